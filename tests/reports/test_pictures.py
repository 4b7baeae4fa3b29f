"""The lines, labels and axes of the pictures."""

from __future__ import annotations

import numpy as np
import pytest

from torchrl_bcq.reports.curves import make_curve
from torchrl_bcq.reports.logs import group_runs
from torchrl_bcq.reports.pictures import Style, draw_losses, draw_metric, draw_runs, draw_values, metric_label

from .conftest import RETURNS, curve_of, find, legend_of


def test_learning_curve_shows_lines_seeds_and_the_dataset(seeds, make_run):
    other = make_run("other", {"dataset": "minari:walks"}, **{"return": {100: 5.0, 200: 5.5}})
    groups = group_runs(find([seeds, other]))
    curves = [make_curve(group, "return") for group in groups]
    style = Style("a title", [group.label for group in groups])
    assert legend_of(draw_metric(curves[1:], {}, style)) == ["dataset=minari:walks (1 seed)"]
    figure = draw_metric(curves, {-3.0: groups[0].label}, style)
    assert legend_of(figure) == [
        "dataset=minari:swings (3 seeds)", "dataset=minari:walks (1 seed)", "mean return of the dataset",
    ]  # fmt: skip
    assert figure.legends[0].get_title().get_text() == (
        "line: mean over seeds, band: its 95 % confidence interval, thin lines: single seeds"
    )
    (axes,) = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("gradient steps", "return per episode (undiscounted)")
    assert [list(line.get_ydata()) for line in axes.lines] == [
        *map(list, RETURNS), [3.0, 40.0], [5.0, 5.5], [-3.0, -3.0],
    ]  # fmt: skip
    assert axes.lines[-1].get_linestyle() == "--"
    both = draw_metric(curves, {-3.0: groups[0].label, 4.0: groups[1].label}, style)
    assert legend_of(both)[2:] == [
        "dataset=minari:swings: mean return of the dataset", "dataset=minari:walks: mean return of the dataset",
    ]  # fmt: skip
    np.testing.assert_array_equal(axes.collections[0].get_paths()[0].vertices[1:3, 1], curves[0].band[0])


def test_values_that_diverge_do_not_hide_the_returns(make_run):
    run = make_run("run", {"phi": 0}, value_estimate={1: 3.0, 2: 149.0}, discounted_return={1: 3.0, 2: 2.0})
    worse = make_run("worse", {"phi": 1}, value_estimate={1: 3.0, 2: 151.0}, discounted_return={1: 3.0, 2: 2.0})
    for folder, scale in ((run, "linear"), (worse, "symlog")):
        curves = [curve_of([folder], name) for name in ("value_estimate", "discounted_return")]
        figure = draw_values(curves[:1], curves[1:], Style("", [curves[0].label]))
        assert figure.axes[0].get_yscale() == scale
        assert legend_of(figure) == ["critic's value (1 seed)", "discounted return obtained (1 seed)"]
    groups = group_runs(find([run, worse]))
    both = [[make_curve(g, name) for g in groups] for name in ("value_estimate", "discounted_return")]
    assert legend_of(draw_values(*both, Style("", [group.label for group in groups]))) == [
        "phi=0: critic's value (1 seed)", "phi=1: critic's value (1 seed)",
        "phi=0: discounted return obtained (1 seed)", "phi=1: discounted return obtained (1 seed)",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "changed"), [({}, False), ({"reward.scale": 0.1}, True), ({"reward.clip": 5}, True)]
)
def test_values_of_changed_rewards_say_so(make_run, settings, changed):
    run = make_run(
        "run", settings, **{"return": {1: 3.0}}, value_estimate={1: 3.0}, discounted_return={1: 2.0}, td_error={1: 1.0}
    )
    note = "\n(with the changed rewards of training)" * changed
    figures = draw_runs(find([run]), "return")
    assert figures["learning_curve.png"].axes[0].get_ylabel() == "return per episode (undiscounted)"
    value = figures["value_estimates.png"].axes[0].get_ylabel()
    assert value == f"discounted value at the start of an episode{note}"
    figures = draw_runs(find([run]), "td_error")
    assert figures["learning_curve.png"].axes[0].get_ylabel() == f"absolute TD error{note}"


def test_losses_are_logarithmic_where_positive(make_run):
    losses = {"loss_first": {1: 1.0, 2: 0.1}, "loss_two_words": {1: 1.0, 2: -9.0}, "td_error": {1: 0.3, 2: 0.2}}
    run = make_run("run", **losses)
    figure = draw_losses([[curve_of([run], name)] for name in losses], Style("", ["minari:swings"]))
    assert [axes.get_title() for axes in figure.axes] == ["first loss", "two words loss", "absolute TD error"]
    assert [axes.get_yscale() for axes in figure.axes] == ["log", "linear", "linear"]  # the last changes too little


@pytest.mark.parametrize(
    ("metric", "label"),
    [
        ("held_out_loss_x", "x loss, held-out episodes"),
        ("held_out_td_error", "absolute TD error, held-out episodes"),
        ("held_out_kl_divergence", "kl divergence, held-out episodes"),
        ("action_distance", "action distance"),
        ("return", "return per episode (undiscounted)"),
    ],
)
def test_labels_follow_from_the_names_of_metrics(metric, label):
    assert metric_label(metric) == label


@pytest.mark.parametrize("count", [2, 6, 9])
def test_groups_have_different_colors(count):
    style = Style("", [str(index) for index in range(count)])
    assert len({style.color(label) for label in style.labels}) == count
