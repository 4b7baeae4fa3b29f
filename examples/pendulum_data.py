"""Functions that the swap examples share: they record Pendulum-v1, train, and compute the return of a policy."""

import torch
from tensordict.nn import TensorDictModule
from torchrl.objectives import SoftUpdate

from torchrl_bcq import BCQTrainer, OfflineOptimizationStepper, make_replay_buffer
from torchrl_bcq.evaluation.recording import swing_up

RECORDED, EVALUATED, EPISODE_STEPS = 20, 10, 200  # recorded episodes, evaluated episodes, steps per episode
SMALL = {"hidden": (64, 64), "vae_hidden": (64, 64), "kl_weight": 0.05}  # small networks, which learn in half a minute


def record(env, observation_keys=("observation",), action_key="action"):
    """Record transitions ``[N]`` of a noisy controller. The observations must be the cos, sin and speed of the pole."""
    behaviour = TensorDictModule(
        lambda *parts: swing_up(torch.cat(parts, -1), noise=10.0), in_keys=list(observation_keys), out_keys=[action_key]
    )
    return run(env, behaviour, RECORDED, seed=0)


@torch.no_grad()
def run(env, policy, episodes=None, seed=1):
    """Run whole episodes, one after another; with the same seed, each policy starts from the same states."""
    env.set_seed(seed)
    return env.rollout((episodes or EVALUATED) * EPISODE_STEPS, policy, break_when_any_done=False)


def mean_return(rollout, reward_key="reward"):
    """Mean undiscounted return of the episodes."""
    return round(rollout["next"][reward_key].sum().item() * EPISODE_STEPS / len(rollout))


def train(loss, transitions, steps):
    """Train on the transitions only, without the environment."""
    loss.make_value_estimator(gamma=0.95)
    buffer = make_replay_buffer(transitions, batch_size=64, seed=0)
    updater, adam = SoftUpdate(loss, tau=0.02), OfflineOptimizationStepper.adam(loss, lr=3e-3)
    BCQTrainer(loss, buffer, target_net_updater=updater, optimization_stepper=adam, total_steps=steps, seed=0).train()
