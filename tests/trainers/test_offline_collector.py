from __future__ import annotations

import pytest

from torchrl_bcq import OfflineCollector


def test_ticks_add_up_to_the_steps_and_the_last_is_shorter():
    ticks = list(OfflineCollector(25, 10))
    assert [tick.numel() for tick in ticks] == [10, 10, 5]
    assert all(not list(tick.keys()) for tick in ticks)


def test_goes_on_where_a_state_dict_was_taken():
    first = OfflineCollector(25, 10)
    next(iter(first))
    second = OfflineCollector(25, 10)
    second.load_state_dict(first.state_dict())
    assert [tick.numel() for tick in second] == [10, 5]
    assert list(second) == []  # a finished run makes no further step


@pytest.mark.parametrize(
    ("start", "ticks"), [(0, [10, 10, 5]), (7, [3, 10, 5]), (10, [10, 5]), (19, [1, 5]), (22, [3]), (25, [])]
)
def test_ticks_end_at_multiples_wherever_they_begin(start, ticks):
    collector = OfflineCollector(25, 10)
    collector.load_state_dict({"steps": start})
    assert [tick.numel() for tick in collector] == ticks


def test_steps_that_were_not_made_are_handed_out_again():
    """Of the second tick 4 of 10 steps were made: 14, then on to 20."""
    collector = OfflineCollector(25, 10)
    ticks = iter(collector)
    next(ticks)
    next(ticks)
    collector.take_back(6)
    assert collector.state_dict() == {"steps": 14}
    assert [tick.numel() for tick in collector] == [6, 5]


@pytest.mark.parametrize("numbers", [(0, 1), (1, 0), (-5, 10)])
def test_numbers_below_one_are_refused(numbers):
    with pytest.raises(ValueError, match="both must be at least 1"):
        OfflineCollector(*numbers)
