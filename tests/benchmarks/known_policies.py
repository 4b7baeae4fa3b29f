"""Policies whose values are known, as TensorDict policies, from a folder of datasets and policies.

The folder holds, for each task, ``{task}-*.hdf5``, ``{task}-policies.json`` with the values and ``policies/*.npz`` with
the weights. ``load`` returns the policies of one task.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
from torch import Tensor, nn
from torch.distributions import Categorical
from torchrl.data import TensorSpec

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "relu": torch.relu}


@dataclass(frozen=True)
class Known:
    """A policy, its true value at the discount factor ``gamma``, and the standard error of this value."""

    name: str
    policy: Any
    value: float
    error: float
    gamma: float


class Agent(nn.Module):
    """The network of a published agent. ``[B, D] -> [B, K]`` or ``[B, A]``."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        with np.load(path, allow_pickle=False) as file:
            held = dict(file)
        self.held = {name: torch.from_numpy(held[name]) for name in held if held[name].dtype.kind == "f"}
        self.activation = ACTIVATIONS[str(held["activation"])]
        self.squash = str(held.get("squash", ""))
        self.depth = sum(name.endswith("_weight") for name in held)

    def forward(self, x: Tensor) -> Tensor:
        held = self.held
        if "obs_mean" in held:
            clip = float(held["obs_clip"])
            x = ((x - held["obs_mean"]) / held["obs_std"]).clamp(-clip, clip).float()
        for i in range(self.depth):
            x = torch.nn.functional.linear(x, held[f"layer{i}_weight"], held[f"layer{i}_bias"])
            x = self.activation(x) if i < self.depth - 1 else x
        if "mean_clip" in held:
            x = x.clamp(-float(held["mean_clip"]), float(held["mean_clip"]))
        return x


def load(folder: Path, task: str, action_spec: TensorSpec) -> list[Known]:
    """Return the policies of a task, in the order of the file."""
    facts = json.loads((folder / f"{task}-policies.json").read_text())
    make = _discrete if hasattr(action_spec, "n") else _continuous
    return [
        Known(
            one["name"],
            make(Agent(folder / one["file"]) if one["file"] else None, one, action_spec),
            one["discounted_no_time_limit"],
            one["discounted_no_time_limit_sem"],
            facts["gamma"],
        )
        for one in facts["policies"]
    ]


def _discrete(agent: Agent | None, facts: dict[str, Any], spec: TensorSpec) -> nn.Module:
    def probabilities(x: Tensor) -> Tensor:
        uniform = torch.full((*x.shape[:-1], spec.n), 1 / spec.n)
        if agent is None:
            return uniform
        scores = agent(x)
        chosen = scores.softmax(-1)
        if facts["kind"] == "greedy":
            chosen = nn.functional.one_hot(scores.argmax(-1), spec.n).to(scores.dtype)
        return (1 - facts["epsilon"]) * chosen + facts["epsilon"] * uniform

    return ProbabilisticTensorDictSequential(
        TensorDictModule(probabilities, ["observation"], ["probs"]),
        ProbabilisticTensorDictModule(["probs"], ["action"], distribution_class=Categorical),
    )


def _continuous(agent: Agent | None, facts: dict[str, Any], spec: TensorSpec) -> nn.Module:
    low, high = spec.low, spec.high

    def act(x: Tensor) -> Tensor:
        if agent is None:
            return low + torch.rand(len(x), len(low)) * (high - low)
        action = agent(x)
        if agent.squash == "tanh":
            action = low + (action.tanh() + 1) / 2 * (high - low)
        return (action + facts["noise"] * (high - low) / 2 * torch.randn_like(action)).clamp(low, high)

    return TensorDictModule(act, ["observation"], ["action"])
