"""The verdict about an estimate, and bootstrap intervals."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from torchrl_bcq import Estimate
from torchrl_bcq.evaluation.estimate import bootstrap_interval

NOT_COVERED = "which does not cover the bias of the estimate"
BETTER = Estimate(
    value=7.0,
    interval=(6.0, 8.0),
    critics=(6.5, 7.5),
    limits=(0.0, 10.0),
    residual=0.1,
    difference=2.0,
    difference_interval=(1.0, 3.0),
    far=0.06,
    effective_sample_size=3.0,
)


def test_better_and_worse():
    assert BETTER.verdict == f"estimated better: difference +2, interval +1 to +3, {NOT_COVERED}"
    worse = replace(BETTER, difference=-2.0, difference_interval=(-3.0, -1.0))
    assert worse.verdict == f"estimated worse: difference -2, interval -3 to -1, {NOT_COVERED}"


def test_the_recorded_behaviour_gets_no_verdict():
    assert replace(BETTER, difference=None, difference_interval=None).verdict == "the recorded behaviour"


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (
            {"critics": (6.5, 11.5)},
            "the critics diverge: the estimate of one critic is 11.5, but the rewards of the dataset allow only",
        ),
        ({"critics": (6.5, -1.5)}, "the critics diverge: the estimate of one critic is -1.5, but"),
        ({"critics": (np.nan, 7.0)}, "the critics diverge: the estimate of one critic is nan, but"),
        (
            {"residual": -2.0},
            "corresponds to an error of 2 in the value, which is not below the difference, 2",
        ),
        ({"residual": np.nan}, "mean TD error corresponds to an error of nan in the value"),
        ({"behaviour_residual": 2.5}, "mean TD error corresponds to an error of 2.5 in the value"),
        ({"behaviour_residual": np.nan}, "mean TD error corresponds to an error of nan in the value"),
        (
            {"value": 12.0, "uses_critics": False},
            "the estimate is 12, but the rewards of the dataset allow only values from 0 to 10",
        ),
        ({"value": np.inf, "uses_critics": False}, "the estimate is inf, but the rewards"),
        ({"uses_weights": True, "effective_sample_size": np.nan}, "the effective sample size is nan episodes"),
        ({"far": 0.6}, "60% of the policy's actions are far from the recorded actions"),
        ({"difference_interval": (-0.5, 3.0)}, "the interval of the difference, -0.5 to +3, includes 0"),
        ({"difference_interval": (-np.inf, np.inf)}, "the interval of the difference, -inf to +inf, includes 0"),
        ({"difference_interval": (np.nan, np.nan)}, "includes 0"),
        ({"uses_weights": True}, "the effective sample size is 3.0 episodes, but a verdict needs at least 10"),
    ],
)
def test_reasons_why_it_cannot_tell(changed, reason):
    estimate = replace(BETTER, **changed)
    assert len(estimate.doubts) == 1
    assert estimate.verdict == f"cannot tell: {estimate.doubts[0]}"
    assert reason in estimate.verdict


def test_objections():
    """They say that the value may be wrong, and not that the policy may be equal to the recorded behaviour."""
    assert replace(BETTER, difference_interval=(-1.0, 3.0), residual=5.0).objections == []
    assert len(replace(BETTER, far=0.31, critics=(99.0,)).objections) == 2


@pytest.mark.parametrize(
    "changed",
    [
        {"far": 0.3},
        {"critics": (6.5, 10.5)},  # within a tenth of the range
        {"far": None},
        {"uses_weights": True, "effective_sample_size": 10.0},
        {
            "uses_weights": True,
            "effective_sample_size": 20.0,
            "uses_critics": False,
            "critics": (99.0,),
            "residual": 9.0,
        },
    ],
)
def test_no_reason(changed):
    assert replace(BETTER, **changed).doubts == []


def test_the_interval_of_a_mean():
    """The mean of n numbers has the standard error s / sqrt(n), and 1.96 of it are on each side."""
    values = np.random.default_rng(0).normal(3, 2, (400, 1))
    low, high = bootstrap_interval(lambda drawn: values[drawn].mean(0), 400)
    half = 1.96 * values.std() / 20
    assert low[0] == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high[0] == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_groups_are_drawn_whole():
    """Two groups with the values 0 and 1: a draw has the mean 0, 0.5 or 1, and each end occurs in a quarter."""
    groups = np.array([5, 5, 5, 9])
    values = np.array([[0.0], [0.0], [0.0], [1.0]])
    seen = set()

    def statistic(drawn):
        seen.add(tuple(sorted(drawn.tolist())))
        return values[drawn].mean(0)

    low, high = bootstrap_interval(statistic, 4, groups)
    assert seen == {(0, 0, 1, 1, 2, 2), (0, 1, 2, 3), (3, 3)}
    assert (low[0], high[0]) == (0, 1)


@pytest.mark.parametrize("groups", [None, np.array([1, 1, 1])])
def test_one_episode_or_one_group_has_no_interval(groups):
    low, high = bootstrap_interval(lambda drawn: np.array([1.0]), 1 if groups is None else 3, groups)
    assert (low[0], high[0]) == (-np.inf, np.inf)


def test_the_seed_decides():
    values = np.arange(9.0)[:, None]
    ends = [bootstrap_interval(lambda drawn: values[drawn].mean(0), 9, seed=seed)[0][0] for seed in (0, 0, 1)]
    assert ends[0] == ends[1] != ends[2]
