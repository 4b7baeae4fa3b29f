"""What the swap examples share: transitions of Pendulum-v1 recorded on the spot, training, and a policy's return."""

import torch
from tensordict.nn import TensorDictModule
from torchrl.objectives import SoftUpdate

from torchrl_bcq import BCQOptimizationStepper, BCQTrainer, make_replay_buffer
from torchrl_bcq.evaluation.recording import swing_up

RECORDED, EVALUATED, EPISODE_STEPS = 20, 10, 200  # episodes, and the steps of each
SMALL = {"hidden": (64, 64), "vae_hidden": (64, 64), "kl_weight": 0.05}  # networks that learn this in half a minute


def record(env, observation_keys=("observation",), action_key="action"):
    """Transitions ``[N]`` of a controller, mostly noise; the observations, joined, are the pole's cos, sin, speed."""
    behaviour = TensorDictModule(
        lambda *parts: swing_up(torch.cat(parts, -1), noise=10.0), in_keys=list(observation_keys), out_keys=[action_key]
    )
    return run(env, behaviour, RECORDED, seed=0)


@torch.no_grad()
def run(env, policy, episodes=None, seed=1):
    """Whole episodes, one after the other: the same initial states for each policy."""
    env.set_seed(seed)
    return env.rollout((episodes or EVALUATED) * EPISODE_STEPS, policy, break_when_any_done=False)


def mean_return(rollout, reward_key="reward"):
    """Sum of the rewards of an episode, on average."""
    return round(rollout["next"][reward_key].sum().item() * EPISODE_STEPS / len(rollout))


def train(loss, transitions, steps):
    """Offline, on the transitions alone."""
    loss.make_value_estimator(gamma=0.95)
    buffer = make_replay_buffer(transitions, batch_size=64, seed=0)
    updater, adam = SoftUpdate(loss, tau=0.02), BCQOptimizationStepper.adam(loss, lr=3e-3)
    BCQTrainer(loss, buffer, target_net_updater=updater, optimization_stepper=adam, total_steps=steps, seed=0).train()
