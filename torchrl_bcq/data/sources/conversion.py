"""Writes memory-mapped copies of transitions, part by part, and loads them. No unfinished copy is ever loaded."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import _encode_key_for_filesystem
from torch import Tensor

from torchrl_bcq.data.frame_store import FramesInFolder, read_frames, without_frames, write_frames
from torchrl_bcq.errors import DatasetError
from torchrl_bcq.files import UNFINISHED, home, write_whole

_FORMAT = 2  # increase this number when the conversion changes, so that old copies are not reused


def contents_digest(files: Iterable[Path]) -> str:
    """Return a digest of the contents of the files."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.stat().st_size.to_bytes(8, "big"))
        with open(file, "rb") as content:
            while block := content.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def fingerprint(contents: str, settings: Mapping[str, Any]) -> str:
    """Return a digest of the ``contents_digest`` of files and of the reader's settings."""
    text = json.dumps([_FORMAT, contents, settings], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_memmap(parts: Iterator[TensorDictBase], rows: int, folder: Path, store: FramesInFolder | None = None) -> None:
    """Write all parts, ``rows`` rows in total, to a new folder. After an error, the folder is removed.

    If the parts hold frames, the folder gets links to memory-mapped frames, or copies of other frames. If the parts
    hold the numbers of frames in ``store``, then ``store`` writes these frames to the folder.
    """
    frames: dict[Any, Tensor] = {}
    store = FramesInFolder() if store is None else store
    parts = (without_frames(part, frames).cpu() for part in parts)
    try:
        with write_whole(folder) as aside, ExitStack() as stack:
            aside.mkdir()
            store.folder = aside
            stack.callback(store.close)
            first = next(parts)
            size = (first.bytes() / len(first) + sum(map(prod, store.shapes.values()))) * rows
            free = shutil.disk_usage(folder.parent).free
            if free < size:
                raise OSError(
                    f"the copy needs {size / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free; choose another folder"
                )
            target = first[:1].expand(rows).memmap_like(str(aside))  # creates the files; the rows are written below
            # write with file streams: writing to mapped tensors would increase the resident memory
            streams = {k: stack.enter_context(open(leaf.filename, "r+b")) for k, leaf in target.items(True, True)}
            written = 0
            for part in chain([first], parts):
                written += len(part)
                for key, stream in streams.items() if written <= rows else ():
                    stream.write(np.ascontiguousarray(part.get(key).cpu()).data)
            if written != rows:
                changed = f"it had {rows} transitions in the first pass and {written} in the second"
                raise DatasetError(f"{changed}; try again when no program writes to the source.")
            stack.close()
            write_frames(frames, aside)
            for path in (*aside.rglob("*"), aside):
                _sync(path)
        _sync(folder.parent)
    except OSError as error:
        reason = error.strerror if error.filename == str(folder) else error
        raise OSError(f"{folder} cannot be written ({reason}); no partial copy is left.") from error


def load_or_write(folder: Path, write: Callable[[], object]) -> TensorDict:
    """Load the copy in ``folder``. If there is no copy, call ``write`` first; other processes wait meanwhile."""
    if not folder.exists():  # an existing copy needs no lock file, which cannot be created in a read-only folder
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if not folder.exists():
                for aside in folder.parent.glob(f"{UNFINISHED}*.{folder.name}"):  # killed processes left these copies
                    shutil.rmtree(aside, ignore_errors=True)
                write()
    return load_memmap(folder)


def _sync(path: Path) -> None:
    """Flush a file or folder to the disk, so that its content is not lost in a power failure."""
    if path.is_dir() and os.name != "posix":  # Windows cannot open folders, so skip them
        return
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)  # a hard link may be read-only
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_memmap(path: str | Path) -> TensorDict:
    """Load a memory-mapped copy; rows are read from the disk only when they are used.

    Args:
        path: folder written by ``TensorDict.memmap``, or by a function such as ``load_hdf5`` with ``root=``.

    Raises:
        FileNotFoundError: if the folder does not exist.
        DatasetError: if a file in the folder is missing, incomplete, or does not hold a tensor. Nothing is unpickled.
    """
    folder = home(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}.")
    if folder.name.startswith(UNFINISHED):
        raise DatasetError(f"{folder} is an unfinished copy; convert the dataset again.")
    if not (folder / "meta.json").is_file():
        held = sorted(path.name for path in folder.glob("[!.]*"))
        raise DatasetError(f"{folder} is not a memory-mapped copy; it holds {held[:5]}. Choose another folder.")
    try:
        batch = _check_files(folder)
        transitions = read_frames(folder, TensorDict.load_memmap(folder, allow_pickle=False))
    except DatasetError:
        raise
    except Exception as error:  # a damaged meta.json raises various exceptions
        hint = "if it is a memory-mapped copy, convert the dataset again; otherwise, name the files in it"
        raise DatasetError(f"{folder} cannot be read ({error}); {hint}.") from error
    if not batch or not batch[0]:
        raise DatasetError(f"{folder} holds no rows; delete it and convert the dataset again.")
    for part in (transitions, *transitions.values(True)):
        if isinstance(part, TensorDict):
            # tensordict 0.14 does not set this flag when it loads files; without it, memmap_() writes them again
            part._is_memmap = True
    return transitions.lock_()


def _check_files(folder: Path, batch: Sequence[int] = ()) -> list[int]:
    """Return the batch size. Check file sizes first: reading a file that is too short would crash Python."""
    description = json.loads((folder / "meta.json").read_text())
    kind, device, shape = (description.pop(name, None) for name in ("_type", "device", "shape"))
    if kind != str(TensorDict) or device not in (None, "None", "cpu"):
        raise DatasetError(f"{folder} holds a {kind} on {device}; only a TensorDict on the CPU can be read.")
    if not all(type(size) is int and size >= 0 for size in shape) or shape[: len(batch)] != [*batch]:
        raise DatasetError(
            f"{folder} has batch size {shape}, expected sizes that start with {[*batch]}; delete it and convert "
            "the dataset again."
        )
    for key, leaf in description.items():
        # encode the key, because a key such as "../x" would be a path outside the folder
        path = folder / _encode_key_for_filesystem(key)
        if leaf.get("type") is not None:
            _check_files(path, shape)
            continue
        file = path.with_name(f"{path.name}.memmap")
        expected = torch.Size(leaf["shape"]).numel() * getattr(torch, leaf["dtype"].removeprefix("torch.")).itemsize
        found = file.stat().st_size if file.is_file() else 0
        if found != expected or leaf["shape"][: len(shape)] != shape or leaf.get("is_nested"):
            raise DatasetError(
                f"{file} has {found} bytes, expected {expected} for shape {leaf['shape']}; delete the copy and convert "
                "the dataset again."
            )
    return shape
