"""Converts arrays of recorded steps to transitions in TorchRL's layout."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from numpy.typing import ArrayLike
from tensordict import TensorDict
from torchrl.data import TensorSpec

from torchrl_bcq.data.checks import FIELDS, FRAMES, Checks
from torchrl_bcq.data.defects import Rows
from torchrl_bcq.data.frame_store import FramesInMemory, FrameStore, equal_rows
from torchrl_bcq.data.groups import Groups
from torchrl_bcq.data.origins import Origins
from torchrl_bcq.errors import DatasetError

_logger = logging.getLogger(__name__)
# fields of states and of next states, and their entry in the transitions
_STATES = (("observations", "next_observations", "observation"), ("frames", "next_frames", "pixels"))
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
    frames: ArrayLike | None = None,
    next_frames: ArrayLike | None = None,
    *,
    action_masks: ArrayLike | None = None,
    next_action_masks: ArrayLike | None = None,
    action_probabilities: ArrayLike | None = None,
    action_type: str | None = None,
    action_spec: TensorSpec | None = None,
) -> TensorDict:
    """Check arrays of ``N`` steps and convert them to TorchRL transitions.

    The rows of an episode must follow each other in order of time. An episode ends where ``terminated`` or
    ``truncated`` is set, and at the last row, which is marked as truncated unless it is terminated. Without
    ``truncated``, an episode also ends where the ``next_observations`` of a row differ from the ``observations`` of the
    following row.

    Without ``next_observations``, the next observation of a row is the observation of the next row. Truncated rows then
    have no next observation and are dropped; the row before a dropped row is the new last row of the episode and is
    marked as truncated. In a terminated row, the next observation is a copy of the observation; the loss does not use
    this copy. In the result, the last row of each episode has ``done``.

    Args:
        observations: observation before each step, ``[N, D]``, or frames of bytes (``uint8``), ``[N, H, W]`` or ``[N,
            C, H, W]``. If the last dimension of frames is clearly the smallest, as in ``[N, 96, 96, 3]``, the channels
            are last, and are moved to the front.
        actions: continuous actions in the units of the environment, ``[N, A]``; or discrete actions of ``K`` choices:
            indices ``[N]`` or ``[N, 1]``, or one-hot vectors ``[N, K]``.
        rewards: reward of each step, ``[N]`` or ``[N, 1]``.
        terminated: whether the step led to a final state, ``[N]`` or ``[N, 1]``. The value of a final state is 0.
        truncated: whether the episode was cut off after the step, for example by a time limit, ``[N]`` or ``[N, 1]``.
            The next state still has a value.
        next_observations: observation after each step, in the shape of ``observations``.
        groups: number or name of the group of each row, such as a patient or a user, ``[N]`` or ``[N, 1]``. All rows of
            an episode have the same group. ``split_episodes`` never splits a group. 7, 7.0 and "7" are the same group.
        frames: frames beside the vectors ``observations``, in the same shapes as frames of ``observations``.
        next_frames: frames after each step. Without ``next_frames``, ``next_observations`` are not used.
        action_masks: whether each discrete action was available before the step, ``[N, K]``.
        next_action_masks: whether each discrete action was available after the step, ``[N, K]``. Without them, the mask
            of the next row is used, and truncated rows are dropped.
        action_probabilities: probability with which the recorded policy chose the action of each row, ``[N]`` or ``[N,
            1]``.
        action_type: ``"continuous"`` or ``"discrete"``. By default, the dtype decides: integers and booleans are
            discrete actions.
        action_spec: spec of one action. If given, all actions must lie within its bounds, or be one of its discrete
            actions, which are then stored as in the spec: as an index, or as a one-hot vector.

    Returns:
        Transitions of batch size ``[M]`` with ``M <= N``, in float32: ``observation [M, D]``, ``action [M, A]`` (the
        index ``[M]`` of a discrete action, in int64), the episode number ``episode [M]``, and under ``"next"``:
        ``observation [M, D]``, and ``reward``, ``done``, ``terminated`` and ``truncated``, each ``[M, 1]``. With
        ``groups``, also the group number ``group [M]``: the first group has number 0, the next one 1, etc. With masks
        and probabilities, also the booleans ``action_mask`` and ``("next", "action_mask")``, each ``[M, K]``, and
        ``action_probability [M]``. Frames of ``observations`` are ``observation [M, C, H, W]``, and ``frames`` are
        ``pixels [M, C, H, W]``, each also under ``"next"``; these tensors share their frames, so each frame is held
        once.

    Raises:
        DatasetError: if ``truncated`` and ``next_observations`` are both missing; if a field has a wrong shape, dtype
            or length, or is empty; if a field other than the flags has only zeros; if a value is not finite; if an
            action is out of bounds or was not available; or if a group is missing or changes within an episode.

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
    checks, store = Checks(action_spec, action_type), FramesInMemory()
    given = (observations, actions, rewards, terminated, truncated, next_observations, groups)
    others = (action_masks, next_action_masks, action_probabilities, frames, next_frames)
    checked = checks(dict(zip((*FIELDS, *FRAMES), (*given, *others), strict=True)))
    checks.finish()
    parts = list(lay_out([("", [checked])], store))
    return store.view(checks.actions.convert(parts[0] if len(parts) == 1 else torch.cat(parts)))


def lay_out(
    recordings: Iterable[tuple[str, Iterable[dict[str, np.ndarray]]]],
    store: FrameStore,
    *,
    report: bool = True,
    origins: Origins | None = None,
) -> Iterator[TensorDict]:
    """Convert recordings to transitions; each recording has a name and consists of chunks of checked arrays.

    The transitions hold the numbers of frames in ``store``, which gets the frames. An episode ends at the last row of
    its recording. If ``report`` is true, log which rows were dropped. ``origins``
    gets the rows that were read and dropped.
    """
    origins, groups = Origins() if origins is None else origins, Groups()
    episode = guessed = 0  # guessed: number of episode ends found by comparing observations
    broken, cut_off = Rows(), False  # broken: rows inside of episodes that the next row does not continue
    lost = kept = 0.0
    for name, chunks in recordings:
        origins.begin(name)
        held: TensorDict | None = None  # kept back until it is known whether it holds the last row of the recording
        for fields, is_last in with_successors(chunks):
            part, keep, ends = _part(fields, episode, is_last, store)
            guessed += 0 if "truncated" in fields or is_last else int(part["next", "truncated"].sum())
            cut_off = cut_off or bool(np.any(fields.get("truncated", False)))
            if "truncated" in fields and not is_last:
                broken.add(_breaks(fields) & ~fields["truncated"][:-1], origins.rows)
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
            f"all {rows} rows are truncated and lack a next observation or next action mask; correct truncated, or "
            "give next_observations and, if there are action_masks, next_action_masks."
        )
    if report:
        report_cuts(guessed, rows)
        if broken.count and not cut_off:
            _logger.warning(
                "truncated is never set, but the next observation differs from the observation of the next row in %s. "
                "If episodes were cut off there, mark these rows as truncated.",
                origins.locate(broken),
            )
        elif 2 * broken.count > rows:
            _logger.warning(
                "inside of episodes, the next observation differs from the observation of the next row in %s. If the "
                "rows of several environments alternate, sort them by environment, then by time.",
                origins.locate(broken),
            )
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
            "row. If these rows belong to one episode, sort them by time, and correct or remove the next observations.",
            cut,
            rows,
        )


def _report_dropped(dropped: Rows, lost: float, kept: float) -> None:
    """Log the dropped rows; ``lost`` and ``kept`` are mean absolute rewards of dropped and kept rows."""
    what = f"dropped {dropped} without a next observation or action mask (truncated rows, or an unfinished last row)."
    if lost > _PAID_AT_THE_END * kept:
        _logger.warning(
            "%s Their mean reward magnitude is %.3g, and that of all other rows is %.3g. If the dropped rows led to a "
            "final state, set terminated there, or give next_observations (and next_action_masks).",
            what,
            lost,
            kept,
        )
    else:
        _logger.info(what)


def _part(
    fields: dict[str, np.ndarray], episode: int, is_last: bool, store: FrameStore
) -> tuple[TensorDict, np.ndarray, np.ndarray]:
    """Convert all rows except the last. Also return masks of the rows to keep, and of the rows that end an episode."""
    terminated = fields["terminated"][:-1]
    given = fields.get("next_observations")
    if "truncated" in fields:
        truncated = fields["truncated"][:-1]
    elif is_last:
        truncated = np.zeros_like(terminated)
    else:
        truncated = _breaks(fields)
    if is_last:
        truncated = truncated | ~terminated
    ends = terminated | truncated
    masks, next_masks = fields.get("action_masks"), fields.get("next_action_masks")
    if given is None or (masks is not None and next_masks is None):  # truncated rows lack the next state or its mask
        if "truncated" not in fields:
            raise DatasetError("truncated and next_action_masks are both missing; give one of them.")
        keep = terminated | ~truncated
        short = fields["truncated"] & ~fields["terminated"]
    else:
        short = fields.get("incomplete", np.zeros(len(given), bool))  # the last row of an episode, to be dropped
        keep = ~short[:-1]
    truncated = truncated | (~ends & short[1:])  # a row before a dropped row is the last row of its episode
    done = terminated | truncated
    states = {names[2]: _states(fields, *names, is_last, store) for names in _STATES if names[0] in fields}
    columns = {
        **{key: now for key, (now, _) in states.items()},
        "action": fields["actions"][:-1],
        "episode": episode + np.cumsum(ends) - ends,  # - ends, because the last row still belongs to its episode
        "next": {
            **{key: after for key, (_, after) in states.items()},
            "reward": fields["rewards"][:-1, None],
            "done": done[:, None],
            "terminated": terminated[:, None],
            "truncated": truncated[:, None],
        },
    }
    part = TensorDict(columns, batch_size=[len(done)])
    if masks is not None:
        part["action_mask"] = masks[:-1]
        following = np.where(terminated[:, None], masks[:-1], masks[1:])
        part["next", "action_mask"] = following if next_masks is None else next_masks[:-1]
    if "action_probabilities" in fields:
        part["action_probability"] = fields["action_probabilities"][:-1]
    return part, keep, ends


def _breaks(fields: dict[str, np.ndarray]) -> np.ndarray:
    """Return a mask of the rows, except the last, whose next observation is not the observation of the next row."""
    pairs = [(fields[name][1:], fields[after][:-1]) for name, after, _ in _STATES if after in fields]
    equal = [np.ones(len(fields["terminated"]) - 1, bool), *(equal_rows(*pair) for pair in pairs)]
    return ~fields["terminated"][:-1] & ~np.logical_and.reduce(equal)


def _states(
    fields: dict[str, np.ndarray], name: str, after: str, key: str, is_last: bool, store: FrameStore
) -> tuple[np.ndarray, np.ndarray]:
    """Return the states and next states of all rows except the last; the states of frames are their numbers."""
    now, given, terminated = fields[name], fields.get(after), fields["terminated"][:-1]
    if now.ndim == 4:
        return store.add(key, now, given, terminated, is_last)
    return now[:-1], np.where(terminated[:, None], now[:-1], now[1:]) if given is None else given[:-1]
