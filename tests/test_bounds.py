"""Bounds of the action space, read from a spec."""

from __future__ import annotations

import gymnasium
import pytest
import torch
from torchrl.data import Bounded, Categorical, Composite, Unbounded

from torchrl_bcq.bounds import action_bounds
from torchrl_bcq.modules import make_bcq_modules, make_discrete_bcq_modules


def test_bounds_of_each_dimension_are_copies():
    spec = Bounded(torch.tensor([-1.0, 0.0]).double(), torch.tensor([1.0, 4.0]).double(), (2,), dtype=torch.float64)
    low, high = action_bounds(spec)
    assert (low.tolist(), high.tolist(), low.dtype) == ([-1, 0], [1, 4], torch.float64)
    low.zero_()
    assert spec.space.low.tolist() == [-1, 0]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (Unbounded((2,)), r"action_spec is unbounded in dimensions \[0, 1\]; pass torchrl.data.Bounded"),
        (Categorical(4), "must be a continuous Bounded spec, got Categorical of torch.int64"),
        (Bounded(-1, 1, (4, 2)), r"has shape \(4, 2\), expected \[A\]; for a vectorised environment"),
        (
            Bounded(torch.tensor([-1.0, 0.0]), torch.tensor([1.0, torch.inf]), (2,)),
            r"unbounded in dimensions \[1\]; pass",
        ),
        (
            Bounded(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0]), (2,)),
            "each lower bound must be below its upper bound",
        ),
        (Composite(action=Bounded(-1, 1, (2,))), r"Composite; pass one of its leaves \['action'\]"),
        (Composite(arm=Composite(torque=Bounded(-1, 1, (2,)))), r"leaves \[\('arm', 'torque'\)\], as in env.full_"),
    ],
)
def test_unusable_action_specs_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        action_bounds(spec)


def test_a_space_of_gymnasium_is_refused():
    spaces = gymnasium.spaces.Box(-1, 1, (3,)), gymnasium.spaces.Discrete(2)
    with pytest.raises(TypeError, match=r"^action_spec is of the type Box, .*GymWrapper\(env\)\.action_spec is that "):
        make_bcq_modules(Unbounded((3,)), spaces[0])
    for make in (make_bcq_modules, make_discrete_bcq_modules):
        with pytest.raises(TypeError, match="^observation_spec is of the type Box, "):
            make(spaces[0], Bounded(-1, 1, (2,)) if make is make_bcq_modules else Categorical(2))
    with pytest.raises(ValueError, match="^action_space is a Discrete, expected one discrete action for each step"):
        make_discrete_bcq_modules(Unbounded((3,)), spaces[1])


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [  # float32 numbers next to 0.1: 0.09999999404 and 0.10000000149; bfloat16 next to 0.1: 0.099609375, 0.10009765625
        (torch.float64, -0.1, 0.1),
        (torch.float32, -0.09999999403953552, 0.09999999403953552),
        (torch.bfloat16, -0.099609375, 0.099609375),
    ],
)
def test_bounds_are_rounded_inwards(dtype, low, high):
    exact = Bounded(
        -torch.full((1,), 0.1).double() * 0 - 0.1, torch.full((1,), 0.1).double() * 0 + 0.1, (1,), dtype=torch.float64
    )
    found = action_bounds(exact, dtype)
    assert [bound.double().tolist() for bound in found] == [[low], [high]]
    assert found[0].dtype == dtype


def test_numbers_of_the_dtype_are_not_rounded():
    spec = Bounded(torch.tensor([-2.0, 0.1]), torch.tensor([2.0, 0.3]), (2,))
    assert torch.equal(torch.stack(action_bounds(spec, torch.float32)), torch.stack([spec.space.low, spec.space.high]))
