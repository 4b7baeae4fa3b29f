"""Reads the bounds of the action space from its spec."""

from __future__ import annotations

import torch
from torch import Tensor
from torchrl.data import Composite, TensorSpec


def action_bounds(action_spec: TensorSpec) -> tuple[Tensor, Tensor]:
    """Return the lower bound and the upper bound of each action dimension.

    Args:
        action_spec: spec of ONE action, with shape ``[A]``. For a vectorised environment, pass
            ``env.action_spec_unbatched``.

    Returns:
        ``(low, high)``, each a new tensor of shape ``[A]`` in the spec's dtype and units.

    Raises:
        ValueError: if the spec lacks a float dtype, the shape ``[A]`` or finite bounds, or if a lower bound is equal to
            or above its upper bound.
    """
    if isinstance(action_spec, Composite):
        raise ValueError(
            f"action_spec is a Composite; pass one of its leaves {list(action_spec.keys(True, True))}, as in "
            "env.full_action_spec[key]."
        )
    low, high = (getattr(getattr(action_spec, "space", None), side, None) for side in ("low", "high"))
    if low is None or high is None or not action_spec.dtype.is_floating_point:
        raise ValueError(
            f"action_spec must be a continuous Bounded spec, got {type(action_spec).__name__} of {action_spec.dtype}."
        )
    if len(action_spec.shape) != 1:
        raise ValueError(
            f"action_spec has shape {tuple(action_spec.shape)}, expected [A]; for a vectorised environment, pass "
            "env.action_spec_unbatched."
        )
    largest = torch.finfo(low.dtype).max  # TorchRL's Unbounded stores this value if there is no bound
    unbounded = ((low <= -largest) | (high >= largest) | low.isnan() | high.isnan()).nonzero().flatten().tolist()
    if unbounded:
        raise ValueError(
            f"action_spec is unbounded in dimensions {unbounded}; pass torchrl.data.Bounded(low, high, shape), for "
            "example with the range of the dataset's actions."
        )
    if (low >= high).any():
        raise ValueError(
            f"action_spec has low = {low.tolist()} and high = {high.tolist()}; each lower bound must be below its "
            "upper bound."
        )
    return low.clone(), high.clone()
