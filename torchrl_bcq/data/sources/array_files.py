"""Reads arrays from HDF5 and NPZ files."""

from __future__ import annotations

import logging
import os
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tensordict import TensorDict
from torchrl.data import Categorical, TensorSpec

from torchrl_bcq.data.checks import Columns
from torchrl_bcq.data.sources.entries import Names
from torchrl_bcq.data.sources.environment import recorded_in_hdf5
from torchrl_bcq.data.sources.hdf5_storage import open_hdf5
from torchrl_bcq.data.sources.layouts import read_steps
from torchrl_bcq.data.sources.source import Source, existing_file, scores_or_none
from torchrl_bcq.errors import DatasetError, remedy

_logger = logging.getLogger(__name__)


def load_hdf5(
    path: str | Path,
    *,
    names: Names | None = None,
    max_episode_steps: int | None = None,
    action_type: str | None = None,
    action_spec: TensorSpec | None = None,
    root: str | Path | None = None,
) -> TensorDict:
    """Read an HDF5 file; returns transitions in the layout of ``from_arrays``.

    Args:
        path: file with D4RL's fields ``observations [N, D]``, ``actions [N, A]``, ``rewards [N]``, ``terminals [N]``,
            and at least one of ``timeouts [N]`` and ``next_observations [N, D]``. Other common field names also work.
            The file may also hold one HDF5 group per episode, with these fields in each group, as in Minari and
            robomimic. Such a group may also hold the observation after its last step. In place of ``timeouts``, the
            ends of episodes may be in ``episode_terminals [N]``, ``episode_starts [N]`` or ``lengths [E]``. With
            ``lengths``, the fields may be padded: ``[E, T, D]``. Buffers of Tianshou and dumps of d3rlpy also work.
            Actions may be discrete, as in ``from_arrays``. Their number may be in the attribute ``n_actions``. The
            entries ``action_masks``, ``next_action_masks`` and ``action_probabilities`` are read, if there are any.
        names: mapping from arguments of ``from_arrays``, ``episode_terminals``, ``episode_starts`` or ``lengths`` to
            entries of the file, such as ``{"observations": "obs/robot"}``. ``names`` is needed only for entries with
            uncommon names, and for groups, such as ``{"groups": "patient_id"}``: one group for each step, or one for
            each episode if the episodes are HDF5 groups or have ``lengths``. A list of entries, such as ``["obs/robot",
            "obs/object"]``, is joined to one vector in this order.
        max_episode_steps: time limit in steps at which episodes were cut off, for files without ``timeouts``.
        action_type: ``"continuous"`` or ``"discrete"``. By default, the dtype decides, as in ``from_arrays``.
        action_spec: if given, all actions must lie within its bounds, or be one of its discrete actions.
        root: folder for a memory-mapped copy, for data larger than memory. Later calls reuse the copy.

    Raises:
        FileNotFoundError: if the file does not exist.
        DatasetError: if the file is not an HDF5 file, lacks a field, or does not pass the checks of ``from_arrays``.
        OSError: if the memory-mapped copy cannot be written.

    Example:
        >>> import h5py
        >>> with h5py.File("steps.hdf5", "w") as file:
        ...     file["observations"], file["actions"] = [[0.1], [0.2], [0.3], [0.4]], [[1.0]] * 4
        ...     file["rewards"], file["terminals"], file["timeouts"] = [1.0] * 4, [0, 0, 0, 1], [0] * 4
        >>> load_hdf5("steps.hdf5")["next", "terminated"].squeeze(-1).tolist()
        [False, False, False, True]

    Source: D4RL, arXiv:2004.07219.
    """
    source = hdf5(path, names=names, max_episode_steps=max_episode_steps, action_type=action_type)
    return source.read(action_spec=action_spec, root=root)


def load_npz(
    path: str | Path,
    *,
    names: Names | None = None,
    max_episode_steps: int | None = None,
    action_type: str | None = None,
    action_spec: TensorSpec | None = None,
    root: str | Path | None = None,
) -> TensorDict:
    """Read an NPZ file; the arguments, the result and the errors are those of ``load_hdf5``.

    Each array is read into memory as a whole. Pickled arrays raise a ``DatasetError``.

    Example:
        >>> one, ends = np.ones((4, 1)), {"terminals": [0, 0, 0, 1], "timeouts": np.zeros(4)}
        >>> np.savez("steps.npz", observations=one, actions=one, rewards=one, **ends)
        >>> load_npz("steps.npz").batch_size
        torch.Size([4])
    """
    source = npz(path, names=names, max_episode_steps=max_episode_steps, action_type=action_type)
    return source.read(action_spec=action_spec, root=root)


def hdf5(
    path: str | Path,
    *,
    names: Names | None = None,
    max_episode_steps: int | None = None,
    action_type: str | None = None,
) -> Source:
    """Return a ``Source`` that reads the HDF5 file ``path`` in chunks."""
    path = existing_file(path)

    def chunks() -> Iterator[Columns]:
        with open_hdf5(path) as file:
            yield from read_steps(file, names)

    return replace(_source(path, chunks, names, max_episode_steps, action_type), **_hdf5_attributes(path))


def npz(
    path: str | Path,
    *,
    names: Names | None = None,
    max_episode_steps: int | None = None,
    action_type: str | None = None,
) -> Source:
    """Return a ``Source`` that reads the NPZ file ``path`` in chunks."""
    path = existing_file(path)

    def chunks() -> Iterator[Columns]:
        if not zipfile.is_zipfile(path):
            raise DatasetError("it is not an NPZ file; choose another file.")
        with zipfile.ZipFile(path) as archive:
            members = [name.removesuffix(".npy") for name in archive.namelist()]
            if repeated := sorted({name for name in members if members.count(name) > 1}):
                raise DatasetError(f"the file holds the arrays {repeated} more than once; save each array once.")
            with open(path, "rb") as stored:
                stored.seek(-12 - len(archive.comment), os.SEEK_END)
                count = int.from_bytes(stored.read(2), "little")
            # refuse a file whose index lists fewer arrays than its count; 0xFFFF means 65535 arrays or more
            if count not in (len(members), 0xFFFF):
                raise DatasetError(f"it holds {len(members)} arrays, but should hold {count}; copy the file again.")
            # find damaged arrays: np.load checks no checksum if an array is shorter than its archive member
            if (damaged := archive.testzip()) is not None:
                raise DatasetError(f"the array {damaged!r} in the file is damaged; copy the file again.")
        with np.load(path, allow_pickle=False) as file:
            yield from read_steps(file, names)

    return _source(path, chunks, names, max_episode_steps, action_type)


def _source(
    path: Path,
    chunks: Callable[[], Iterator[Columns]],
    names: Names | None,
    max_episode_steps: int | None,
    action_type: str | None,
) -> Source:
    if max_episode_steps is not None and (not isinstance(max_episode_steps, int) or max_episode_steps < 1):
        raise DatasetError(f"max_episode_steps is {max_episode_steps!r}, expected a whole number of at least 1.")
    settings = {"names": names, "max_episode_steps": max_episode_steps, "action_type": action_type}
    return Source(path.name, lambda: _with_ends(chunks(), max_episode_steps), [path], settings, action_type=action_type)


def _with_ends(chunks: Iterator[Columns], max_episode_steps: int | None) -> Iterator[Columns]:
    """Yield the chunks. A missing ``truncated`` is computed from ``max_episode_steps``, if this is set."""
    steps = 0  # number of steps of the current episode in earlier chunks
    for number, chunk in enumerate(chunks):
        if "truncated" in chunk and max_episode_steps is not None and not number:
            _logger.warning("max_episode_steps has no effect, because the file says where episodes were cut off.")
        if "truncated" in chunk or (max_episode_steps is None and "next_observations" in chunk):
            yield chunk
            continue
        if max_episode_steps is None:
            raise DatasetError(
                "it has neither timeouts nor next_observations, so it is unknown where episodes were cut off. "
                + remedy(
                    "Pass max_episode_steps=, add timeouts, or use from_arrays if no episode was cut off.",
                    "Set reader.max_episode_steps=N to the time limit, or add timeouts, which are all 0 if no episode "
                    "was cut off.",
                )
            )
        ends = np.asarray(chunk["terminated"]).reshape(-1) == 1
        row = np.arange(len(ends))
        starts = np.where(np.roll(ends, 1), row, -steps)
        starts[:1] = -steps
        step = row - np.maximum.accumulate(starts) + 1  # rows since the last terminated row, including this row
        yield {**chunk, "truncated": ~ends & (step % max_episode_steps == 0)}
        steps = int(step[-1]) if len(step) and not ends[-1] else 0


def _hdf5_attributes(path: Path) -> dict[str, Any]:
    """Return the environment, the reference scores and the action spec, or ``{}`` if the file is damaged."""
    import h5py

    try:
        with h5py.File(path, "r") as file:
            env, scores = recorded_in_hdf5(file.attrs), [file.attrs.get(n) for n in ("ref_min_score", "ref_max_score")]
            number = file.attrs.get("n_actions")
    except Exception:  # h5py raises various exceptions for damaged files
        return {}
    spec = Categorical(int(number)) if isinstance(number, (int, np.integer)) and number > 1 else None
    return {"env": env, "reference_scores": scores_or_none(scores), "action_spec": spec}
