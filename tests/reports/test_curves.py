"""The numbers of a curve: the statistic over seeds and its interval."""

from __future__ import annotations

import itertools

import numpy as np
import torch

from torchrl_bcq.reports.curves import interval, make_curve, warn
from torchrl_bcq.reports.logs import group_runs

from .conftest import RETURNS, curve_of, find


def test_mean_and_middle_half_by_hand(seeds, make_run):
    curve = curve_of([seeds])
    assert curve.steps.tolist() == [100, 200]
    assert curve.seeds.tolist() == [list(values) for values in RETURNS]
    assert curve.center.tolist() == [3.0, 40.0]
    assert curve_of([seeds], statistic="iqm").center.tolist() == [3.0, 40.0]  # of three, none is cut
    fourth = make_run("fourth", seed=3, **{"return": {100: 100.0, 200: 20.0}})
    assert curve_of([seeds, fourth], statistic="iqm").center.tolist() == [4.0, 30.0]  # (2 + 6) / 2, (20 + 40) / 2


def test_band_covers_all_resamples_but_the_tails():
    """Of three seeds there are 27 resamples, equally likely; the band is between quantiles of their means."""
    band = interval(np.array(RETURNS), confidence=0.8, resamples=50_000)
    for step in range(2):
        column = [values[step] for values in RETURNS]
        means = [np.mean(resample) for resample in itertools.product(column, repeat=3)]
        low, high = np.quantile(means, [0.1, 0.9], method="inverted_cdf")
        np.testing.assert_allclose(band[:, step], [low, high], rtol=1e-12)


def test_band_of_the_middle_half_against_another_bootstrap():
    """Of many seeds, against resamples of our own, by an interquartile mean of our own."""
    seeds = np.random.default_rng(1).gamma(1.0, size=(40, 1))
    low, high = interval(seeds, "iqm", confidence=0.9, resamples=20_000)
    drawn = torch.randint(40, (20_000, 40), generator=torch.Generator().manual_seed(0))
    middle = torch.from_numpy(seeds[:, 0])[drawn].sort(-1).values[:, 10:30].mean(-1)
    expected = middle.quantile(torch.tensor([0.05, 0.95], dtype=torch.float64))
    np.testing.assert_allclose([low[0], high[0]], expected, atol=0.01)  # random states differ by 0.005
    assert high[0] - low[0] > 0.5


def test_band_is_the_same_for_each_call():
    seeds = np.random.default_rng(0).normal(size=(5, 7))
    np.testing.assert_array_equal(interval(seeds), interval(seeds))


def test_one_seed_has_no_band(seeds):
    curve = curve_of([seeds / "1"])
    assert curve.band is None
    assert curve.center.tolist() == [2.0, 40.0]


def test_only_steps_that_all_seeds_have_are_used(seeds, make_run, caplog):
    killed = make_run("killed", seed=3, **{"return": {50: 0.0, 100: 7.0}})
    crashed = make_run("crashed", seed=4, **{"return": "10"})
    curve = curve_of([seeds, killed, crashed])
    assert (curve.steps.tolist(), curve.seeds.tolist(), curve.left_out) == ([100], [[1.0], [2.0], [6.0], [7.0]], 2)
    warn(group_runs(find([seeds, killed, crashed])), [curve])
    assert caplog.messages == [
        "minari:swings: steps that only some runs logged are left out: 2 of 3 for return.",
        f"{crashed} has not logged return; the curves show the other runs only.",
    ]


def test_a_group_is_asked_for_the_first_metric_and_for_its_own(make_run, caplog):
    one = make_run("one", loss_a={1: 1.0}, loss_b={1: 1.0})
    two = make_run("two", seed=1, loss_a={1: 1.0})
    other = make_run("other", {"algorithm": "other"}, loss_c={1: 1.0})
    groups = group_runs(find([one, two, other]))
    curves = [
        curve for name in ("loss_a", "loss_b", "loss_c") for group in groups if (curve := make_curve(group, name))
    ]
    warn(groups, curves)
    assert caplog.messages == [
        f"{two} has not logged loss_b; the curves show the other runs only.",
        f"{other} has not logged loss_a; the curves show the other runs only.",
    ]


def test_what_is_not_finite_leaves_a_gap(seeds, make_run, caplog):
    broken = make_run("broken", seed=3, **{"return": {100: float("nan"), 200: 80.0}})
    curve = curve_of([seeds, broken])
    np.testing.assert_array_equal(curve.center, [np.nan, 50.0])
    np.testing.assert_array_equal(np.isnan(curve.band), [[True, False]] * 2)
    warn(group_runs(find([seeds, broken])), [curve])
    assert caplog.messages == ["minari:swings: curves have gaps at steps whose values are not finite: 1 for return."]
