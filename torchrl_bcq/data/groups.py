"""Numbers the groups of rows, such as patients or users."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchrl_bcq.data.defects import Rows, listed
from torchrl_bcq.data.origins import Origins
from torchrl_bcq.errors import DatasetError

_NO_NAME = {"", "nan", "none", "null", "<na>", "nat", "inf", "-inf"}  # texts of missing values, in lower case
_NAMELESS = "the group is missing in {}; fill in the groups, or drop these rows."
_MIXED = (
    "the group differs from the row before, in the same episode, in {}; correct the groups, or the ends or names of "
    "the episodes: an episode belongs to one group."
)


class Groups:
    """Numbers groups in order of first appearance. Equal names in several sources are the same group."""

    def __init__(self) -> None:
        self._numbers: dict[str | None, int] = {}
        self._defects = {message: Rows() for message in (_NAMELESS, _MIXED)}

    def names(self, values: np.ndarray, ends: np.ndarray, start: int) -> np.ndarray:
        """Return the names of the groups of ``n`` rows, ``[n]``, and count rows with a defect.

        Args:
            values: groups of these rows and of the row that follows them, ``[n + 1]``.
            ends: whether each row is the last row of its episode, ``[n]``.
            start: number of the first row.
        """
        names = _names(values)
        known = names != None  # noqa: E711 (elementwise)
        self._defects[_NAMELESS].add(~known[:-1], start)
        self._defects[_MIXED].add((names[1:] != names[:-1]) & known[1:] & known[:-1] & ~ends, start + 1)
        return names[:-1]

    def numbers(self, names: np.ndarray) -> Tensor:
        """Return the number of each name, ``[n]``."""
        first = np.flatnonzero(np.r_[True, names[1:] != names[:-1]])  # a loop over runs of one group, not over all rows
        numbers = [self._numbers.setdefault(name, len(self._numbers)) for name in names[first]]
        return torch.from_numpy(np.repeat(np.array(numbers, dtype=np.int64), np.diff(first, append=len(names))))

    def finish(self, origins: Origins) -> None:
        """Raise a ``DatasetError`` if a row has no group, or an episode has several groups."""
        if found := [text.format(origins.locate(rows)) for text, rows in self._defects.items() if rows.count]:
            raise DatasetError(listed(found))


def _names(values: np.ndarray) -> np.ndarray:
    """Return the name of each group as text, or None if it is missing. 7, 7.0, "7" and "7.0" are the same group."""
    if values.dtype.kind == "O":
        return np.array([_name(value) for value in values], dtype=object)
    if values.dtype.kind not in "biufUSM":
        raise DatasetError(f"groups has dtype {values.dtype}, expected numbers or text.")
    unique, inverse = np.unique(values, return_inverse=True)
    return np.array([_name(value) for value in unique], dtype=object)[inverse]


def _name(value: Any) -> str | None:
    if hasattr(value, "__len__") and not isinstance(value, (str, bytes)):
        raise DatasetError(f"groups has a value of type {type(value).__name__}, expected numbers or text.")
    if isinstance(value, (float, np.floating)) and float(value).is_integer():
        value = int(value)
    text = value.decode(errors="backslashreplace") if isinstance(value, bytes) else str(value)
    if text.strip().lower() in _NO_NAME:
        return None
    whole = re.fullmatch(r"(-?\d+)\.0*", text)
    return whole[1] if whole else text
