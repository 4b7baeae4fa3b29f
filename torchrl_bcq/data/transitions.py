"""Converts arrays of recorded steps to transitions in TorchRL's layout."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from numpy.typing import ArrayLike
from tensordict import TensorDict
from torchrl.data import TensorSpec

from torchrl_bcq.data.checks import FIELDS, Checks, DatasetError, Rows
from torchrl_bcq.data.groups import Groups
from torchrl_bcq.data.origins import Origins

_logger = logging.getLogger(__name__)
# A warning is logged if the mean absolute reward of the dropped rows is more than 10 times the mean absolute reward of
# the other rows. Rows at a time limit have normal rewards, so much larger rewards suggest a final state.
_PAID_AT_THE_END = 10


def from_arrays(
    observations: ArrayLike,
    actions: ArrayLike,
    rewards: ArrayLike,
    terminated: ArrayLike,
    truncated: ArrayLike | None = None,
    next_observations: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    *,
    action_spec: TensorSpec | None = None,
) -> TensorDict:
    """Check arrays of ``N`` steps and convert them to TorchRL transitions in float32.

    The rows of an episode must follow each other in order of time. An episode ends where ``terminated`` or
    ``truncated`` is set, and at the last row, which is marked as truncated unless it is terminated. Without
    ``truncated``, an episode also ends where the ``next_observations`` of a row differ from the ``observations`` of the
    following row.

    Without ``next_observations``, the next observation of a row is the observation of the next row. Truncated rows then
    have no next observation and are dropped; the row before a dropped row is the new last row of the episode and is
    marked as truncated. In a terminated row, the next observation is a copy of the observation; the loss does not use
    this copy. In the result, the last row of each episode has ``done``.

    Args:
        observations: observation before each step, ``[N, D]``.
        actions: continuous actions in the units of the environment, ``[N, A]``.
        rewards: reward of each step, ``[N]`` or ``[N, 1]``.
        terminated: whether the step led to a final state, ``[N]`` or ``[N, 1]``. The value of a final state is 0.
        truncated: whether the episode was cut off after the step, for example by a time limit, ``[N]`` or ``[N, 1]``.
            The next state still has a value.
        next_observations: observation after each step, ``[N, D]``.
        groups: number or name of the group of each row, such as a patient or a user, ``[N]`` or ``[N, 1]``. All rows of
            an episode have the same group. ``split_episodes`` never splits a group. 7, 7.0 and "7" are the same group.
        action_spec: bounded spec of one action. If given, all actions must lie within its bounds.

    Returns:
        Transitions of batch size ``[M]`` with ``M <= N``: ``observation [M, D]``, ``action [M, A]``, the episode number
        ``episode [M]``, and under ``"next"``: ``observation [M, D]``, and ``reward``, ``done``, ``terminated`` and
        ``truncated``, each ``[M, 1]``. With ``groups``, also the group number ``group [M]``: the first group has number
        0, the next one 1, etc.

    Raises:
        DatasetError: if ``truncated`` and ``next_observations`` are both missing; if a field has a wrong shape, dtype
            or length, or is empty; if a field other than the flags has only zeros; if a value is not finite; if an
            action is out of bounds; or if a group is missing or changes within an episode.

    Example:
        >>> import numpy as np
        >>> from torchrl_bcq import from_arrays
        >>> states, actions, rewards = np.ones((6, 3)), np.full((6, 1), 0.5), np.ones(6)
        >>> data = from_arrays(states, actions, rewards, terminated=[0, 0, 1, 0, 0, 1], truncated=np.zeros(6))
        >>> data["episode"].tolist(), data["next", "reward"].shape
        ([0, 0, 0, 1, 1, 1], torch.Size([6, 1]))
    """
    if truncated is None and next_observations is None:
        raise DatasetError(
            "truncated and next_observations are both missing, so it is unknown where episodes were cut off; pass one "
            "of them, or truncated=np.zeros(N) if no episode was cut off."
        )
    checks = Checks(action_spec)
    given = (observations, actions, rewards, terminated, truncated, next_observations, groups)
    checked = checks(dict(zip(FIELDS, given, strict=True)))
    checks.finish()
    parts = list(lay_out([("", [checked])]))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def lay_out(
    recordings: Iterable[tuple[str, Iterable[dict[str, np.ndarray]]]],
    *,
    report: bool = True,
    origins: Origins | None = None,
) -> Iterator[TensorDict]:
    """Convert recordings to transitions; each recording has a name and consists of chunks of checked arrays.

    An episode ends at the last row of its recording. If ``report`` is true, log which rows were dropped. ``origins``
    gets the rows that were read and dropped.
    """
    origins, groups = Origins() if origins is None else origins, Groups()
    episode = guessed = 0  # guessed: number of episode ends found by comparing observations
    lost = kept = 0.0
    for name, chunks in recordings:
        origins.begin(name)
        held: TensorDict | None = None  # kept back until it is known whether it holds the last row of the recording
        for fields, is_last in with_successors(chunks):
            part, keep, ends = _part(fields, episode, is_last)
            guessed += 0 if "truncated" in fields or is_last else int(part["next", "truncated"].sum())
            episode += int(ends.sum())
            reward = np.abs(fields["rewards"][:-1].astype(np.float64))
            lost, kept = lost + reward[~keep].sum(), kept + reward[keep].sum()
            names = groups.names(fields["groups"], ends, origins.rows) if "groups" in fields else None
            origins.add(keep, fields)
            if keep.any():
                if held is not None:
                    yield held
                held = part if keep.all() else part[torch.from_numpy(keep)]
                if names is not None:
                    held["group"] = groups.numbers(names[keep])
        if held is not None:
            held["next", "truncated"][-1] |= ~held["next", "done"][-1]
            held["next", "done"][-1] = True
            yield held
    rows, dropped = origins.rows, origins.dropped
    if not rows:
        raise DatasetError("the data has no rows; at least one row is needed.")
    groups.finish(origins)
    if dropped.count == rows:
        raise DatasetError(
            f"all {rows} rows are truncated and next_observations is not given, so no row has a next observation; "
            "correct truncated, or give next_observations."
        )
    if report:
        report_cuts(guessed, rows)
    if report and dropped.count:
        _report_dropped(dropped, lost / dropped.count, kept / (rows - dropped.count))


def with_successors(chunks: Iterable[dict[str, np.ndarray]]) -> Iterator[tuple[dict[str, np.ndarray], bool]]:
    """Let chunks overlap: the last row of each chunk is repeated as the first row of the next chunk.

    A final chunk holds only the last row of the data, twice, because no row follows it. The function yields pairs: a
    chunk, and whether it is the final chunk.
    """
    held: dict[str, np.ndarray] = {}
    for chunk in chunks:
        for name, values in held.items():
            if values.shape[1:] != chunk[name].shape[1:]:
                raise DatasetError(f"{name} has lists of different lengths; make all lists equally long.")
        fields = {name: np.concatenate([held[name], values]) if held else values for name, values in chunk.items()}
        held = {name: values[-1:] for name, values in fields.items()}
        if len(fields["actions"]) > 1:
            yield fields, False
    if held:
        yield {name: np.concatenate([values, values]) for name, values in held.items()}, True


def report_cuts(cut: int, rows: int) -> None:
    """Log a warning if ``cut``, the number of rows that end an episode, is more than half of ``rows``."""
    if 2 * cut > rows:
        _logger.warning(
            "%d of %d rows end an episode, because their next observation is not exactly the observation of the next "
            "row. If these rows belong to one episode, sort them by time. Then leave next_observations out and give "
            "truncated: each next observation is then taken from the next row.",
            cut,
            rows,
        )


def _report_dropped(dropped: Rows, lost: float, kept: float) -> None:
    """Log the dropped rows; ``lost`` and ``kept`` are mean absolute rewards of dropped and kept rows."""
    what = f"dropped {dropped} without a next observation (truncated rows, or an unfinished last row)."
    if lost > _PAID_AT_THE_END * kept:
        _logger.warning(
            "%s Their mean reward magnitude is %.3g, and that of all other rows is %.3g. If the dropped rows led to a "
            "final state, set terminated there, or give next_observations.",
            what,
            lost,
            kept,
        )
    else:
        _logger.info(what)


def _part(fields: dict[str, np.ndarray], episode: int, is_last: bool) -> tuple[TensorDict, np.ndarray, np.ndarray]:
    """Convert all rows except the last. Also return masks of the rows to keep, and of the rows that end an episode."""
    observation, following = fields["observations"][:-1], fields["observations"][1:]
    terminated = fields["terminated"][:-1]
    given = fields.get("next_observations")
    if "truncated" in fields:
        truncated = fields["truncated"][:-1]
    elif given is None or is_last:
        truncated = np.zeros_like(terminated)
    else:
        truncated = ~terminated & (given[:-1] != following).any(1)
    if is_last:
        truncated = truncated | ~terminated
    ends = terminated | truncated
    if given is None:
        next_observation = np.where(terminated[:, None], observation, following)
        keep = terminated | ~truncated
        # a row before a dropped row is the last row of its episode
        truncated = truncated | (~ends & (fields["truncated"] & ~fields["terminated"])[1:])
    else:
        next_observation = given[:-1]
        short = fields.get("incomplete", np.zeros(len(given), bool))  # the last row of an episode, to be dropped
        keep, truncated = ~short[:-1], truncated | (~ends & short[1:])
    done = terminated | truncated
    columns = {
        "observation": observation,
        "action": fields["actions"][:-1],
        "episode": episode + np.cumsum(ends) - ends,  # - ends, because the last row still belongs to its episode
        "next": {
            "observation": next_observation,
            "reward": fields["rewards"][:-1, None],
            "done": done[:, None],
            "terminated": terminated[:, None],
            "truncated": truncated[:, None],
        },
    }
    return TensorDict(columns, batch_size=[len(done)]), keep, ends
