"""A policy as a function of tensors, from raw observations to actions, and the description of its inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.envs.utils import ExplorationType, set_exploration_type


@dataclass(frozen=True)
class Port:
    """An input or an output of the graph. Its first dimension is the batch.

    Args:
        name: name in the graph.
        kind: ``observation``, ``mask``, ``history``, ``start`` or ``latents`` of inputs; ``action``, ``output`` or
            ``history`` of outputs.
        shape: shape without the batch.
        dtype: dtype of its numbers.
        key: key of the entry in the policy's tensordict.
        facts: other facts, such as bounds.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    key: NestedKey = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """Return plain values for the description in the file."""
        key = [self.key] if isinstance(self.key, str) else [*self.key]
        dtype = str(self.dtype).removeprefix("torch.")
        return {"name": self.name, "kind": self.kind, "key": key, "shape": [*self.shape], "dtype": dtype, **self.facts}


class PolicyGraph(nn.Module):
    """Computes the outputs of a policy from raw observations, without random numbers of its own.

    If the policy reads a short history (``policy.stack > 1``), the graph also reads the observations of the steps
    before, and returns those for the next step. Where the input ``start`` is true, an episode starts, and its first
    observation is repeated, as ``History`` does.

    Args:
        policy: a policy on the CPU, in evaluation mode.
        states: states for this policy, one tensor ``[N, ...]`` for each of its in-keys.
        latents: whether the latents are an input. Otherwise, the policy uses its fixed latents.

    Raises:
        ValueError: if ``latents`` is true, but the policy has no latents.
    """

    def __init__(self, policy: TensorDictModuleBase, states: Mapping[NestedKey, Tensor], latents: bool) -> None:
        """Find the inputs and outputs of the policy."""
        super().__init__()
        self.policy = policy
        self.stack = getattr(policy, "stack", 1)
        mask = getattr(policy, "mask_key", None)
        self.states = [_observation(key, states[key], mask, self.stack) for key in policy.in_keys]
        self.inputs = [*self.states, *(self._histories() if self.stack > 1 else ())]
        if latents:
            shape = getattr(policy, "latent_shape", None)
            if shape is None:
                raise ValueError(f"latents is True, but a {type(policy).__name__} has no latents; leave it out.")
            clip = {"clip": policy.latent_clip if math.isfinite(policy.latent_clip) else 1e9}
            dtype = next(port.dtype for port in self.states if port.dtype.is_floating_point)
            self.inputs.append(Port("latents", "latents", shape, dtype, facts=clip))
        outputs = self(*self.example({key: value[:2] for key, value in states.items()}))
        self.outputs = [
            Port(_name(key), "output" if number else "action", tuple(value.shape[1:]), value.dtype, key)
            for number, (key, value) in enumerate(zip(policy.out_keys, outputs, strict=False))
        ]

    def _histories(self) -> list[Port]:
        past = [
            Port(f"{port.name}_history", "history", ((self.stack - 1) * port.shape[0], *port.shape[1:]), port.dtype)
            for port in self.states
            if port.kind == "observation"
        ]
        return [*past, Port("start", "start", (), torch.bool)]

    @property
    def output_names(self) -> list[str]:
        """Names of all outputs; the histories for the next step come last."""
        return [port.name for port in self.outputs] + [f"next_{p.name}" for p in self.inputs if p.kind == "history"]

    def example(self, states: Mapping[NestedKey, Tensor]) -> tuple[Tensor, ...]:
        """Return inputs of the graph, made from states ``[N, ...]`` at the start of an episode."""
        number = len(next(iter(states.values())))
        given = {port.name: current(states[port.key], port, self.stack) for port in self.states}
        for port in self.inputs:
            if port.name not in given:
                given[port.name] = torch.zeros(number, *port.shape, dtype=port.dtype)
        if "start" in given:
            given["start"] = ~given["start"]
        return tuple(given[port.name] for port in self.inputs)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs of the policy, and the histories for the next step."""
        given = {port.name: value for port, value in zip(self.inputs, inputs, strict=True)}
        states, histories = {}, []
        for port in self.states:
            value = given[port.name]
            if self.stack > 1 and port.kind == "observation":
                start = given["start"].reshape(-1, *[1] * len(port.shape))
                first = value.repeat(1, self.stack - 1, *[1] * (len(port.shape) - 1))
                past = torch.where(start, first, given[f"{port.name}_history"])
                value = torch.cat([past, value], 1)  # [B, stack * D]
                histories.append(value[:, port.shape[0] :])
            states[port.key] = value
        latents = {"latents": given["latents"]} if "latents" in given else {}
        with set_exploration_type(ExplorationType.DETERMINISTIC):
            found = self.policy(TensorDict(states, [inputs[0].shape[0]]), **latents)
        return *(found.get(key) for key in self.policy.out_keys), *histories


def current(state: Tensor, port: Port, stack: int) -> Tensor:
    """Return the last of the observations that states ``[N, stack * D]`` join, ``[N, D]``. A mask has no history."""
    return state[:, (stack - 1) * port.shape[0] :] if stack > 1 and port.kind == "observation" else state


def _observation(key: NestedKey, value: Tensor, mask: NestedKey | None, stack: int) -> Port:
    size, *others = value.shape[1:]
    if key == mask:
        return Port(_name(key), "mask", (size,), torch.bool, key)
    return Port(_name(key), "observation", (size // stack, *others), value.dtype, key)


def _name(key: NestedKey) -> str:
    return key if isinstance(key, str) else ".".join(map(str, key))
