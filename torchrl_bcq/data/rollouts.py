"""Converts rollouts of TorchRL environments and collectors to transitions."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from tensordict import TensorDictBase
from torchrl.data import TensorSpec

from torchrl_bcq.data.checks import Checks
from torchrl_bcq.data.episodes import FLAGS, check_finite, check_outcomes, check_single_steps
from torchrl_bcq.data.transitions import report_cuts
from torchrl_bcq.errors import DatasetError

_logger = logging.getLogger(__name__)


def from_rollouts(
    rollouts: TensorDictBase | Sequence[TensorDictBase], *, action_spec: TensorSpec | None = None
) -> TensorDictBase:
    """Join TorchRL rollouts into flat transitions, number their episodes, and convert float64 to float32.

    An episode ends where ``done``, ``terminated`` or ``truncated`` is set. In all these rows, ``done`` becomes true.
    A row without a true flag is marked as truncated in two cases: the row is the last one of its environment, or its
    next observation differs from the observation of the following row. A warning is logged if more than half of the
    rows are truncated in this way.

    Args:
        rollouts: results of ``env.rollout`` or batches of a collector, each ``[T]`` or ``[*B, T]``. If all rollouts
            have the same ``*B``, the rollouts are joined along time: each rollout continues the previous rollout.
            Padded steps, where ``("collector", "mask")``, or ``mask [*B, T]``, is false, are left out. So are the
            copies of a final step with which ``env.rollout(..., break_when_all_done=True)`` waits for the other
            environments.
        action_spec: if given, ``action`` must lie within its bounds.

    Returns:
        Transitions of batch size ``[N]``: a copy of the entries of the rollouts, and the episode numbers ``episode
        [N]``. Nested entries and images are allowed.

    Raises:
        DatasetError: if there are no steps, the reward or a flag is missing, a row spans several steps, a value is not
            finite, an action is out of bounds, or all rewards, actions or observations are zero.

    Example:
        >>> from torchrl.envs import GymEnv
        >>> from torchrl_bcq import from_rollouts
        >>> rollout = GymEnv("Pendulum-v1").rollout(450, break_when_any_done=False)
        >>> from_rollouts(rollout)["episode"].bincount().tolist()
        [200, 200, 50]
    """
    parts = [rollouts] if isinstance(rollouts, TensorDictBase) else list(rollouts)
    for part in parts:
        if not isinstance(part, TensorDictBase) or not part.ndim:
            kind = type(part).__name__
            raise DatasetError(f"rollouts holds a {kind}; expected TensorDicts of batch size [T] or [*B, T].")
    parts = [part for part in parts if 0 not in part.batch_size]
    if len([part for part in parts if "group" in part.keys()]) > 1:
        _logger.warning(
            "several rollouts have group numbers, and equal numbers become one group. If the numbers of two rollouts "
            "have other meanings, read all files with one load_transitions, or number the groups anew."
        )
    if not parts or not len(rows := _joined(parts)):
        raise DatasetError("rollouts is empty; pass at least one step.")
    last = rows.pop("_last")
    check_single_steps(rows)
    _check_keys(rows)
    check_outcomes(rows)
    rows = rows.apply(lambda value: value.float() if value.dtype == torch.float64 else value)
    _check_values(rows, action_spec)
    return _number_episodes(rows, last)


def _joined(parts: list[TensorDictBase]) -> TensorDictBase:
    """Join all rollouts into one TensorDict ``[N]``; rollouts with the same ``*B`` are joined along time.

    The entry ``_last [N]`` is true at the last step of each environment.
    """
    try:
        parts = [_with_kept(part) for part in parts]
        if len({part.batch_size[:-1] for part in parts}) == 1:
            return _flat(torch.cat(parts, -1))  # time is the last dimension
        return torch.cat([_flat(part) for part in parts])
    except Exception as error:  # tensordict raises various exceptions if entries differ
        raise DatasetError(
            f"the rollouts cannot be joined ({error}); all rollouts need the same entries with the same shapes."
        ) from error


def _with_kept(rollout: TensorDictBase) -> TensorDictBase:
    """Add the entry ``_kept [*B, T]``, which is false in padded steps and in copies of final steps."""
    kept, names = rollout.get(("collector", "mask"), None), ["collector", *FLAGS]
    if kept is None and getattr(rollout.get("mask", None), "shape", None) == rollout.shape:  # of split_trajectories
        kept = rollout["mask"].bool()
        names.append("mask")
    kept = ~_copies(rollout) if kept is None else kept
    if kept.shape != rollout.shape:
        raise ValueError(f"the mask has shape {tuple(kept.shape)}, expected {tuple(rollout.shape)}")
    return rollout.exclude(*names).set("_kept", kept)


def _copies(rollout: TensorDictBase) -> torch.Tensor:
    """Return which steps ``[*B, T]`` are copies of a final step, at the end of an environment's steps."""
    none = torch.zeros(rollout.batch_size, dtype=torch.bool, device=rollout.device)
    if rollout.ndim < 2 or ("next", "done") not in rollout.keys(True):
        return none
    before, after = rollout[..., :-1], rollout[..., 1:]
    copy = _at_the_end(before["next", "done"].flatten(rollout.ndim - 1))  # [*B, T - 1]
    copy &= ~copy.flatten(0, -2).all(0)  # as long as another environment continues
    for key, value in before.items(True, True) if copy.any() else ():
        if isinstance(value, torch.Tensor):
            copy &= (value == after[key]).reshape(*copy.shape, -1).all(-1)
    if not (copy := _at_the_end(copy)).any():
        return none
    _logger.info("left out %d copies of final steps.", int(copy.sum()))
    return torch.cat([torch.zeros_like(copy[..., :1]), copy], -1)


def _at_the_end(mask: torch.Tensor) -> torch.Tensor:
    """Keep only the true values after the last false value along time, the last dimension."""
    return mask.flip(-1).cummin(-1).values.flip(-1)


def _flat(rollout: TensorDictBase) -> TensorDictBase:
    """Flatten ``[*B, T]`` to ``[N]``, without the steps that are not kept."""
    kept = rollout["_kept"]
    last = kept & (kept.flip(-1).cumsum(-1).flip(-1) == 1)  # no kept step follows
    rows = rollout.exclude("_kept").set("_last", last).reshape(-1)
    return rows if kept.all() else rows[kept.reshape(-1)]


def _check_keys(rows: TensorDictBase) -> None:
    needed = ["reward", "done", "terminated", *(["observation"] if "observation" in rows.keys() else [])]
    if missing := [key for key in needed if ("next", key) not in rows.keys(True)]:
        present = sorted(map(str, rows.keys(True, True)))
        raise DatasetError(f"the rollouts lack {missing} under 'next'; they hold {present}. Add or rename the entries.")


def _check_values(rows: TensorDictBase, action_spec: TensorSpec | None) -> None:
    """Run the checks of ``from_arrays``, and check that nested observations and images are finite."""
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


def _number_episodes(rows: TensorDictBase, last_steps: torch.Tensor) -> TensorDictBase:
    after = rows["next"]
    continues = ~last_steps.to(after["done"].device)
    for key, value in after.items(True, True):
        before = rows.get(key, None)
        if before is not None and before.shape == value.shape:
            continues[:-1] &= (value[:-1] == before[1:]).unsqueeze(-1).flatten(1).all(1)
    truncated = after.get("truncated", torch.zeros_like(after["done"]))
    done = after["done"] | after["terminated"] | truncated
    cut = ~done & ~continues.unsqueeze(-1)
    report_cuts(int(cut[:-1].sum()), len(cut))  # the last row is not counted, because no row follows it
    after.update({"truncated": truncated | cut, "done": done | cut})
    last = after["done"].squeeze(-1)
    return rows.set("episode", last.cumsum(0) - last.long())
