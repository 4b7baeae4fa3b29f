from __future__ import annotations

import re

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from torch import nn
from torchrl.data import Composite, Unbounded
from torchrl.envs import GymEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_bcq.modules import (
    ActionVAE,
    BCQPolicy,
    BehaviorCloningPolicy,
    PerturbationActor,
    QEnsemble,
    make_bcq_modules,
)

from ..conftest import ACTION_SPEC
from ..exporters import EXPORTERS


class Still(nn.Module):
    def forward(self, observation, action):
        return torch.zeros_like(action)


class NearObservation(nn.Module):
    """A critic whose best first action is the first observation."""

    def __init__(self, sign: float) -> None:
        super().__init__()
        self.sign = nn.Parameter(torch.tensor(sign))

    def forward(self, observation, action):
        return -self.sign * (action[..., :1] - observation[..., :1]).square()


def policy(num_action_samples: int) -> BCQPolicy:
    vae = ActionVAE(nn.Identity(), Wide(), ACTION_SPEC, latent_dim=2)
    critics = [
        TensorDictModule(NearObservation(sign), ["observation", "action"], ["state_action_value"])
        for sign in (1.0, -1.0)
    ]
    return BCQPolicy(
        vae, PerturbationActor(Still(), ACTION_SPEC), QEnsemble(critics), num_action_samples=num_action_samples
    )


class Wide(nn.Module):
    def forward(self, observation, latent):
        return 3 * latent


def test_each_row_takes_its_own_best_candidate_by_the_first_critic():
    observation = torch.tensor([[-0.8, 0, 0], [0.0, 0, 0], [0.5, 0, 0], [0.8, 0, 0]])
    action = policy(2000)(TensorDict({"observation": observation}, [4]))["action"]
    torch.testing.assert_close(action[:, 0], observation[:, 0], atol=0.02, rtol=0)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_any_batch(batch):
    states = TensorDict({"observation": torch.zeros(*batch, 3)}, batch)
    action = policy(500)(states)["action"]
    assert action.shape == (*batch, 2)
    torch.testing.assert_close(action[..., 0], torch.zeros(batch), atol=0.1, rtol=0)


@pytest.mark.parametrize("make", [BCQPolicy, lambda vae, actor, critics: BehaviorCloningPolicy(vae)])
def test_agents_of_a_group_act_as_rows(make):
    """TorchRL's multi-agent layout: the tensordict has the batch size [5], and its group "agents" [5, 2]."""
    spec = Composite(agents=Composite(observation=Unbounded((3,))))
    modules = make_bcq_modules(spec, ACTION_SPEC, hidden=(8,), vae_hidden=(8,), action_key=("agents", "action"))
    observation = torch.randn(5, 2, 3)
    group = TensorDict({"observation": observation}, [5, 2])
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        acted = make(*modules)(TensorDict({"agents": group}, [5]))
        rows = make(*modules)(TensorDict({"agents": {"observation": observation.flatten(0, 1)}}, [10]))
    assert (acted.batch_size, acted["agents"].batch_size) == ((5,), (5, 2))
    torch.testing.assert_close(acted["agents", "action"].flatten(0, 1), rows["agents", "action"])


def test_policy_leaves_only_the_action_behind():
    states = TensorDict({"observation": torch.zeros(3, 3)}, [3])
    assert set(policy(10)(states).keys()) == {"observation", "action"}


def test_no_candidate_is_refused(modules):
    with pytest.raises(ValueError, match="num_action_samples is 0"):
        policy(0)
    with pytest.raises(ValueError, match="num_action_samples is 100 and chunk_size 0; both must be at least 1"):
        BCQPolicy(*modules, chunk_size=0)


# Fixed latents


def test_deterministic_mode_gives_the_same_action_for_the_same_observation(modules, make_batch):
    acting, states = BCQPolicy(*modules), make_batch(8).select("observation")

    def act(mode: ExplorationType | None) -> torch.Tensor:
        with set_exploration_type(mode):
            return acting(states.clone())["action"]

    for mode in (ExplorationType.DETERMINISTIC, ExplorationType.MODE, ExplorationType.MEAN):
        assert torch.equal(act(mode), act(ExplorationType.DETERMINISTIC))
    for mode in (ExplorationType.RANDOM, None):
        assert (act(mode) != act(mode)).any(-1).sum() > 4  # two draws may share the corner of the clip that is best
    other = BCQPolicy(*modules, seed=1)
    assert not torch.equal(other.latents, acting.latents)
    other.load_state_dict(acting.state_dict())  # the latents belong to the policy
    assert torch.equal(other.latents, acting.latents)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        assert torch.equal(other(states.clone())["action"], act(ExplorationType.DETERMINISTIC))


def test_deterministic_action_by_hand(modules, make_batch):
    """The best candidate out of those that the policy's own latents make, one latent after the other."""
    vae, actor, critics = modules
    acting, states = BCQPolicy(*modules, num_action_samples=7), make_batch(5).select("observation")
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        action = acting(states.clone())["action"]
    best, expected = torch.full((5,), -torch.inf), torch.zeros(5, 2)
    for latent in acting.latents:
        td = critics.first(actor(vae.decode(states.clone(), latent.expand(5, -1))))
        value = td["state_action_value"][:, 0]
        expected = torch.where((value > best).unsqueeze(-1), td["action"], expected)
        best = torch.maximum(best, value)
    torch.testing.assert_close(action, expected)


@pytest.mark.parametrize("threads", [1, 2])
def test_two_deterministic_rollouts_from_one_seed_are_bitwise_equal(threads):
    torch.set_num_threads(threads)
    env = GymEnv("Pendulum-v1")
    acting = BCQPolicy(*make_bcq_modules(env.observation_spec, env.action_spec, hidden=(64,), vae_hidden=(64,)))
    rollouts = []
    for seed in (0, 1):
        torch.manual_seed(seed)  # has no effect
        env.set_seed(3)
        with set_exploration_type(ExplorationType.DETERMINISTIC):
            rollouts.append(env.rollout(60, acting))
    for key in ("action", "observation"):
        assert torch.equal(rollouts[0][key], rollouts[1][key])
    assert rollouts[0]["action"].unique().numel() > 20


def test_fixed_latents_leave_the_random_state_alone(modules):
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    BCQPolicy(*modules)
    assert torch.equal(torch.randn(3), expected)


# Memory, outputs, input


@pytest.mark.parametrize(("chunk_size", "largest"), [(1, 20), (50, 40), (60, 60), (10_000, 140)])
def test_candidates_are_evaluated_in_chunks(modules, make_batch, chunk_size, largest):
    """Seven states with 20 candidates each, never more than the chunk, or those of one state."""
    whole = BCQPolicy(*modules, num_action_samples=20)
    chunked = BCQPolicy(*modules, num_action_samples=20, chunk_size=chunk_size)
    states, sizes = make_batch(7, 1).select("observation"), []
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        expected = whole(states.clone())["action"]
        modules[0].decoder.register_forward_hook(lambda module, args, output: sizes.append(output[..., 0].numel()))
        torch.testing.assert_close(chunked(states.clone())["action"], expected)
    assert max(sizes) == largest
    assert sum(sizes) == 140


def test_chosen_value_and_candidates_on_demand(modules, make_batch):
    acting = BCQPolicy(*modules, num_action_samples=9, chunk_size=18, return_value=True, return_candidates=True)
    out = acting(make_batch(2, 3).select("observation"))
    assert set(out.keys()) == {"observation", *acting.out_keys}
    states = out.select("observation").unsqueeze(-1).expand(2, 3, 9).clone().set("action", out["candidates"])
    values = modules[2].first(states)["state_action_value"].squeeze(-1)
    torch.testing.assert_close(out["action_value"], values)
    torch.testing.assert_close(out["chosen_action_value"], values.amax(-1, keepdim=True))
    best = values.argmax(-1)
    for i in range(2):
        for j in range(3):
            assert torch.equal(out["action"][i, j], out["candidates"][i, j, best[i, j]])


def test_observations_of_another_dtype_are_refused(modules):
    states = TensorDict({"observation": torch.zeros(2, 3, dtype=torch.float64)}, [2])
    with pytest.raises(
        ValueError, match=r"observation has dtype torch.float64, but the networks have dtype torch.float32: wrap the"
    ):
        BCQPolicy(*modules)(states)


def test_no_states_no_actions(modules):
    assert BCQPolicy(*modules)(TensorDict({"observation": torch.zeros(0, 3)}, [0]))["action"].shape == (0, 2)


def test_rollout_in_an_environment():
    env = GymEnv("Pendulum-v1")
    vae, actor, critics = make_bcq_modules(env.observation_spec, env.action_spec, hidden=(8,), vae_hidden=(8,))
    rollout = env.rollout(20, BCQPolicy(vae, actor, critics))
    assert rollout.batch_size == (20,)
    assert env.action_spec.is_in(rollout["action"])
    assert rollout["action"].unique().numel() > 10


def test_behavior_cloning_is_the_decoder_alone(modules, make_batch):
    vae, _, _ = modules
    batch = make_batch(5).select("observation")
    torch.manual_seed(3)
    action = BehaviorCloningPolicy(vae)(batch.clone())["action"]
    torch.manual_seed(3)
    latent = torch.randn(5, 4).clamp(-0.5, 0.5)
    torch.testing.assert_close(action, vae.decode(batch.clone(), latent)["action"])
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        action = BehaviorCloningPolicy(vae)(batch.clone())["action"]
    torch.testing.assert_close(action, vae.decode(batch.clone(), torch.zeros(5, 4))["action"])


def test_policy_reads_what_only_the_critics_read(modules):
    vae, actor, _ = modules
    critics = QEnsemble(
        [TensorDictModule(nn.Bilinear(1, 2, 1), in_keys=["goal", "action"], out_keys=["value"]) for _ in range(2)]
    )
    policy = BCQPolicy(vae, actor, critics, num_action_samples=5)
    assert policy.in_keys == ["observation", "goal"]
    states = TensorDict({"observation": torch.randn(20, 3), "goal": torch.ones(20, 1)}, [20])
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        action = policy(states.clone())["action"]
        states["goal"] = -states["goal"]  # turns the order of a bilinear critic's values around, but for its bias
        assert ((policy(states)["action"] - action).abs().sum(-1) > 1e-3).all()


# Behaviours without parameters that learn


class NearestNeighbour(nn.Module):
    """Takes the action of the nearest state of the dataset; its latent is added."""

    observation_keys, action_key, latent_dim, latent_clip, loss_keys = ["observation"], "action", 2, 0.5, []

    def __init__(self, observation: torch.Tensor, action: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("observation", observation)
        self.register_buffer("action", action)

    def training_loss(self, tensordict, noise=None):
        return torch.zeros(tensordict.batch_size), {}

    def decode(self, tensordict, latent):
        distance = (tensordict["observation"].unsqueeze(-2) - self.observation).square().sum(-1)
        return tensordict.set("action", self.action[distance.argmin(-1)] + latent)


NEIGHBOURS = torch.tensor([[0.0, 0, 0], [10, 0, 0]]), torch.tensor([[0.0, 1.0], [0.0, 3.0]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_behaviour_without_parameters(dtype):
    """The mean latent is 0: the action of the nearest state itself. In BCQ the critic prefers an action of 0.3."""
    vae = NearestNeighbour(*(tensor.to(dtype) for tensor in NEIGHBOURS))
    critics = [TensorDictModule(NearObservation(sign), ["goal", "action"], ["value"]).to(dtype) for sign in (1.0, -1.0)]
    states = TensorDict({"observation": torch.tensor([[1.0, 2, 0], [9, 0, 0]], dtype=dtype)}, [2])
    states["goal"] = torch.full((2, 1), 0.3, dtype=dtype)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        assert BehaviorCloningPolicy(vae)(states.clone())["action"].tolist() == [[0, 1], [0, 3]]
        action = BCQPolicy(vae, None, QEnsemble(critics))(states.clone())["action"]
    torch.testing.assert_close(action[:, 0], torch.full((2,), 0.3, dtype=dtype), atol=0.05, rtol=0)
    assert (action[:, 1] - torch.tensor([1.0, 3.0])).abs().max() <= 0.5
    sampled = BehaviorCloningPolicy(vae)(states.clone())["action"]
    assert sampled.dtype == dtype
    assert (sampled - torch.tensor([[0, 1], [0, 3]])).abs().min() > 0


def test_behaviour_and_critics_without_parameters_or_buffers():
    """Latents then take the dtype of the observation, or PyTorch's default."""

    class Latent(NearestNeighbour):
        def __init__(self) -> None:
            nn.Module.__init__(self)

        def decode(self, tensordict, latent):
            return tensordict.set("action", latent)

    class Last(nn.Module):
        def forward(self, action):
            return action[..., -1:]

    action = BehaviorCloningPolicy(Latent())(observation=torch.zeros(5, 3, dtype=torch.float64))
    assert action.dtype == torch.float64
    assert action.unique().numel() > 3
    policy = BCQPolicy(Latent(), None, QEnsemble([TensorDictModule(Last(), ["action"], ["value"])]))
    assert policy(observation=torch.zeros(5, 3))[:, 1].tolist() == [0.5] * 5  # the clip, reached by 30% of latents


def test_frozen_behaviour(modules, make_batch):
    states = make_batch(5).select("observation")
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        expected = BCQPolicy(*modules)(states.clone())["action"]
        modules[0].requires_grad_(False)
        assert torch.equal(BCQPolicy(*modules)(states.clone())["action"], expected)


# Export


@pytest.mark.parametrize("settings", [{}, {"return_value": True, "return_candidates": True}], ids=["action", "all"])
@pytest.mark.parametrize("convert", EXPORTERS)
def test_exported_graph_takes_any_number_of_states(modules, convert, settings):
    """Without a wrapper; 1,000 states are more than the policy evaluates at once."""
    policy = BCQPolicy(*modules, num_action_samples=10, chunk_size=100, **settings)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        graph = EXPORTERS[convert](policy, torch.randn(4, 3))
        for number in (1, 4, 9, 1000):
            observation = torch.randn(number, 3)
            torch.testing.assert_close(graph(observation), policy(observation))


@pytest.mark.parametrize("make", [BCQPolicy, lambda vae, actor, critics: BehaviorCloningPolicy(vae)])
def test_latents_of_the_caller(modules, make_batch, make):
    """They replace the policy's own latents, for any batch dimensions."""
    policy, states = make(*modules), make_batch(2, 3).select("observation")
    latents = torch.randn(2, 3, *policy.latent_shape)
    with set_exploration_type(ExplorationType.RANDOM):
        action = policy(states.clone(), latents=latents)["action"]
        assert torch.equal(policy(states.clone(), latents=latents)["action"], action)
        torch.testing.assert_close(policy(states[1, 2].clone(), latents=latents[1, 2])["action"], action[1, 2])
        assert not torch.equal(policy(states.clone(), latents=-latents)["action"], action)
        with pytest.raises(ValueError, match=re.escape(f"expected {tuple(latents.shape)}")):
            policy(states.clone(), latents=latents[0])


def test_latents_of_the_caller_in_chunks(modules, make_batch):
    states = make_batch(7).select("observation")
    whole, parts = (BCQPolicy(*modules, num_action_samples=10, chunk_size=size) for size in (1000, 20))
    latents = torch.randn(7, *whole.latent_shape)
    torch.testing.assert_close(parts(states.clone(), latents=latents), whole(states.clone(), latents=latents))
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        own = whole.latents.expand(7, -1, -1)
        assert torch.equal(whole(states.clone(), latents=own)["action"], whole(states.clone())["action"])


@pytest.mark.parametrize("width", [1, 2, 3])
def test_critics_of_your_own_write_one_value_for_each_candidate(modules, make_batch, width):
    """Two values would choose each of the two action dimensions from another candidate."""

    class Own(TensorDictModuleBase):
        in_keys, out_keys = ["observation", "action"], ["value"]

        def forward(self, tensordict):
            return tensordict.set("value", torch.zeros(*tensordict.batch_size, width))

        first = forward

    policy, states = BCQPolicy(modules[0], None, Own()), make_batch(5).select("observation")
    if width == 1:
        assert policy(states)["action"].shape == (5, 2)
    else:
        message = (
            rf"critics write values of shape \(5, 100, {width}\), expected one value for each of the candidates \(5, 10"
        )
        with pytest.raises(ValueError, match=message):
            policy(states)
