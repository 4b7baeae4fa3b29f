"""What a policy does in the states of a dataset, with exact probabilities where the policy has them."""

from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch.distributions import Categorical as CategoricalDistribution
from torchrl.data import Binary, Bounded, Categorical, Composite, OneHot, Unbounded
from torchrl.modules import OneHotCategorical, ProbabilisticActor

from torchrl_bcq import (
    BCQPolicy,
    BehaviorCloningPolicy,
    DiscreteBCQPolicy,
    OffPolicyEvaluation,
    add_policy_actions,
    make_bcq_modules,
    make_cloning_modules,
    make_discrete_bcq_modules,
)
from torchrl_bcq.evaluation.policy_actions import policy_actions

from ..conftest import ACTION_SPEC, random_transitions

LOGITS = torch.tensor([0.0, 1.0, 2.0])


def policy_of(function, **keys) -> TensorDictModule:
    return TensorDictModule(function, keys.pop("in_keys", ["observation"]), keys.pop("out_keys", ["action"]))


def states(number: int = 10) -> TensorDict:
    return TensorDict({"observation": torch.arange(number * 3.0).view(number, 3)}, [number])


@pytest.mark.parametrize("batch_size", [3, 4096])
def test_actions_of_a_deterministic_policy(batch_size):
    """The action is a part of the observation, so no row is lost or mixed up."""
    policy = policy_of(lambda observation: observation[:, 1:])
    found = policy_actions(policy, states(), Bounded(-99, 99, (2,)), batch_size=batch_size, num_samples=2)
    assert found.shape == (10, 2, 2)
    assert torch.equal(found[:, 0], states()["observation"][:, 1:])
    assert torch.equal(found[:, 0], found[:, 1])


def test_samples_differ_and_the_random_state_is_kept():
    policy = policy_of(lambda observation: torch.randn(len(observation), 2))
    before = torch.get_rng_state()
    one, same, other = (policy_actions(policy, states(), ACTION_SPEC, num_samples=2, seed=s) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert not torch.equal(one[:, 0], one[:, 1])


@pytest.mark.parametrize("one_hot", [False, True])
def test_exact_probabilities(one_hot):
    spec = OneHot(3) if one_hot else Categorical(3)
    distribution = OneHotCategorical if one_hot else CategoricalDistribution
    network = policy_of(lambda observation: LOGITS.expand(len(observation), 3), out_keys=["logits"])
    policy = ProbabilisticActor(network, in_keys=["logits"], distribution_class=distribution, spec=spec)
    found = policy_actions(policy, states(), spec)
    torch.testing.assert_close(found, LOGITS.softmax(0).expand(10, 3))


@pytest.mark.parametrize("spec", [Categorical(3), Categorical(3, (1,)), OneHot(3)])
def test_frequencies_of_drawn_actions(spec):
    """An epsilon of 0.6 gives each of three actions the probability 0.2, and the best one 0.4 more."""
    (network,) = make_discrete_bcq_modules(Unbounded((3,)), spec, hidden=(8,))
    policy = DiscreteBCQPolicy(network, epsilon=0.6)
    best = policy_actions(DiscreteBCQPolicy(network), states(), spec)
    assert best.sum(-1).tolist() == [1] * 10
    found = policy_actions(policy, states(), spec, num_samples=2000)
    torch.testing.assert_close(found, 0.4 * best + 0.2, rtol=0, atol=0.05)


def test_choices_in_final_states_are_zero_because_a_mask_may_allow_none():
    data = random_transitions(4)
    data["next", "terminated"][1] = True
    nan = torch.full((4, 2), torch.nan)
    labelled = add_policy_actions(data, policy_of(lambda x: nan), ACTION_SPEC)["next", "policy_action"]
    assert labelled.isnan().all(-1).squeeze(-1).tolist() == [True, False, True, True]
    assert labelled[1].abs().sum() == 0


def test_choices_have_the_dtype_of_the_spec():
    found = policy_actions(policy_of(lambda x: x[:, 1:].double()), states(), Bounded(-99, 99, (2,)))
    assert found.dtype == torch.float32


def test_the_policy_acts_in_evaluation_mode():
    dropout = torch.nn.Dropout(0.5).train()
    found = policy_actions(policy_of(dropout), states(), Bounded(-99, 99, (3,)))
    assert torch.equal(found[:, 0], states()["observation"])
    assert dropout.training


def test_add_policy_actions_copies_no_other_entry():
    data = random_transitions(20)
    policy = policy_of(lambda observation: observation[:, :2])
    labelled = add_policy_actions(data, policy, ACTION_SPEC)
    assert torch.equal(labelled["next", "policy_action"][:, 0], data["next", "observation"][:, :2])
    assert labelled["next", "observation"].data_ptr() == data["next", "observation"].data_ptr()
    assert ("next", "policy_action") not in data.keys(True)
    data["action"] = torch.zeros(20, dtype=torch.int64)
    choose = policy_of(lambda observation: torch.ones(len(observation), dtype=torch.int64))
    assert add_policy_actions(data, choose, Categorical(2))["next", "policy_probability"].tolist() == [[0, 1]] * 20


@pytest.mark.parametrize(
    ("function", "spec", "message"),
    [
        (lambda x: x, ACTION_SPEC, r"gives actions of shape \(10, 3\), expected \(10, 2\)"),
        (lambda x: torch.full((len(x),), 3), Categorical(3), "the actions are 3 to 3, expected 0 to 2"),
    ],
)
def test_wrong_actions(function, spec, message):
    with pytest.raises(ValueError, match=message):
        policy_actions(policy_of(function), states(), spec)


def test_a_plain_function_is_refused():
    with pytest.raises(TypeError, match="the policy is a function; wrap it in a TensorDictModule"):
        policy_actions(lambda states: states, states(), Categorical(4))


def test_wrong_probabilities_and_numbers():
    network = policy_of(lambda observation: LOGITS.expand(len(observation), 3), out_keys=["logits"])
    policy = ProbabilisticActor(network, in_keys=["logits"], distribution_class=CategoricalDistribution)
    with pytest.raises(ValueError, match=r"gives probabilities of shape \(10, 3\), expected \(10, 4\)"):
        policy_actions(policy, states(), Categorical(4))
    with pytest.raises(ValueError, match="num_samples is 0, expected at least 1"):
        policy_actions(policy, states(), Categorical(3), num_samples=0)


def test_a_policy_with_its_own_action_key():
    specs = Unbounded((3,)), Categorical(3)
    (network,) = make_discrete_bcq_modules(*specs, hidden=(8,), action_key=("agent", "choice"))
    found = policy_actions(DiscreteBCQPolicy(network), states(), specs[1])
    index = DiscreteBCQPolicy(network)(states())["agent", "choice"]
    assert torch.equal(found.argmax(-1), index)


def test_one_hot_actions_where_indices_are_expected():
    policy = policy_of(lambda observation: torch.eye(3, dtype=torch.int64)[observation[:, 0].long() % 3])
    with pytest.raises(ValueError, match=r"shape \(10, 3\), expected indices \(10,\) or \(10, 1\); for one-hot"):
        policy_actions(policy, states(), Categorical(3))


def test_continuous_policies_with_their_own_action_key():
    networks = make_bcq_modules(Unbounded((3,)), ACTION_SPEC, hidden=(8,), vae_hidden=(8,), action_key="torque")
    (cloned,) = make_cloning_modules(Unbounded((3,)), ACTION_SPEC, hidden=(8,), action_key="torque")
    for policy in (BCQPolicy(*networks), BehaviorCloningPolicy(networks[0]), cloned):
        assert policy_actions(policy, states(), ACTION_SPEC).shape == (10, 1, 2)


def test_a_policy_that_writes_no_action():
    with pytest.raises(ValueError, match=r"the policy writes \['a'\], but not 'action'; rename its output to 'action'"):
        policy_actions(policy_of(lambda x: x[:, :2], out_keys=["a"]), states(), ACTION_SPEC)


def test_a_mask_may_exclude_all_actions_only_in_a_terminal_state():
    spec = Composite(observation=Unbounded((3,)), action_mask=Binary(3, dtype=torch.bool))
    (network,) = make_discrete_bcq_modules(spec, Categorical(3), hidden=(8,))
    data = random_transitions(4)
    data["next", "observation"] = torch.zeros(4, 3)
    data["next", "action_mask"] = torch.tensor([[False] * 3] * 4)
    data["next", "done"] = data["next", "terminated"] = torch.ones(4, 1, dtype=torch.bool)
    add_policy_actions(data, DiscreteBCQPolicy(network), Categorical(3))
    data["next", "terminated"] = torch.tensor([[True], [True], [True], [False]])
    with pytest.raises(ValueError, match="allows no action in 1 states"):
        add_policy_actions(data, DiscreteBCQPolicy(network), Categorical(3))


def test_actions_have_the_dtype_of_the_recorded_actions():
    """The spec of an environment may be float64."""
    data, policy = random_transitions(60), policy_of(lambda observation: observation[:, :2].double())
    spec = Bounded(-99, 99, (2,), dtype=torch.float64)
    found = add_policy_actions(data, policy, spec)
    assert found["next", "policy_action"].dtype == data["action"].dtype == torch.float32
    data["episode"] = torch.arange(60) // 10
    assert math.isfinite(OffPolicyEvaluation(data, spec, steps=1, hidden=(4,)).estimate(policy).value)
