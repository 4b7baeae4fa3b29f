"""Trains with five critics of different architectures: four ValueOperators of TorchRL and a TensorDictSequential.

python examples/swap_critics.py
"""

import argparse

import torch
from pendulum_data import SMALL, mean_return, record, run, train
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.envs import GymEnv
from torchrl.modules import MLP, ValueOperator

from torchrl_bcq import BCQLoss, BCQPolicy, QEnsemble, make_bcq_modules


def make_critics(observations: int, actions: int) -> QEnsemble:
    """Make critics with equal in-keys and the same last out-key, ``[*B, 1]``. Actor and policy use the first critic."""
    sizes = {"in_features": observations + actions, "out_features": 1, "activation_class": nn.ReLU}
    norm = {"norm_class": nn.LayerNorm, "norm_kwargs": {"normalized_shape": 64}}
    keys, value = ["observation", "action"], ["state_action_value"]
    deep = {**sizes, "in_features": observations, "num_cells": [64], "out_features": 32, "activate_last_layer": True}
    features = TensorDictModule(MLP(**deep), ["observation"], ["features"])
    score = TensorDictModule(
        MLP(**{**sizes, "in_features": 32 + actions}, num_cells=[64]), ["features", "action"], value
    )
    return QEnsemble(
        [
            ValueOperator(MLP(**sizes, num_cells=[64, 64]), keys, value),
            ValueOperator(MLP(**sizes, num_cells=[256]), keys, value),
            ValueOperator(MLP(**sizes, num_cells=[32, 32, 32]), keys, value),
            ValueOperator(MLP(**sizes, num_cells=[64, 64], **norm), keys, value),
            TensorDictSequential(features, score),
        ]
    )


def main(steps: int) -> dict[str, float]:
    torch.manual_seed(0)
    env = GymEnv("Pendulum-v1")
    transitions = record(env)
    vae, actor, _ = make_bcq_modules(env.observation_spec, env.action_spec, **SMALL)
    critics = make_critics(observations=3, actions=1)
    train(BCQLoss(vae, actor, critics, lmbda=1.0), transitions, steps)  # with lmbda=1, the target uses the lowest value
    with torch.no_grad():
        spread = critics(transitions)["state_action_value"].std(-1).mean().item()
    returns = {"behaviour": mean_return(transitions), "bcq": mean_return(run(env, BCQPolicy(vae, actor, critics)))}
    return {**returns, "spread_of_critics": round(spread, 2)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000, help="gradient steps (default: %(default)s)")
    print(main(parser.parse_args().steps))
