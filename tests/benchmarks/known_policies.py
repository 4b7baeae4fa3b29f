"""Policies with known values, as TensorDict policies: networks from ``.npz`` files, and the values from a JSON file.

A JSON file holds a list ``policies``. Each one names its network (``file``), how it acts (``kind``, ``epsilon`` or
``noise``) and its value ``discounted_no_time_limit``. A network has the arrays ``layer0_weight [out, in]``,
``layer0_bias``, and so on, and an ``activation``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torch.distributions import Categorical as CategoricalDistribution
from torchrl.data import Categorical, TensorSpec

ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU}
VALUE = "discounted_no_time_limit"


class KnownPolicy(TensorDictModuleBase):
    """A published agent, or a noisy version of one, or the uniform policy."""

    def __init__(self, entry: Mapping[str, Any], arrays: Mapping[str, np.ndarray], action_spec: TensorSpec) -> None:
        super().__init__()
        self.in_keys, self.out_keys = ["observation"], ["action"]
        self.kind, self.action_spec, self.noise = entry["kind"], action_spec, entry.get("noise", 0.0)
        self.epsilon = entry.get("epsilon", 0.0)
        self.constants = {name: value for name, value in arrays.items() if not name.startswith("layer")}
        layers: list[nn.Module] = []
        for i in range(sum(name.endswith("weight") for name in arrays)):
            weight, bias = (torch.from_numpy(arrays[f"layer{i}_{part}"]) for part in ("weight", "bias"))
            layer = nn.Linear(*reversed(weight.shape))
            layer.weight.data, layer.bias.data = weight, bias
            layers += [layer, ACTIVATIONS[str(arrays["activation"])]()]
        self.network = nn.Sequential(*layers[:-1])

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write a sampled action."""
        discrete = isinstance(self.action_spec, Categorical)
        action = self.get_dist(tensordict).sample() if discrete else self._draw(tensordict["observation"])
        return tensordict.set("action", action)

    def _output(self, observation: Tensor) -> Tensor:
        number = {
            name: torch.from_numpy(np.asarray(value))
            for name, value in self.constants.items()
            if value.dtype.kind == "f"
        }
        if "obs_mean" in number:
            observation = (observation - number["obs_mean"]) / number["obs_std"]
            observation = observation.clamp(-number["obs_clip"], number["obs_clip"])
        return self.network(observation.float())

    def _draw(self, observation: Tensor) -> Tensor:
        """Return actions of a continuous policy. ``[N, D] -> [N, A]``."""
        low, high = self.action_spec.space.low, self.action_spec.space.high
        if self.kind == "uniform":
            return low + (high - low) * torch.rand(len(observation), len(low))
        action = self._output(observation)
        if "mean_clip" in self.constants:
            limit = float(self.constants["mean_clip"])
            action = action.clamp(-limit, limit)
        if "squash" in self.constants:
            action = low + (action.tanh() + 1) / 2 * (high - low)
        return (action + self.noise * (high - low) / 2 * torch.randn_like(action)).clamp(low, high)

    def get_dist(self, tensordict: TensorDictBase) -> CategoricalDistribution:
        """Return the distribution of a discrete policy."""
        number, observation = self.action_spec.space.n, tensordict["observation"]
        uniform = torch.full((len(observation), number), 1 / number)
        if self.kind == "uniform":
            return CategoricalDistribution(probs=uniform)
        output = self._output(observation)
        best = nn.functional.one_hot(output.argmax(-1), number).float()
        probability = output.softmax(-1) if self.kind == "softmax" else best
        return CategoricalDistribution(probs=(1 - self.epsilon) * probability + self.epsilon * uniform)


def load_policies(file: Path, action_spec: TensorSpec) -> dict[str, tuple[TensorDictModuleBase, float, float]]:
    """Return the policies by name, each with its value and the standard error of its value."""
    found = {}
    for entry in json.loads(file.read_text())["policies"]:
        with np.load(file.parent / entry["file"], allow_pickle=False) if entry["file"] else nullcontext({}) as arrays:
            policy = KnownPolicy(entry, dict(arrays), action_spec)
        found[entry["name"]] = policy, entry[VALUE], entry[f"{VALUE}_sem"]
    return found
