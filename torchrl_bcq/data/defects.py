"""Counts bad rows of a dataset, and lists defects for messages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor


@dataclass
class Rows:
    """Stores how many rows have a defect, the index of the first such row and an example of a bad value."""

    count: int = 0
    first: int = 0
    example: str = ""
    where: str = ""  # the source of the first row, if there are several sources
    columns: np.ndarray | None = field(default=None, compare=False)  # mask [D] of the columns with a defect, if known

    def add(self, mask: np.ndarray | Tensor, start: int = 0) -> None:
        """Count the rows where ``mask [n]``, or a column of ``mask [n, D]``, is true. Row 0 of it is row ``start``."""
        values = np.asarray(mask)
        if values.ndim == 2:
            self.columns = np.logical_or(values.any(0), False if self.columns is None else self.columns)
            values = np.asarray(values.any(1))
        if not self.count and values.any():
            self.first = start + int(values.argmax())
        self.count += int(values.sum())

    def __str__(self) -> str:
        """Return a text with the number of bad rows and the index of the first bad row."""
        return f"{self.count} {'row' if self.count == 1 else 'rows'} (first: {self.first}{self.where})"


def listed(defects: list[str]) -> str:
    """Join all defects into one message."""
    return defects[0] if len(defects) == 1 else "\n- ".join([f"{len(defects)} defects:", *defects])


def listed_columns(names: Sequence[str]) -> str:
    """Return a text that names at most four columns, such as ``columns 27, 28, 29 and 81 more``."""
    if len(names) > 4:
        return f"columns {', '.join(names[:3])} and {len(names) - 3} more"
    return f"column{'s' * (len(names) > 1)} {', '.join(names)}"


def in_columns(names: Sequence[str], bad: np.ndarray | None = None) -> str:
    """Return a text with the names of the columns of a field, or of those that ``bad [D]`` marks."""
    if bad is not None and len(names) == len(bad) > 1:  # a single column may hold all numbers of a field
        names = [name for name, is_bad in zip(names, bad, strict=True) if is_bad]
    elif bad is not None and len(names) > 1:  # columns of lists: it is unknown which column holds the number
        names = ()
    return f", in {listed_columns(names)}" if names else ""
