"""Compares an exported policy with the policy it was made from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_bcq.export.exported_policy import ExportedPolicy
from torchrl_bcq.export.graph import PolicyGraph, current
from torchrl_bcq.modules.history import History


def largest_difference(file: Path, graph: PolicyGraph, states: Mapping[NestedKey, Tensor], number: int) -> float:
    """Return the largest difference between the outputs of the file and of the policy, for ``number`` states at once.

    The difference of two numbers is ``|file - policy| / max(1, |policy|)``. A policy that takes the best of several
    candidates may have two candidates of equal value. Rounding then decides which one it takes, and both are right. If
    the action of the file is another candidate, the difference of their values counts.

    Args:
        file: exported policy.
        graph: the graph that was exported.
        states: states ``[N, ...]`` of the policy by key. If a state joins several observations, the last one is used,
            and the comparison goes on for several steps.
        number: number of states in each call.
    """
    exported, policy = ExportedPolicy(file), graph.policy
    if hasattr(policy, "set_outputs"):
        policy.set_outputs(value=True, candidates=True)
    histories = {
        port.key: History(graph.stack, -len(port.shape)) for port in graph.states if port.kind == "observation"
    }
    random, largest = torch.Generator().manual_seed(number), 0.0
    for step in range(graph.stack + 1):
        rows = (torch.arange(number) + step) % len(next(iter(states.values())))
        given = {port.key: current(states[port.key][rows], port, graph.stack) for port in graph.states}
        joined = {key: histories[key](value) if key in histories else value for key, value in given.items()}
        latents = [
            torch.randn(number, *port.shape, dtype=port.dtype, generator=random)
            for port in graph.inputs
            if port.kind == "latents"
        ]
        found = exported(
            {port.name: given[port.key].numpy() for port in graph.states}, *(value.numpy() for value in latents)
        )
        with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
            expected = policy(TensorDict(joined, [number]), *latents)
        for port in graph.outputs:
            got = torch.from_numpy(found[port.name])
            compare = _action_difference if port.kind == "action" else _difference
            largest = max(largest, float(compare(got, expected.get(port.key), expected).max()))
    return largest


def _difference(got: Tensor, wanted: Tensor, expected: Any = None) -> Tensor:
    """Return the largest difference of each row. ``[N, ...], [N, ...] -> [N]``."""
    if got.shape != wanted.shape:
        return torch.full(got.shape[:1], torch.inf)
    got, wanted = got.double(), wanted.double()
    error = torch.where(got == wanted, 0, (got - wanted).abs() / wanted.abs().clamp_min(1))  # infinite ones are equal
    error = error.masked_fill(error.isnan(), torch.inf)
    return error.flatten(1).amax(1) if error.ndim > 1 else error


def _action_difference(got: Tensor, wanted: Tensor, expected: TensorDictBase) -> Tensor:
    """Return the difference of each row; another candidate of equal value does not differ. ``-> [N]``."""
    direct = _difference(got, wanted)
    candidates, value = expected.get("candidates", None), expected.get("action_value", None)
    if candidates is None or got.shape != wanted.shape:
        return direct
    if candidates.dtype == torch.bool:  # [N, K], which actions are allowed
        index = got.int().argmax(-1) if got.shape == candidates.shape else got.flatten()  # one-hot vectors, or indices
        apart = torch.where(candidates & (torch.arange(candidates.shape[-1]) == index[:, None]), 0, torch.inf)
        value = value.masked_fill(~candidates, -torch.inf)
    else:
        apart = ((got[:, None] - candidates).abs() / candidates.abs().clamp_min(1)).amax(-1)  # [N, n, A] -> [N, n]
    best = value.amax(-1, keepdim=True)
    worse = (best - value) / best.abs().clamp_min(1)
    return torch.minimum(direct, torch.maximum(apart, worse).amin(-1).double())
