"""Compares an exported policy with the policy it was made from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_bcq.errors import RunError
from torchrl_bcq.export.exported_policy import ExportedPolicy
from torchrl_bcq.export.graph import PolicyGraph, Port, current
from torchrl_bcq.modules.history import History


def largest_difference(file: Path, graph: PolicyGraph, states: Mapping[NestedKey, Tensor], number: int) -> float:
    """Return the largest relative difference between the outputs of the file and of the policy.

    The difference of two actions is divided by the range of the actions, if the range is known. Other differences are
    divided by the size of the policy's output. Several candidates can have equal values. Rounding then decides which
    one is chosen, and each choice is correct. If the file chooses another candidate, the difference between the two
    values counts, divided by the range of the values in this state.

    Args:
        file: exported policy.
        graph: the graph that was exported. Its policy is changed: from now on, it also writes its candidates.
        states: states ``[N, ...]`` of the policy by key. If a state joins several observations, the last one is used,
            and the comparison goes on for several steps; then every second row starts a new episode.
        number: number of states in each call.
    """
    exported, policy = _run_or_refuse(ExportedPolicy, file), graph.policy
    if hasattr(policy, "set_outputs"):
        policy.set_outputs(value=True, candidates=True)
    histories = {
        port.key: History(graph.stack, -len(port.shape)) for port in graph.states if port.kind == "observation"
    }
    histories = histories if graph.stack > 1 else {}
    random, largest = torch.Generator().manual_seed(number), 0.0
    for step in range(graph.stack + 1):
        if step == graph.stack:
            starts = torch.arange(number) % 2 == 0
            exported.reset(starts.numpy())
            for history in histories.values():
                history.reset(starts.numpy())
        rows = (torch.arange(number) + step) % len(next(iter(states.values())))
        given = {port.key: current(states[port.key][rows], port, graph.stack) for port in graph.states}
        joined = {key: histories[key](value) if key in histories else value for key, value in given.items()}
        latents = [
            torch.randn(number, *port.shape, dtype=port.dtype, generator=random)
            for port in graph.inputs
            if port.kind == "latents"
        ]
        arrays = {port.name: given[port.key].numpy() for port in graph.states}
        found = _run_or_refuse(exported, arrays, *(value.numpy() for value in latents))
        with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
            expected = policy(TensorDict(joined, [number]), *latents)
        for port in graph.outputs:
            largest = max(largest, float(_output_difference(torch.from_numpy(found[port.name]), expected, port).max()))
    return largest


def _run_or_refuse(call: Callable[..., Any], *arguments: Any) -> Any:
    """Call ``call``; raise a RunError if onnxruntime raises an error."""
    try:
        return call(*arguments)
    except Exception as error:  # onnxruntime has an exception class for each cause, without a common base class
        raise RunError(f"onnxruntime cannot run the file, so no file is written: {error}") from error


def _output_difference(got: Tensor, expected: TensorDictBase, port: Port) -> Tensor:
    """Return the largest difference of each row of an output, ``[N]``."""
    wanted = expected.get(port.key)
    if got.shape != wanted.shape:
        return torch.full(got.shape[:1], torch.inf)
    size = wanted.double().abs()
    scale = torch.maximum(size, size[size.isfinite()].amax().clamp_max(1)) if size.isfinite().any() else size
    if "low" in port.facts:
        scale = torch.tensor(port.facts["high"]).double() - torch.tensor(port.facts["low"]).double()
    direct = difference(got, wanted, scale)
    candidates, value = expected.get("candidates", None), expected.get("action_value", None)
    if port.kind != "action" or candidates is None:
        return direct
    if candidates.dtype == torch.bool:  # [N, K], which actions are allowed
        one_hot = got if got.shape == candidates.shape else torch.nn.functional.one_hot(got.flatten(), value.shape[-1])
        is_one = (one_hot != 0) & ((one_hot != 0).sum(-1, keepdim=True) == 1)
        apart = torch.where(candidates & is_one, 0.0, torch.inf)
        value = value.masked_fill(~candidates, -torch.inf)
    else:
        scale = scale if "low" in port.facts else scale[:, None]
        apart = ((got[:, None].double() - candidates) / scale).abs().amax(-1)  # [N, n, A] -> [N, n]
    allowed = torch.maximum(apart, shortfall(value)).nan_to_num(nan=torch.inf, posinf=torch.inf)
    return torch.minimum(direct, allowed.amin(-1))


def difference(got: Tensor, wanted: Tensor, scale: Tensor) -> Tensor:
    """Return the largest of ``|got - wanted| / scale`` in each row. ``[N, ...], [N, ...] -> [N]``."""
    got, wanted = got.double(), wanted.double()
    error = torch.where(got == wanted, 0, (got - wanted).abs() / scale)  # infinite numbers may be equal
    error = error.masked_fill(error.isnan(), torch.inf)
    return error.flatten(1).amax(1) if error.ndim > 1 else error


def shortfall(value: Tensor) -> Tensor:
    """Return how much lower each value is than the best one of its row, relative to their range. ``[N, n] -> [N, n]``.

    If the range is below 1 % of the best value, 1 % of the best value is used, because rounding limits the accuracy.
    """
    value = value.double()
    best = value.amax(-1, keepdim=True)
    spread = best - torch.where(value.isfinite(), value, best).amin(-1, keepdim=True)
    return torch.where(value == best, 0, (best - value) / torch.maximum(spread, best.abs() / 100))
