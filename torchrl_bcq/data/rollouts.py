"""Rollouts of TorchRL's environments and collectors, as transitions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import TensorDictBase
from torchrl.data import TensorSpec

from torchrl_bcq.data.checks import Checks, DatasetError, check_finite
from torchrl_bcq.data.episodes import FLAGS, check_outcomes
from torchrl_bcq.data.transitions import report_cuts


def from_rollouts(
    rollouts: TensorDictBase | Sequence[TensorDictBase], *, action_spec: TensorSpec | None = None
) -> TensorDictBase:
    """Join TorchRL rollouts into flat transitions in float32, with their episodes numbered.

    An episode ends where ``done``, ``terminated`` or ``truncated`` is set, and ``done`` becomes their union. Wherever
    else a row's next observation is not the next row's, the row is marked as truncated; a warning is logged if these
    are most rows.

    Args:
        rollouts: of ``env.rollout`` or the batches of a collector, ``[T]`` or ``[*B, T]``. If several have the same
            ``*B``, each continues where the one before stopped. Padded steps (``("collector", "mask")``) are left out.
        action_spec: bounds that ``action`` must keep, if given.

    Returns:
        Batch size ``[N]``, a copy of the entries, which may be nested or images, and ``episode [N]``.

    Raises:
        DatasetError: if there is no step, a reward or flag is missing, or an entry is not finite or out of bounds.
    """
    parts = [rollouts] if isinstance(rollouts, TensorDictBase) else list(rollouts)
    for part in parts:
        if not isinstance(part, TensorDictBase) or not part.ndim:
            kind = type(part).__name__
            raise DatasetError(f"rollouts holds a {kind}; expected TensorDicts with steps, [T] or [*B, T].")
    parts = [part for part in parts if 0 not in part.batch_size]
    if not parts or not len(rows := _joined(parts)):
        raise DatasetError("rollouts is empty; there is nothing to learn from.")
    _check_keys(rows)
    check_outcomes(rows)
    rows = rows.apply(lambda value: value.float() if value.dtype == torch.float64 else value)
    _check_values(rows, action_spec)
    return _number_episodes(rows)


def _joined(parts: list[TensorDictBase]) -> TensorDictBase:
    """Join the parts to ``[N]``; parts with the same ``*B`` are joined along time first."""
    try:
        if len({part.batch_size[:-1] for part in parts}) == 1:
            return _flat(torch.cat(parts, -1))  # time is the last dimension
        return torch.cat([_flat(part) for part in parts])
    except Exception as error:  # tensordict raises many kinds for entries that differ
        raise DatasetError(
            f"the rollouts cannot be joined ({error}); each needs the same entries and widths."
        ) from error


def _flat(rollout: TensorDictBase) -> TensorDictBase:
    """``[*B, T]`` to ``[N]``, without the padding."""
    rows = rollout.reshape(-1)
    mask = rows.get(("collector", "mask"), None)
    rows = rows.exclude("collector", *FLAGS)
    return rows if mask is None else rows[mask]


def _check_keys(rows: TensorDictBase) -> None:
    needed = ["reward", "done", "terminated", *(["observation"] if "observation" in rows.keys() else [])]
    if missing := [key for key in needed if ("next", key) not in rows.keys(True)]:
        present = sorted(map(str, rows.keys(True, True)))
        raise DatasetError(f"the rollouts lack {missing} under 'next'; they hold {present}.")


def _check_values(rows: TensorDictBase, action_spec: TensorSpec | None) -> None:
    """Check what from_arrays checks, and that nested observations and images are finite."""
    after = rows["next"]
    columns = {"rewards": after["reward"], "terminated": after["terminated"]}
    others = [key for key in after.keys(True, True) if key in rows.keys(True, True)]
    if "action" in rows.keys():
        columns["actions"] = rows["action"]
    if "observation" in others and rows["observation"].ndim <= 2:
        others.remove("observation")
        columns |= {"observations": rows["observation"], "next_observations": after["observation"]}
    Checks(action_spec).check_all(columns)
    for key in others:
        check_finite(repr(key), rows[key])
        check_finite(f"{key!r} under 'next'", after[key])


def _number_episodes(rows: TensorDictBase) -> TensorDictBase:
    after, continues = rows["next"], torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    continues[-1:] = False
    for key, value in after.items(True, True):
        before = rows.get(key, None)
        if before is not None and before.shape == value.shape:
            continues[:-1] &= (value[:-1] == before[1:]).flatten(1).all(1)
    truncated = after.get("truncated", torch.zeros_like(after["done"]))
    done = after["done"] | after["terminated"] | truncated
    cut = ~done & ~continues.unsqueeze(-1)
    report_cuts(int(cut[:-1].sum()), len(cut))  # nothing follows the last row
    after.update({"truncated": truncated | cut, "done": done | cut})
    last = after["done"].squeeze(-1)
    return rows.set("episode", last.cumsum(0) - last.long())
