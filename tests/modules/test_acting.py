from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_bcq.modules import (
    BCQPolicy,
    BehaviorCloningPolicy,
    DeterministicActor,
    make_bcq_modules,
    make_cloning_modules,
)

SMALL = {"hidden": [8], "vae_hidden": [8]}
ACTION = Bounded(torch.tensor([-2.0, 0.0]), torch.tensor([2.0, 10.0]), (2,))


def make_policies(observation_spec=None) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    spec = Unbounded((3,)) if observation_spec is None else observation_spec
    vae, actor, critics = make_bcq_modules(spec, ACTION, **SMALL)
    (cloned,) = make_cloning_modules(spec, ACTION, hidden=[8])
    return {"bcq": BCQPolicy(vae, actor, critics), "vae-bc": BehaviorCloningPolicy(vae), "cloning": cloned}


POLICIES = ["bcq", "vae-bc", "cloning"]


class Sum(nn.Module):
    """Two features of each state: the sum of its three numbers, and zero."""

    def forward(self, observation):
        return torch.stack([observation.sum(-1), torch.zeros(observation.shape[:-1])], -1)


def test_actions_by_hand():
    policy = DeterministicActor(Sum(), ACTION)
    action = policy.act([[0.1, 0.2, 0.2], [0.0, 0.0, 0.0]])
    # tanh of the features, from [-1, 1] to [-2, 2] and [0, 10]
    np.testing.assert_allclose(action, [[2 * np.tanh(0.5), 5], [0, 5]], rtol=1e-6)
    assert isinstance(action, np.ndarray)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("shape", [(3,), (1, 3), (5, 3)])
def test_actions_are_those_of_the_tensordict_call(name, shape):
    policy, observation = make_policies()[name], np.random.default_rng(0).normal(size=shape)
    states = TensorDict({"observation": torch.from_numpy(observation).float()}, shape[:-1])
    with set_exploration_type(ExplorationType.DETERMINISTIC), torch.no_grad():
        expected = policy(states)["action"].numpy()
    for given in (observation, observation.astype(np.float16).astype(np.float32), torch.from_numpy(observation)):
        action = policy.act(given)
        assert action.shape == (*shape[:-1], 2)
        np.testing.assert_allclose(action, expected, atol=5e-3)  # float16 keeps three digits
    np.testing.assert_array_equal(policy.act({"observation": observation}), expected)
    assert action.dtype == np.float32
    assert not torch.is_grad_enabled() or policy.act(observation).flags.writeable


@pytest.mark.parametrize("name", ["bcq", "vae-bc"])
def test_equal_states_get_equal_actions_unless_they_are_drawn(name):
    """Products of matrices may round the rows of a batch differently, in the last bits."""
    policy, observation = make_policies()[name], np.ones((50, 3))
    action = policy.act(observation)
    np.testing.assert_allclose(action, action[:1].repeat(50, 0), rtol=16 * np.finfo(np.float32).eps)
    assert len(np.unique(policy.act(observation, deterministic=False).round(3), axis=0)) > 10


def test_whole_numbers_are_converted():
    policy = make_policies()["cloning"]
    for dtype in (np.int64, np.int8, np.uint8):
        np.testing.assert_array_equal(policy.act(np.array([1, 2, 3], dtype)), policy.act([1.0, 2.0, 3.0]))


def test_arrays_that_are_read_only_or_reversed():
    policy, observation = make_policies()["cloning"], np.arange(3.0)
    expected = policy.act([2.0, 1.0, 0.0])
    np.testing.assert_array_equal(policy.act(observation[::-1]), expected)
    reverse = observation[::-1].copy()
    reverse.flags.writeable = False
    np.testing.assert_array_equal(policy.act(reverse), expected)


@pytest.mark.parametrize("name", POLICIES)
def test_entries_by_nested_keys(name):
    spec = Composite(goal=Unbounded((2,)), robot=Composite(joints=Unbounded((3,))))
    policy, rng = make_policies(spec)[name], np.random.default_rng(0)
    goal, joints = rng.normal(size=(4, 2)), rng.normal(size=(4, 3))
    action = policy.act({"goal": goal, "robot": {"joints": joints}})
    assert action.shape == (4, 2)
    one = policy.act({"goal": goal[1], "robot": {"joints": joints[1]}})
    np.testing.assert_allclose(one, action[1], rtol=1e-5)
    with pytest.raises(ValueError, match=r"the policy reads \['goal', \('robot', 'joints'\)\]; pass a mapping"):
        policy.act(goal)
    with pytest.raises(ValueError, match=r"lacks \('robot', 'joints'\); it has \['hand'\]"):
        policy.act({"goal": goal, "robot": {"hand": joints}})
    with pytest.raises(ValueError, match=re.escape("numbers of states: {'goal': (4,), ('robot', 'joints'): (3,)}")):
        policy.act({"goal": goal, "robot": {"joints": joints[:3]}})


@pytest.mark.parametrize(
    ("observation", "message"),
    [
        (np.zeros(4), "'observation' has shape (4,), expected [3] or [B, 3]: one state or several."),
        (np.zeros((2, 5, 3)), "'observation' has shape (2, 5, 3), expected [3] or [B, 3]: one state or several."),
        (1.0, "'observation' has shape (), expected [3] or [B, 3]: one state or several."),
        ([0, np.nan, 1], "'observation' has values that are not finite in float32, such as nan at [1]; repair them."),
        (
            np.full((2, 3), -np.inf),
            "'observation' has values that are not finite in float32, such as -inf at [0, 0]; repair them.",
        ),
        (
            [1e39, 0, 0],
            "'observation' has values that are not finite in float32, such as inf at [0]; repair them.",
        ),
        (["a", "b", "c"], "'observation' has dtype <U1, expected real numbers."),
        ([[1, 2, 3], [1, 2]], "'observation' is not an array of numbers ("),
        ((np.zeros(3), {}), "'observation' is not an array of numbers ("),
        (None, "'observation' has dtype object, expected real numbers."),
        (np.zeros(3, bool), "'observation' has dtype bool, expected real numbers."),
        (np.zeros(3, complex), "'observation' has dtype complex128, expected real numbers."),
        ({"obs": np.zeros(3)}, "the observation lacks 'observation'; it has ['obs']."),
    ],
)
@pytest.mark.parametrize("name", POLICIES)
def test_bad_input_is_refused(name, observation, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        make_policies()[name].act(observation)


def test_networks_of_ones_own_name_the_shape_that_they_do_not_take():
    policy = DeterministicActor(nn.Linear(3, 2), ACTION)
    assert policy.act(np.zeros((5, 3))).shape == (5, 2)
    with pytest.raises(
        ValueError, match=r"^the networks cannot process observations of shape \{'observation': \(4,\)\}: "
    ):
        policy.act(np.zeros(4))
    with pytest.raises(ValueError, match=r"has shape \(2, 2, 3\), expected \[D\] or \[B, D\]"):
        policy.act(np.zeros((2, 2, 3)))


def test_images_are_kept_as_bytes():
    class Brightness(nn.Module):
        def forward(self, pixels):
            assert pixels.dtype == torch.uint8
            return pixels.flatten(-3).float().mean(-1, keepdim=True).expand(*pixels.shape[:-3], 2) / 255

    policy = DeterministicActor(
        Brightness(),
        ACTION,
        observation_keys=["pixels"],
        observation_specs={"pixels": Unbounded((3, 4, 4), dtype=torch.uint8)},
    )
    frames = np.zeros((2, 3, 4, 4), np.uint8)
    frames[1] = 255
    np.testing.assert_allclose(policy.act(frames)[:, 0], [0, 2 * np.tanh(1)], rtol=1e-6)
    np.testing.assert_allclose(policy.act(frames[1])[0], 2 * np.tanh(1), rtol=1e-6)


def test_an_array_for_one_nested_key():
    policy = make_policies(Composite(agent=Composite(state=Unbounded((3,)))))["bcq"]
    action = policy.act(np.zeros(3))
    assert np.array_equal(action, policy.act({"agent": {"state": np.zeros(3)}}))


def test_networks_in_bfloat16():
    assert make_policies()["bcq"].to(torch.bfloat16).act(np.zeros(3)).dtype == np.float32


def test_the_behaviour_model_refuses_other_dtypes():
    with pytest.raises(ValueError, match=r"observation has dtype torch.float64, but the networks have dtype"):
        make_policies()["vae-bc"](torch.zeros(2, 3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.ma.array([1.0, 2.0, 3.0], mask=[0, 1, 0]), "'observation' is a masked array; fill in its values"),
        ([torch.ones(1, requires_grad=True)[0]] * 3, "'observation' is not an array of numbers"),
    ],
)
def test_arrays_that_numpy_would_misread_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        make_policies()["bcq"].act(given)
