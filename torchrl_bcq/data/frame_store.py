"""Collects the frames of a dataset, each once, in memory or in the folder of a memory-mapped copy."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from tensordict import MemoryMappedTensor, TensorDict, TensorDictBase
from torch import Tensor

from torchrl_bcq.data.frame_stack import FrameStack
from torchrl_bcq.errors import DatasetError

_INDEX_FILE = "frames.json"  # shape of each file of frames, and the entries whose numbers refer to this file
_BYTES = 2**24  # number of bytes that are compared or written at a time


class FrameStore:
    """Numbers the frames of each entry in order, without keeping them: for a pass that only checks the data."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}

    def add(
        self, key: str, now: np.ndarray, given: np.ndarray | None, stays: np.ndarray, is_last: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Add the frames of a chunk. Return the numbers of the frames and of the next frames, each ``[n, 1]``.

        A next frame that equals the frame of the row, or of the next row, is not kept again.

        Args:
            key: entry of the frames.
            now: frames of the rows and of the row after them, ``[n + 1, C, H, W]``.
            given: next frames ``[n + 1, C, H, W]``, if the data holds them.
            stays: rows whose next frame, if not given, is their own frame, ``[n]``. In other rows, the next frame is
                the frame of the next row.
            is_last: whether no row follows, so that the last frame of ``now`` is no frame of a next row.
        """
        rows, start = len(now) - 1, self.counts.get(key, 0)
        own = start + np.arange(rows)
        goes_on = ~stays
        if given is not None:
            goes_on = equal_rows(given[:-1], now[1:]) & (not is_last)
            stays = equal_rows(given[:-1], now[:-1])
        following, extra = np.where(goes_on, own + 1, own), ~(goes_on | stays)
        following[extra] = start + rows + np.arange(extra.sum())
        self._keep(key, now[:-1])
        if given is not None and extra.any():
            self._keep(key, given[:-1][extra])
        self.shapes[key], self.counts[key] = now.shape[1:], start + rows + int(extra.sum())
        if goes_on[-1] and not is_last:
            following[-1] = self.counts[key]  # the first frame of the next chunk
        return own[:, None], following[:, None]

    def _keep(self, key: str, frames: np.ndarray) -> None:
        """Keep no frames."""


class FramesInMemory(FrameStore):
    """Keeps frames in memory."""

    def __init__(self) -> None:
        super().__init__()
        self._parts: dict[str, list[np.ndarray]] = {}

    def _keep(self, key: str, frames: np.ndarray) -> None:
        self._parts.setdefault(key, []).append(frames)

    def view(self, transitions: TensorDict) -> TensorDict:
        """Replace the numbers of frames in ``transitions`` by the frames."""
        for key, parts in self._parts.items():
            frames = torch.from_numpy(np.ascontiguousarray(np.concatenate(parts)))  # as the hash of a frame needs it
            parts.clear()
            for entry in (key, ("next", key)):
                transitions.set(entry, FrameStack(frames, transitions.get(entry)))
        return transitions


class FramesInFolder(FrameStore):
    """Writes frames to files. ``folder`` must be set before the first frames are added."""

    folder: Path

    def __init__(self) -> None:
        super().__init__()
        self._streams: dict[str, BinaryIO] = {}

    def _keep(self, key: str, frames: np.ndarray) -> None:
        if key not in self._streams:
            file = _file(self.folder, len(self._streams))
            self._streams[key] = open(file, "wb")  # noqa: SIM115 (``close`` closes it)
        self._streams[key].write(np.ascontiguousarray(frames).data)

    def close(self) -> None:
        """Close the files, and write the file that describes them."""
        for stream in self._streams.values():
            stream.close()
        if self._streams:
            shapes = {key: (self.counts[key], *self.shapes[key]) for key in self._streams}
            _describe(self.folder, [(shape, [key, ("next", key)]) for key, shape in shapes.items()])


def without_frames(transitions: TensorDictBase, found: dict[Any, Tensor]) -> TensorDictBase:
    """Replace frames by their numbers; add the stored frames of each entry to ``found``."""
    for key, value in transitions.items(True, True):
        if isinstance(value, FrameStack):
            found[key] = value.frames
            transitions = transitions.copy().set(key, value.index)
    return transitions


def write_frames(found: Mapping[Any, Tensor], folder: Path) -> None:
    """Put stored frames into a folder: as links to the files of memory-mapped frames if possible, else as copies."""
    entries: dict[int, list[Any]] = {}
    for key, frames in found.items():
        entries.setdefault(id(frames), []).append(key)
    stores = {id(frames): frames for frames in found.values()}
    for number, frames in enumerate(stores.values()):
        target = _file(folder, number)
        try:
            os.link(frames.filename, target)  # type: ignore[attr-defined]
        except (AttributeError, OSError):  # frames in memory, or a file system without links
            _write(frames, target)
    if stores:
        _describe(folder, [(tuple(frames.shape), entries[key]) for key, frames in stores.items()])


def read_frames(folder: Path, transitions: TensorDict) -> TensorDict:
    """Replace the numbers of frames in a memory-mapped copy by the frames, if the folder holds frames."""
    description = folder / _INDEX_FILE
    for number, stored in enumerate(json.loads(description.read_text()) if description.is_file() else ()):
        file, shape = _file(folder, number), torch.Size(stored["shape"])
        size = file.stat().st_size if file.is_file() else 0
        if len(shape) != 4 or size != shape.numel():
            raise DatasetError(
                f"{file} has {size} bytes, expected {shape.numel()} for the frames {[*shape]}; delete the copy and "
                "convert the dataset again."
            )
        frames = MemoryMappedTensor.from_filename(file, torch.uint8, shape)
        for entry in stored["entries"]:
            key = tuple(entry)
            transitions.set(key, FrameStack(frames, transitions.get(key)))
    return transitions


def frames_of(transitions: TensorDictBase) -> dict[Any, FrameStack]:
    """Return the entries outside ``"next"`` that hold frames stored once."""
    entries = transitions.exclude("next").items(True, True)
    return {key: value for key, value in entries if isinstance(value, FrameStack)}


def equal_rows(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return which rows of two arrays ``[n, ...]`` are equal, ``[n]``; large arrays are compared in parts."""
    step = max(1, _BYTES * len(one) // max(1, one.nbytes))
    axes = tuple(range(1, one.ndim))
    starts = range(0, len(one), step)
    parts = [(one[start : start + step] == other[start : start + step]).all(axes) for start in starts]
    return np.concatenate(parts)


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number}.frames"


def _describe(folder: Path, stores: Iterable[tuple[Sequence[int], Sequence[Any]]]) -> None:
    described = [
        {"shape": [*shape], "entries": [[key] if isinstance(key, str) else [*key] for key in keys]}
        for shape, keys in stores
    ]
    (folder / _INDEX_FILE).write_text(json.dumps(described))


def _write(frames: Tensor, target: Path) -> None:
    free = shutil.disk_usage(target.parent).free
    if free < frames.numel():
        sizes = f"the frames need {frames.numel() / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free"
        raise OSError(f"{sizes} in {target.parent}; free space, or choose another folder")
    step = max(1, _BYTES * len(frames) // frames.numel())
    with open(target, "wb") as stream:
        for start in range(0, len(frames), step):
            stream.write(np.ascontiguousarray(frames[start : start + step].as_subclass(Tensor).cpu().numpy()).data)
