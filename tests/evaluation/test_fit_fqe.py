"""Fitted Q evaluation on problems whose values are computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch.distributions import Categorical as Choice
from torchrl.data import Bounded, Categorical, OneHot
from torchrl.modules import ProbabilisticActor

from torchrl_bcq import add_policy_actions, add_recorded_actions, clone_probabilities, fit_fqe, from_arrays, multi_step
from torchrl_bcq.errors import DatasetError
from torchrl_bcq.evaluation.fqe import value_range

pytestmark = pytest.mark.no_cover  # training steps by the thousand
SMALL = {"hidden": (32, 32), "batch_size": 64, "lr": 3e-3, "num_critics": 2}
UNIT = Bounded(-1, 1, (1,))


def two_states(rows: int = 400) -> TensorDict:
    """States 0 and 1, actions 0 and 1, in episodes of one step that are cut off, except where the task ends.

    In state 0, action 0 has the reward 1 and changes nothing; action 1 leads to state 1. In state 1, action 0 has the
    reward 4 and ends the episode; action 1 leads to state 0.
    """
    rng = np.random.default_rng(0)
    state, action = rng.integers(2, size=(2, rows))
    ends = (state == 1) & (action == 0)
    reward = np.where(action == 0, np.where(state == 0, 1.0, 4.0), 0.0)
    following = np.where(action == 0, state, 1 - state)
    return from_arrays(np.eye(2)[state], action, reward, ends, ~ends, np.eye(2)[following])


def even_policy() -> ProbabilisticActor:
    network = TensorDictModule(lambda state: torch.zeros(len(state), 2), ["observation"], ["logits"])
    return ProbabilisticActor(network, in_keys=["logits"], distribution_class=Choice)


@pytest.mark.parametrize("one_hot", [False, True])
def test_values_of_a_random_policy(one_hot):
    """V0 = (1 + V0 / 2) / 2 + V1 / 4 and V1 = 4 / 2 + V0 / 4 at gamma 0.5, so V0 = 16 / 11 and V1 = 26 / 11."""
    data, spec = two_states(), OneHot(2) if one_hot else Categorical(2)
    if one_hot:
        data["action"] = torch.nn.functional.one_hot(data["action"], 2)
    critics = fit_fqe(add_policy_actions(data, even_policy(), spec), spec, gamma=0.5, steps=800, **SMALL)
    states = TensorDict({"observation": torch.eye(2), "policy_probability": torch.full((2, 2), 0.5)}, [2])
    expected = torch.tensor([16 / 11, 26 / 11])
    torch.testing.assert_close(critics.state_values(states), expected[:, None].expand(2, 2), rtol=0, atol=0.05)
    assert critics.state_values(states)[:, 0].ne(critics.state_values(states)[:, 1]).all()  # two critics, not a copy


def test_values_of_a_continuous_policy():
    """The reward is the action. The policy takes 0.5, so Q(a) = a + 0.5 * 1."""
    actions = np.linspace(-1, 1, 200)[:, None]
    state = np.ones((200, 1))
    data = from_arrays(state, actions, actions[:, 0], np.zeros(200), np.ones(200), state)
    policy = TensorDictModule(lambda x: torch.full_like(x, 0.5), ["observation"], ["action"])
    critics = fit_fqe(add_policy_actions(data, policy, UNIT), UNIT, gamma=0.5, steps=800, **SMALL)
    torch.testing.assert_close(critics.value(data), data["action"].squeeze(-1) + 0.5, rtol=0, atol=0.05)


def chain(ends: bool) -> TensorDict:
    """Episodes of three states with the rewards 1, 2 and 4 and one action in each state."""
    states, following = np.tile(np.eye(4)[:3], (30, 1)), np.tile(np.eye(4)[1:], (30, 1))
    last = np.tile([False, False, True], 30)
    actions = np.tile([0, 1, 0], 30)
    return from_arrays(states, actions, np.tile([1.0, 2.0, 4.0], 30), last & ends, last & (not ends), following)


def test_values_of_the_recorded_behaviour():
    """Without a discount, the value of a state is the sum of the rewards that follow."""
    data = add_recorded_actions(chain(ends=True), Categorical(2))
    assert len(data) == 90
    critics = fit_fqe(data, Categorical(2), gamma=1.0, steps=1500, **SMALL)
    torch.testing.assert_close(critics.value(data[:3]), torch.tensor([7.0, 6.0, 4.0]), rtol=0, atol=0.15)


@pytest.mark.parametrize("spec", [Categorical(2), UNIT])
def test_data_in_float64(spec):
    data = chain(ends=True).apply(lambda entry: entry.double() if entry.is_floating_point() else entry)
    data = data if spec is not UNIT else data.set("action", torch.zeros(90, 1, dtype=torch.float64))
    critics = fit_fqe(add_recorded_actions(data, spec), spec, steps=2, **SMALL)
    assert critics.value(data).dtype == torch.float64


def test_recorded_next_actions():
    data = add_recorded_actions(chain(ends=True), Categorical(2))
    assert data["next", "policy_probability"][:2].tolist() == [[0, 1], [1, 0]]
    assert data["episode"].unique().tolist() == list(range(30))
    rewards = torch.linspace(-1, 1, 90)[:, None]
    continuous = chain(ends=True).set("action", rewards)
    following = add_recorded_actions(continuous, UNIT)["next", "policy_action"]
    assert torch.equal(following[:2, 0], rewards[1:3])


def test_a_row_before_a_cut_gets_the_action_of_a_similar_state():
    data, last = chain(ends=False), torch.arange(90) % 3 == 2
    data["next", "observation"][last] = torch.tensor([0.1, 0.9, 0.0, 0.0])  # nearest to state 1, with the action 1
    labelled = add_recorded_actions(data, Categorical(2))
    assert labelled["next", "policy_probability"][last].tolist() == [[0, 1]] * 30
    data["next", "observation"][last] = torch.eye(4)[0]  # in state 0, one action of three is 1
    data["action"][::3] = torch.arange(30) % 3 == 0
    drawn = [add_recorded_actions(data, Categorical(2), seed=seed)["next", "policy_probability"] for seed in range(9)]
    assert torch.stack(drawn)[:, last, 1].mean() == pytest.approx(1 / 3, abs=0.09)  # 3 standard errors
    frames = data.replace({"observation": (data["observation"] * 255).byte()})
    kept = add_recorded_actions(frames.exclude("episode"), Categorical(2))
    assert len(kept) == 60
    assert value_range(kept, 1.0) == (0, 4)  # the last reward of each episode is left out


def test_a_feature_that_varies_by_rounding_only_decides_nothing():
    """The two kinds of states differ in the first feature; the second one is the nearest by chance."""
    data = chain(ends=False)
    plain = torch.eye(4)[torch.arange(90) % 3][:, :2]
    data["observation"], data["action"] = plain.clone(), (torch.arange(90) % 3 == 1).long()
    data["next", "observation"] = plain.roll(-1, 0)
    last = torch.arange(90) % 3 == 2
    data["next", "observation"][last] = torch.tensor([0.1, 0.9])
    noise = 1 + 6e-8 * (torch.arange(90) % 3 == 1)[:, None]  # 1 and the next number of float32
    data["observation"] = torch.cat([data["observation"], noise.float()], -1)
    data["next", "observation"] = torch.cat([data["next", "observation"], torch.full((90, 1), 1.0)], -1)
    labelled = add_recorded_actions(data, Categorical(2))
    assert labelled["next", "policy_probability"][last].tolist() == [[0, 1]] * 30


def test_several_steps_of_the_dataset_are_one_row():
    """Two steps: the reward of the first row is 1 + 0.5 * 2, and the value of its next state counts a quarter."""
    data = multi_step(chain(ends=True), 2, gamma=0.5)
    data["next", "policy_probability"] = torch.full((90, 2), 0.5)
    data["action"] = torch.zeros_like(data["action"])
    critics = fit_fqe(data, Categorical(2), gamma=0.5, steps=5, **SMALL)
    with torch.no_grad():
        critics.qvalue_loss(row := data[:1].clone())
        states = data[:1]["next"].copy()
        with critics.target_networks():
            target = 2 + 0.25 * critics.state_values(states)
        error = (critics.values(data[:1]) - target).abs().max()
    torch.testing.assert_close(row["td_error"], error[None])


def test_transitions_without_the_actions_of_a_policy_are_refused():
    message = r"lack \('next', 'policy_probability'\); add it with add_policy_actions or add_recorded_actions\.$"
    with pytest.raises(DatasetError, match=message):
        fit_fqe(two_states(), Categorical(2), steps=1, **SMALL)


def test_the_seed_decides_and_the_random_state_is_kept():
    data = add_policy_actions(two_states(), even_policy(), Categorical(2))
    before = torch.get_rng_state()
    one, same, other = (fit_fqe(data, Categorical(2), steps=3, seed=seed, **SMALL).value(data) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_the_first_values_have_the_size_of_the_returns():
    """Untrained critics write numbers near 0; large rewards scale them, so that Adam needs few steps."""
    data = add_policy_actions(two_states(), even_policy(), Categorical(2))
    small = fit_fqe(data, Categorical(2), steps=1, **SMALL).value(data)
    data["next", "reward"] *= 1000
    torch.testing.assert_close(fit_fqe(data, Categorical(2), steps=1, **SMALL).value(data), 1000 * small)


def test_the_range_of_values():
    """The rewards are 1, 2 and 4, in episodes of three steps."""
    assert value_range(chain(ends=True), 0.5) == (0, 8)
    assert value_range(chain(ends=True), 1.0) == (0, 12)
    data = chain(ends=True)
    data["next", "reward"] *= -1
    assert value_range(data, 0.75) == (-16, 0)
    labelled = add_recorded_actions(data, Categorical(2))
    assert fit_fqe(labelled, Categorical(2), gamma=0.75, steps=1, **SMALL).value_range == (-16, 0)


def test_cloned_probabilities():
    """In state 0, three of four recorded actions are 0; in state 1, all are 1."""
    state, action = np.tile([0, 0, 0, 0, 1, 1, 1, 1], 50), np.tile([0, 0, 0, 1, 1, 1, 1, 1], 50)
    data = from_arrays(np.eye(2)[state], action, np.ones(400), np.ones(400), np.zeros(400))
    found = clone_probabilities(data, data[:8], Categorical(2), steps=500, hidden=(16,), lr=1e-2)
    expected = torch.tensor([0.75, 0.75, 0.75, 0.25, 1, 1, 1, 1])
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05)


def test_a_cloned_probability_is_never_0():
    """Far from the data, the softmax underflows to 0. A ratio to it would turn the weighted estimates into NaN."""
    state, action = np.tile([0, 0, 1, 1], 50), np.tile([0, 1, 1, 1], 50)
    data = from_arrays(np.eye(2)[state], action, np.ones(200), np.ones(200), np.zeros(200))
    far = data[:4].clone()
    far["observation"] = 1e6 * torch.tensor([[1.0, -1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, 1.0]])
    far["action"] = torch.tensor([0, 1, 0, 1])
    found = clone_probabilities(data, far, Categorical(2), steps=100, hidden=(16,), lr=1e-2)
    assert (found > 0).all()
    assert found.min() < 1e-30


def test_an_action_that_is_not_available_gets_no_probability():
    action = np.tile([0, 1, 1, 1], 100)
    masks = np.tile([[True, True], [False, True]], (200, 1))
    data = from_arrays(np.ones((400, 1)), action, np.ones(400), np.ones(400), np.zeros(400), action_masks=masks)
    found = clone_probabilities(data, data[:2], Categorical(2), steps=3, hidden=(16,))
    assert found[1] == 1  # the only available action
    assert found[0] < 1


def test_a_missing_entry_is_named():
    with pytest.raises(ValueError, match="policy_probability"):
        fit_fqe(two_states(), Categorical(2), steps=1)


def test_the_range_of_values_of_rows_that_span_several_steps():
    """The reward is 1 in each step, so no value is above 1 / (1 - 0.5), although rows have the reward 1 + 0.5."""
    data = chain(ends=True)
    data["next", "reward"] = torch.ones(90, 1)
    data = multi_step(data, 2, gamma=0.5)
    assert data["next", "reward"].max() == 1.5
    assert value_range(data, 0.5) == (0, 2)


@pytest.mark.parametrize("gamma", [-1, 1.5])
def test_a_discount_out_of_range_is_refused(gamma):
    data = add_recorded_actions(chain(ends=True), Categorical(2))
    with pytest.raises(ValueError, match=f"gamma is {gamma}, expected a number from 0 to 1"):
        fit_fqe(data, Categorical(2), gamma=gamma, steps=1, **SMALL)
