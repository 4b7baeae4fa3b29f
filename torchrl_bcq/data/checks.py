"""What a dataset must be to be learned from: checks that count over chunks of it and report everything at the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torchrl.data import Bounded, TensorSpec

Columns = Mapping[str, Any]  # fields as from_arrays takes them, one row for each step

_NUMBERS = {"observations": 2, "actions": 2, "rewards": 1, "next_observations": 2}  # and their ranks
_FLAGS = ("terminated", "truncated")
_OPTIONAL = ("truncated", "next_observations")


class DatasetError(ValueError):
    """Data that cannot be learned from; says what was found, where, and what to do."""


class Checks:
    """Checks a dataset chunk by chunk.

    A wrong rank, width, length or dtype is refused at once. Bad rows are counted over all chunks, and refused by
    :meth:`finish`.

    Args:
        action_spec: bounds that the actions must keep, if given.
    """

    def __init__(self, action_spec: TensorSpec | None = None) -> None:
        self.rows = 0  # checked so far
        self._bounds = None if action_spec is None else spec_bounds(action_spec)
        self._names: set[str] = set()
        self._widths: dict[str, int] = {}
        self._zero: dict[str, bool] = {}  # whether a field was zero all along
        self._not_finite = {name: Rows() for name in _NUMBERS}
        self._not_flags = {name: Rows() for name in _FLAGS}
        self._outside = Rows()
        self._lowest, self._highest = np.float32(np.inf), np.float32(-np.inf)  # of each action

    def __call__(self, chunk: Columns) -> dict[str, np.ndarray]:
        """The fields as arrays: numbers in float32, ``[n, features]`` or ``[n]`` for rewards, and boolean ``[n]``.

        Raises:
            DatasetError: if a field has the wrong rank, dtype or length, or is empty.
        """
        given = {name: values for name, values in chunk.items() if values is not None or name not in _OPTIONAL}
        self._check_names(given)
        fields = {name: self._numbers(name, given[name]) for name in _NUMBERS if name in given}
        fields |= {name: self._read_flags(name, given[name]) for name in _FLAGS if name in given}
        check_lengths({name: len(fields[name]) for name in given})
        self._check_widths(fields)
        if "actions" in fields:
            self._check_bounds(fields["actions"])
        self.rows += len(fields["rewards"])
        return fields

    def finish(self, *, strict: bool = True) -> None:
        """Refuse what was counted; if not ``strict``, only what the arrays do not show any more: odd flags.

        Raises:
            DatasetError: if rows are not finite, flags neither 0 nor 1, actions out of bounds, or a field is zero.
        """
        odd_flags = [
            f"{name} has {rows} that are neither 0 nor 1, such as {rows.example}; write 1 where it is so, 0 elsewhere."
            for name, rows in self._not_flags.items()
            if rows.count
        ]
        found = [*self._not_finite_rows(), *odd_flags, *self._zero_fields(), *self._outside_rows()]
        if refused := found if strict else odd_flags:
            raise DatasetError(listed(refused))

    def _not_finite_rows(self) -> Iterator[str]:
        for name, rows in self._not_finite.items():
            if rows.count:
                yield f"{name} has {rows} that are not finite in float32; drop or repair them."

    def _zero_fields(self) -> Iterator[str]:
        for name, zero in self._zero.items():
            if zero:
                yield f"{name} is zero in all {self.rows} rows; was it written and read properly?"

    def _outside_rows(self) -> Iterator[str]:
        if self._outside.count and self._bounds is not None:
            low, high = self._bounds
            yield (
                f"actions has {self._outside} outside the action spec: they span {self._lowest.tolist()} to "
                f"{self._highest.tolist()}, the spec {low.tolist()} to {high.tolist()}; clip or rescale them."
            )

    def _numbers(self, name: str, values: ArrayLike) -> np.ndarray:
        array = column(name, values, rank=_NUMBERS[name])
        kinds = "f" if name == "actions" else "fiu"
        if array.dtype.kind not in kinds:
            hint = " BCQLoss needs continuous actions; cast them if they are." if name == "actions" else ""
            raise DatasetError(f"{name} has dtype {array.dtype}, expected real numbers.{hint}")
        with np.errstate(over="ignore", invalid="ignore"):  # both are found below
            array = array.astype(np.float32)
        self._not_finite[name].add(~np.isfinite(array).reshape(len(array), -1).all(1), self.rows)
        self._zero[name] = self._zero.get(name, True) and not array.any()
        return array

    def _read_flags(self, name: str, values: ArrayLike) -> np.ndarray:
        array = column(name, values, rank=1)
        if array.dtype.kind not in "bfiu":
            raise DatasetError(f"{name} has dtype {array.dtype}, expected booleans.")
        odd = (array != 0) & (array != 1)
        rows = self._not_flags[name]
        if odd.any() and not rows.count:
            rows.example = str(array[odd][0])
        rows.add(odd, self.rows)
        return array.astype(bool)

    def _check_names(self, given: Mapping[str, ArrayLike]) -> None:
        self._names = self._names or set(given)
        for name in sorted(self._names ^ set(given)):
            found = "given from row {} on, and missing" if name in given else "missing from row {} on, and given"
            raise DatasetError(f"{name} is {found.format(self.rows)} before; every row needs the same.")

    def _check_widths(self, fields: Mapping[str, np.ndarray]) -> None:
        if "next_observations" in fields and fields["next_observations"].shape != fields["observations"].shape:
            shapes = fields["next_observations"].shape, fields["observations"].shape
            raise DatasetError(f"next_observations has shape {shapes[0]}, observations {shapes[1]}.")
        for name in [name for name in ("observations", "actions") if name in fields]:
            width = fields[name].shape[1]
            if width != self._widths.setdefault(name, width):
                raise DatasetError(
                    f"{name} has {width} features from row {self.rows} on, {self._widths[name]} before; every row "
                    "needs the same."
                )

    def _check_bounds(self, actions: np.ndarray) -> None:
        if self._bounds is None:
            return
        low, high = self._bounds
        if actions.shape[1:] != low.shape:
            raise DatasetError(f"actions have shape {actions.shape}, but the action spec has shape {low.shape}.")
        finite = np.isfinite(actions).all(1)  # the others are counted as such
        self._lowest = np.minimum(self._lowest, actions[finite].min(0, initial=np.inf))
        self._highest = np.maximum(self._highest, actions[finite].max(0, initial=-np.inf))
        self._outside.add(finite & ((actions < low) | (actions > high)).any(1), self.rows)


@dataclass
class Rows:
    """Rows that share a defect."""

    count: int = 0
    first: int = 0
    example: str = ""

    def add(self, mask: np.ndarray, start: int) -> None:
        """Count the rows of a chunk that begins at row ``start``."""
        if not self.count and mask.any():
            self.first = start + int(mask.argmax())
        self.count += int(mask.sum())

    def __str__(self) -> str:
        """Their number, and the first one's."""
        return f"{self.count} {'row' if self.count == 1 else 'rows'} (first: {self.first})"


def listed(defects: list[str]) -> str:
    """One message of them all."""
    return defects[0] if len(defects) == 1 else "\n- ".join([f"{len(defects)} defects:", *defects])


def column(name: str, values: ArrayLike, rank: int) -> np.ndarray:
    """An array of the given rank with at least one row; ``[N, 1]`` passes for ``[N]``.

    Raises:
        DatasetError: for any other shape.
    """
    try:
        array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    except Exception as error:  # arrays of other libraries, and tensors without numbers, raise many kinds
        raise DatasetError(f"{name} is no array ({error}); each of its rows needs the same shape.") from error
    if np.ma.is_masked(values):
        raise DatasetError(f"{name} has {np.ma.count_masked(values)} masked values; fill them in, or drop their rows.")
    if rank == 1 and array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != rank:
        expected = "[N] or [N, 1]" if rank == 1 else "[N, features]"
        hint = f"; use {name}[:, None] for a single feature" if (array.ndim, rank) == (1, 2) else ""
        raise DatasetError(f"{name} has shape {array.shape}, expected {expected}{hint}.")
    if not array.size:
        raise DatasetError(f"{name} is empty (shape {array.shape}); there is nothing to learn from.")
    return array


def check_lengths(lengths: Mapping[str, int]) -> None:
    """Refuse fields of different lengths.

    Raises:
        DatasetError: naming all lengths.
    """
    if len(set(lengths.values())) > 1:
        raise DatasetError(
            f"fields differ in length: {dict(lengths)}; each needs one row per step, and the last observation of an "
            "episode belongs to next_observations."
        )


def spec_bounds(spec: TensorSpec) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest action, in float32.

    Raises:
        DatasetError: for an unbounded spec.
    """
    if not isinstance(spec, Bounded):
        raise DatasetError(f"action_spec is a {type(spec).__name__}, expected the Bounded spec of one action.")
    return spec.space.low.cpu().float().numpy(), spec.space.high.cpu().float().numpy()
