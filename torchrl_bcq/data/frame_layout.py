"""Recognises frames, and moves their channels to the front."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from torchrl_bcq.errors import DatasetError

_logger = logging.getLogger(__name__)


def layout_of(shape: Sequence[int]) -> str:
    """Return ``"HW"``, ``"CHW"`` or ``"HWC"``, the order of height, width and channels of one frame.

    The channels are last if the last dimension is smaller than the other two, and is 1, 3, 4 or at most half of them.

    >>> layout_of((84, 84)), layout_of((4, 84, 84)), layout_of((96, 96, 3))
    ('HW', 'CHW', 'HWC')
    """
    if len(shape) == 2:
        return "HW"
    smaller, last = min(shape[:2]), shape[2]
    return "HWC" if last < smaller and (last in (1, 3, 4) or 2 * last <= smaller) else "CHW"


def as_frames(name: str, array: np.ndarray) -> np.ndarray:
    """Return frames ``[N, H, W]``, ``[N, C, H, W]`` or ``[N, H, W, C]`` as ``[N, C, H, W]``.

    Raises:
        DatasetError: if the array has another number of dimensions, is empty, or does not hold bytes.
    """
    if array.ndim == 3 and array.dtype.kind == "f":
        raise DatasetError(
            f"{name} has shape {array.shape} and dtype {array.dtype}. If this is [step, environment, features], store "
            "the rows of each environment one after another: np.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), and mark "
            "the last row of each environment as truncated. If these are frames, store bytes from 0 to 255: frames "
            "with values from 0 to 1 become np.round(255 * frames).astype(np.uint8)."
        )
    if array.ndim not in (3, 4) or not array.size or array.dtype != np.uint8:
        vectors = "" if "frames" in name else "vectors [N, features], or "
        raise DatasetError(
            f"{name} has shape {array.shape} and dtype {array.dtype}, expected {vectors}frames [N, H, W] or [N, C, H, "
            "W] of bytes (uint8). Store frames as bytes from 0 to 255: frames with values from 0 to 1 become "
            "np.round(255 * frames).astype(np.uint8)."
        )
    layout = layout_of(array.shape[1:])
    if layout == "HW":
        return array[:, None]
    return np.ascontiguousarray(np.moveaxis(array, -1, 1)) if layout == "HWC" else array


def report_layout(name: str, given: Sequence[int], frames: np.ndarray) -> None:
    """Log that the channels of frames were moved to the front."""
    if len(given) == 4 and tuple(given) != frames.shape:
        _logger.info(
            "%s has shape [N, %d, %d, %d]; the last dimension is taken for the channels, and the frames become [N, %d, "
            "%d, %d].",
            name,
            *given[1:],
            *frames.shape[1:],
        )


def width_of(values: np.ndarray) -> Any:
    """Return the number of features of each row of a field, or the shape ``(C, H, W)`` of its frames."""
    return tuple(values.shape[1:]) if values.ndim == 4 else np.size(values[0])


def paired(given: Mapping[str, Any], *, report: bool) -> Mapping[str, Any]:
    """Drop ``next_observations`` or ``next_frames`` if data with ``frames`` holds only one of these two fields.

    Raises:
        DatasetError: if the rows then show no ends of episodes, or if ``next_frames`` are given without ``frames``.
    """
    if "next_frames" in given and "frames" not in given:
        raise DatasetError("next_frames is given without frames; also give frames.")
    if "next_action_masks" in given and "action_masks" not in given:
        raise DatasetError("next_action_masks is given without action_masks; also give action_masks.")
    alone = given.keys() & {"next_observations", "next_frames"}
    if "frames" not in given or len(alone) != 1:
        return given
    (name,) = alone
    if "truncated" not in given:
        (missing,) = {"next_observations", "next_frames"} - alone
        raise DatasetError(f"{name} is given, but {missing} and truncated are missing; give one of these two.")
    if report:
        _logger.info(
            "%s is not used, because the other next field is missing: each next state is the state of the next row.",
            name,
        )
    return {field: values for field, values in given.items() if field != name}
