"""Equal networks of several agents as one, whose layers are batched matrix products."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn


class StackedLinear(nn.Module):
    """``K`` linear layers, each for its part of the input. ``[K, *B, in] -> [K, *B, out]``.

    Args:
        layers: of equal sizes. Their weights are copied.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.stack([layer.weight.detach() for layer in layers]))  # [K, out, in]
        biases = [layer.bias for layer in layers]
        self.bias = None if biases[0] is None else nn.Parameter(torch.stack([bias.detach() for bias in biases]))

    def forward(self, x: Tensor) -> Tensor:
        """Apply layer ``k`` to ``x[k]``."""
        flat, weight = x.flatten(1, -2), self.weight.mT  # [K, N, in], [K, in, out]
        out = torch.bmm(flat, weight) if self.bias is None else torch.baddbmm(self.bias.unsqueeze(1), flat, weight)
        return out.view(*x.shape[:-1], -1)


def stack_networks(networks: Sequence[Any]) -> Any:
    """One network that does for ``[K, *B, ...]`` what ``networks[k]`` does for part ``k``.

    Linear layers become :class:`StackedLinear`; all else is the first network's, and must be equal in all of them.

    Args:
        networks: of equal structure.

    Raises:
        ValueError: if they differ in structure or in a buffer, or another layer than a linear one has parameters.
    """
    first = networks[0]
    if any(repr(network) != repr(first) for network in networks):
        raise ValueError(f"the networks differ in structure: {first} against {networks[-1]}; build them alike.")
    if all(isinstance(network, nn.Linear) for network in networks):
        return StackedLinear(networks)
    _check_equal(networks)
    stacked = copy.copy(first)
    stacked._buffers = dict(first._buffers)
    stacked._modules = {
        name: stack_networks([network.get_submodule(name) for network in networks])
        for name, _ in first.named_children()
    }
    return stacked


def _check_equal(networks: Sequence[nn.Module]) -> None:
    """Whether what networks hold beside their children is the same in all."""
    own = [dict(chain(n.named_parameters(recurse=False), n.named_buffers(recurse=False))) for n in networks]
    if any(isinstance(value, nn.Parameter) for value in own[0].values()):
        raise ValueError(
            f"a {type(networks[0]).__name__} has parameters {[*own[0]]}; agents can be trained together if only linear "
            "layers have parameters."
        )
    for name, value in own[0].items():
        if any(not torch.equal(value, other[name]) for other in own[1:]):
            raise ValueError(f"{name} of {type(networks[0]).__name__} differs between the agents; it must be the same.")
