"""Reads the bounds of the action space from its spec."""

from __future__ import annotations

import torch
from torch import Tensor
from torchrl.data import Composite, TensorSpec


def action_bounds(action_spec: TensorSpec) -> tuple[Tensor, Tensor]:
    """Lower and upper bound of each action dimension.

    Args:
        action_spec: spec of ONE action, shape ``[A]`` (of a vectorised environment: ``env.action_spec_unbatched``).

    Returns:
        ``(low, high)``, each a new tensor of shape ``[A]`` in the spec's dtype and units.

    Raises:
        ValueError: if the spec is not a continuous, finite, non-empty box of rank 1.
    """
    if isinstance(action_spec, Composite):
        raise ValueError(
            f"action_spec is a Composite; pass one of its leaves {list(action_spec.keys(True, True))}, as in "
            "env.full_action_spec[key]."
        )
    low, high = (getattr(getattr(action_spec, "space", None), side, None) for side in ("low", "high"))
    if low is None or high is None or not action_spec.dtype.is_floating_point:
        raise ValueError(
            f"action_spec must be a continuous Bounded spec, got {type(action_spec).__name__}, {action_spec.dtype}."
        )
    if len(action_spec.shape) != 1:
        raise ValueError(
            f"action_spec has shape {tuple(action_spec.shape)}, expected [A]; of a vectorised environment pass "
            "env.action_spec_unbatched."
        )
    largest = torch.finfo(low.dtype).max  # the bounds of TorchRL's Unbounded are the largest floats
    unbounded = ((low <= -largest) | (high >= largest) | low.isnan() | high.isnan()).nonzero().flatten().tolist()
    if unbounded:
        raise ValueError(
            f"action_spec is unbounded in dimensions {unbounded}; pass torchrl.data.Bounded(low, high, shape), such as "
            "the range of the dataset's actions."
        )
    if (low >= high).any():
        raise ValueError(f"action_spec is empty in a dimension: low {low.tolist()}, high {high.tolist()}.")
    return low.clone(), high.clone()
