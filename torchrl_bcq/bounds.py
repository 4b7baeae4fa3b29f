"""Reads the bounds of the action space from its spec."""

from __future__ import annotations

import torch
from torch import Tensor
from torchrl.data import Composite, TensorSpec

_REMEDY = "pass torchrl.data.Bounded(low, high, shape)"


def check_spec(name: str, spec: TensorSpec) -> None:
    """Raise a TypeError if an argument is not a spec of TorchRL, but for example a space of Gymnasium."""
    if not isinstance(spec, TensorSpec):
        raise TypeError(
            f"{name} is of the type {type(spec).__name__}, expected a spec of torchrl.data, such as Bounded(-1, 1, "
            f"(3,)); torchrl.envs.GymWrapper(env).{name} is that of an environment of Gymnasium."
        )


def action_bounds(action_spec: TensorSpec, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Return the lower bound and the upper bound of each action dimension.

    Args:
        action_spec: spec of ONE action, with shape ``[A]``. For a vectorised environment, pass
            ``env.action_spec_unbatched``.
        dtype: dtype of the bounds; by default, the spec's dtype. If ``dtype`` cannot represent a bound, the bound is
            rounded inwards.

    Returns:
        ``(low, high)``, each a new tensor of shape ``[A]`` in the spec's units.

    Raises:
        TypeError: if ``action_spec`` is not a spec of TorchRL.
        ValueError: if the spec lacks a float dtype, the shape ``[A]`` or finite bounds, or if a lower bound is equal to
            or above its upper bound.
    """
    low, high = action_box(action_spec)
    unbounded = (low.isinf() | high.isinf()).nonzero().flatten().tolist()
    if unbounded:
        raise ValueError(
            f"action_spec is unbounded in dimensions {unbounded}; {_REMEDY}, for example with the range of the "
            "dataset's actions."
        )
    low, high = round_inwards(low, high, dtype or low.dtype)
    if (low >= high).any():
        raise ValueError(
            f"action_spec has low = {low.tolist()} and high = {high.tolist()}; each lower bound must be below its "
            f"upper bound: {_REMEDY}."
        )
    return low, high


def action_box(action_spec: TensorSpec) -> tuple[Tensor, Tensor]:
    """Return new tensors ``(low, high)``, each ``[A]``; a missing bound is infinite.

    Raises:
        TypeError: if ``action_spec`` is not a spec of TorchRL.
        ValueError: if the spec lacks a float dtype or the shape ``[A]``.
    """
    check_spec("action_spec", action_spec)
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
    return (
        low.masked_fill((low <= -largest) | low.isnan(), -torch.inf),
        high.masked_fill((high >= largest) | high.isnan(), torch.inf),
    )


def round_inwards(low: Tensor, high: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the largest box ``[low, high]`` of ``dtype`` that lies within the given box. ``[A], [A] -> [A], [A]``."""
    inner_low, inner_high = low.to(dtype), high.to(dtype)
    up, down = (torch.full_like(inner_low, end) for end in (torch.inf, -torch.inf))
    inner_low = torch.where(inner_low.double() < low.double(), inner_low.nextafter(up), inner_low)
    return inner_low, torch.where(inner_high.double() > high.double(), inner_high.nextafter(down), inner_high)
