"""Memory-mapped transitions: written in parts, atomically, and loaded."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from tensordict.utils import _encode_key_for_filesystem

from torchrl_bcq.data.checks import DatasetError
from torchrl_bcq.files import UNFINISHED, write_whole

_FORMAT = 1  # increase it when the copy of the same files changes


def fingerprint(files: Iterable[Path], settings: Mapping[str, Any]) -> str:
    """Digest of the contents of files and of the settings with which they are read."""
    digest = hashlib.sha256(json.dumps([_FORMAT, settings], sort_keys=True, default=str).encode())
    for file in files:
        digest.update(file.stat().st_size.to_bytes(8, "big"))
        with open(file, "rb") as content:
            while block := content.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


def write_memmap(parts: Iterator[TensorDict], rows: int, folder: Path) -> None:
    """Write parts with ``rows`` rows in total to a new folder; it is complete or does not exist."""
    try:
        with write_whole(folder) as aside, ExitStack() as stack:
            aside.mkdir()
            first = next(parts)
            size, free = first.bytes() / len(first) * rows, shutil.disk_usage(folder.parent).free
            if free < size:
                raise OSError(f"it needs {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")
            target = first[:1].expand(rows).memmap_like(str(aside))  # empty rows
            # written and not mapped, so that the resident memory does not grow with the files
            streams = {k: stack.enter_context(open(leaf.filename, "r+b")) for k, leaf in target.items(True, True)}
            written = 0
            for part in chain([first], parts):
                written += len(part)
                for key, stream in streams.items() if written <= rows else ():
                    stream.write(np.ascontiguousarray(part.get(key).cpu()).data)
            if written != rows:
                changed = f"it had {rows} transitions when it was checked and has {written} now"
                raise DatasetError(f"{changed}; wait until it stays the same.")
            stack.close()
            for path in (*aside.rglob("*"), aside):
                _sync(path)
        _sync(folder.parent)
    except OSError as error:
        raise OSError(f"{folder} cannot be written ({error}); nothing of it was kept.") from error


def remove_unfinished(folder: Path) -> None:
    """Remove temporary folders that killed processes left; no other process may be writing ``folder``."""
    for aside in folder.parent.glob(f"{UNFINISHED}*.{folder.name}"):
        shutil.rmtree(aside, ignore_errors=True)


def _sync(path: Path) -> None:
    """Flush a file or folder to the disk, so that a power cut cannot leave the name without the content."""
    if path.is_dir() and os.name != "posix":  # folders cannot be opened
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_memmap(path: str | Path) -> TensorDict:
    """Load a copy that ``root=`` of the readers or ``TensorDict.memmap`` wrote; rows are read when they are used.

    Raises:
        FileNotFoundError: if there is no such folder.
        DatasetError: if a file in it is missing, cut off, or is not a tensor (nothing is unpickled).
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}.")
    if folder.name.startswith(UNFINISHED):
        raise DatasetError(f"{folder} is an unfinished conversion; convert it again.")
    if not (folder / "meta.json").is_file():
        held = sorted(path.name for path in folder.glob("[!.]*"))
        raise DatasetError(f"{folder} is no memory-mapped copy, but a folder of {held[:5]}; name one of them.")
    try:
        batch = _check_files(folder)
        transitions = TensorDict.load_memmap(folder, allow_pickle=False)
    except DatasetError:
        raise
    except Exception as error:  # damaged descriptions raise many kinds
        raise DatasetError(f"{folder} cannot be read ({error}); delete it and convert it again.") from error
    if not batch or not batch[0]:
        raise DatasetError(f"{folder} holds no rows; delete it and convert it again.")
    for part in (transitions, *transitions.values(True)):
        if isinstance(part, TensorDict):
            part._is_memmap = True  # tensordict 0.14 does not set it, and memmap_() would write the files again
    return transitions.lock_()


def _check_files(folder: Path, batch: Sequence[int] = ()) -> list[int]:
    """Check the size of every file, since mapping a shorter one would crash; returns the batch size."""
    description = json.loads((folder / "meta.json").read_text())
    kind, device, shape = (description.pop(name, None) for name in ("_type", "device", "shape"))
    if kind != str(TensorDict) or device not in (None, "None", "cpu"):
        raise DatasetError(f"{folder} holds a {kind} on {device}; only a TensorDict on the CPU can be read.")
    if not all(type(size) is int and size >= 0 for size in shape) or shape[: len(batch)] != [*batch]:
        raise DatasetError(
            f"{folder} has batch size {shape}, expected {[*batch, ...]}; delete it and convert it again."
        )
    for key, leaf in description.items():
        path = folder / _encode_key_for_filesystem(key)  # it cannot lie outside of the folder
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
