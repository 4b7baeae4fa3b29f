"""One defect of the values at a time in a healthy dataset, and the whole message that it gives."""

from __future__ import annotations

import pytest
import torch
from torchrl.data import Bounded

from torchrl_bcq import describe
from torchrl_bcq.reports.description import fields as fields_module

from .conftest import LAST, LENGTHS, ROWS, SPEC, messages


def both(data, rows, column, value):
    """Set a column of the observations, and of the next ones."""
    data["observation"][rows, column] = value
    data["next", "observation"][rows, column] = value


@pytest.mark.parametrize("key", ["observation", "action", ("next", "observation"), ("next", "reward")])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_that_are_not_finite(data, key, value):
    data[key][[7, 30], 0] = value
    name = {"observation": "observations", "action": "actions"}.get(key) or f"next_{key[1]}s"
    name = "rewards" if name == "next_rewards" else name
    (finding,) = describe(data).findings
    assert str(finding) == f"{name} has 2 rows (first: 7) that are not finite; drop or repair these rows."
    assert (finding.field, finding.rows, finding.first) == (name, 2, 7)


def test_zero_observations(data):
    both(data, slice(None), slice(None), data["observation"])
    data["observation"][LAST[:1] - LENGTHS[:1] + 1] = 0  # the first row of an episode follows none
    data["observation"][6, 1] = data["next", "observation"][5, 1] = 0  # one number of a row may be zero
    assert messages(data)[0] == (
        "observations has only zeros in 1 row (first: 0); drop these rows, unless zero is a valid state of the task."
    )


def test_zeroed_successors_matter_only_where_they_are_used(data):
    data["next", "observation"][LAST] = 0  # six terminate
    assert messages(data) == [
        "next_observations has only zeros in 6 rows (first: 89) where terminated is not set; drop these rows, or store "
        "the true next observation."
    ]


def test_rewards_without_a_difference(data):
    data["next", "reward"][:] = 0
    text = "in all 1212 rows (first: 0), so no action is better than another; check the recording."
    assert messages(data) == [f"rewards is 0 {text}"]
    data["next", "reward"][:] = -1
    assert messages(data) == []  # time to a goal
    data["next", "terminated"][:], data["next", "truncated"][:] = False, data["next", "done"]
    assert messages(data) == [f"rewards is -1 {text}"]


def test_huge_rewards(data):
    data["next", "reward"][[12, 40]] = -1e6
    assert messages(data) == [
        "rewards has 2 rows (first: 12) of magnitude above 100000; check the units, or scale the values with "
        "Normalization.fit."
    ]


def test_an_outlier_among_rewards_but_no_bonus_at_the_end(data):
    data["next", "reward"][LAST[1]] = 5000
    assert messages(data) == []
    data["next", "reward"][40] = 5000
    assert messages(data) == [
        "rewards has 1 row (first: 40) inside an episode with more than 1000 times the magnitude of 99% of all "
        "rewards; drop these rows, unless the task gives such rewards."
    ]


def test_constant_action(data):
    data["action"][:, 1] = 0.5
    assert messages(data) == ["actions is constant in column 1, in all 1212 rows (first: 0); check the recording."]


def test_actions_of_whole_numbers(data):
    data["action"].copy_((data["action"] * 10).round())
    assert messages(data, Bounded(-10, 10, (2,))) == [
        "actions has only whole numbers in all 1212 rows (first: 0), from -9 to 9; this is normal for bang-bang "
        "control, otherwise the actions are rounded, or they are discrete: then pass action_type='discrete' to the "
        "reader."
    ]


def test_the_same_action_twice(data):
    data["action"][:, 1] = data["action"][:, 0]
    assert messages(data) == [
        "actions has equal values in columns 0 and 1, in all 1212 rows (first: 0); check that each column was recorded."
    ]


def test_actions_outside_the_spec(data):
    data["action"][[3, 4], 1] = torch.tensor([1.5, -7.0])
    assert messages(data) == [
        "actions has 2 rows (first: 3) outside the action bounds, such as 1.5 in column 1, where the bounds are -1 to "
        "1; clip or rescale the actions."
    ]


@pytest.mark.parametrize(
    ("spec", "bound"), [(SPEC, "a bound of the action spec"), (None, "the smallest or largest value")]
)
def test_actions_at_the_bounds(data, spec, bound):
    data["action"][2:800, 0] = 1
    data["action"][800, 0] = -1
    assert messages(data, spec) == [
        f"actions has 799 rows (first: 2) at {bound} in column 0; this is normal for bang-bang control, otherwise "
        "check whether the actions were clipped or scaled wrongly."
    ]


def test_actions_of_other_units(data):
    data["action"][5], data["action"][6] = 1.0, -1.0
    assert messages(data, Bounded(-100, 100, (2,))) == [
        "actions spans only -1 to 1 in columns 0, 1, in all 1212 rows (first: 0), but the action bounds are -100 to "
        "100; if the actions are normalised, scale them to the units of the spec."
    ]


def test_actions_are_compared_with_the_spec_in_float32(data):
    data["action"] = data["action"].double() / 2
    data["action"][[5, 6], 0] = torch.tensor([0.7, -0.7], dtype=torch.float64)  # 0.69999999 in float32
    assert messages(data, Bounded(-0.7, 0.7, (2,))) == []


def test_integer_observations_that_are_zero(data):
    data["observation"] = data["next", "observation"] = torch.zeros(ROWS, 3, dtype=torch.int64)
    assert messages(data) == [
        "observations is constant in columns 0, 1, 2, in all 1212 rows (first: 0); check the recording."
    ]


def test_a_zero_among_integers_and_a_switch_that_stays_are_usual(data):
    random = torch.Generator().manual_seed(1)
    cells, switch = torch.randint(0, 4, (ROWS + 1, 2), generator=random), torch.zeros(ROWS + 1, 1, dtype=torch.bool)
    switch[LAST - 40] = True
    for part, rows in ((data, slice(None, -1)), (data["next"], slice(1, None))):
        part["cells"], part["switch"] = cells[rows].clone(), switch[rows].clone()
    data["next", "cells"][LAST] = 4 - data["next", "cells"][LAST]  # not where the next episode begins
    data["next", "cells"][LAST[0], 0] += 1
    assert (data["cells"] == 0).all(1).any()
    assert messages(data) == []


@pytest.mark.parametrize("chunk_bytes", [fields_module.CHUNK_BYTES, 1000])
@pytest.mark.parametrize("value", [-9999.0, 999.0])
def test_a_value_that_stands_for_a_missing_one(data, monkeypatch, chunk_bytes, value):
    monkeypatch.setattr(fields_module, "CHUNK_BYTES", chunk_bytes)
    for observation in (data["observation"], data["next", "observation"]):
        observation[:, 1] = 80 + 19 * torch.sin(observation[:, 1])
    data["observation"][[5, 6], 1] = data["next", "observation"][[4, 5], 1] = torch.tensor([60.0, 100])
    assert messages(data) == []
    data["observation"][[17, 30, 31], 1] = data["next", "observation"][[16, 29, 30], 1] = value
    assert messages(data) == [
        f"observations has 3 rows (first: 17) far from all others, such as {value:g} in column 1, where the others "
        "span "
        "60 to 100; if such values mark missing data, drop or repair these rows."
    ]


def test_values_for_missing_ones_on_both_sides(data):
    for observation in (data["observation"], data["next", "observation"]):
        observation[:, :2].clamp_(-2, 2)
    data["observation"][[20, 40], [1, 0]] = data["next", "observation"][[19, 39], [1, 0]] = torch.tensor([-500.0, 500])
    data["observation"][30, 0] = data["next", "observation"][29, 0] = -400
    assert messages(data) == [
        "observations has 3 rows (first: 20) far from all others, such as -400 in column 0, where the others span -2 "
        "to 2; if such values mark missing data, drop or repair these rows."
    ]


def test_rare_and_large_values_that_belong_to_the_task(data):
    noise = torch.randn(ROWS + 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    touch = (noise > 2.3).double()  # in one row of a hundred
    force = torch.where(noise > 2, noise.pow(5), 1e-3 * noise)
    spike = noise.clamp(-2, 2)
    spike[5] = 41  # ten times their range is 40, from 2 on
    columns = torch.stack([touch, force, spike], 1)
    data["observation"], data["next", "observation"] = columns[:-1].clone(), columns[1:].clone()
    data["next", "observation"][LAST] += 0.5
    assert not [message for message in messages(data) if "far from" in message]
    data["observation"][5, 2] = 43
    assert [message for message in messages(data) if "far from" in message]


def test_constant_observations(data):
    both(data, slice(None), 2, 3.0)
    assert messages(data) == ["observations is constant in column 2, in all 1212 rows (first: 0); check the recording."]


def test_the_same_observation_twice(data):
    for observation in (data["observation"], data["next", "observation"]):
        observation[:, 2] = observation[:, 0]
    assert messages(data) == [
        "observations has equal values in columns 0 and 2, in all 1212 rows (first: 0); check that each column was "
        "recorded."
    ]


def test_huge_observations(data):
    data["observation"][50, 1] = data["next", "observation"][49, 1] = 2e5
    assert messages(data) == [
        "observations has 1 row (first: 50) of magnitude above 100000; check the units, or scale the values with "
        "Normalization.fit."
    ]


def test_observations_of_different_scales(data):
    for observation in (data["observation"], data["next", "observation"]):
        observation[:, 0] = observation[:, 0].sign() * 0.25
        observation[:, 2] = observation[:, 2].sign() * 1024
    data["observation"][:2, [0, 2]] = torch.tensor([[0.25, 1024.0], [-0.25, -1024.0]])
    low, high = (data["observation"][:, column].double().std(correction=0) for column in (0, 2))
    assert (
        f"observations has columns of different scales in all 1212 rows (first: 0): the standard deviation is "
        f"{low:.3g} in column 0 "
        f"and {high:.3g} in column 2; scale the values with Normalization.fit."
    ) in messages(data)
