"""Arrays in NPZ archives, read in parts: ``numpy.load`` reads each of them whole and ignores surplus data."""

from __future__ import annotations

import os
import zipfile
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np

from torchrl_bcq.data.checks import DatasetError


def check_members(path: Path, archive: zipfile.ZipFile) -> None:
    """Refuse an archive with a damaged directory, which has no checksum and could hide an optional field."""
    members = archive.infolist()
    for member in members:
        archive.open(member).close()  # compares its name with the second copy
    with open(path, "rb") as file:
        file.seek(-12 - len(archive.comment), os.SEEK_END)
        count = int.from_bytes(file.read(2), "little")
    if count not in (len(members), 0xFFFF):  # the latter stands for more
        raise DatasetError(f"it says that it holds {count} arrays, but {len(members)} are found. Copy it again.")


class Member:
    """An array in an NPZ archive, read from its beginning to its end in parts, and never unpickled."""

    def __init__(self, name: str, stream: IO[bytes]) -> None:
        version = np.lib.format.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise DatasetError(f"{name} is stored in version {version} of NumPy's format; save a plain array.")
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        self.shape, columns_first, self.dtype = read_header(stream)
        if self.dtype.hasobject:
            raise DatasetError(f"{name} holds pickled objects, which are never loaded; save a plain array of numbers.")
        self._name, self._stream = name, stream
        self._left = prod(self.shape) * self.dtype.itemsize  # bytes to read
        self._whole = self._read(self.shape[::-1]).T if columns_first or not self.shape else None

    def __getitem__(self, rows: Any) -> np.ndarray:
        """The next rows, or all of a scalar."""
        if self._whole is not None:
            return self._whole[rows]
        return self._read((len(range(*rows.indices(self.shape[0]))), *self.shape[1:]))

    def _read(self, shape: tuple[int, ...]) -> np.ndarray:
        size = prod(shape) * self.dtype.itemsize
        data = self._stream.read(size)
        self._left -= size
        over = not self._left and self._stream.read(1)  # zipfile compares the checksum at the end
        if len(data) < size or over:
            raise DatasetError(
                f"{self._name} is damaged: its shape is {self.shape}, but it holds {'more' if over else 'less'} data. "
                "Copy it again."
            )
        return np.frombuffer(data, self.dtype).reshape(shape)
