"""Episodes in environments: returns by hand, seeds, modes and stops."""

from __future__ import annotations

import gc
from functools import partial

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Composite, Unbounded
from torchrl.envs import GymEnv, SerialEnv, StepCounter, TransformedEnv

from torchrl_bcq import BCQLoss, CloningLoss, evaluate, make_cloning_modules
from torchrl_bcq.evaluation.rollouts import summarize
from torchrl_bcq.functional import change_reward

from ..conftest import ACTION_SPEC, OBSERVATION_SPEC
from .conftest import Stairs, Watching, stairs

WIDTH = 1234


def test_returns_lengths_and_discounted_returns_by_hand():
    """Returns 1, 1 + 2 + 3, 1 + 2 + 3 + 4; discounted by one half 1, 1 + 2/2 + 3/4, and 4/8 more."""
    found = evaluate(stairs(1, 3, 4), Watching(), gamma=0.5)
    assert found.batch_size == (3,)
    assert found["return"].tolist() == [1, 6, 10]
    assert found["length"].tolist() == [1, 3, 4]
    assert found["discounted_return"].tolist() == [1, 2.75, 3.25]
    assert set(found.keys()) == {"return", "length", "discounted_return"}


def test_a_time_limit_cuts_the_return_but_not_the_discounted_one(modules):
    """Two steps count: 1, 1 + 2, 1 + 2; without a value that is compared, no further step is made."""
    loss = BCQLoss(*modules)
    found = evaluate(stairs(1, 3, 4), Watching(), value=loss.value, gamma=0.5, time_limit=2)
    assert found["return"].tolist() == [1, 3, 3]
    assert found["length"].tolist() == [1, 2, 2]
    assert found["discounted_return"].tolist() == [1, 2.75, 3.25]
    policy = Watching()
    found = evaluate(stairs(1, 3, 4), policy, gamma=0.5, time_limit=2)
    assert found["return"].tolist() == [1, 3, 3]
    assert found["discounted_return"].tolist() == [1, 2, 2]
    assert len(policy.seen) == 2


def test_the_policy_acts():
    """An action of 2 doubles the reward; without a policy, actions are uniform in [0, 4]."""
    found = evaluate(stairs(3, by_action=True), Watching(lambda o: torch.full((*o.shape[:-1], 2), 2.0)))
    assert found["return"].tolist() == [12]
    found = evaluate(stairs(*[1] * 100, by_action=True), None)
    assert found["return"].mean().item() == pytest.approx(2, abs=0.5)
    assert found["return"].unique().numel() == 100
    assert 0 <= found["return"].min() < 0.5 < 3.5 < found["return"].max() <= 4


def test_the_estimate_is_the_value_of_the_first_states_and_actions(modules):
    policy, critics = Watching(lambda observation: observation[..., :2] + 0.25), modules[2]
    found = evaluate(stairs(2, 5), policy, value=BCQLoss(*modules).value)
    first = policy.seen[0]
    inputs = TensorDict({"observation": first, "action": first[:, :2] + 0.25}, [2])
    expected = critics(inputs)["state_action_value"]
    torch.testing.assert_close(found["value_estimate"], expected[:, 0].detach(), rtol=0, atol=1e-6)
    assert (expected[:, 0] - expected[:, 1]).abs().min() > 1e-3  # the critics differ
    assert found["value_estimate"].requires_grad is False


def test_an_objective_without_values_has_no_estimate():
    loss = CloningLoss(*make_cloning_modules(OBSERVATION_SPEC, ACTION_SPEC, hidden=(8,)))
    found = evaluate(stairs(2, 5), loss.actor_network, value=loss.value)
    assert set(found.keys()) == {"return", "length", "discounted_return"}


def test_the_random_state_is_restored_and_the_seed_decides(policy):
    envs = stairs(2, 3, by_action=True)
    state = torch.get_rng_state()
    runs = [evaluate(envs, policy, seed=seed)["return"].tolist() for seed in (3, 3, 4)]
    assert torch.equal(torch.get_rng_state(), state)
    torch.randn(7)
    assert evaluate(envs, policy, seed=3)["return"].tolist() == runs[0] == runs[1] != runs[2]


def test_the_seed_decides_initial_states_too():
    starts = []
    for seed in (3, 3, 4):
        policy = Watching()
        evaluate(stairs(1, 1), policy, seed=seed)
        starts.append(policy.seen[0][:, 1].tolist())
    assert starts[0] == starts[1] != starts[2]
    assert starts[0][0] != starts[0][1]  # the environments differ from each other


def test_a_stop_ends_the_episodes():
    env, asked = Stairs(10), []
    found = evaluate(SerialEnv(1, lambda: env), Watching(), should_stop=lambda: asked.append(1) or len(asked) > 3)
    assert found is None
    assert len(asked) == 4
    assert env.steps_made <= 5
    assert (
        evaluate(SerialEnv(1, lambda: Stairs(1)), Watching(), should_stop=lambda: True) is None
    )  # before the only step


@pytest.mark.parametrize("training", [True, False])
def test_the_policy_acts_in_eval_mode_and_returns_to_its_mode(training):
    policy = Watching().train(training)
    evaluate(stairs(2), policy)
    assert policy.modes == [False, False]
    assert policy.training is training
    evaluate(stairs(2), policy, should_stop=lambda: True)
    assert policy.training is training
    assert torch.is_grad_enabled()


def test_an_environment_idles_while_others_run():
    found = evaluate(stairs(1, 9), Watching())
    assert found["length"].tolist() == [1, 9]
    assert found["return"].tolist() == [1, 45]


# means


def test_summary_by_hand():
    """A mean of 4 is a quarter of the way from the random policy's 2 to the expert's 10."""
    episodes = TensorDict({"return": torch.tensor([1.0, 7.0]), "length": torch.tensor([1, 2])}, [2])
    assert summarize(episodes) == {"return": 4, "return_std": 3, "episode_length": 1.5}
    assert summarize(episodes, (2, 10)) == {
        "return": 4,
        "normalized_score": 25,
        "return_std": 3,
        "episode_length": 1.5,
    }
    episodes["discounted_return"], episodes["value_estimate"] = torch.tensor([[1.0, 2.0], [5.0, 6.0]])
    assert summarize(episodes)["value_estimate"] == 5.5
    assert summarize(episodes)["discounted_return"] == 1.5
    assert next(iter(summarize(episodes))) == "return"  # the one on the progress bar
    assert summarize(episodes[:1])["return_std"] == 0


def test_changed_rewards_count_in_the_discounted_return_only():
    """Rewards 1, 2 and 1, 2, 3 become 2, 3 and 2, 3, 3; a shift adds nothing after the end of an episode."""
    found = evaluate(stairs(2, 3), Watching(), gamma=0.5, reward=partial(change_reward, shift=1, clip=3))
    assert found["return"].tolist() == [3, 6]
    assert found["discounted_return"].tolist() == [2 + 1.5, 2 + 1.5 + 0.75]


@pytest.mark.parametrize("transform", [lambda envs: envs, lambda envs: TransformedEnv(envs, StepCounter())])
@pytest.mark.parametrize("limit", [{}, {"time_limit": 3}])
def test_large_observations_give_the_same_numbers(modules, monkeypatch, transform, limit):
    settings = {"value": BCQLoss(*modules).value, "gamma": 0.5, **limit}
    found = []
    for large in (4096, 0):  # bytes
        monkeypatch.setattr("torchrl_bcq.evaluation.rollouts._LARGE", large)
        envs, policy = transform(stairs(2, 5, 3, 1, by_action=True)), Watching()
        found.append(evaluate(envs, policy, **settings))
        assert len(policy.seen) == 5
    assert (found[0] == found[1]).all()


@pytest.mark.parametrize(("large", "kept"), [(10**9, True), (4096, False)])
def test_large_observations_are_not_kept(monkeypatch, large, kept):
    monkeypatch.setattr("torchrl_bcq.evaluation.rollouts._LARGE", large)
    alive = []

    def policy(tensordict):
        tensors = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor]
        alive.append(sum(thing.shape[-1:] == (WIDTH,) for thing in tensors))
        return tensordict.set("action", torch.zeros(len(tensordict), 2))

    class Wide(Stairs):
        def __init__(self) -> None:
            super().__init__(30)
            self.observation_spec = Composite(observation=Unbounded((WIDTH,)))

        def _observe(self):
            return torch.zeros(WIDTH)

    evaluate(SerialEnv(2, Wide), policy)
    assert (alive[-1] >= alive[10] + 15) == kept


def test_one_environment_without_a_batch_is_refused():
    with pytest.raises(ValueError, match=r"envs has batch size \(\), expected one dimension: the number of episodes"):
        evaluate(GymEnv("Pendulum-v1"), None)
