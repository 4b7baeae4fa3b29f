"""Opens HDF5 files, and checks that their data is complete."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

from torchrl_bcq.errors import DatasetError

_COPY = "copy the data into this file"


@contextmanager
def open_hdf5(path: Path) -> Iterator[Any]:
    """Open the HDF5 file ``path`` for reading. A file that another process has locked raises ``DatasetError``."""
    import h5py

    if not h5py.is_hdf5(path):
        raise DatasetError("it is not an HDF5 file; choose another file.")
    try:
        file = h5py.File(path, "r")
    except BlockingIOError as error:
        raise DatasetError(
            f"another process has the file open for writing and has locked it ({error}). Close the file there. If no "
            "process writes to the file, for example on a network drive without locks, set the environment variable "
            "HDF5_USE_FILE_LOCKING=FALSE."
        ) from error
    with file:
        yield file


def check_hdf5(path: Path, names: Collection[str]) -> None:
    """Raise a ``DatasetError`` if an HDF5 dataset is incomplete; check those with a name, or a group, in ``names``."""
    import h5py

    def check(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and not {*name.split("/")}.isdisjoint(names):
            check_stored(name, item)

    with open_hdf5(path) as file:
        file.visititems(check)


def refuse_external_links(file: Any) -> None:
    """Raise a ``DatasetError`` if an entry is in another HDF5 file: nobody would notice that this file changes."""
    import h5py

    def other_file(name: str, link: Any) -> str | None:  # h5py stops at the first result that is not None
        return f"{name} is stored in the file {link.filename}" if isinstance(link, h5py.ExternalLink) else None

    if found := file.visititems_links(other_file):
        raise DatasetError(f"{found}, which may change; {_COPY}.")


def check_stored(name: str, field: Any) -> None:
    """Raise a ``DatasetError`` if data is missing in the file: h5py would read missing data as zeros."""
    if field.is_virtual or field.external:
        raise DatasetError(f"{name} is stored in other files, which may change; {_COPY}.")
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
