"""What TorchRL's environments and collectors give, as transitions."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import product

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import TensorSpec

from torchrl_bcq.data.checks import Checks, DatasetError, Rows

_logger = logging.getLogger(__name__)
_ENDS = ("done", "terminated", "truncated")
_CHUNK = 2**16  # rows checked together, as checks copy them


def from_rollouts(
    rollouts: TensorDictBase | Sequence[TensorDictBase], *, action_spec: TensorSpec | None = None
) -> TensorDictBase:
    """Join TorchRL rollouts into flat transitions in float32, with their episodes numbered.

    Args:
        rollouts: of ``env.rollout`` or the batches of a collector, ``[T]`` or ``[*B, T]``; of several with the same
            ``*B``, each goes on where the one before stopped. Padded steps (``("collector", "mask")``) are left out.
            Entries keep their names; nested ones and images may be among them.
        action_spec: bounds that ``action`` must keep, if given.

    Returns:
        Batch size ``[N]``, a copy of the entries of the rollouts and ``episode [N]``. An episode ends where ``done``,
        ``terminated`` or ``truncated`` is set, and ``done`` becomes their union. Wherever else a row's next
        observation is not the next row's, its episode was cut off, and it is marked as truncated; a warning is logged
        if that is more than half of the rows.

    Raises:
        DatasetError: if there is no step, a reward or flag is missing, or an entry is not finite or out of bounds.
    """
    parts = [rollouts] if isinstance(rollouts, TensorDictBase) else list(rollouts)
    if odd := [part for part in parts if not isinstance(part, TensorDictBase) or not part.ndim]:
        raise DatasetError(
            f"rollouts holds a {type(odd[0]).__name__}; expected TensorDicts with steps, [T] or [*B, T]."
        )
    parts = [part for part in parts if 0 not in part.batch_size]
    rows = _joined(parts) if parts else None
    if rows is None or not len(rows):
        raise DatasetError("rollouts is empty; there is nothing to learn from.")
    _check_layout(rows)
    rows = rows.apply(lambda value: value.float() if value.dtype == torch.float64 else value)
    _check(rows, action_spec)
    return _number_episodes(rows)


def _joined(parts: list[TensorDictBase]) -> TensorDictBase:
    """``[N]``, each part or, of several that go on from one another, each of the ``*B`` after the one before."""
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
    rows = rows.exclude("collector", *_ENDS)
    return rows if mask is None else rows[mask]


def _check_layout(rows: TensorDictBase) -> None:
    needed = ["reward", "done", "terminated", *(["observation"] if "observation" in rows.keys() else [])]
    if missing := [key for key in needed if ("next", key) not in rows.keys(True)]:
        present = sorted(map(str, rows.keys(True, True)))
        raise DatasetError(f"the rollouts lack {missing} under 'next'; they hold {present}.")
    for key in {"reward", *_ENDS} & set(rows["next"].keys()):
        value = rows["next", key]
        if value.shape != (len(rows), 1) or (key in _ENDS and value.dtype != torch.bool):
            kind = "booleans" if key in _ENDS else "numbers"
            raise DatasetError(
                f"('next', {key!r}) has {value.dtype} of shape {tuple(value.shape)}, expected {kind} ({len(rows)}, 1)."
            )


def _check(rows: TensorDictBase, action_spec: TensorSpec | None) -> None:
    """What from_arrays checks, as far as it is there; of other observations, nested or images, that they are finite."""
    after = rows["next"]
    columns = {"rewards": after["reward"], "terminated": after["terminated"]}
    others = [key for key in after.keys(True, True) if key in rows.keys(True, True)]
    if "action" in rows.keys():
        columns["actions"] = rows["action"]
    if "observation" in others and rows["observation"].ndim <= 2:
        others.remove("observation")
        columns |= {"observations": rows["observation"], "next_observations": after["observation"]}
    checks = Checks(action_spec)
    for start in range(0, len(rows), _CHUNK):
        checks({name: value[start : start + _CHUNK] for name, value in columns.items()})
    checks.finish()
    for key, part in product(others, (rows, after)):
        bad = Rows()
        bad.add(~part[key].isfinite().reshape(len(rows), -1).all(1).cpu().numpy(), 0)
        if bad.count:
            where = " under 'next'" if part is after else ""
            raise DatasetError(f"{key!r}{where} has {bad} that are not finite in float32; drop or repair them.")


def _number_episodes(rows: TensorDictBase) -> TensorDictBase:
    after = rows["next"]
    truncated = after.get("truncated", torch.zeros_like(after["done"]))
    done = after["done"] | after["terminated"] | truncated
    cut = ~done & ~_continues(rows).unsqueeze(-1)
    _report(cut[:-1])  # nothing follows the last row
    after.update({"truncated": truncated | cut, "done": done | cut})
    last = after["done"].squeeze(-1)
    return rows.set("episode", last.cumsum(0) - last.long())


def _report(cut: Tensor) -> None:
    """Log when rows seem not to be in order; ``cut [N - 1, 1]`` is of all rows that another follows."""
    found = Rows()
    found.add(cut.squeeze(-1).cpu().numpy(), 0)
    if 2 * found.count > len(cut) + 1:
        _logger.warning(
            "%s of %d are cut off, each the end of an episode, as their next observation is not exactly the next "
            "row's observation: if they are steps of one episode, put them in order of time and copy each next "
            "observation from the row that follows",
            found,
            len(cut) + 1,
        )


def _continues(rows: TensorDictBase) -> Tensor:
    """Whether a row's next observation is the next row's observation, ``[N]``."""
    continues = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    continues[-1:] = False
    for key, after in rows["next"].items(True, True):
        before = rows.get(key, None)
        if before is not None and before.shape == after.shape:
            continues[:-1] &= (after[:-1] == before[1:]).flatten(1).all(1)
    return continues
