"""From recorded steps to transitions in TorchRL's layout."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from numpy.typing import ArrayLike
from tensordict import TensorDict
from torchrl.data import TensorSpec

from torchrl_bcq.data.checks import Checks, DatasetError, Rows

_logger = logging.getLogger(__name__)
_PAID_AT_THE_END = 10  # dropped rewards against the others, mean magnitudes: those of a time-out are like any


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
    has none and is dropped; a terminated row, whose next observation is never used, repeats its own. Without
    ``truncated`` an episode is cut off wherever a row's next observation is not the next row's observation.

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
        DatasetError: if ``truncated`` and ``next_observations`` are both missing, or a field has the wrong rank, dtype
            or length, is empty or all zero, or has non-finite rows or actions out of bounds; it names the field, the
            count and the first row.
    """
    columns = {
        "observations": observations,
        "actions": actions,
        "rewards": rewards,
        "terminated": terminated,
        "truncated": truncated,
        "next_observations": next_observations,
    }
    if truncated is None and next_observations is None:
        raise DatasetError(
            "truncated and next_observations are both missing, so nothing says where an episode was cut off and the "
            "next one began; if none was cut, pass truncated=np.zeros(N)."
        )
    checks = Checks(action_spec)
    checked = checks(columns)
    checks.finish()
    parts = list(lay_out([checked]))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def lay_out(chunks: Iterable[dict[str, np.ndarray]], *, report: bool = True) -> Iterator[TensorDict]:
    """Transitions of checked chunks; episodes may go on from one chunk to the next.

    Args:
        chunks: fields of :class:`~torchrl_bcq.data.checks.Checks`, all with the same ones.
        report: whether to log what was dropped.

    Raises:
        DatasetError: after the last chunk, if there was none, or no transition is complete.
    """
    episode = rows = 0
    dropped, lost, kept = Rows(), 0.0, 0.0
    guessed = 0  # ends of episodes, where nothing but the observations tells
    held: dict[str, np.ndarray] = {}  # the last row, whose successor is not known yet
    for chunk in chunks:
        fields = {name: np.concatenate([held[name], values]) if held else values for name, values in chunk.items()}
        held = {name: values[-1:] for name, values in fields.items()}
        part, keep = _part(fields, episode)
        guessed += 0 if "truncated" in fields else int(part["next", "truncated"].sum())
        episode += int(part["next", "done"].sum())
        dropped.add(~keep, rows)
        reward = np.abs(fields["rewards"][:-1].astype(np.float64))
        lost, kept = lost + reward[~keep].sum(), kept + reward[keep].sum()
        rows += len(part)
        if keep.any():
            yield part if keep.all() else part[torch.from_numpy(keep)]
    if not held:
        raise DatasetError("it holds no rows; there is nothing to learn from.")
    part, keep = _part({name: np.concatenate([values, values]) for name, values in held.items()}, episode, is_last=True)
    dropped.add(~keep, rows)
    lost += 0 if keep.all() else float(np.abs(held["rewards"][0]))
    rows += 1
    if dropped.count == rows:
        raise DatasetError(
            f"all {rows} rows are truncated and next_observations is not given: no transition is complete."
        )
    if guessed > rows / 2 and report:
        _logger.warning(
            "%d of %d rows are followed by another observation than their next one, so each ends an episode; if they "
            "should go on, pass truncated, or leave next_observations out",
            guessed,
            rows,
        )
    if dropped.count and report:
        _report(dropped, lost / dropped.count, kept / (rows - dropped.count))
    if keep.any():
        yield part


def _report(dropped: Rows, lost: float, kept: float) -> None:
    """Log which rows were dropped; ``lost`` and ``kept`` are mean magnitudes of rewards."""
    what = f"dropped {dropped} without a next observation (truncated, or the unfinished last one)"
    if lost > _PAID_AT_THE_END * kept:
        _logger.warning(
            "%s, whose rewards are of magnitude %.3g on average and those of all other rows %.3g: if they ended in a "
            "final state, set terminated there, or give next_observations",
            what,
            lost,
            kept,
        )
    else:
        _logger.info(what)


def _part(fields: dict[str, np.ndarray], episode: int, is_last: bool = False) -> tuple[TensorDict, np.ndarray]:
    """Transitions of all rows but the last, which serves as a successor only, and which of them are complete.

    With ``is_last`` the successor is none, but a stand-in for it.
    """
    observation, following = fields["observations"][:-1], fields["observations"][1:]
    terminated = fields["terminated"][:-1]
    given = fields.get("next_observations")
    if "truncated" in fields:
        truncated = fields["truncated"][:-1]
    elif given is None or is_last:
        truncated = np.zeros_like(terminated)
    else:
        truncated = ~terminated & (given[:-1] != following).any(1)
    done = terminated | truncated
    if given is None:
        next_observation = np.where(terminated[:, None], observation, following)
        keep = terminated | ~(truncated | is_last)
    else:
        next_observation, keep = given[:-1], np.ones_like(done)
    columns = {
        "observation": observation,
        "action": fields["actions"][:-1],
        "episode": episode + np.cumsum(done) - done,  # the row that ends an episode still belongs to it
        "next": {
            "observation": next_observation,
            "reward": fields["rewards"][:-1, None],
            "done": done[:, None],
            "terminated": terminated[:, None],
            "truncated": truncated[:, None],
        },
    }
    return TensorDict(columns, batch_size=[len(done)]), keep
