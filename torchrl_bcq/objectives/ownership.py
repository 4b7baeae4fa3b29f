"""Running a network on other weights than its own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from tensordict import TensorDictParams
from torch import Tensor, nn

Slots = list[tuple[dict[str, Any], str, Tensor]]


def find_slots(params: TensorDictParams, network: nn.Module) -> Slots:
    """List where a network stores its weights, each with the tensor of ``params`` that belongs there."""
    modules, slots = dict(network.named_modules(remove_duplicate=False)), []
    for key, tensor in params.items(True, True):
        *path, name = (key,) if isinstance(key, str) else key
        module = modules[".".join(path)]
        slots.append((module._parameters if name in module._parameters else module._buffers, name, tensor))
    return slots


class RunOn:
    """Context in which a network uses other weights; its own return afterwards, also after an error.

    tensordict's ``params.to_module(network)`` walks through both at each use, which takes longer than a small network's
    forward pass. Slots are found once. A context is created for each use, because PyTorch before 2.14 compiles only
    contexts that are created where they are entered.

    Args:
        slots: of :func:`find_slots`.
        detached: whether to use the network's present weights without their gradients, instead of those of ``slots``.
    """

    def __init__(self, slots: Slots, *, detached: bool = False) -> None:
        self._slots = slots
        self._detached = detached

    def __enter__(self) -> None:
        """Replace the weights."""
        self._own = [place[name] for place, name, _ in self._slots]
        for (place, name, tensor), own in zip(self._slots, self._own, strict=True):
            place[name] = own.detach() if self._detached else tensor

    def __exit__(self, *failure: Any) -> None:
        """Put the network's own weights back."""
        for (place, name, _), tensor in zip(self._slots, self._own, strict=True):
            place[name] = tensor


def follow_swapped_weights(method: Callable) -> Callable:
    """Make a method of an objective use the weights that ``params.to_module(loss)`` has put into it."""

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self._has_swapped_weights():
            return method(self, *args, **kwargs)
        with RunOn(self._find_own_slots()):
            return method(self, *args, **kwargs)

    return call
