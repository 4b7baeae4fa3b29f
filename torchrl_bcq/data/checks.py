"""Checks a dataset: counts the bad rows of all chunks and reports every defect at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from torchrl.data import TensorSpec

from torchrl_bcq.data.action_checks import ActionChecks
from torchrl_bcq.data.arrays import as_array, check_lengths, column, conversion, to_float32
from torchrl_bcq.data.defects import Rows, in_columns, listed
from torchrl_bcq.data.frame_layout import as_frames, paired, report_layout, width_of
from torchrl_bcq.errors import DatasetError

Columns = Mapping[str, Any]  # maps argument names of from_arrays to arrays with one row per step

CHUNK_ROWS = 2**16  # number of rows in a chunk; small, because the checks need memory for a copy of the chunk
# number of dimensions of each field, except actions
_NUMBERS = {"observations": 2, "rewards": 1, "next_observations": 2, "action_probabilities": 1}
# incomplete marks rows without a next observation; readers add it if next_observations lacks only some of them
_FLAGS = {"terminated": 1, "truncated": 1, "incomplete": 1, "action_masks": 2, "next_action_masks": 2}
FIELDS = ("observations", "actions", "rewards", "terminated", "truncated", "next_observations", "groups",
          "action_masks", "next_action_masks", "action_probabilities")  # fmt: skip
FRAMES = ("frames", "next_frames")  # frames beside the vectors of observations
_OPTIONAL = (*FIELDS[4:], *FRAMES)  # FIELDS and FRAMES are the arguments of from_arrays
_WITH_FRAMES = ("observations", "next_observations", *FRAMES)  # fields that may hold frames


class Checks:
    """Checks a dataset chunk by chunk.

    A wrong shape, length or dtype raises a ``DatasetError`` at once. Bad rows are counted, and ``finish`` raises a
    ``DatasetError`` that reports them.

    Args:
        action_spec, action_type, typed: as for ``ActionChecks``, which decides whether the actions are discrete.
        columns: names of the columns of each field, for the messages.
    """

    def __init__(
        self,
        action_spec: TensorSpec | None = None,
        action_type: str | None = None,
        columns: Mapping[str, Sequence[str]] | None = None,
        *,
        typed: bool = True,
    ) -> None:
        self.rows = 0  # number of rows checked so far
        self.counts: dict[str, int] = {}  # number of rows of each source that ``add`` added
        self._found: list[str] = []  # defects of these sources
        self._odd_flags: list[str] = []
        self._columns = columns or {}
        self._expected = (action_spec, action_type)
        self.actions = ActionChecks(*self._expected, typed=typed, columns=self._columns.get("actions", ()))
        self._widths: dict[str, Any] = {}  # number of features, or shape of a frame, of each field in the first chunk
        self._zero: dict[str, bool] = {}  # whether all values of a field are zero so far
        self._bad = {name: Rows() for name in ("actions", *_NUMBERS, *_FLAGS)}  # rows that are not finite, or bad flags

    def __call__(self, chunk: Columns) -> dict[str, np.ndarray]:
        """Check a chunk. Return a dictionary of its fields, with numbers as float32 and flags as booleans."""
        given: Columns = {name: values for name, values in chunk.items() if values is not None or name not in _OPTIONAL}
        given = paired(given, report=not self.rows)
        self._check_names(given)
        fields = {name: self._read_numbers(name, given[name]) for name in _NUMBERS if name in given}
        fields |= {name: self._read_frames(name, as_array(name, given[name])) for name in FRAMES if name in given}
        fields |= {name: self._read_flags(name, given[name]) for name in _FLAGS if name in given}
        if "actions" in given:
            number = fields["action_masks"].shape[1] if "action_masks" in fields else None
            fields["actions"] = self.actions.read(given["actions"], self.rows, number)
            self._zero["actions"] = self._zero.get("actions", True) and not fields["actions"].any()
        if "groups" in given:  # names or numbers; the class Groups checks them
            fields["groups"] = column("groups", as_array("groups", given["groups"]), rank=1)
        check_lengths({name: len(fields[name]) for name in given})
        self._check_widths(fields)
        for name in {"actions", *_NUMBERS} & fields.keys():
            if fields[name].dtype != np.uint8:
                self._bad[name].add(~np.isfinite(fields[name]), self.rows)
        self.actions.check_others(fields, self.rows)
        self.rows += len(fields["rewards"])
        return fields

    def check_all(self, columns: Columns) -> None:
        """Check all rows of ``columns``, ``CHUNK_ROWS`` rows at a time, then call ``finish``."""
        for start in range(0, len(columns["rewards"]), CHUNK_ROWS):
            self({name: values[start : start + CHUNK_ROWS] for name, values in columns.items()})
        self.finish()

    def finish(self, *, strict: bool = True) -> None:
        """Raise a ``DatasetError`` for non-finite or out-of-bounds values, invalid flags or all-zero fields.

        A flag is invalid if it is neither 0 nor 1. If ``strict`` is false, only invalid flags raise the error.
        ``describe`` cannot find invalid flags later, because all flags become booleans.
        """
        found, odd_flags = self._defects()
        zero = [name for name, is_zero in self._zero.items() if is_zero]
        hint = "check that it was written and read correctly"
        found += [f"{name} is zero in all {self.rows} rows{self._in_columns(name)}; {hint}." for name in zero]
        found += self.actions.unclear()
        if refused := found if strict else odd_flags:
            raise DatasetError(listed(refused))

    def alike(self, typed: bool) -> Checks:
        """Return new checks with the same action spec, for one of several sources."""
        return Checks(*self._expected, self._columns, typed=typed)

    def add(self, name: str, source: Checks) -> None:
        """Add the findings of the source ``name``. A field may be zero in some sources, but not in all."""
        found, odd_flags = source._defects()
        self._found += [f"{name}: {defect}" for defect in found]
        self._odd_flags += [f"{name}: {defect}" for defect in odd_flags]
        self._zero |= {field: self._zero.get(field, True) and is_zero for field, is_zero in source._zero.items()}
        self.actions.add(name, source.actions)
        self.counts[name] = source.rows
        self.rows += source.rows

    def _defects(self) -> tuple[list[str], list[str]]:
        """Return a text for each defect in single rows; and the texts about invalid flags only."""
        found, odd_flags = [*self._found], [*self._odd_flags]
        for name, rows in self._bad.items():
            where = self._in_columns(name, rows.columns)
            if rows.count and name in _FLAGS:
                defect = f"neither 0 nor 1, such as {rows.example}{where}; use only 0 (false) and 1 (true)."
                odd_flags.append(f"{name} has {rows} that are {defect}")
                found.append(odd_flags[-1])
            elif rows.count:
                found.append(f"{name} has {rows} that are not finite in float32{where}; drop or repair them.")
        if not self.counts:  # add has reported the defects of each source
            found += self.actions.defects()
        return found, odd_flags

    def _in_columns(self, name: str, bad: np.ndarray | None = None) -> str:
        return in_columns(self._columns.get(name, ()), bad)

    def _read_numbers(self, name: str, values: ArrayLike) -> np.ndarray:
        array = as_array(name, values)
        if name in _WITH_FRAMES and array.ndim > 2:
            return self._read_frames(name, array)
        array = to_float32(name, column(name, array, rank=_NUMBERS[name]))
        self._zero[name] = self._zero.get(name, True) and not array.any()
        return array

    def _read_frames(self, name: str, array: np.ndarray) -> np.ndarray:
        frames = as_frames(name, array)
        if not self.rows:
            report_layout(name, array.shape, frames)
        self._zero[name] = self._zero.get(name, True) and not frames.any()
        return frames

    def _read_flags(self, name: str, values: ArrayLike) -> np.ndarray:
        array = column(name, as_array(name, values), rank=_FLAGS[name])
        if array.dtype.kind not in "bfiu":
            raise DatasetError(f"{name} has dtype {array.dtype}, expected booleans.{conversion(name, array)}")
        odd = (array != 0) & (array != 1)
        rows = self._bad[name]
        if odd.any() and not rows.count:
            rows.example = str(array[odd][0])
        rows.add(odd, self.rows)
        return array.astype(bool)

    def _check_names(self, given: Columns) -> None:
        for name in sorted(self._widths.keys() ^ given.keys()) if self._widths else ():
            found = "given from row {} on, but missing" if name in given else "missing from row {} on, but given"
            raise DatasetError(f"{name} is {found.format(self.rows)} before; every row needs the same fields.")

    def _check_widths(self, fields: Mapping[str, np.ndarray]) -> None:
        for name in ("observations", "frames"):
            now, following = fields.get(name), fields.get(f"next_{name}")
            if now is not None and following is not None and now.shape != following.shape:
                raise DatasetError(
                    f"next_{name} has shape {following.shape}, but {name} has shape {now.shape}; both need the same "
                    "shape."
                )
        for name, values in fields.items():
            width = width_of(values)
            if width != (before := self._widths.setdefault(name, width)):
                found = f"frames of shape {width}" if values.ndim == 4 else f"{width} features"
                every = "frame needs the same shape" if values.ndim == 4 else "row needs the same number"
                raise DatasetError(f"{name} has {found} from row {self.rows} on, but {before} before; every {every}.")
