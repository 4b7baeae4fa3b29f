"""Checks a dataset: counts the bad rows of all chunks and reports every defect at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor, bfloat16
from torchrl.data import TensorSpec

from torchrl_bcq.bounds import action_box
from torchrl_bcq.errors import remedy

Columns = Mapping[str, Any]  # maps argument names of from_arrays to arrays with one row per step

CHUNK_ROWS = 2**16  # number of rows in a chunk; small, because the checks need memory for a copy of the chunk
_NUMBERS = {"observations": 2, "actions": 2, "rewards": 1, "next_observations": 2}  # number of dimensions of each field
# incomplete marks rows without a next observation; readers add it if next_observations lacks only some of them
_FLAGS = ("terminated", "truncated", "incomplete")
FIELDS = ("observations", "actions", "rewards", "terminated", "truncated", "next_observations", "groups")
_OPTIONAL = FIELDS[4:]  # FIELDS are the arguments of from_arrays


class DatasetError(ValueError):
    """Raised for a dataset that cannot be used; the message says what was found, where, and what to do."""


class Checks:
    """Checks a dataset chunk by chunk. With an ``action_spec``, also checks the bounds of the actions.

    A wrong shape, length or dtype raises a ``DatasetError`` at once. Bad rows are counted, and ``finish`` raises a
    ``DatasetError`` that reports them. If ``refuse_whole`` is a text, actions that are all whole numbers are a defect,
    and the text says what to do. ``columns`` holds the names of the columns of each field, for the messages.
    """

    def __init__(
        self,
        action_spec: TensorSpec | None = None,
        refuse_whole: str | None = None,
        columns: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.rows = 0  # number of rows checked so far
        self.counts: dict[str, int] = {}  # number of rows of each source that ``add`` added
        self._found: list[str] = []  # defects of these sources
        self._odd_flags: list[str] = []
        self._refuse_whole, self._whole = refuse_whole, refuse_whole is not None
        self._columns = columns or {}
        self._bounds = None if action_spec is None else spec_bounds(action_spec)
        self._widths: dict[str, int] = {}  # number of features of each field in the first chunk
        self._zero: dict[str, bool] = {}  # whether all values of a field are zero so far
        self._bad = {name: Rows() for name in (*_NUMBERS, *_FLAGS)}  # rows with non-finite values or invalid flags
        self._outside = Rows()
        self._lowest, self._highest = np.float32(np.inf), np.float32(-np.inf)  # lowest and highest actions so far

    def __call__(self, chunk: Columns) -> dict[str, np.ndarray]:
        """Check a chunk. Return a dictionary of its fields, with numbers as float32 and flags as booleans."""
        given = {name: values for name, values in chunk.items() if values is not None or name not in _OPTIONAL}
        self._check_names(given)
        fields = {name: self._read_numbers(name, given[name]) for name in _NUMBERS if name in given}
        fields |= {name: self._read_flags(name, given[name]) for name in _FLAGS if name in given}
        if "groups" in given:  # names or numbers; the class Groups checks them
            fields["groups"] = column("groups", as_array("groups", given["groups"]), rank=1)
        check_lengths({name: len(fields[name]) for name in given})
        self._check_widths(fields)
        for name in _NUMBERS.keys() & fields.keys():
            self._bad[name].add(~np.isfinite(fields[name]), self.rows)
        self._whole = self._whole and bool((fields["actions"] == fields["actions"].round()).all())
        if "actions" in fields and self._bounds is not None:
            self._check_bounds(fields["actions"], *self._bounds)
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
        if self._whole and self.rows:
            where = f"in all {self.rows} rows{self._in_columns('actions')}"
            found.append(f"actions has only whole numbers {where}{self._refuse_whole}")
        if refused := found if strict else odd_flags:
            raise DatasetError(listed(refused))

    def alike(self) -> Checks:
        """Return new checks with the same bounds, for one of several sources."""
        checks = Checks(refuse_whole=self._refuse_whole, columns=self._columns)
        checks._bounds = self._bounds
        return checks

    def add(self, name: str, source: Checks) -> None:
        """Add what the checks of the source ``name`` found. A field may be zero in some sources, but not in all."""
        found, odd_flags = source._defects()
        self._found += [f"{name}: {defect}" for defect in found]
        self._odd_flags += [f"{name}: {defect}" for defect in odd_flags]
        self._zero |= {field: self._zero.get(field, True) and is_zero for field, is_zero in source._zero.items()}
        self._whole = self._whole and source._whole
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
        if self._outside.count and self._bounds is not None:
            low, high = self._bounds
            where = self._in_columns("actions", self._outside.columns)
            spans = f"{self._lowest.tolist()} to {self._highest.tolist()}"
            found.append(
                f"actions has {self._outside} outside the action spec{where}: the actions span {spans}, the spec spans "
                f"{low.tolist()} to {high.tolist()}; "
                + remedy(
                    "clip or rescale the actions.",
                    "set action_clip=true, or action_low and action_high, in torchrl-bcq train.",
                )
            )
        return found, odd_flags

    def _in_columns(self, name: str, bad: np.ndarray | None = None) -> str:
        """Return a text with the names of the columns of a field, or of those that ``bad [D]`` marks."""
        names = self._columns.get(name, ())
        if bad is not None and len(names) == len(bad) > 1:  # a single column may hold all numbers of a field
            names = [name for name, is_bad in zip(names, bad, strict=True) if is_bad]
        elif bad is not None and len(names) > 1:  # columns of lists: it is unknown which column holds the number
            names = ()
        return f", in {listed_columns(names)}" if names else ""

    def _read_numbers(self, name: str, values: ArrayLike) -> np.ndarray:
        array = as_array(name, values)
        if name == "actions" and array.dtype.kind in "biu":
            raise DatasetError(
                f"actions has dtype {array.dtype}, so the actions may be discrete, and discrete actions are not "
                "supported yet. If these actions are continuous, store them as floating-point numbers."
            )
        array = column(name, array, rank=_NUMBERS[name])
        if array.dtype.kind not in "fiu":
            raise DatasetError(f"{name} has dtype {array.dtype}, expected real numbers.{_conversion(name, array)}")
        with np.errstate(over="ignore", invalid="ignore"):  # no warning: rows with overflow or NaN are counted below
            array = array.astype(np.float32)
        self._zero[name] = self._zero.get(name, True) and not array.any()
        return array

    def _read_flags(self, name: str, values: ArrayLike) -> np.ndarray:
        array = column(name, as_array(name, values), rank=1)
        if array.dtype.kind not in "bfiu":
            raise DatasetError(f"{name} has dtype {array.dtype}, expected booleans.{_conversion(name, array)}")
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
        observations, following = fields.get("observations"), fields.get("next_observations")
        if observations is not None and following is not None and observations.shape != following.shape:
            raise DatasetError(
                f"next_observations has shape {following.shape}, but observations has shape {observations.shape}; "
                "both need the same shape."
            )
        for name, values in fields.items():
            width = np.size(values[0])
            if width != self._widths.setdefault(name, width):
                raise DatasetError(
                    f"{name} has {width} features from row {self.rows} on, but {self._widths[name]} before; every row "
                    "needs the same number."
                )

    def _check_bounds(self, actions: np.ndarray, low: np.ndarray, high: np.ndarray) -> None:
        if actions.shape[1:] != low.shape:
            raise DatasetError(f"actions have shape {actions.shape}, but the action spec has shape {low.shape}.")
        finite = np.isfinite(actions).all(1)  # skip rows that are not finite; _read_numbers counts them
        self._lowest = np.minimum(self._lowest, actions[finite].min(0, initial=np.inf))
        self._highest = np.maximum(self._highest, actions[finite].max(0, initial=-np.inf))
        self._outside.add(finite[:, None] & ((actions < low) | (actions > high)), self.rows)


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


def as_array(name: str, values: ArrayLike) -> np.ndarray:
    """Convert ``values`` to a NumPy array. NumPy has no bfloat16, so bfloat16 tensors become float32."""
    try:
        if isinstance(values, Tensor):
            values = values.detach().cpu()
            array = (values.float() if values.dtype == bfloat16 else values).numpy()
        else:
            array = np.asarray(values)
    except Exception as error:  # arrays of other libraries and meta tensors raise various exceptions
        raise DatasetError(f"{name} is not an array ({error}); each of its rows needs the same shape.") from error
    if np.ma.is_masked(values):
        raise DatasetError(f"{name} has {np.ma.count_masked(values)} masked values; fill them in, or drop these rows.")
    return array


def _conversion(name: str, array: np.ndarray) -> str:
    """Return a hint for arrays of objects, booleans or texts, such as pandas frames with columns of several dtypes."""
    if array.dtype.kind not in "ObSUT":
        return ""
    return f" Convert {name} to floating-point numbers, in Python with np.asarray({name}, dtype=float)."


def column(name: str, array: np.ndarray, rank: int) -> np.ndarray:
    """Check that ``array`` has ``rank`` dimensions. With rank 1, ``[N, 1]`` becomes ``[N]``."""
    if rank == 1 and array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != rank:
        expected = "[N] or [N, 1]" if rank == 1 else "[N, features]"
        hint = f"; use np.asarray({name})[:, None] for a single feature" if (array.ndim, rank) == (1, 2) else ""
        raise DatasetError(f"{name} has shape {array.shape}, expected {expected}{hint}.")
    if not array.size:
        raise DatasetError(f"{name} is empty (shape {array.shape}); it needs at least one value.")
    return array


def check_lengths(lengths: Mapping[str, int]) -> None:
    """Raise a ``DatasetError`` if the fields differ in length."""
    if len(set(lengths.values())) > 1:
        raise DatasetError(
            f"fields differ in length: {dict(lengths)}; each field needs one row per step. Put the last observation of "
            "an episode into next_observations."
        )


def spec_bounds(spec: TensorSpec) -> tuple[np.ndarray, np.ndarray]:
    """Return the lower and upper bounds of an action spec in float32; a missing bound is infinite.

    The bounds are rounded like the actions of a dataset, so a float64 action at its bound stays within the bounds.

    Raises:
        DatasetError: if the spec is not a float vector.
    """
    try:
        low, high = action_box(spec)
    except ValueError as error:
        raise DatasetError(str(error)) from error
    return low.cpu().float().numpy(), high.cpu().float().numpy()
