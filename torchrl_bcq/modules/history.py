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
        dim: dimension along which the observations are joined: -1 for vectors ``[*B, D]``, -3 for the channels of
            frames ``[*B, C, H, W]``.

    Raises:
        ValueError: if ``num_frames`` is not a whole number of at least 1, or ``dim`` is not negative.

    Example:
        >>> from torchrl_bcq import History
        >>> history = History(3)
        >>> history([1.0, 10.0]), history([2.0, 20.0])
        (array([ 1., 10.,  1., 10.,  1., 10.]), array([ 1., 10.,  1., 10.,  2., 20.]))
        >>> history.reset()  # the next observation is the first one of a new episode
        >>> history([5.0, 50.0])
        array([ 5., 50.,  5., 50.,  5., 50.])
    """

    def __init__(self, num_frames: int, dim: int = -1) -> None:
        if not isinstance(num_frames, int) or num_frames < 1:
            raise ValueError(f"num_frames is {num_frames!r}, expected a whole number of at least 1.")
        if not isinstance(dim, int) or dim >= 0:
            raise ValueError(f"dim is {dim!r}, expected -1 for vectors, or -3 for frames.")
        self.num_frames, self.dim = num_frames, dim
        self._frames: Tensor | None = None  # [*B, num_frames, D], or [*B, num_frames, C, H, W] if dim is -3
        self._starts = torch.tensor(False)  # [*B], True where the next observation starts an episode

    def __call__(self, observation: Any) -> Any:
        """Add an observation ``[*B, D]``; return a new array (for a tensor: a tensor) ``[*B, num_frames * D]``.

        With ``dim=-3``, add a frame ``[*B, C, H, W]``, and return an array ``[*B, num_frames * C, H, W]``.

        Raises:
            ValueError: if the observation has too few dimensions, or another shape than the observation before.
        """
        dim = self.dim
        is_tensor = isinstance(observation, Tensor)
        frame = observation.detach() if is_tensor else _copy(observation)  # a copy: environments reuse arrays
        if frame is None or frame.ndim < -dim or frame.layout != torch.strided or frame.is_nested:
            shapes = "[D] or [B, D]" if dim == -1 else "[C, H, W] or [B, C, H, W]"
            raise ValueError(f"the observation is {observation!r:.60}, expected an array of numbers, {shapes}.")
        frames = frame.unsqueeze(dim - 1).repeat_interleave(self.num_frames, dim - 1)  # [*B, D] -> [*B, num_frames, D]
        if self._frames is None:
            self._starts = torch.zeros(frame.shape[:dim], dtype=torch.bool, device=frame.device)
        else:
            if frames.shape != self._frames.shape:
                found, before = tuple(frame.shape), (*self._starts.shape, *self._frames.shape[dim:])
                raise ValueError(f"the observation has shape {found}, but the one before has {before}; call reset().")
            kept = self._frames.narrow(dim - 1, 1, self.num_frames - 1)
            longer = torch.cat([kept, frame.unsqueeze(dim - 1)], dim - 1)
            frames = frames.where(self._starts.reshape(*self._starts.shape, *[1] * (1 - dim)), longer)
            self._starts.zero_()
        self._frames = frames
        state = frames.flatten(dim - 1, dim).clone()  # a copy, so that changes to the state do not change the history
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
