"""Modules called with tensors give what they give for a tensordict."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_bcq.modules import BCQPolicy, BehaviorCloningPolicy, QEnsemble, make_bcq_modules, make_cloning_modules

from ..conftest import ACTION_SPEC, OBSERVATION_SPEC


@pytest.fixture(autouse=True)
def _deterministic():
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        yield


def modules_by_name(observation_spec=OBSERVATION_SPEC, action_spec=ACTION_SPEC) -> dict[str, nn.Module]:
    vae, actor, critics = make_bcq_modules(observation_spec, action_spec, hidden=(16,), vae_hidden=(16,))
    (cloned,) = make_cloning_modules(observation_spec, action_spec, hidden=(16,))
    policy = BCQPolicy(vae, actor, critics, num_action_samples=20)
    return {"actor": actor, "critics": critics, "policy": policy, "vae-bc": BehaviorCloningPolicy(vae), "bc": cloned}


# as many observations as actions: [B, 2] and [B, 2] share both dimensions, but only the first one counts rows
@pytest.mark.parametrize("width", [2, 3])
@pytest.mark.parametrize("batch", [(), (2,), (5,), (2, 4)])
@pytest.mark.parametrize("name", ["actor", "critics", "policy", "vae-bc", "bc"])
def test_tensors_give_what_a_tensordict_gives(name, batch, width):
    module = modules_by_name(Unbounded((width,)))[name]
    columns = {"observation": torch.randn(*batch, width), "action": torch.rand(*batch, 2)}
    expected = module(TensorDict(columns, batch))[module.out_keys[0]]
    inputs = [columns[key] for key in module.in_keys]
    assert torch.equal(module(*inputs), expected)
    assert torch.equal(module(**dict(zip(module.in_keys, inputs, strict=True))), expected)
    assert torch.equal(module(tensordict=TensorDict(columns, batch))[module.out_keys[0]], expected)
    assert expected.shape == (*batch, 2)


@pytest.mark.parametrize("batch", [(), (5,)])
def test_vae_returns_its_three_entries(modules, batch):
    vae, _, _ = modules
    observation, action, noise = torch.randn(*batch, 3), torch.rand(*batch, 2), torch.randn(*batch, 4)
    expected = vae(TensorDict({"observation": observation, "action": action}, batch), noise)
    result = vae(observation=observation, action=action, noise=noise)
    assert isinstance(result, tuple)
    for entry, key in zip(result, ("reconstruction", "loc", "log_std"), strict=True):
        assert torch.equal(entry, expected[key])


def test_critics_one_by_one_find_the_rows():
    """The value of a critic that is not an MLP: the sum of the observation times the first action."""

    class Product(nn.Module):
        def forward(self, observation, action):
            return observation.sum(-1, keepdim=True) * action[..., :1]

    critics = [TensorDictModule(Product(), ["observation", "action"], ["worth"]) for _ in range(3)]
    value = QEnsemble(critics)(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), action=torch.tensor([[2.0, 0.0], [-1.0, 0.0]]))
    assert value.tolist() == [[6.0] * 3, [-7.0] * 3]


def test_nested_keys_and_several_observations():
    spec = Composite(camera=Composite(features=Unbounded((4,))), joints=Unbounded((3,)))
    features, joints = torch.randn(5, 4), torch.randn(5, 3)
    states = TensorDict({"camera": {"features": features}, "joints": joints}, [5])
    for name in ("policy", "vae-bc", "bc"):
        module = modules_by_name(spec)[name]
        expected = module(states.clone())["action"]
        assert torch.equal(module(camera_features=features, joints=joints), expected)
        assert torch.equal(module(features, joints), expected)


def test_several_and_selected_outputs(modules):
    policy, observation = BCQPolicy(*modules, num_action_samples=7, return_candidates=True), torch.randn(5, 3)
    expected = policy(TensorDict({"observation": observation}, [5]))
    for entry, key in zip(policy(observation), ("action", "candidates", "action_value"), strict=True):
        assert torch.equal(entry, expected[key])
    policy.select_out_keys("action")
    assert torch.equal(policy(observation), expected["action"])
    assert set(policy(TensorDict({"observation": observation}, [5])).keys()) == {"observation", "action"}


def test_unknown_and_missing_names_are_refused(modules):
    policy = BCQPolicy(*modules)
    with pytest.raises(TypeError, match="unexpected keyword argument 'obs'"):
        policy(obs=torch.randn(5, 3))
    with pytest.raises(KeyError, match="observation"):
        policy()


def test_no_gradient_and_no_trace_in_the_inputs():
    observation = torch.randn(5, 3, requires_grad=True)
    by_name = modules_by_name(action_spec=Bounded(-1, 1, (2,)))
    assert not by_name["policy"](observation).requires_grad
    action = torch.zeros(5, 2)
    by_name["actor"](observation, action)
    assert not action.any()
