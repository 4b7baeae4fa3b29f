"""One defect of the steps at a time in a healthy dataset, and the whole message that it gives."""

from __future__ import annotations

import re

import pytest
import torch
from torchrl.data import Bounded, Unbounded

from torchrl_bcq import DatasetError, describe, from_arrays, multi_step

from .conftest import LAST, LENGTHS, ROWS, SPEC, healthy, messages


@pytest.mark.parametrize("spec", [None, SPEC])
def test_healthy_data_gives_none(data, spec):
    assert messages(data, spec) == []


def test_no_observation(data):
    del data["observation"]
    del data["next", "observation"]
    assert messages(data)[0] == (
        "observations are missing in all 1212 rows (first: 0); add them under any key, because a policy needs them."
    )


def test_all_rows_terminal(data):
    data["next", "terminated"][:] = True
    data["next", "truncated"][:] = False
    data["next", "done"][:] = True
    del data["episode"]
    assert messages(data) == [
        "terminated is set in all 1212 rows (first: 0), so each target is the reward alone; set terminated only "
        "where an episode ended in a final state, and truncated where a time limit ended it."
    ]


@pytest.mark.parametrize("numbered", [True, False])
def test_no_flag_at_all(numbered):
    data = healthy(LENGTHS if numbered else torch.tensor([ROWS]))
    for flag in ("done", "terminated", "truncated"):
        data["next", flag].zero_()
    what = "although there are 12 episodes" if numbered else "so all rows are one endless episode"
    assert messages(data) == [
        f"terminated and truncated are set in none of 1212 rows (first: 0), {what}; this is right if only time limits "
        "ended the episodes, otherwise set terminated where an episode ended in a final state."
    ]


def test_both_flags(data):
    data["next", "terminated"][LAST] = True
    assert messages(data) == [
        "terminated and truncated are both set in 6 rows (first: 89); clear terminated where a time limit ended the "
        "episode."
    ]


def test_done_without_a_reason(data):
    data["next", "truncated"][LAST[0]] = False
    assert messages(data) == [
        "done is set in 1 row (first: 89) where neither terminated nor truncated is set, so targets use the value of "
        "the next observation; set terminated where the state was final, and truncated where a time limit ended the "
        "episode."
    ]


def test_done_inside_an_episode(data):
    data["next", "done"][5] = data["next", "truncated"][5] = True
    assert messages(data) == [
        "done is set in 1 row (first: 5) although the next row has the same episode number; if torch.cat joined "
        "datasets, use load_transitions([A, B]) or from_rollouts([a, b]) instead; otherwise correct the flags or "
        "numbers."
    ]


def test_an_episode_that_comes_back(data):
    data["episode"][LAST[1] + 1 : LAST[2] + 1] = 0  # the third, of 94 rows from row 182
    assert messages(data) == [
        "episode has 94 rows (first: 182) with the number of an earlier episode; if torch.cat joined datasets, use "
        "load_transitions([A, B]) or from_rollouts([a, b]) instead; otherwise store all rows of an episode together."
    ]


def test_an_episode_that_comes_back_last_without_a_flag(data):
    data["episode"][LAST[10] + 1 :] = 0  # the twelfth, of 112 rows from row 1100
    data["next", "done"][-1] = data["next", "terminated"][-1] = False
    assert messages(data) == [
        "episode has 112 rows (first: 1100) with the number of an earlier episode; if torch.cat joined datasets, use "
        "load_transitions([A, B]) or from_rollouts([a, b]) instead; otherwise store all rows of an episode together."
    ]


def test_episodes_of_one_row(data):
    data["episode"] = torch.arange(ROWS)
    data["next", "observation"] += 1
    assert messages(data) == [
        "each of 1212 rows (first: 0) is an episode of its own; check the flags or the entry episode."
    ]


def test_a_time_limit_recorded_as_terminal():
    data = healthy(torch.full((12,), 101))
    data["next", "terminated"].copy_(data["next", "done"])
    data["next", "truncated"].zero_()
    assert messages(data) == [
        "terminated is set in 12 rows (first: 100) that end episodes after 101 steps, the greatest length, so a time "
        "limit may have ended them; if so, set truncated instead, because targets use no next value where terminated "
        "is set."
    ]


def test_observations_that_do_not_continue(data):
    data["observation"][[10, 20]] += 1  # so those of rows 9 and 19 don't go on
    assert messages(data) == [
        "next_observations differs from the observation of the next row of the same episode in 2 rows (first: 9); "
        "if the rows of several environments alternate, sort them by environment, then by time; unless rows were "
        "left out or shuffled, leave this field out, then the observation of the next row is used."
    ]


def test_next_observations_that_are_not_shifted(data):
    data["next", "observation"].copy_(data["observation"])  # six rows are terminated
    assert messages(data) == [
        "next_observations equals the observation of the same row in 1206 rows (first: 0), so it was probably stored "
        "without the shift by one step; leave this field out, then the observation of the next row is used."
    ]


def test_next_observations_beyond_a_reset(data):
    data["next", "observation"][LAST[:-1]] = data["observation"][LAST[:-1] + 1]  # 6 truncated, 5 terminated
    assert messages(data) == [
        "next_observations holds the first observation of the next episode in 6 rows (first: 89) where an episode "
        "ends, but terminated is not set; if the environment was reset there, drop these rows, or store the last "
        "observation before the reset; vector environments of Gymnasium reset in the row after an end, so drop that "
        "row instead."
    ]


def walks(shift: int, *, episodes: int = 40, steps: int = 50, width: int = 3, noise: float = 0.0):
    """Random walks from random states without next observations; time-outs are recorded ``shift`` rows late."""
    random = torch.Generator().manual_seed(1)
    start = 10 * torch.randn(episodes, 1, width, generator=random)
    walk = start + torch.randn(episodes, steps, width, generator=random).cumsum(1) / 10
    walk += noise * torch.randn(walk.shape, generator=random)
    n = episodes * steps
    cut = (torch.arange(n) - shift) % steps == steps - 1
    cut[0] = False
    return from_arrays(
        walk.flatten(0, 1),
        torch.rand(n, 2, generator=random) * 1.8 - 0.9,
        torch.randn(n, generator=random),
        terminated=torch.arange(n) == n - 1,
        truncated=cut & (torch.arange(n) < n - 1),
    )


def test_ends_of_episodes_that_are_one_row_too_late():
    """The row after each of the first 39 ends is dropped, so row 49 is followed by an observation of the next walk."""
    assert messages(walks(1)) == [
        "next_observations jumps in 39 rows (first: 49) that end an episode without terminated: the next observation "
        "is close to the next row and far from its own row, so the episodes probably end one row too late; set "
        "truncated one row earlier."
    ]


def test_ends_of_episodes_that_are_one_row_too_early():
    """Row 48 of 50 is dropped, so row 48 of the rest is the last one of the first walk."""
    assert messages(walks(-1)) == [
        "next_observations jumps in 39 rows (first: 48) that start an episode: the observation is close to the row "
        "before and far from its next observation, so the episodes probably end one row too early; set truncated one "
        "row later."
    ]


@pytest.mark.parametrize("width", [1, 3, 60])
@pytest.mark.parametrize("noise", [0, 1, 100])
def test_resets_and_noise_are_no_jumps(width, noise):
    assert messages(walks(0, width=width, noise=noise)) == []
    assert len(messages(walks(1, width=width))) == 1


def test_constant_goals_in_an_episode():
    """A goal changes only between episodes; of 40 walks, 39 are followed by another goal."""
    for shift, count in ((0, 0), (1, 1), (-1, 1)):
        data = walks(shift)
        goal = torch.randn(40, generator=torch.Generator().manual_seed(2)).repeat_interleave(50)
        rows = torch.arange(2000)
        cut = ((rows - shift) % 50 == 49) & (rows > 0) & (rows < 1999)
        following = torch.where(rows < 1999, goal.roll(-1), goal)
        for entry, column in ((data, goal), (data["next"], following)):
            entry["observation"] = torch.cat([entry["observation"], column[~cut, None]], 1)
        assert len(messages(data)) == count


def test_repeated_rows(data):
    data = torch.cat([data, data[: LAST[0] + 1]])
    data["episode"][ROWS:] = 12
    assert messages(data) == [
        "transitions has 90 rows (first: 1212) that repeat earlier rows; drop them, unless there are few states and "
        "actions."
    ]


def test_few_rows():
    assert messages(healthy(torch.tensor([50, 60]))) == [
        "transitions has only 110 rows (first: 0), fewer than 1000; record more data, because networks overfit few "
        "rows."
    ]


def test_what_cannot_be_described(data):
    with pytest.raises(ValueError, match=r"action_spec has shape \(1, 2\), expected \[A\]"):
        describe(data, action_spec=Unbounded((1, 2)))
    with pytest.raises(ValueError, match="actions have 2 columns, but the action bounds have shape"):
        describe(data, action_spec=Bounded(-1, 1, (3,)))
    message = (
        "transitions span up to 3 steps (steps_to_next_obs), so the rewards are sums and the next observations are "
        "several steps later; describe the one-step transitions from which they were made."
    )
    with pytest.raises(DatasetError, match=f"^{re.escape(message)}$"):
        describe(multi_step(data, 3, 0.99))
    assert describe(multi_step(data, 1, 0.99)).findings == []
    with pytest.raises(ValueError, match=r"transitions have batch size \(0,\), expected \[N\] with N at least 1"):
        describe(data[:0])
    data.rename_key_("action", "torque")
    with pytest.raises(
        ValueError, match=r"transitions lack \['action'\]; they have .*torque.*Rename your entries with"
    ):
        describe(data)
