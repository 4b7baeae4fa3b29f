"""Takes the bounds of each action dimension from the spec. An unbounded spec raises an error: pass your own bounds.

python examples/swap_action_bounds.py
"""

import argparse

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box
from gymnasium.wrappers import TransformAction
from pendulum_data import SMALL, mean_return, record, run, train
from torchrl.data import Bounded
from torchrl.envs import ActionScaling, GymEnv, GymWrapper, TransformedEnv

from torchrl_bcq import BCQLoss, BCQPolicy, make_bcq_modules


def two_motors(low, high) -> GymWrapper:
    """Return Pendulum-v1 with two motors: it adds their torques, which have the bounds ``low`` and ``high``."""
    box = Box(np.float32(low), np.float32(high), (2,))
    return GymWrapper(TransformAction(gymnasium.make("Pendulum-v1"), lambda a: a.sum(keepdims=True), box))


def learn(env, action_spec, transitions, steps) -> BCQPolicy:
    torch.manual_seed(0)  # both trainings start from the same weights
    networks = make_bcq_modules(env.observation_spec, action_spec, **SMALL)
    train(BCQLoss(*networks), transitions, steps)
    return BCQPolicy(*networks)


def main(steps: int) -> dict[str, float]:
    torch.manual_seed(0)
    transitions = record(GymEnv("Pendulum-v1"))
    transitions["action"] = transitions["action"] / 2 + torch.tensor([0.5, -0.5])  # their sum is unchanged
    env = two_motors(low=[-0.5, -1.5], high=[1.5, 0.5])
    rollout = run(env, learn(env, env.action_spec, transitions, steps))

    env = two_motors(low=-np.inf, high=np.inf)
    try:
        make_bcq_modules(env.observation_spec, env.action_spec)
    except ValueError as error:
        print(f"refused: {error}")
    # This replaces Tianshou's action_scaling: the networks act in [-1, 1], and ActionScaling scales the actions of the
    # dataset and of the environment. The bounds are the range of the recorded actions. Unbounded actions are not
    # possible, because the perturbation is a fraction of the action range.
    scaling = ActionScaling.from_stats(low=transitions["action"].amin(0), high=transitions["action"].amax(0))
    transitions["action"] = scaling.normalize(transitions["action"])
    env = TransformedEnv(env, scaling)
    scaled = run(env, learn(env, Bounded(-1, 1, (2,)), transitions, steps))
    return {"behaviour": mean_return(transitions), "bcq": mean_return(rollout), "bcq_scaled": mean_return(scaled)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000, help="gradient steps (default: %(default)s)")
    print(main(parser.parse_args().steps))
