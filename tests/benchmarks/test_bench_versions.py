"""Rounds, ratios and intervals of the comparison of two checkouts, on clocks that the test sets."""

from __future__ import annotations

import importlib
import random
from pathlib import Path

import pytest


@pytest.fixture
def versions(monkeypatch):
    """Import the file as a script does."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    return importlib.import_module("bench_versions")


class Clock:
    """A stopwatch that reads the times it is given, in turn."""

    def __init__(self, *seconds: float, steps: int = 1) -> None:
        self.seconds, self.steps, self.calls = seconds, steps, []

    def calibrate(self, seconds: float) -> int:
        return self.steps

    def time(self, steps: int) -> float:
        self.calls.append(steps)
        return self.seconds[(len(self.calls) - 1) % len(self.seconds)]


def test_ratio_is_the_other_checkouts_time_over_this_ones_in_the_same_round(versions):
    before, now = Clock(2.0, 4.0, 20.0, 40.0, 8.0, 8.0, steps=4), Clock(1.0, 1.0, 10.0, 10.0, 8.0, 8.0, steps=7)
    case = versions.Case(before, now)
    for _ in range(3):
        case.measure()
    assert case.ratios == [3.0, 3.0, 1.0]
    assert before.calls == now.calls == [4] * 6  # the steps that the slower checkout makes in a turn
    assert case.interval() == pytest.approx((9 ** (1 / 3), 1, 3))


def test_the_lowest_and_the_highest_fifth_of_the_ratios_are_left_out(versions):
    case = versions.Case(Clock(1.0), Clock(1.0))
    case.ratios = [0.01, 2.0, 2.0, 16.0, 99.0]
    assert case.interval()[0] == pytest.approx(4)


def test_all_cases_are_measured_until_all_intervals_are_narrow(versions, monkeypatch):
    monkeypatch.setattr(versions, "MIN_ROUNDS", 2 * versions.BLOCK)
    even, uneven = versions.Case(Clock(2.0), Clock(1.0)), versions.Case(Clock(1.0, 1.0, 1.02, 1.02), Clock(1.0))
    results = versions.compare({"uneven": uneven, "even": even}, width=0.005, max_minutes=60)
    assert results["even"]["rounds"] == results["uneven"]["rounds"] > 2 * versions.BLOCK
    assert results["even"] == pytest.approx({"ratio": 2, "low": 2, "high": 2, "rounds": len(even.ratios)})
    assert results["uneven"]["high"] - results["uneven"]["low"] < 0.005


def test_it_ends_when_the_time_is_up(versions, monkeypatch):
    now = iter(range(100))  # a second passes each time that the deadline is checked
    monkeypatch.setattr(versions.time, "monotonic", lambda: next(now))
    uneven = versions.Case(Clock(1.0, 1.0, 2.0, 2.0), Clock(1.0))
    results = versions.compare({"uneven": uneven}, width=0.03, max_minutes=10.5 / 60)
    assert results["uneven"]["rounds"] == 11 * versions.BLOCK
    assert results["uneven"]["high"] - results["uneven"]["low"] >= 0.03


def test_every_case_is_measured_once_when_there_is_no_time(versions):
    cases = {name: versions.Case(Clock(1.0), Clock(1.0)) for name in "ab"}
    assert {name: one["rounds"] for name, one in versions.compare(cases, 0.03, 0).items()} == {
        "a": versions.BLOCK,
        "b": versions.BLOCK,
    }


def test_each_round_runs_in_a_random_order_and_in_reverse(versions):
    order = []

    class Named(Clock):
        def time(self, steps: int) -> float:
            order.append(self)
            return super().time(steps)

    random.seed(0)
    case = versions.Case(first := Named(1.0), second := Named(1.0))
    for _ in range(20):
        case.measure()
    rounds = {tuple(map(id, order[start : start + 4])) for start in range(0, len(order), 4)}
    a, b = id(first), id(second)
    assert rounds == {(a, b, b, a), (b, a, a, b)}


def test_another_checkout_than_the_one_asked_for_is_refused(versions, tmp_path, monkeypatch):
    monkeypatch.setattr(versions.sys, "path", [*versions.sys.path])
    with pytest.raises(ImportError, match=f"expected {tmp_path}"):
        versions.import_from(tmp_path)
