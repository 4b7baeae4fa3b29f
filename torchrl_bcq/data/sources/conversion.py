"""Transitions on disk: written a part at a time, complete or not there at all, and mapped into memory."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from tensordict import TensorDict

from torchrl_bcq.data.checks import DatasetError

_FORMAT = 1  # raise it whenever what is written for the same files changes
_UNFINISHED = ".part"


def fingerprint(files: Iterable[Path], settings: Mapping[str, Any]) -> str:
    """A digest of the content of files, and of how they are read."""
    digest = hashlib.sha256(json.dumps([_FORMAT, settings], sort_keys=True, default=str).encode())
    for file in files:
        digest.update(file.stat().st_size.to_bytes(8, "big"))
        with open(file, "rb") as content:
            while block := content.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


def write_memmap(parts: Iterator[TensorDict], rows: int, folder: Path) -> None:
    """Write parts, ``rows`` rows in all, so that ``folder`` holds all of them or does not exist.

    Files are written and not mapped meanwhile, so that resident memory does not grow with them.

    Raises:
        OSError: if there is no room.
        DatasetError: if the parts have another number of rows.
    """
    aside = folder.with_name(f".{folder.name}.{uuid4().hex[:8]}{_UNFINISHED}")
    try:
        aside.mkdir(parents=True)
        first = next(parts)
        _check_room(folder.parent, first.bytes() / len(first) * rows)
        files = _make_files(aside, first, rows)
        with ExitStack() as stack:
            streams = {key: stack.enter_context(open(file, "r+b")) for key, file in files.items()}
            written = 0
            for part in chain([first], parts):
                written += len(part)
                for key, stream in streams.items() if written <= rows else ():
                    stream.write(np.ascontiguousarray(part.get(key).cpu()).data)
        if written != rows:
            raise DatasetError(f"it had {rows} transitions when it was checked and has {written} now; let it settle.")
        for path in (*aside.rglob("*"), aside):
            _sync(path)
        aside.replace(folder)
        _sync(folder.parent)
    except OSError as error:
        raise OSError(f"{folder} cannot be written ({error}); nothing of it was kept.") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def remove_unfinished(folder: Path) -> None:
    """Remove what runs that were killed left of ``folder``; the caller sees to it that no other run is writing it."""
    for aside in folder.parent.glob(f".{folder.name}.*{_UNFINISHED}"):
        shutil.rmtree(aside, ignore_errors=True)


def _make_files(folder: Path, like: TensorDict, rows: int) -> dict[Any, str]:
    """A memory-mapped TensorDict of ``rows`` empty rows; the file of each entry. It is not mapped any more."""
    target = TensorDict({}, [rows]).memmap_(str(folder))
    for key, value in like.items(True, True):
        if not isinstance(value, torch.Tensor):
            raise DatasetError(f"{key!r} is no tensor; leave it out with transitions.exclude({key!r}).")
        target.make_memmap(key, torch.Size([rows, *value.shape[1:]]), dtype=value.dtype)
    return {key: leaf.filename for key, leaf in target.items(True, True)}


def _sync(path: Path) -> None:
    """Have a file or folder reach the disk, so that a power cut cannot leave the name without the content."""
    if path.is_dir() and os.name != "posix":
        return  # only there can folders be opened
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_memmap(path: str | Path) -> TensorDict:
    """Map a folder of transitions into memory, as ``root=`` of the readers or ``TensorDict.memmap`` leave it.

    Returns:
        The TensorDict that was written, on disk until its rows are asked for.

    Raises:
        FileNotFoundError: if there is no such folder.
        DatasetError: if a file in it is missing, cut off, or holds anything but tensors (nothing is unpickled).
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}.")
    if folder.name.startswith(".") and folder.name.endswith(_UNFINISHED):
        raise DatasetError(f"{folder} is of a conversion that was cut off; convert it again.")
    if not (folder / "meta.json").is_file():
        held = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
        raise DatasetError(f"{folder} is no memory-mapped copy, but a folder of {held[:5]}; name one of them.")
    try:
        batch = _check_files(folder)
        transitions = TensorDict.load_memmap(folder, allow_pickle=False)
    except DatasetError:
        raise
    except Exception as error:  # whatever a damaged description leads to
        raise DatasetError(f"{folder} cannot be read ({error}); delete it and convert it again.") from error
    if not batch or not batch[0]:
        raise DatasetError(f"{folder} holds no rows; delete it and convert it again.")
    for part in (transitions, *transitions.values(True)):
        if isinstance(part, TensorDict):
            part._is_memmap = True  # tensordict 0.14 forgets it on loading, and memmap_() would write its files anew
    return transitions.lock_()


def _check_files(folder: Path, batch: list[int] | None = None) -> list[int]:
    """Batch size of a memory-mapped TensorDict, every file of which has its size: mapping a shorter one would crash.

    Args:
        folder: where it is.
        batch: batch size of the one that it is an entry of.
    """
    description = json.loads((folder / "meta.json").read_text())
    if description.pop("_type") != str(TensorDict):
        raise DatasetError(f"{folder} does not hold a TensorDict; only those can be read.")
    if (device := description.pop("device", None)) not in (None, "None", "cpu"):
        raise DatasetError(
            f"{folder} is said to be on device {device!r}, but files are on cpu; delete it and convert it again."
        )
    shape = description.pop("shape")
    if not all(type(size) is int and size >= 0 for size in shape) or shape[: len(batch or [])] != (batch or []):
        raise DatasetError(
            f"{folder} has batch size {shape}, expected {batch or 'whole numbers'}; delete it and convert it again."
        )
    for key, leaf in description.items():
        path = folder / _file_name(key)
        if leaf.get("type") is not None:
            _check_files(path, shape)
            continue
        file = path.with_name(f"{path.name}.memmap")
        expected = torch.Size(leaf["shape"]).numel() * getattr(torch, leaf["dtype"].removeprefix("torch.")).itemsize
        found = file.stat().st_size if file.is_file() else 0
        if found != expected or leaf["shape"][: len(shape)] != shape or leaf.get("is_nested"):
            raise DatasetError(
                f"{file} has {found} bytes, expected {expected} of shape {leaf['shape']}; delete it and convert it "
                "again."
            )
    return shape


def _file_name(key: str) -> str:
    """How tensordict names the file of an entry, so that none is outside of its folder."""
    if key.strip("."):
        return re.sub(r'[\x00-\x20/<>:"|?*\\%\x7f]', lambda unsafe: f"%{ord(unsafe[0]):02X}", key)
    return {"": "%", ".": "%2E", "..": "%2E%2E"}.get(key, key)


def _check_room(folder: Path, size: float) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(f"it needs {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")
