from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.envs import GymEnv

from torchrl_bcq import (
    ActionVAE,
    BCQPolicy,
    BehaviorCloningPolicy,
    PerturbationActor,
    QEnsemble,
    make_bcq_modules,
)

from ..conftest import ACTION_SPEC


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


def test_policy_leaves_only_the_action_behind():
    states = TensorDict({"observation": torch.zeros(3, 3)}, [3])
    assert set(policy(10)(states).keys()) == {"observation", "action"}


def test_no_candidate_is_refused():
    with pytest.raises(ValueError, match="num_action_samples is 0"):
        policy(0)


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


def test_policy_reads_what_only_the_critics_read(modules):
    vae, actor, _ = modules
    critics = QEnsemble(
        [TensorDictModule(nn.Bilinear(1, 2, 1), in_keys=["goal", "action"], out_keys=["value"]) for _ in range(2)]
    )
    policy = BCQPolicy(vae, actor, critics, num_action_samples=5)
    assert policy.in_keys == ["observation", "goal"]
    assert policy(TensorDict({"observation": torch.randn(4, 3), "goal": torch.randn(4, 1)}, [4]))["action"].shape == (
        4,
        2,
    )
