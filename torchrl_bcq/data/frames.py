"""Joins the last observations of an episode to one state."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from torchrl_bcq.data.defects import Rows
from torchrl_bcq.data.episodes import check_single_steps, episode_numbers
from torchrl_bcq.data.frame_stack import FrameStack
from torchrl_bcq.data.frame_store import frames_of
from torchrl_bcq.data.n_step import check_output
from torchrl_bcq.data.sources.conversion import load_memmap, load_or_write, write_memmap
from torchrl_bcq.errors import DatasetError, remedy

_CHUNK = 2**16  # number of rows that are compared, or written, at a time
_FRAMES = 256  # number of frames that are compared
_logger = logging.getLogger(__name__)


def stack_observations(transitions: TensorDictBase, num_frames: int, *, folder: str | Path | None = None) -> TensorDict:
    """Join the last ``num_frames`` observations of the episode to the observation of each row, oldest first.

    ``observation [N, D]`` becomes ``[N, num_frames * D]``, and so does ``("next", "observation")``. Before the start of
    an episode, its first observation is repeated. So the rows are equal to the rows of an environment with TorchRL's
    ``CatFrames(N=num_frames, dim=-1, in_keys=["observation"])``. Frames that a reader returned, ``[N, C, H, W]``, are
    joined to ``[N, num_frames * C, H, W]``, as by ``dim=-3``. They are not copied: the result refers to the same
    frames, and a replay buffer joins the frames of a batch when it draws the batch. If there are frames beside vectors,
    both are joined. Call ``stack_observations`` before ``multi_step``. The other entries are not copied, unless
    ``folder`` is given.

    A state holds the rows that the dataset contains. If rows are missing inside an episode, the states after them hold
    earlier observations instead. A warning is logged if the next observation of a row is not exactly the observation of
    the next row of its episode.

    Args:
        transitions: TensorDict of batch size ``[N]`` with the rows of each episode in order of time. Required entries
            are ``observation`` and ``("next", "observation")``, each ``[N, D]``, or frames from a reader, and ``episode
            [N]`` or ``("next", "done") [N, 1]``.
        num_frames: number of observations in a state, at least 1.
        folder: new folder. The result is written there in parts and is memory-mapped. Pass a folder if the result does
            not fit into memory. Memory-mapped frames are linked and need no further space on the disk.

    Raises:
        OSError: if the folder exists (``FileExistsError``) or cannot be written.
        ValueError: if ``num_frames`` is not a whole number of at least 1.
        DatasetError: if an observation is missing, or is neither a vector nor frames from a reader, if the rows of an
            episode do not directly follow each other, or if the transitions span several steps.

    Example:
        >>> import numpy as np
        >>> from torchrl_bcq import from_arrays, stack_observations
        >>> ones, end = np.ones((3, 1)), np.array([False, False, True])
        >>> transitions = from_arrays(np.array([[1], [2], [3]]), ones, ones, end, next_observations=[[2], [3], [4]])
        >>> stacked = stack_observations(transitions, 2)
        >>> stacked["observation"].tolist()
        [[1.0, 1.0], [1.0, 2.0], [2.0, 3.0]]
        >>> stacked["next", "observation"].tolist()
        [[1.0, 2.0], [2.0, 3.0], [3.0, 4.0]]
    """
    if not isinstance(num_frames, int) or num_frames < 1:
        raise ValueError(f"num_frames is {num_frames!r}, expected a whole number of at least 1.")
    folder = check_output(transitions, folder)
    numbers = episode_numbers(transitions)
    states = _states(transitions)
    if num_frames > len(numbers):
        name = remedy("num_frames", "stack")
        raise DatasetError(f"{name} is {num_frames}, but there are only {len(numbers)} rows; set a smaller {name}.")
    rows = torch.arange(len(numbers), device=numbers.device)
    first = torch.searchsorted(numbers, numbers)  # [N], first row of the episode of each row
    if num_frames > 1:
        _report_breaks([(_columns(now), _columns(later)) for now, later in states.values()], numbers)
        _report_stacked([now for now, _ in states.values()], numbers, num_frames)

    def part(some: slice) -> TensorDict:
        result, after = transitions[some].copy(), transitions["next"][some].copy()
        for key, (now, later) in states.items():
            joined = _columns(now)
            past = [joined[(rows[some] - ago).maximum(first[some])] for ago in reversed(range(num_frames))]
            result.set(key, _like(now, torch.cat(past, -1)))
            after.set(key, _like(later, torch.cat([*past[1:], _columns(later)[some]], -1)))
        return result.set("next", after)

    if folder is None:
        return part(slice(None))
    write_memmap((part(slice(i, i + _CHUNK)) for i in range(0, len(rows), _CHUNK)), len(rows), folder)
    return load_memmap(folder)


def stack_in_folder(transitions: TensorDictBase, num_frames: int) -> TensorDict:
    """Return the stacked rows of a copy, memory-mapped from a second copy beside it, written if missing.

    Args:
        transitions: memory-mapped copy, as a reader returns it. Its name contains a digest of its contents.
        num_frames: as for ``stack_observations``.
    """
    copy = Path(transitions["action"].filename).parent
    folder = copy.with_name(f"{copy.name}-stack{num_frames}")
    stacked = load_or_write(folder, lambda: stack_observations(transitions, num_frames, folder=folder))
    _logger.info("states of %d observations: memory-mapped from %s", num_frames, folder)
    return stacked


def _columns(states: Tensor) -> Tensor:
    """Return vectors ``[N, D]``, or the numbers ``[N, 1]`` of stored frames."""
    return states.index if isinstance(states, FrameStack) else states


def _like(states: Tensor, joined: Tensor) -> Tensor:
    """Return joined vectors, or the frames with these joined numbers."""
    return states.with_index(joined) if isinstance(states, FrameStack) else joined


def _states(transitions: TensorDictBase) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the observations and the next observations, each ``[N, D]`` or frames, and frames beside vectors."""
    check_single_steps(transitions)
    states = {}
    for key in dict.fromkeys(["observation", *frames_of(transitions)]):
        keys = (key, ("next", key))
        if missing := [key for key in keys if transitions.get(key, None) is None]:
            present = sorted(map(str, transitions.keys(True, True)))
            raise DatasetError(f"the transitions lack {missing}; they hold {present}. Add or rename the entries.")
        now, later = (transitions.get(key) for key in keys)
        stored = isinstance(now, FrameStack) and isinstance(later, FrameStack)
        if now.shape != later.shape or not (stored or now.ndim == 2):
            found = f"{key} has shape {tuple(now.shape)} and {keys[1]} {tuple(later.shape)}"
            raise DatasetError(
                f"{found}, expected the same shape [N, D] twice: only vectors can be stacked, and frames that a reader "
                "returned. For frames of rollouts, append CatFrames(N, dim=-3) to the environment."
            )
        states[key] = now, later
    return states


def _report_breaks(states: Sequence[tuple[Tensor, Tensor]], numbers: Tensor) -> None:
    """Log a warning if episodes have rows that do not continue the row before."""
    breaks = Rows()
    for start in range(0, len(numbers) - 1, _CHUNK):
        now, after = slice(start, min(start + _CHUNK, len(numbers) - 1)), slice(start + 1, start + _CHUNK + 1)
        differs = [(later[now] != state[after]).any(-1) for state, later in states]
        breaks.add((torch.stack(differs).any(0) & (numbers[now] == numbers[after])).cpu(), start)
    if breaks.count:
        _logger.warning(
            "in %d of %d rows (first: %d), the next observation is not the observation of the next row of the episode. "
            "The states join the rows as they are stored. If rows are missing, the states after them hold earlier "
            "observations; if rows are shuffled, the states are wrong, so sort the rows by episode and time.",
            breaks.count,
            len(numbers),
            breaks.first,
        )


def _report_stacked(observations: Sequence[Tensor], numbers: Tensor, num_frames: int) -> None:
    """Log a warning if each of the first observations holds the ``num_frames`` last observations already."""
    for observation in observations:
        rows = _CHUNK if observation.ndim == 2 else _FRAMES
        some, known = observation[:rows], numbers[:rows]
        some = some.gathered() if isinstance(some, FrameStack) else some
        size, odd = divmod(some.shape[1], num_frames)
        inside = known[1:] == known[:-1]
        before, after = some[:-1][inside], some[1:][inside]
        if not odd and torch.equal(before[:, size:], after[:, :-size]) and not torch.equal(before, after):
            _logger.warning(
                "the observations seem to be stacked already: each holds the last %s of the row before, moved by %d "
                "places. If so, %s.",
                "numbers" if some.ndim == 2 else "channels",
                size,
                remedy("do not stack them again", "set stack=1"),
            )
