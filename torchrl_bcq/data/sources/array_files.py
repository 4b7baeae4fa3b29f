"""Arrays in HDF5 and NPZ files."""

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

CHUNK_BYTES = 16 << 20  # read at a time, of the widest field as stored

# names of the fields in D4RL, Gymnasium, Minari, TorchRL, Tianshou and others
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
    """Read an HDF5 file into the transitions of :func:`~torchrl_bcq.from_arrays`.

    Args:
        path: file in D4RL's layout, or with other common names of its fields: ``observations [N, D]``,
            ``actions [N, A]``, ``rewards [N]``, ``terminals [N]``, and at least one of ``timeouts [N]`` and
            ``next_observations [N, D]``; or with a group of these fields for each episode (as in files of Minari and
            robomimic), which may hold one observation more than steps.
        names: entry of a field of :func:`~torchrl_bcq.from_arrays`, if it has no common name, such as
            ``{"observations": "obs/robot"}``.
        max_episode_steps: time limit in steps at which episodes were cut off, for files without ``timeouts``.
        action_spec: bounds that the actions must keep, if given.
        root: folder for a memory-mapped copy, made once and for data larger than memory.

    Raises:
        FileNotFoundError: if there is no such file.
        DatasetError: if it is no HDF5 file, lacks a field, or does not pass :func:`~torchrl_bcq.from_arrays`.
        OSError: if the copy cannot be written.

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
    """Read an NPZ file as :func:`load_hdf5` reads an HDF5 file.

    Arrays are read into memory whole; pickled ones are refused.
    """
    return npz(path, names=names, max_episode_steps=max_episode_steps).read(action_spec=action_spec, root=root)


def hdf5(path: str | Path, *, names: Mapping[str, str] | None = None, max_episode_steps: int | None = None) -> Source:
    """The source of :func:`load_hdf5`."""
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
    """The source of :func:`load_npz`."""
    path = existing_file(path)

    def chunks() -> Iterator[Columns]:
        if not zipfile.is_zipfile(path):
            raise DatasetError("it is not an NPZ file.")
        with zipfile.ZipFile(path) as archive:
            members = [name.removesuffix(".npy") for name in archive.namelist()]
            if repeated := sorted({name for name in members if members.count(name) > 1}):
                raise DatasetError(f"it holds {repeated} more than once; save each array once.")
            with open(path, "rb") as stored:
                stored.seek(-12 - len(archive.comment), os.SEEK_END)
                count = int.from_bytes(stored.read(2), "little")
            if count not in (len(members), 0xFFFF):  # the latter stands for more; a hidden field would not be missed
                raise DatasetError(f"{len(members)} of its {count} arrays are found; copy it again.")
            # np.load compares no checksum where an array is shorter than its member
            if (damaged := archive.testzip()) is not None:
                raise DatasetError(f"{damaged!r} in it is damaged; copy it again.")
        with np.load(path, allow_pickle=False) as file:
            yield from _slices({name: file[key] for name, key in find_fields(members, names).items()})

    return _source(path, chunks, names, max_episode_steps)


def existing_file(path: str | Path) -> Path:
    """The path of an existing file; others are refused by a FileNotFoundError."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    return path


def find_fields(found: list[str], names: Mapping[str, str] | None = None) -> dict[str, str]:
    """The entry of a file for each field; missing fields and fields with several candidates are refused."""
    names = dict(names or {})
    if unknown := sorted(names.keys() - _NAMES.keys()):
        raise DatasetError(f"names has {unknown}, which are no fields; those are {list(_NAMES)}.")
    if absent := sorted(set(names.values()) - set(found)):
        raise DatasetError(f"names asks for {absent}; it holds {sorted(found)}.")
    entries = {}
    for field, known in _NAMES.items():
        matches = [names[field]] if field in names else [name for name in known if name in found]
        if len(matches) > 1:
            raise DatasetError(f"{matches} could all be {field}; choose with names={{{field!r}: {matches[0]!r}}}.")
        if matches:
            entries[field] = matches[0]
    if missing := [field for field in _REQUIRED if field not in entries]:
        hint = " dones does not say whether an episode ended or was cut off." if "dones" in found else ""
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
    """Add ``truncated`` where the time limit cut episodes off, if nothing else says where episodes end."""
    steps = 0  # of the episode so far
    for chunk in chunks:
        if "truncated" in chunk or (max_episode_steps is None and "next_observations" in chunk):
            yield chunk
            continue
        if max_episode_steps is None:
            raise DatasetError(
                "it has neither timeouts nor next_observations, so nothing says where an episode was cut off and the "
                "next one began. Pass max_episode_steps=, add timeouts, or use from_arrays if no episode was cut."
            )
        ends = np.asarray(chunk["terminated"]).reshape(-1) == 1
        row = np.arange(len(ends))
        starts = np.where(np.roll(ends, 1), row, -steps)
        starts[:1] = -steps
        step = row - np.maximum.accumulate(starts) + 1  # of the rows since the last terminated one, from 1
        yield {**chunk, "truncated": ~ends & (step % max_episode_steps == 0)}
        steps = int(step[-1]) if len(step) and not ends[-1] else 0


def _slices(fields: Mapping[str, Any]) -> Iterator[Columns]:
    """Chunks of rows of arrays; there is one chunk at least, which may be empty."""
    lengths = {name: field.shape[0] if field.shape else 0 for name, field in fields.items()}
    check_lengths(lengths)
    widest = max(field.dtype.itemsize * prod(field.shape[1:]) for field in fields.values())
    step = max(1, CHUNK_BYTES // max(1, widest))
    for start in range(0, max(1, *lengths.values()), step):
        yield {name: field[start : start + step] if field.shape else field[()] for name, field in fields.items()}


def _hdf5_attributes(path: Path) -> dict[str, Any]:
    """Environment and scores in a file; nothing if it cannot be opened, which its reader will report."""
    import h5py

    try:
        with h5py.File(path, "r") as file:
            env_id, *scores = (file.attrs.get(name) for name in ("env_id", "ref_min_score", "ref_max_score"))
    except Exception:  # h5py raises many kinds for damaged files
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
    """Refuse a file in which a dataset with one of the names is incomplete."""
    import h5py

    def check(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and name.rpartition("/")[2] in names:
            _check_stored(name, item)

    with h5py.File(path, "r") as file:
        file.visititems(check)


def _check_stored(name: str, field: Any) -> None:
    """Refuse data that was never written, or that only a damaged header describes: it would read as zeros."""
    if field.is_virtual or field.external:
        raise DatasetError(f"{name} lies in other files, which may be gone or change; copy it into this one.")
    if not field.size:
        return
    found, expected, kind = field.id.get_storage_size(), field.nbytes, "bytes"
    if field.chunks:
        expected = prod(-(-n // c) for n, c in zip(field.shape, field.chunks, strict=True))
        found, kind = field.id.get_num_chunks(), "chunks"
    if found < expected:
        raise DatasetError(
            f"{name} has shape {field.shape}, but only {found} of its {expected} {kind} were written. Copy it again, "
            "or write it whole."
        )


def _episode_groups(file: Any) -> list[Any]:
    """Groups with numbered names, in order, if the file or a group of it holds nothing else."""
    if not all(hasattr(child, "values") for child in file.values()):
        return []
    for group in [file, *file.values()]:
        numbers = {name: int(match[1]) for name in group if (match := re.search(r"(\d+)$", name))}
        if numbers and len(numbers) == len(group) and all(hasattr(child, "values") for child in group.values()):
            return [group[name] for name in sorted(numbers, key=numbers.__getitem__)]
    return []


def _end_episode(episode: Mapping[str, np.ndarray]) -> Columns:
    """Fields of one episode, which may hold one observation more than steps; its end is a cut unless it has a flag."""
    observations, terminated = episode["observations"], episode["terminated"]
    steps = len(episode["actions"])
    if len(observations) == steps + 1 and "next_observations" not in episode:
        episode = {**episode, "observations": observations[:-1], "next_observations": observations[1:]}
    truncated = np.array(episode.get("truncated", np.zeros(steps, dtype=bool)))
    if len(terminated) == len(truncated) and not np.any(terminated[-1:]) and not np.any(truncated[-1:]):
        truncated[-1:] = True
    return {**episode, "truncated": truncated}


def joined(episodes: Iterable[Mapping[str, np.ndarray]]) -> Iterator[Columns]:
    """Join episodes with the same fields, widths and dtypes to chunks."""
    held: list[Columns] = []
    kind: object = None
    size = 0
    for number, episode in enumerate(map(_end_episode, episodes)):
        if not len(episode["actions"]):
            raise DatasetError(f"episode {number} (the first is 0) has no steps; leave it out.")
        own = {name: (values.shape[1:], values.dtype) for name, values in episode.items()}
        if held and (own != kind or size > CHUNK_BYTES):
            yield {name: np.concatenate([part[name] for part in held]) for name in held[0]}
            held, size = [], 0
        held.append(episode)
        kind, size = own, size + max(values.nbytes for values in episode.values())
    if held:
        yield {name: np.concatenate([part[name] for part in held]) for name in held[0]}
