"""Batches of OfflineCollector: how many gradient steps each one asks for."""

from __future__ import annotations

import pytest

from torchrl_bcq import OfflineCollector


def test_batches_add_up_to_the_steps_and_the_last_is_shorter():
    batches = list(OfflineCollector(25, 10))
    assert [batch.numel() for batch in batches] == [10, 10, 5]
    assert all(not list(batch.keys()) for batch in batches)


def test_state_dict_holds_the_step():
    first = OfflineCollector(25, 10)
    next(iter(first))
    second = OfflineCollector(25, 10)
    second.load_state_dict(first.state_dict())
    assert [batch.numel() for batch in second] == [10, 5]
    assert list(second) == []  # a finished run makes no further step


@pytest.mark.parametrize(
    ("start", "batches"), [(0, [10, 10, 5]), (7, [3, 10, 5]), (10, [10, 5]), (19, [1, 5]), (22, [3]), (25, [])]
)
def test_batches_end_at_multiples_wherever_they_begin(start, batches):
    collector = OfflineCollector(25, 10)
    collector.load_state_dict({"steps": start})
    assert [batch.numel() for batch in collector] == batches


def test_steps_that_are_taken_back_are_asked_for_again():
    """Of the second batch 4 of 10 steps were made: 14 in all, and 6 are left to 20."""
    collector = OfflineCollector(25, 10)
    batches = iter(collector)
    next(batches)
    next(batches)
    collector.take_back(6)
    assert collector.state_dict() == {"steps": 14}
    assert [batch.numel() for batch in collector] == [6, 5]


@pytest.mark.parametrize("numbers", [(0, 1), (1, 0), (-5, 10)])
def test_numbers_below_one_are_refused(numbers):
    with pytest.raises(ValueError, match="both must be at least 1"):
        OfflineCollector(*numbers)
