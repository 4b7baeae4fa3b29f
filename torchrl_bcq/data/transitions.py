"""From arrays to transitions in TorchRL's layout, with the checks that a dataset must pass."""

from __future__ import annotations

import logging

import numpy as np
import torch
from numpy.typing import ArrayLike
from tensordict import TensorDict
from torchrl.data import Bounded, TensorSpec

_logger = logging.getLogger(__name__)


def from_arrays(
    observations: ArrayLike,
    actions: ArrayLike,
    rewards: ArrayLike,
    terminated: ArrayLike,
    truncated: ArrayLike | None = None,
    next_observations: ArrayLike | None = None,
    *,
    action_spec: TensorSpec | None = None,
) -> TensorDict:
    """Check arrays of ``N`` steps and lay them out as TorchRL transitions, in float32.

    Rows of one episode follow one another, and an episode ends where ``terminated`` or ``truncated`` is set. Without
    ``next_observations`` each row's next observation is the next row's; a truncated row, and an unfinished last one,
    has none and is dropped; a terminated row, whose next observation is never used, repeats its own.

    Args:
        observations: ``[N, D]``.
        actions: ``[N, A]``, continuous, in the units of the environment.
        rewards: ``[N]`` or ``[N, 1]``.
        terminated: ``[N]`` or ``[N, 1]``, the episode ended in a final state: no value follows.
        truncated: the same shapes, the episode was cut off: value follows. Needed unless there
            are ``next_observations``.
        next_observations: ``[N, D]``.
        action_spec: bounds that the actions must keep, if given.

    Returns:
        Batch size ``[M]``, ``M <= N``: ``observation [M, D]``, ``action [M, A]``, ``episode [M]`` (its number),
        ``("next", ...)``: ``observation [M, D]``, ``reward``, ``done``, ``terminated``, ``truncated`` ``[M, 1]``.

    Raises:
        ValueError: if ``truncated`` and ``next_observations`` are both missing, or a field has the wrong rank, dtype or
            length, is empty or all zero, or has non-finite rows or actions out of bounds; it names the field, the count
            and the first row.
    """
    fields = {
        "observations": _real("observations", observations, rank=2),
        "actions": _real("actions", actions, rank=2, integers=False),
        "rewards": _real("rewards", rewards, rank=1),
        "terminated": _flags("terminated", terminated),
    }
    if truncated is None and next_observations is None:
        raise ValueError(
            "truncated and next_observations are both missing, so nothing says where an episode was cut off and the "
            "next one began; if none was cut, pass truncated=np.zeros(N)."
        )
    fields["truncated"] = np.zeros_like(fields["terminated"]) if truncated is None else _flags("truncated", truncated)
    if next_observations is not None:
        fields["next_observations"] = _real("next_observations", next_observations, rank=2)
    _check_lengths(fields)
    if action_spec is not None:
        _check_bounds(fields["actions"], action_spec)
    observation, done = fields["observations"], fields["terminated"] | fields["truncated"]
    episode = np.cumsum(done) - done  # the row that ends an episode still belongs to it
    if next_observations is None:
        next_observation, keep = _shift(observation, done, fields["truncated"] & ~fields["terminated"])
    else:
        next_observation, keep = fields["next_observations"], np.ones_like(done)
    columns = {
        "observation": observation,
        "action": fields["actions"],
        "episode": episode,
        "next": {
            "observation": next_observation,
            "reward": fields["rewards"][:, None],
            "done": done[:, None],
            "terminated": fields["terminated"][:, None],
            "truncated": fields["truncated"][:, None],
        },
    }
    transitions = TensorDict(columns, batch_size=[len(done)])
    return transitions if keep.all() else transitions[torch.from_numpy(keep)]


def _real(name: str, values: ArrayLike, rank: int, integers: bool = True) -> np.ndarray:
    """A finite float32 array of the given rank (``[N, 1]`` passes for ``[N]``), not all zero."""
    array = _column(name, values, rank)
    if array.dtype.kind not in ("fiu" if integers else "f"):
        hint = "" if integers else " BCQLoss needs continuous actions; cast them if they are."
        raise ValueError(f"{name} has dtype {array.dtype}, expected real numbers.{hint}")
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    finite = np.isfinite(array).reshape(len(array), -1).all(1)
    if not finite.all():
        raise ValueError(f"{name} has {_rows(~finite)} that are not finite in float32; drop or repair them.")
    if not array.any():
        raise ValueError(f"{name} is zero in all {len(array)} rows; was it written and read properly?")
    return array


def _flags(name: str, values: ArrayLike) -> np.ndarray:
    """A boolean ``[N]``; numbers pass where all are 0 or 1."""
    array = _column(name, values, rank=1)
    if array.dtype.kind not in "bfiu":
        raise ValueError(f"{name} has dtype {array.dtype}, expected booleans.")
    odd = (array != 0) & (array != 1)
    if odd.any():
        raise ValueError(f"{name} has {_rows(odd)} that are neither 0 nor 1, such as {array[odd][0]}.")
    return array.astype(bool)


def _column(name: str, values: ArrayLike, rank: int) -> np.ndarray:
    array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    if rank == 1 and array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != rank:
        expected = "[N] or [N, 1]" if rank == 1 else "[N, features]"
        hint = f"; use {name}[:, None] for a single feature" if (array.ndim, rank) == (1, 2) else ""
        raise ValueError(f"{name} has shape {array.shape}, expected {expected}{hint}.")
    if not array.size:
        raise ValueError(f"{name} is empty (shape {array.shape}); there is nothing to learn from.")
    return array


def _check_lengths(fields: dict[str, np.ndarray]) -> None:
    lengths = {name: len(array) for name, array in fields.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"fields differ in length: {lengths}; each needs one row per step, and the last observation of an "
            "episode belongs to next_observations."
        )
    if "next_observations" in fields and fields["next_observations"].shape != fields["observations"].shape:
        shapes = fields["next_observations"].shape, fields["observations"].shape
        raise ValueError(f"next_observations has shape {shapes[0]}, observations {shapes[1]}.")


def _check_bounds(actions: np.ndarray, spec: TensorSpec) -> None:
    if not isinstance(spec, Bounded):
        raise ValueError(f"action_spec is a {type(spec).__name__}, expected the Bounded spec of one action.")
    low, high = (bound.cpu().float().numpy() for bound in (spec.space.low, spec.space.high))
    if actions.shape[1:] != low.shape:
        raise ValueError(f"actions have shape {actions.shape}, but the action spec has shape {low.shape}.")
    outside = ((actions < low) | (actions > high)).any(1)
    if outside.any():
        raise ValueError(
            f"actions has {_rows(outside)} outside the action spec: they span {actions.min(0).tolist()} to "
            f"{actions.max(0).tolist()}, the spec {low.tolist()} to {high.tolist()}; clip or rescale them."
        )


def _shift(observation: np.ndarray, done: np.ndarray, truncated: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Next observations from the rows that follow, and which rows have one (or need none)."""
    following = np.concatenate([observation[1:], observation[-1:]])
    next_observation = np.where(done[:, None], observation, following)
    keep = ~truncated
    keep[-1] &= done[-1]
    if not keep.any():
        raise ValueError(
            f"all {len(keep)} rows are truncated and next_observations is not given: no transition is complete."
        )
    if not keep.all():
        _logger.info("dropped %s without a next observation (truncated, or the unfinished last one)", _rows(~keep))
    return next_observation, keep


def _rows(mask: np.ndarray) -> str:
    count = int(mask.sum())
    return f"{count} {'row' if count == 1 else 'rows'} (first: {int(mask.argmax())})"
