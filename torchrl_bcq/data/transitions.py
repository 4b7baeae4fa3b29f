"""Transitions in TorchRL's layout, made from arrays of recorded steps."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from numpy.typing import ArrayLike
from tensordict import TensorDict
from torchrl.data import TensorSpec

from torchrl_bcq.data.checks import FIELDS, Checks, DatasetError, Rows

_logger = logging.getLogger(__name__)
_PAID_AT_THE_END = 10  # ratio of mean reward magnitudes, dropped rows to kept ones: about 1 for time-outs


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
    ``next_observations``, each row's next observation is the next row's. A truncated row and an unfinished last row
    have none and are dropped; a terminated row repeats its own, which is never used. Without ``truncated``, an episode
    is cut off wherever a row's next observation is not the next row's observation.

    Args:
        observations: ``[N, D]``.
        actions: ``[N, A]``, continuous, in the units of the environment.
        rewards, terminated, truncated: ``[N]`` or ``[N, 1]``. The episode ended in a final state, whose value is 0, or
            it was cut off, so the next state still has a value.
        next_observations: ``[N, D]``.
        action_spec: bounds that the actions must keep, if given.

    Returns:
        Batch size ``[M]``, ``M <= N``: ``observation [M, D]``, ``action [M, A]``, ``episode [M]`` (its number),
        ``("next", ...)``: ``observation [M, D]``, ``reward``, ``done``, ``terminated``, ``truncated`` ``[M, 1]``.

    Raises:
        DatasetError: if ``truncated`` and ``next_observations`` are both missing, or a field has the wrong rank, dtype
            or length, is empty or all zero, or has non-finite rows or actions out of bounds.
    """
    if truncated is None and next_observations is None:
        raise DatasetError(
            "truncated and next_observations are both missing, so nothing says where an episode was cut off and the "
            "next one began; if none was cut, pass truncated=np.zeros(N)."
        )
    checks = Checks(action_spec)
    given = (observations, actions, rewards, terminated, truncated, next_observations)
    checked = checks(dict(zip(FIELDS, given, strict=True)))
    checks.finish()
    parts = list(lay_out([checked]))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def lay_out(chunks: Iterable[dict[str, np.ndarray]], *, report: bool = True) -> Iterator[TensorDict]:
    """Transitions of checked chunks; episodes may continue in the next one. Logs dropped rows if ``report``."""
    episode = rows = guessed = 0  # guessed: ends of episodes found by comparing observations
    dropped, lost, kept = Rows(), 0.0, 0.0
    for fields, is_last in with_successors(chunks):
        part, keep = _part(fields, episode, is_last)
        guessed += 0 if "truncated" in fields else int(part["next", "truncated"].sum())
        episode += int(part["next", "done"].sum())
        dropped.add(~keep, rows)
        reward = np.abs(fields["rewards"][:-1].astype(np.float64))
        lost, kept = lost + reward[~keep].sum(), kept + reward[keep].sum()
        rows += len(part)
        if keep.any():
            yield part if keep.all() else part[torch.from_numpy(keep)]
    if not rows:
        raise DatasetError("it holds no rows; there is nothing to learn from.")
    if dropped.count == rows:
        raise DatasetError(
            f"all {rows} rows are truncated and next_observations is not given: no transition is complete."
        )
    if report:
        report_cuts(guessed, rows)
    if report and dropped.count:
        _report_dropped(dropped, lost / dropped.count, kept / (rows - dropped.count))


def with_successors(chunks: Iterable[dict[str, np.ndarray]]) -> Iterator[tuple[dict[str, np.ndarray], bool]]:
    """Regroup rows so that each chunk ends with a row that only serves as the successor of the one before.

    The last chunk is the last row twice, since it has no successor; only there the flag is True.
    """
    held: dict[str, np.ndarray] = {}
    for chunk in chunks:
        for name, values in held.items():
            if values.shape[1:] != chunk[name].shape[1:]:
                raise DatasetError(f"{name} has lists of different lengths; each row needs the same.")
        fields = {name: np.concatenate([held[name], values]) if held else values for name, values in chunk.items()}
        held = {name: values[-1:] for name, values in fields.items()}
        if len(fields["actions"]) > 1:
            yield fields, False
    if held:
        yield {name: np.concatenate([values, values]) for name, values in held.items()}, True


def report_cuts(cut: int, rows: int) -> None:
    """Warn if most rows end an episode that no flag ends; the rows may be out of order."""
    if 2 * cut > rows:
        _logger.warning(
            "%d of %d rows end an episode, as their next observation is not exactly the next row's observation: if they"
            " are steps of one episode, put them in order of time and copy each next observation from the next row "
            "(from_arrays copies it if next_observations is left out and truncated is given)",
            cut,
            rows,
        )


def _report_dropped(dropped: Rows, lost: float, kept: float) -> None:
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


def _part(fields: dict[str, np.ndarray], episode: int, is_last: bool) -> tuple[TensorDict, np.ndarray]:
    """Transitions of all rows but the last one, and which of them are complete; see :func:`with_successors`."""
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
