"""Reads arrays from HDF5 and NPZ files."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from tensordict import TensorDict
from torchrl.data import TensorSpec

from torchrl_bcq.data.checks import FIELDS, Columns, DatasetError, check_lengths
from torchrl_bcq.data.sources.source import Source, env_id_or_none, scores_or_none

CHUNK_BYTES = 16 << 20  # limit in bytes for the largest field of a chunk

# common names of each field in D4RL, Gymnasium, Minari, TorchRL, Tianshou and others
_NAMES = {
    "observations": ("observations", "observation", "obs", "states", "state"),
    "actions": ("actions", "action", "act"),
    "rewards": ("rewards", "reward", "rew"),
    "terminated": ("terminals", "terminal", "terminations", "terminated"),
    "truncated": ("timeouts", "timeout", "truncations", "truncated"),
    "next_observations": ("next_observations", "next_observation", "obs_next", "next_obs", "next_states", "next_state"),
}
_REQUIRED = FIELDS[:4]


def load_hdf5(
    path: str | Path,
    *,
    names: Mapping[str, str] | None = None,
    max_episode_steps: int | None = None,
    action_spec: TensorSpec | None = None,
    root: str | Path | None = None,
) -> TensorDict:
    """Read an HDF5 file; returns transitions in the layout of ``from_arrays``.

    Args:
        path: file with D4RL's fields ``observations [N, D]``, ``actions [N, A]``, ``rewards [N]``, ``terminals [N]``,
            and at least one of ``timeouts [N]`` and ``next_observations [N, D]``. Other common field names also work.
            The file may also hold one HDF5 group per episode, with these fields in each group, as in Minari and
            robomimic. Such a group may also hold the observation after its last step.
        names: mapping from arguments of ``from_arrays`` to entries of the file, such as ``{"observations":
            "obs/robot"}``. ``names`` is needed only for entries with uncommon names.
        max_episode_steps: time limit in steps at which episodes were cut off, for files without ``timeouts``.
        action_spec: if given, the actions must lie within its bounds.
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
    return hdf5(path, names=names, max_episode_steps=max_episode_steps).read(action_spec=action_spec, root=root)


def load_npz(
    path: str | Path,
    *,
    names: Mapping[str, str] | None = None,
    max_episode_steps: int | None = None,
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
    return npz(path, names=names, max_episode_steps=max_episode_steps).read(action_spec=action_spec, root=root)


def hdf5(path: str | Path, *, names: Mapping[str, str] | None = None, max_episode_steps: int | None = None) -> Source:
    """Return a ``Source`` that reads the HDF5 file ``path`` in chunks."""
    import h5py

    path = existing_file(path)

    def chunks() -> Iterator[Columns]:
        if not h5py.is_hdf5(path):
            raise DatasetError("it is not an HDF5 file.")
        with h5py.File(path, "r") as file:
            if groups := _episode_groups(file):
                fields = (_hdf5_fields(group, names) for group in groups)
                yield from joined({name: field[()] for name, field in part.items()} for part in fields)
            else:
                yield from _slices(_hdf5_fields(file, names))

    return replace(_source(path, chunks, names, max_episode_steps), **_hdf5_attributes(path))


def npz(path: str | Path, *, names: Mapping[str, str] | None = None, max_episode_steps: int | None = None) -> Source:
    """Return a ``Source`` that reads the NPZ file ``path`` in chunks."""
    path = existing_file(path)

    def chunks() -> Iterator[Columns]:
        if not zipfile.is_zipfile(path):
            raise DatasetError("it is not an NPZ file.")
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
            yield from _slices({name: file[key] for name, key in find_fields(members, names).items()})

    return _source(path, chunks, names, max_episode_steps)


def existing_file(path: str | Path) -> Path:
    """Return the path if the file exists, else raise a ``FileNotFoundError``."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    return path


def find_fields(found: list[str], names: Mapping[str, str] | None = None) -> dict[str, str]:
    """Find the entry of each field among ``found``. A missing or ambiguous field raises ``DatasetError``."""
    names = dict(names or {})
    if unknown := sorted(names.keys() - _NAMES.keys()):
        raise DatasetError(f"names has the unknown fields {unknown}; the known fields are {list(_NAMES)}.")
    if absent := sorted(set(names.values()) - set(found)):
        raise DatasetError(f"names refers to the entries {absent}, but the file holds only {sorted(found)}.")
    entries = {}
    for field, known in _NAMES.items():
        matches = [names[field]] if field in names else [name for name in known if name in found]
        if len(matches) > 1:
            raise DatasetError(f"{matches} could all be {field}; choose one with names={{{field!r}: {matches[0]!r}}}.")
        if matches:
            entries[field] = matches[0]
    if missing := [field for field in _REQUIRED if field not in entries]:
        hint = " dones does not say whether an episode was terminated or truncated." if "dones" in found else ""
        raise DatasetError(
            f"it lacks {missing}; it holds {sorted(found)}.{hint} Name the entries with names={{{missing[0]!r}: ...}}."
        )
    return entries


def _source(
    path: Path, chunks: Callable[[], Iterator[Columns]], names: Mapping[str, str] | None, max_episode_steps: int | None
) -> Source:
    if max_episode_steps is not None and max_episode_steps < 1:
        raise DatasetError(f"max_episode_steps is {max_episode_steps}, expected at least 1.")
    settings = {"names": names, "max_episode_steps": max_episode_steps}
    return Source(path.name, lambda: _with_ends(chunks(), max_episode_steps), [path], settings)


def _with_ends(chunks: Iterator[Columns], max_episode_steps: int | None) -> Iterator[Columns]:
    """Yield the chunks. A missing ``truncated`` is computed from ``max_episode_steps``, if this is set."""
    steps = 0  # number of steps of the current episode in earlier chunks
    for chunk in chunks:
        if "truncated" in chunk or (max_episode_steps is None and "next_observations" in chunk):
            yield chunk
            continue
        if max_episode_steps is None:
            raise DatasetError(
                "it has neither timeouts nor next_observations, so it is unknown where episodes were cut off. Pass "
                "max_episode_steps=, add timeouts, or use from_arrays if no episode was cut off."
            )
        ends = np.asarray(chunk["terminated"]).reshape(-1) == 1
        row = np.arange(len(ends))
        starts = np.where(np.roll(ends, 1), row, -steps)
        starts[:1] = -steps
        step = row - np.maximum.accumulate(starts) + 1  # rows since the last terminated row, including this row
        yield {**chunk, "truncated": ~ends & (step % max_episode_steps == 0)}
        steps = int(step[-1]) if len(step) and not ends[-1] else 0


def _slices(fields: Mapping[str, Any]) -> Iterator[Columns]:
    """Yield the fields in chunks of rows. If the fields have no rows, yield one empty chunk."""
    lengths = {name: field.shape[0] if field.shape else 0 for name, field in fields.items()}
    check_lengths(lengths)
    widest = max(field.dtype.itemsize * prod(field.shape[1:]) for field in fields.values())
    step = max(1, CHUNK_BYTES // max(1, widest))
    for start in range(0, max(1, *lengths.values()), step):
        yield {name: field[start : start + step] if field.shape else field[()] for name, field in fields.items()}


def _hdf5_attributes(path: Path) -> dict[str, Any]:
    """Return the environment id and the reference scores, or ``{}`` if the file is damaged."""
    import h5py

    try:
        with h5py.File(path, "r") as file:
            env_id, *scores = (file.attrs.get(name) for name in ("env_id", "ref_min_score", "ref_max_score"))
    except Exception:  # h5py raises various exceptions for damaged files
        return {}
    return {"env_id": env_id_or_none(env_id), "reference_scores": scores_or_none(scores)}


def _hdf5_fields(group: Any, names: Mapping[str, str] | None) -> dict[str, Any]:
    found = dict.fromkeys([*group, *(entry for entry in (names or {}).values() if entry in group)])
    fields = {name: group[key] for name, key in find_fields(list(found), names).items()}
    for name, field in fields.items():
        if not hasattr(field, "shape"):
            raise DatasetError(f"{name} is a group of {sorted(field)}; choose one with names={{{name!r}: ...}}.")
        _check_stored(name, field)
    return fields


def check_hdf5(path: Path, names: Collection[str]) -> None:
    """Raise a ``DatasetError`` if an HDF5 dataset with a name in ``names`` is incomplete."""
    import h5py

    def check(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and name.rpartition("/")[2] in names:
            _check_stored(name, item)

    with h5py.File(path, "r") as file:
        file.visititems(check)


def _check_stored(name: str, field: Any) -> None:
    """Raise a ``DatasetError`` if data is missing in the file: h5py would read missing data as zeros."""
    if field.is_virtual or field.external:
        raise DatasetError(f"{name} is stored in other files, and they may change; copy it into this file.")
    if not field.size:
        return
    found, expected, kind = field.id.get_storage_size(), field.nbytes, "bytes"
    if field.chunks:
        expected = prod(-(-n // c) for n, c in zip(field.shape, field.chunks, strict=True))
        found, kind = field.id.get_num_chunks(), "chunks"
    if found < expected:
        raise DatasetError(
            f"{name} has shape {field.shape}, but only {found} of its {expected} {kind} were written. Copy the file "
            "again, or write the whole field."
        )


def _episode_groups(file: Any) -> list[Any]:
    """Return the HDF5 groups of the episodes, sorted by the number in the group's name, or ``[]``."""
    if not all(hasattr(child, "values") for child in file.values()):
        return []
    for group in [file, *file.values()]:
        numbers = {name: int(match[1]) for name in group if (match := re.search(r"(\d+)$", name))}
        if numbers and len(numbers) == len(group) and all(hasattr(child, "values") for child in group.values()):
            return [group[name] for name in sorted(numbers, key=numbers.__getitem__)]
    return []


def _end_episode(episode: Mapping[str, np.ndarray]) -> Columns:
    """Return the episode with one observation per step. A last row without a true flag becomes truncated."""
    observations, terminated = episode["observations"], episode["terminated"]
    steps = len(episode["actions"])
    if len(observations) == steps + 1 and "next_observations" not in episode:
        episode = {**episode, "observations": observations[:-1], "next_observations": observations[1:]}
    truncated = np.array(episode.get("truncated", np.zeros(steps, dtype=bool)))
    if len(terminated) == len(truncated) and not np.any(terminated[-1:]) and not np.any(truncated[-1:]):
        truncated[-1:] = True
    return {**episode, "truncated": truncated}


def joined(episodes: Iterable[Mapping[str, np.ndarray]]) -> Iterator[Columns]:
    """Join consecutive episodes with the same fields, widths and dtypes into chunks."""
    held: list[Columns] = []
    kind: object = None
    size = 0
    for number, episode in enumerate(map(_end_episode, episodes)):
        if not len(episode["actions"]):
            raise DatasetError(f"episode {number} (counted from 0) has no steps; leave it out.")
        own = {name: (values.shape[1:], values.dtype) for name, values in episode.items()}
        if held and (own != kind or size > CHUNK_BYTES):
            yield {name: np.concatenate([part[name] for part in held]) for name in held[0]}
            held, size = [], 0
        held.append(episode)
        kind, size = own, size + max(values.nbytes for values in episode.values())
    if held:
        yield {name: np.concatenate([part[name] for part in held]) for name in held[0]}
