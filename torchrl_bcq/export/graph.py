"""A policy as a function of tensors, from raw observations to actions, and the description of its inputs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_bcq.modules.acting import Policy, tensor_like


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

    If the policy reads a short history (``policy.stack > 1``), the graph also takes the previous observations as an
    input, and returns the updated history for the next step. Where the input ``start`` is true, an episode starts, and
    its first observation is repeated, as ``History`` does.

    Args:
        policy: a policy on the CPU, in evaluation mode.
        states: states for this policy, one tensor ``[N, ...]`` for each of its in-keys.
        action_key: the out-key that holds the action. It becomes the first output.
        bounds: facts about the action, such as its bounds ``low`` and ``high``.
        latents: whether the latents are an input. Otherwise, the policy uses its fixed latents.

    Raises:
        ValueError: if ``latents`` is true, but the policy has no latents; if the policy does not write ``action_key``;
            or if two inputs or outputs have the same name.
    """

    def __init__(
        self,
        policy: TensorDictModuleBase,
        states: Mapping[NestedKey, Tensor],
        action_key: NestedKey,
        bounds: Mapping[str, Any],
        latents: bool,
    ) -> None:
        """Find the inputs and outputs of the policy."""
        super().__init__()
        self.policy = policy
        own = policy if isinstance(policy, Policy) else Policy()  # others may have attributes of these names
        self.stack, mask = own.stack, own.mask_key
        self.states = [_observation(key, states[key], mask, self.stack) for key in policy.in_keys]
        self.inputs = [*self.states, *(self._histories() if self.stack > 1 else ())]
        if latents:
            if own.latent_shape is None:
                raise ValueError(f"latents is True, but {type(policy).__name__} has no latents; use latents=False.")
            clip = {"clip": own.latent_clip if math.isfinite(own.latent_clip) else None}
            dtype = tensor_like(policy, default=torch.empty(0)).dtype
            self.inputs.append(Port("latents", "latents", own.latent_shape, dtype, facts=clip))
        _check_names([port.name for port in self.inputs])
        if action_key not in policy.out_keys:
            raise ValueError(
                f"the policy writes {[*policy.out_keys]}, but not {action_key!r}; pass another action_key."
            )
        self.out_keys = [action_key, *(key for key in policy.out_keys if key != action_key)]
        outputs = self(*self.example({key: value[:2] for key, value in states.items()}))
        self.outputs = [
            Port(_name(key), "output", tuple(value.shape[1:]), value.dtype, key)
            for key, value in zip(self.out_keys, outputs, strict=False)
        ]
        self.outputs[0] = replace(self.outputs[0], kind="action", facts=bounds)
        _check_names([port.name for port in self.inputs] + self.output_names)

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
        return *(found.get(key) for key in self.out_keys), *histories


def current(state: Tensor, port: Port, stack: int) -> Tensor:
    """Return the last of the observations that states ``[N, stack * D]`` join, ``[N, D]``. A mask has no history."""
    return state[:, (stack - 1) * port.shape[0] :] if stack > 1 and port.kind == "observation" else state


def _observation(key: NestedKey, value: Tensor, mask: NestedKey | None, stack: int) -> Port:
    shape = tuple(value.shape[1:])
    if key == mask:
        return Port(_name(key), "mask", shape, torch.bool, key)
    if stack > 1:
        shape = (shape[0] // stack, *shape[1:])
    return Port(_name(key), "observation", shape, value.dtype, key)


def _check_names(names: list[str]) -> None:
    if several := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"several inputs or outputs have the names {several}; rename the policy's entries.")


def _name(key: NestedKey) -> str:
    return key if isinstance(key, str) else ".".join(map(str, key))
