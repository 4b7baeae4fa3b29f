"""PyTorch's own exporters, called with a policy as a user calls them."""

from __future__ import annotations

import warnings

import torch
from torch import nn


def export(policy: nn.Module, *tensors: torch.Tensor) -> nn.Module:
    batch = {0: torch.export.Dim("batch")}
    shapes = (batch, tuple(batch for _ in tensors[1:])) if len(tensors) > 1 else (batch,)
    return torch.export.export(policy, tensors, dynamic_shapes=shapes, strict=False).module()


def trace(policy: nn.Module, *tensors: torch.Tensor) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch.jit is deprecated, and of shapes, which the tests check
        return torch.jit.trace(policy, tensors)


EXPORTERS = {"torch.export": export, "torch.jit.trace": trace}
