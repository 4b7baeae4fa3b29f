"""Trains on nested observations: the networks read every entry of the spec, under the keys of the environment.

python examples/swap_dict_observations.py
"""

import argparse

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box, Dict
from pendulum_data import SMALL, mean_return, record, run, train
from torchrl.envs import GymWrapper

from torchrl_bcq import BCQLoss, BCQPolicy, make_bcq_modules

KEYS = [("pole", "cos"), ("pole", "sin"), "speed"]


class DictPendulum(gymnasium.ObservationWrapper):
    """Pendulum-v1 with the nested observation ``{"pole": {"cos": [1], "sin": [1]}, "speed": [1]}``, in float32."""

    observation_space = Dict(pole=Dict(cos=Box(-1, 1, (1,)), sin=Box(-1, 1, (1,))), speed=Box(-8, 8, (1,)))

    def observation(self, observation):
        cos, sin, speed = np.split(observation, 3)
        return {"pole": {"cos": cos, "sin": sin}, "speed": speed}


def main(steps: int) -> dict[str, float]:
    torch.manual_seed(0)
    env = GymWrapper(DictPendulum(gymnasium.make("Pendulum-v1")))
    transitions = record(env, KEYS)
    vae, actor, critics = make_bcq_modules(env.observation_spec, env.action_spec, **SMALL)  # takes a Composite spec
    train(BCQLoss(vae, actor, critics), transitions, steps)
    return {"behaviour": mean_return(transitions), "bcq": mean_return(run(env, BCQPolicy(vae, actor, critics)))}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000, help="gradient steps (default: %(default)s)")
    print(main(parser.parse_args().steps))
