"""The ranking of policies: order, table, agreement with true values, and picture."""

from __future__ import annotations

import math

import pytest

from torchrl_bcq import Estimate
from torchrl_bcq.reports.ranking import BEHAVIOUR, Ranked, agreement, draw, rank, table


def ranked(name: str, value: float, true: float | None = None, **facts) -> Ranked:
    made = {"difference": value - 2, "difference_interval": (value - 3, value - 1), "far": 0.1, **facts}
    estimate = Estimate(value, (value - 1, value + 1), (value,), (0.0, 10.0), 0.0, **made)
    return Ranked(name, estimate, None if true is None else (true, 0.25))


OWN = Ranked(BEHAVIOUR, Estimate(2.0, (1.5, 2.5), (2.0,), (0.0, 10.0), 0.0))
POLICIES = [ranked("low", 3, 1), ranked("nan", math.nan, 9), ranked("high", 7, 6), ranked("middle", 5, 8)]


def test_the_best_estimate_is_first_and_nan_last():
    assert [one.name for one in rank(POLICIES)] == ["high", "middle", "low", "nan"]


def test_policies_that_are_far_from_the_data_come_after_the_others():
    far = [ranked("far", 9, far=0.31), ranked("farther", 10, far=0.9)]
    assert [one.name for one in rank([*far, *POLICIES])] == ["high", "middle", "low", "farther", "far", "nan"]


def test_agreement_with_true_values():
    """The estimates order true values as 6, 8, 1: of three squared rank differences, two are 1."""
    found = agreement([one for one in POLICIES if one.name != "nan"])
    assert found == {"regret": 2, "spearman": pytest.approx(1 - 6 * 2 / (3 * 8))}
    assert agreement([POLICIES[0], POLICIES[2]]) == {"regret": 0}
    assert agreement([*POLICIES[:1], ranked("unknown", 4)]) == agreement(POLICIES[:1]) == {}
    assert agreement([]) == {}


def test_columns_without_numbers_are_left_out():
    header, *rows = table(POLICIES[2:], OWN)
    assert header == ["policy", "estimate", "interval", "difference", "far", "true"]
    assert rows[0] == ["high", "7", "6 to 8", "+5", "10%", "6 ± 0.25"]
    assert rows[-1] == [BEHAVIOUR, "2", "1.5 to 2.5", "-", "-", "-"]
    header, *rows = table([ranked("frames", 3, far=None)], OWN)
    assert header == ["policy", "estimate", "interval", "difference"]


def test_columns_of_discrete_actions():
    others = {"weighted_importance_sampling": (1.25, 1.0, 2.0), "weighted_doubly_robust": (2.5, 2.0, 3.0)}
    header, row, behaviour = table([ranked("discrete", 3, others=others, effective_sample_size=12.34)], OWN)
    cells = dict(zip(header, row, strict=True))
    assert (cells["ESS"], cells["weighted IS"], cells["weighted DR"]) == ("12.3", "1.25", "2.5")
    assert behaviour[-3:] == ["-", "-", "-"]


def test_the_picture():
    figure = draw([ranked("a", 4, 1), ranked("b", 7, 6, difference_interval=(-1.0, 9.0))], OWN)
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["b (?)", "a"]
    assert axes.yaxis_inverted()  # the best is on top
    points = {line.get_label(): line.get_xdata() for line in axes.lines}
    assert list(points["true value, in the environment"]) == [6, 1]
    assert list(points[f"estimate of the {BEHAVIOUR}"]) == [2, 2]
    assert "(?) cannot tell" in axes.get_xlabel()
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert {"estimate", "true value, in the environment", f"estimate of the {BEHAVIOUR}"} == set(labels)


def test_a_picture_without_true_values():
    figure = draw([ranked("a", 4)], OWN)
    assert len(figure.legends[0].get_texts()) == 2
    assert "cannot tell" not in figure.axes[0].get_xlabel()


def test_infinite_intervals_are_not_drawn():
    estimate = Estimate(2.0, (-math.inf, math.inf), (2.0,), (0.0, 10.0), 0.0)
    figure = draw([Ranked("a", estimate), ranked("nan", math.nan)], Ranked(BEHAVIOUR, estimate))
    assert len(figure.axes[0].patches) == 0
    figure.canvas.draw()
