"""Remembers where rows come from: their source, their row there, and which rows were dropped."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from torchrl_bcq.data.defects import Rows

_NUMBERS = {"observations", "actions", "rewards"}


@dataclass
class Origins:
    """The rows that were read from one or several sources, in their order, and which of them were dropped.

    Without any sources, the row numbers of the transitions are the row numbers of the source.
    """

    rows: int = 0  # number of rows read so far, over all sources
    starts: list[int] = field(default_factory=list)  # number of rows that were read before each source
    names: list[str] = field(default_factory=list)  # name of each source; empty if there is only one source
    _dropped: list[np.ndarray] = field(default_factory=list)
    _odd: Rows = field(default_factory=Rows)  # dropped rows with a value that is not finite

    def begin(self, name: str) -> None:
        """Start a new source; its rows follow."""
        self.starts.append(self.rows)
        self.names.append(name)

    def add(self, keep: np.ndarray, fields: Mapping[str, np.ndarray]) -> None:
        """Add rows of the current source. Rows where ``keep [n]`` is false are dropped."""
        if not keep.all():
            rows, odd = np.flatnonzero(~keep), np.zeros(len(keep), dtype=bool)
            self._dropped.append(self.rows + rows)
            for name in _NUMBERS & fields.keys():
                odd[rows] |= ~np.isfinite(fields[name][rows].reshape(len(rows), -1)).all(1)
            self._odd.add(odd, self.rows)
        self.rows += len(keep)

    @property
    def dropped(self) -> Rows:
        """The dropped rows."""
        rows = self._dropped_rows()
        return self.locate(Rows(len(rows), int(rows[0]))) if len(rows) else Rows()

    @property
    def odd(self) -> Rows:
        """The dropped rows with a value that is not finite."""
        return self.locate(self._odd) if self._odd.count else Rows()

    def locate(self, rows: Rows) -> Rows:
        """Convert the first row's number over all sources to its number in its own source."""
        at = bisect_right(self.starts, rows.first) - 1
        if at < 0:
            return rows
        name = self.names[at]
        return replace(rows, first=rows.first - self.starts[at], where=f" of {name}" if name else "")

    def locate_kept(self, rows: Rows) -> Rows:
        """Convert the first row's number in the transitions to its number in its own source.

        >>> origins = Origins()
        >>> origins.begin("")
        >>> origins.add(np.array([True, False, False, True]), fields={})
        >>> origins.locate_kept(Rows(count=1, first=1)).first
        3
        """
        dropped = self._dropped_rows()
        before = int(np.searchsorted(dropped - np.arange(len(dropped)), rows.first, side="right"))
        return self.locate(replace(rows, first=rows.first + before))

    def _dropped_rows(self) -> np.ndarray:
        return np.concatenate(self._dropped) if self._dropped else np.zeros(0, dtype=int)
