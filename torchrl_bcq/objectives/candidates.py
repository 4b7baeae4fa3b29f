"""Evaluates many candidate actions in parts that fit into the caches of a CPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tensordict import TensorDictBase
from torch import Tensor


def evaluate_in_parts(
    evaluate: Callable[[TensorDictBase, Tensor], Tensor], candidates: TensorDictBase, latent: Tensor, size: int
) -> Tensor:
    """Evaluate candidates: on a CPU in parts of about ``size`` candidates, on other devices all at once.

    ``evaluate`` maps candidates ``[*B, n]`` and latents ``[*B, n, L]`` to ``[*B, 1]``. The result for a state must
    depend only on the candidates of this state. The candidates are split along the last dimension of ``*B``.
    """
    parts = -(-candidates.numel() // size)
    if latent.device.type != "cpu" or parts <= 1 or candidates.ndim == 1:
        return evaluate(candidates, latent)
    dim = candidates.ndim - 2
    rows = -(-candidates.shape[dim] // parts)
    pairs = zip(candidates.split(rows, dim), latent.split(rows, dim), strict=True)
    values = [evaluate(*pair) for pair in pairs]
    return values[0] if len(values) == 1 else torch.cat(values, dim)
