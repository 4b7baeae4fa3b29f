"""Converts arguments to NumPy arrays, and checks their shapes; reads bounds as arrays."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor, bfloat16
from torchrl.data import TensorSpec

from torchrl_bcq.bounds import action_box
from torchrl_bcq.errors import DatasetError


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


def conversion(name: str, array: np.ndarray) -> str:
    """Return a hint for arrays of objects, booleans or texts, such as pandas frames with columns of several dtypes."""
    if array.dtype.kind not in "ObSUT":
        return ""
    return f" Convert {name} to floating-point numbers, in Python with np.asarray({name}, dtype=float)."


def column(name: str, array: np.ndarray, rank: int) -> np.ndarray:
    """Check that ``array`` has ``rank`` dimensions. ``[N, 1]`` becomes ``[N]`` with rank 1, and the reverse with 2."""
    if rank == 1 and array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    elif rank == 2 and array.ndim == 1:
        array = array[:, None]
    if array.ndim != rank:
        expected = "[N] or [N, 1]" if rank == 1 else "[N, features]"
        raise DatasetError(f"{name} has shape {array.shape}, expected {expected}.")
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


def to_float32(name: str, array: np.ndarray) -> np.ndarray:
    """Convert real numbers to float32. Numbers beyond its range become infinite, without a warning."""
    if array.dtype.kind not in "fiu":
        raise DatasetError(f"{name} has dtype {array.dtype}, expected real numbers.{conversion(name, array)}")
    with np.errstate(over="ignore", invalid="ignore"):
        return array.astype(np.float32)


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
