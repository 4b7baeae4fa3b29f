"""BCQPolicy in TorchRL's collectors, in this process and in others, and in vectorised environments."""

from __future__ import annotations

import copy
import functools
import inspect

import pytest
import torch
from tensordict import TensorDict
from torchrl.collectors import AsyncCollector, Collector, MultiAsyncCollector, MultiSyncCollector
from torchrl.envs import GymEnv, SerialEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_bcq import BCQPolicy, make_bcq_modules

make_env = functools.partial(GymEnv, "Pendulum-v1")
LIMIT, PUSH = 2.0, 1.5  # bound of the torque; what the new weights add before the decoder's tanh


@pytest.fixture
def policy() -> BCQPolicy:
    """A policy that acts near 0."""
    env = make_env()
    vae, actor, critics = make_bcq_modules(env.observation_spec, env.action_spec, hidden=(8,), vae_hidden=(8,))
    with torch.no_grad():
        vae.decoder[-1].weight.mul_(0.1)
    return BCQPolicy(vae, actor, critics, num_action_samples=10)


def trained(policy: BCQPolicy) -> BCQPolicy:
    """A copy with its own memory and other weights, as in a learner's process: all its actions are larger."""
    learned = copy.deepcopy(policy)
    with torch.no_grad():
        learned.vae.decoder[-1].bias.add_(PUSH)
    return learned


def collected(cls: type, policy: BCQPolicy, learned: BCQPolicy, **settings) -> list[TensorDict]:
    """Ten batches; the weights are sent after the second."""
    multi, batches = cls in (MultiSyncCollector, MultiAsyncCollector), []
    if "auto_register_policy_transforms" in inspect.signature(cls.__init__).parameters:
        settings["auto_register_policy_transforms"] = False
    create = [make_env, make_env] if multi else make_env
    collector = cls(create, policy, frames_per_batch=40, total_frames=400, **settings)
    try:
        collector.set_seed(0)
        for i, batch in enumerate(collector):
            batches.append(batch.clone())
            if i == 1:
                collector.update_policy_weights_(TensorDict.from_module(learned))
    finally:
        collector.shutdown()
    return batches


@pytest.mark.parametrize("cls", [Collector, AsyncCollector, MultiSyncCollector, MultiAsyncCollector])
def test_collects_receives_new_weights_and_acts_differently(policy, cls):
    batches = collected(cls, policy, trained(policy))
    means = [batch["action"].mean().item() for batch in batches]
    assert all(abs(mean) < 0.6 for mean in means[:2]), means
    # batches collected while the weights were sent may still come from the old ones
    assert all(mean > 1.2 for mean in means[8:]), means
    for batch in batches:
        assert batch["action"].abs().max() <= LIMIT
        assert batch["action"].unique().numel() > 20  # fresh latents at each step, in each worker


def test_two_workers_in_deterministic_mode_act_as_the_policy_here_does(policy):
    """The fixed latents travel to the workers with the weights."""
    learned = trained(policy)
    batches = collected(MultiSyncCollector, policy, learned, exploration_type=ExplorationType.DETERMINISTIC)
    for batch in batches[4:]:
        with set_exploration_type(ExplorationType.DETERMINISTIC):
            here = learned(batch.select("observation"))["action"]
        torch.testing.assert_close(batch["action"], here, atol=1e-5, rtol=0)


def test_vectorised_environment(policy):
    env = SerialEnv(3, make_env)
    env.set_seed(0)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        rollout = env.rollout(15, policy)
        alone = policy(rollout[1, 7:8].select("observation"))["action"][0]
    assert rollout.batch_size == (3, 15)
    torch.testing.assert_close(rollout["action"][1, 7], alone, atol=1e-5, rtol=0)
    assert not torch.equal(rollout["action"][0], rollout["action"][1])
