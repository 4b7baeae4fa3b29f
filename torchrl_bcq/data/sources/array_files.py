"""Reads arrays from HDF5 and NPZ files."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tensordict import TensorDict
from torchrl.data import Categorical, TensorSpec

from torchrl_bcq.data.checks import Columns
from torchrl_bcq.data.sources.entries import Names
from torchrl_bcq.data.sources.environment import recorded_in_hdf5
from torchrl_bcq.data.sources.hdf5_storage import open_hdf5, refuse_external_links
from torchrl_bcq.data.sources.layouts import read_steps
from torchrl_bcq.data.sources.order import check_limit, cut_at_limit
from torchrl_bcq.data.sources.source import Source, existing_file, scores_or_none
from torchrl_bcq.errors import DatasetError


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


def hdf5(path: str | Path, **settings: Any) -> Source:
    """Return a ``Source`` that reads the HDF5 file ``path`` in chunks; ``settings`` as in ``_source``."""
    path = existing_file(path)
    found = _hdf5_attributes(path)
    if settings.get("action_type") == "continuous":  # some files call the number of action dimensions n_actions
        found.pop("action_spec", None)
    return replace(_source(path, _hdf5_chunks, **settings), **found)


def npz(path: str | Path, **settings: Any) -> Source:
    """Return a ``Source`` that reads the NPZ file ``path`` in chunks; ``settings`` as in ``_source``."""
    return _source(existing_file(path), _npz_chunks, **settings)


def _source(
    path: Path,
    chunks: Callable[[Path, Names | None], Iterator[Columns]],
    *,
    names: Names | None = None,
    max_episode_steps: int | None = None,
    action_type: str | None = None,
    report_limit: bool = True,  # for cut_at_limit
) -> Source:
    check_limit(max_episode_steps)
    settings = {"names": names, "max_episode_steps": max_episode_steps, "action_type": action_type}
    cut = partial(cut_at_limit, max_episode_steps=max_episode_steps, report=report_limit)
    return Source(path.name, lambda: cut(chunks(path, names)), [path], settings, action_type=action_type)


def _hdf5_chunks(path: Path, names: Names | None) -> Iterator[Columns]:
    with open_hdf5(path) as file:
        refuse_external_links(file)
        yield from read_steps(file, names)


def _npz_chunks(path: Path, names: Names | None) -> Iterator[Columns]:
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
