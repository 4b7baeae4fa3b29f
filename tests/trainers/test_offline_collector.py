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


@pytest.mark.parametrize("numbers", [(0, 1), (1, 0), (-5, 10)])
def test_numbers_below_one_are_refused(numbers):
    with pytest.raises(ValueError, match="both must be at least 1"):
        OfflineCollector(*numbers)
