"""Trains without a perturbation actor: policy and target choose among unchanged samples of the behaviour model.

python examples/swap_no_perturbation.py
"""

import argparse

import torch
from pendulum_data import SMALL, mean_return, record, run, train
from torchrl.envs import GymEnv

from torchrl_bcq import BCQLoss, BCQPolicy, make_bcq_modules


def main(steps: int) -> dict[str, float]:
    torch.manual_seed(0)
    env = GymEnv("Pendulum-v1")
    transitions = record(env)
    vae, _, critics = make_bcq_modules(env.observation_spec, env.action_spec, **SMALL)
    train(BCQLoss(vae, None, critics), transitions, steps)
    return {"behaviour": mean_return(transitions), "bcq": mean_return(run(env, BCQPolicy(vae, None, critics)))}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000, help="gradient steps (default: %(default)s)")
    print(main(parser.parse_args().steps))
