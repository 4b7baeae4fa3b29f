"""Off-policy evaluation on a task with exact values: the reward is 1 for the action with the number of the state."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch.distributions import Categorical as Choice
from torchrl.data import Bounded, Categorical
from torchrl.modules import ProbabilisticActor

from torchrl_bcq import DatasetError, OffPolicyEvaluation, from_arrays, multi_step

pytestmark = pytest.mark.no_cover  # training steps by the hundred
SPEC = Categorical(2)
FIT = {"steps": 400, "hidden": (16,), "lr": 5e-3, "batch_size": 64, "num_critics": 2}


def recorded(rows: int = 600, right: float = 0.5, seed: int = 0, **fields) -> TensorDict:
    """Episodes of one step; the recorded policy takes the right action with the probability ``right``."""
    rng = np.random.default_rng(seed)
    state, is_right = rng.integers(2, size=rows), rng.random(rows) < right
    probability = np.where(is_right, right, 1 - right)
    action = np.where(is_right, state, 1 - state)
    fields = {"action_probabilities": probability, **fields}
    return from_arrays(np.eye(2)[state], action, is_right * 1.0, np.ones(rows), np.zeros(rows), **fields)


def policy(right: float) -> ProbabilisticActor:
    """Take the right action with the probability ``right``; the value is ``right``."""
    table = torch.tensor([[right, 1 - right], [1 - right, right]])
    network = TensorDictModule(lambda state: table[state.argmax(-1)], ["observation"], ["probs"])
    return ProbabilisticActor(network, in_keys=["probs"], distribution_class=Choice)


@pytest.fixture(scope="module")
def evaluation() -> OffPolicyEvaluation:
    return OffPolicyEvaluation(recorded(), SPEC, held_out=0.5, **FIT)


@pytest.mark.parametrize(("right", "verdict"), [(1.0, "estimated better"), (0.0, "estimated worse")])
def test_values_and_verdicts(evaluation, right, verdict):
    found = evaluation.estimate(policy(right))
    assert found.value == pytest.approx(right, abs=0.02)
    assert found.critics == pytest.approx((right, right), abs=0.03)
    assert found.difference == pytest.approx(right - 0.5, abs=0.05)
    assert found.verdict.startswith(verdict)
    assert abs(found.residual) < 0.05
    assert found.far == 0
    for name, (value, low, high) in found.others.items():
        assert low <= value <= high, name
        assert value == pytest.approx(right, abs=0.1), name
    assert found.effective_sample_size == pytest.approx(300 / 2, rel=0.15)  # half of the weights are 0


def test_an_equal_policy_is_not_told_apart(evaluation):
    found = evaluation.estimate(policy(0.5))
    assert found.value == pytest.approx(0.5, abs=0.03)
    assert "includes 0" in found.verdict
    assert found.effective_sample_size == pytest.approx(300)


def test_the_recorded_behaviour(evaluation):
    assert evaluation.behaviour.value == pytest.approx(0.5, abs=0.05)
    low, high = evaluation.behaviour.interval
    assert low < 0.5 < high
    held = evaluation.recorded_return
    assert held == pytest.approx(0.5, abs=0.06)
    assert evaluation.behaviour.limits == (0, pytest.approx(100))  # a reward of 1 in each step, at gamma 0.99


@pytest.mark.parametrize("name", ["importance_sampling", "weighted_doubly_robust"])
def test_other_estimators_decide_the_verdict(name):
    evaluation = OffPolicyEvaluation(recorded(), SPEC, held_out=0.5, estimator=name, **{**FIT, "steps": 50})
    found = evaluation.estimate(policy(1.0))
    assert (found.value, *found.interval) == found.others[name]
    assert found.difference == pytest.approx(found.value - evaluation.recorded_return)
    assert found.uses_weights
    assert found.uses_critics == ("robust" in name)


def cut_off(right: float, rows: int = 3000) -> TensorDict:
    """Episodes of ten steps that are cut off: the value is ten times that of one step, at gamma 0.9."""
    data = recorded(rows, right)
    data["next", "terminated"] = torch.zeros(rows, 1, dtype=torch.bool)
    data["next", "truncated"] = data["next", "done"] = torch.arange(1, rows + 1)[:, None] % 10 == 0
    data["episode"] = torch.arange(rows) // 10
    return data.set(("next", "observation"), data["observation"].roll(-1, 0))


@pytest.mark.parametrize("name", ["doubly_robust", "importance_sampling"])
def test_the_recorded_behaviour_is_not_better_than_itself_if_episodes_are_cut_off(name):
    evaluation = OffPolicyEvaluation(cut_off(0.5), SPEC, gamma=0.9, held_out=0.5, estimator=name, **FIT)
    found = evaluation.estimate(policy(0.5))
    assert found.value == pytest.approx(5 if "robust" in name else 5 * (1 - 0.9**10), abs=0.4)
    assert found.difference == pytest.approx(0, abs=0.25)
    assert found.verdict.startswith("cannot tell")
    assert found.difference == pytest.approx(found.value - evaluation.behaviour.value)
    assert evaluation.behaviour.interval[0] < evaluation.behaviour.value < evaluation.behaviour.interval[1]


def test_cut_episodes_do_not_make_ends_more_frequent():
    """Each step has the reward 1 and ends the episode with probability 1/2, so the value is 1 / (1 - 0.8 / 2) = 5/3.

    Half of the episodes are cut off after one step. Without these rows, the value would be 1.
    """
    ends = np.arange(800) % 2 == 0
    state = np.random.default_rng(0).normal(size=(800, 1))
    data = from_arrays(state, np.zeros((800, 1)) + 0.5, np.ones(800), ends, ~ends, state[::-1].copy())
    evaluation = OffPolicyEvaluation(data, Bounded(-1, 1, (1,)), gamma=0.8, **FIT)
    assert evaluation.behaviour.value == pytest.approx(5 / 3, abs=0.05)


def test_no_details(evaluation):
    found = evaluation.estimate(policy(1.0), details=False)
    assert (found.far, found.others) == (None, {})
    assert found.value == evaluation.estimate(policy(1.0)).value


@pytest.mark.parametrize("groups", [None, np.zeros(600, int)])
def test_one_episode_or_one_group_is_refused(groups):
    data = recorded(**({} if groups is None else {"groups": groups}))
    if groups is None:
        data["episode"] = torch.zeros(600, dtype=torch.long)
        data["next", "done"][:-1] = False
    with pytest.raises(DatasetError, match="the dataset has one (episode|group), but an estimate needs at least two"):
        OffPolicyEvaluation(data, SPEC)


def test_rows_of_several_steps_are_refused():
    with pytest.raises(DatasetError, match="the transitions have steps_to_next_obs, so a row spans several steps"):
        OffPolicyEvaluation(multi_step(cut_off(0.5), 2, gamma=0.9), SPEC)


def test_probabilities_are_cloned_if_none_are_logged():
    data = recorded(1200, right=0.8).exclude("action_probability")
    evaluation = OffPolicyEvaluation(data, SPEC, held_out=0.5, **FIT)
    value, *_ = evaluation.estimate(policy(0.5)).others["importance_sampling"]
    assert value == pytest.approx(0.5, abs=0.08)


def test_groups_are_held_out_together():
    groups = np.repeat(np.arange(60), 10)
    evaluation = OffPolicyEvaluation(recorded(groups=groups), SPEC, held_out=0.5, **{**FIT, "steps": 5})
    assert len(np.unique(evaluation._groups)) == 30
    assert len(evaluation._held) == 300


def test_the_seed_decides():
    small = {**FIT, "steps": 5}
    one, same, other = (OffPolicyEvaluation(recorded(), SPEC, seed=seed, **small).behaviour for seed in (0, 0, 1))
    assert one == same != other


def test_continuous_actions_have_no_weights():
    rng = np.random.default_rng(0)
    action = rng.uniform(-1, 1, (400, 1))
    data = from_arrays(rng.normal(size=(400, 2)), action, action[:, 0], np.ones(400), np.zeros(400))
    evaluation = OffPolicyEvaluation(data, Bounded(-1, 1, (1,)), **FIT)
    best = TensorDictModule(lambda x: torch.ones(len(x), 1), ["observation"], ["action"])
    found = evaluation.estimate(best)
    assert found.value == pytest.approx(1, abs=0.05)
    assert found.verdict.startswith("estimated better")
    assert found.others == {}
    assert found.effective_sample_size is None
    with pytest.raises(ValueError, match=r"estimator is 'doubly_robust', expected one of \['fqe'\]"):
        OffPolicyEvaluation(data, Bounded(-1, 1, (1,)), estimator="doubly_robust")


def test_episodes_must_be_known():
    with pytest.raises(DatasetError, match="done"):
        OffPolicyEvaluation(recorded().exclude(("next", "done"), "episode"), SPEC)


def test_the_residual_is_the_error_of_the_value():
    """At gamma 1, the mean error of the values of the first states is the mean TD error times the mean length."""
    lengths = torch.tensor([99, 1] * 6)
    rows = int(lengths.sum())
    ends = torch.zeros(rows, dtype=torch.bool)
    ends[lengths.cumsum(0) - 1] = True
    state = np.random.default_rng(0).normal(size=(rows, 2))
    data = from_arrays(state, np.arange(rows) % 2, np.ones(rows), ends.numpy(), np.zeros(rows))
    evaluation = OffPolicyEvaluation(data, SPEC, gamma=1.0, held_out=0.5, **{**FIT, "steps": 3})
    assert set(evaluation._returns.tolist()) == {1, 99}
    true = evaluation._returns.mean().item()
    assert evaluation.behaviour.residual == pytest.approx(true - evaluation.behaviour.value, rel=1e-4)


def test_tiny_logged_probabilities_give_finite_estimates():
    """The weight 1 / 1e-40 is infinite in float32."""
    data = recorded()
    data["action_probability"][:] = 1e-40
    others = OffPolicyEvaluation(data, SPEC, held_out=0.5, **{**FIT, "steps": 1}).estimate(policy(1.0)).others
    assert np.isfinite([value for value, *_ in others.values()]).all()


@pytest.mark.parametrize("wrong", [0.0, 2.0])
def test_logged_probabilities_out_of_range_are_refused(wrong):
    data = recorded()
    data["action_probability"][:] = wrong
    evaluation = OffPolicyEvaluation(data, SPEC, held_out=0.5, **{**FIT, "steps": 1})
    with pytest.raises(DatasetError, match=f"not above 0 and at most 1 in 300 held-out rows, such as {wrong}"):
        evaluation.estimate(policy(1.0))
