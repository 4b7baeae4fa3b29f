"""Joins the last observations to the state that a policy reads, outside TorchRL's environments."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


class History:
    """Keeps the last observations of an episode; a call adds an observation and returns the state for ``policy.act``.

    The states are equal to those of TorchRL's ``CatFrames``: the observations are joined, oldest first, and before the
    start of an episode, its first observation is repeated.

    Args:
        num_frames: number of observations in a state, such as ``policy.stack`` of a policy from ``load_policy``.

    Raises:
        ValueError: if ``num_frames`` is not a whole number of at least 1.

    Example:
        >>> from torchrl_bcq import History
        >>> history = History(3)
        >>> history([1.0, 10.0]), history([2.0, 20.0])
        (array([ 1., 10.,  1., 10.,  1., 10.]), array([ 1., 10.,  1., 10.,  2., 20.]))
        >>> history.reset()  # the next observation is the first one of a new episode
        >>> history([5.0, 50.0])
        array([ 5., 50.,  5., 50.,  5., 50.])
    """

    def __init__(self, num_frames: int) -> None:
        if not isinstance(num_frames, int) or num_frames < 1:
            raise ValueError(f"num_frames is {num_frames!r}, expected a whole number of at least 1.")
        self.num_frames = num_frames
        self._frames: Tensor | None = None  # [*B, num_frames, D]
        self._starts = torch.tensor(False)  # [*B], True where the next observation starts an episode

    def __call__(self, observation: Any) -> Any:
        """Add an observation ``[*B, D]``; return a new array (for a tensor: a tensor) ``[*B, num_frames * D]``.

        Raises:
            ValueError: if the observation has no dimension, or another shape than the observation before.
        """
        is_tensor = isinstance(observation, Tensor)
        frame = observation.detach() if is_tensor else _copy(observation)  # a copy: environments reuse arrays
        if frame is None or not frame.ndim or frame.layout != torch.strided or frame.is_nested:
            raise ValueError(f"the observation is {observation!r:.60}, expected an array of numbers, [D] or [B, D].")
        frames = frame.unsqueeze(-2).repeat_interleave(self.num_frames, -2)  # [*B, D] -> [*B, num_frames, D]
        if self._frames is None:
            self._starts = torch.zeros(frame.shape[:-1], dtype=torch.bool, device=frame.device)
        else:
            if frames.shape != self._frames.shape:
                found, before = tuple(frame.shape), (*self._starts.shape, self._frames.shape[-1])
                raise ValueError(f"the observation has shape {found}, but the one before has {before}; call reset().")
            longer = torch.cat([self._frames[..., 1:, :], frames[..., -1:, :]], -2)
            frames = frames.where(self._starts[..., None, None], longer)
            self._starts.zero_()
        self._frames = frames
        state = frames.flatten(-2).clone()  # a copy, so that changes to the state do not change the history
        return state if is_tensor else state.numpy()

    def reset(self, mask: Any = None) -> None:
        """Start a new episode with the next observation.

        Args:
            mask: booleans ``[*B]``, true for the environments of a batch that start a new episode. By default, all do.

        Raises:
            ValueError: if ``mask`` holds no booleans, or has another shape than the batch of the observations.
        """
        if mask is None:
            self._frames = None
            return
        starts = mask if isinstance(mask, Tensor) else _copy(mask)
        if starts is None or starts.dtype != torch.bool:
            raise ValueError(f"mask is {mask!r:.60}, expected booleans: true where a new episode starts.")
        if self._frames is None:  # all environments start a new episode
            return
        if starts.shape != self._starts.shape:
            found, expected = tuple(starts.shape), tuple(self._starts.shape)
            raise ValueError(f"mask has shape {found}, expected {expected}, one boolean for each environment.")
        self._starts |= starts.to(self._starts.device)


def _copy(values: Any) -> Tensor | None:
    """Return a tensor with a copy of ``values``, or None if they are no numbers or booleans of one shape."""
    try:
        array = np.array(values)
        if np.ma.is_masked(values):
            return None
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
    except (TypeError, ValueError, RuntimeError):  # texts, rows of different lengths, objects
        return None
