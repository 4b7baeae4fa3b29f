"""Runs a network temporarily with other weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from tensordict import TensorDictParams
from torch import nn

Slots = list[tuple[dict[str, Any], str, Any]]  # a dict and a key, which hold a weight; and the new weight


def find_slots(params: TensorDictParams, network: nn.Module) -> Slots:
    """For each weight in ``params``, find where the network stores it.

    A ``TensorDictParams`` in the network, such as that of ``EnsembleModule``, stores its weights in one TensorDict.
    """
    modules = dict(network.named_modules(remove_duplicate=False))
    stores = {
        tuple(name.split(".")): module for name, module in modules.items() if isinstance(module, TensorDictParams)
    }
    slots: Slots = []
    for store, module in stores.items():
        weights = params._param_td.get(store)
        slots.append((module.__dict__, "_param_td", getattr(weights, "_param_td", weights)))
    for key, tensor in params.items(True, True):
        *path, name = (key,) if isinstance(key, str) else key
        if not any(tuple(path[: len(store)]) == store for store in stores):
            module = modules[".".join(path)]
            slots.append((module._parameters if name in module._parameters else module._buffers, name, tensor))
    return slots


class RunOn:
    """Context manager in which a network uses other weights. At the end, the network gets its own weights back.

    tensordict's ``params.to_module(network)`` searches all parameters and layers at each use. The search takes longer
    than the forward pass of a small network. Therefore ``find_slots`` searches once, and ``RunOn`` uses the result.
    Create a new ``RunOn`` in each ``with`` statement: before PyTorch 2.14, ``torch.compile`` supports a context manager
    only if the ``with`` statement creates it.

    Args:
        slots: result of ``find_slots``.
        detached: if True, the network uses its own current weights, detached, instead of the tensors in ``slots``.
    """

    def __init__(self, slots: Slots, *, detached: bool = False) -> None:
        self._slots = slots
        self._detached = detached

    def __enter__(self) -> None:
        """Replace the network's weights by the tensors in ``slots``, or by its own detached weights."""
        self._own = [place[name] for place, name, _ in self._slots]
        for (place, name, tensor), own in zip(self._slots, self._own, strict=True):
            place[name] = own.detach() if self._detached else tensor

    def __exit__(self, *failure: Any) -> None:
        """Put the network's own weights back."""
        for (place, name, _), tensor in zip(self._slots, self._own, strict=True):
            place[name] = tensor


def follow_swapped_weights(method: Callable) -> Callable:
    """Wrap a method of a loss: after ``params.to_module(loss)``, the method uses the weights ``params``."""

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        current = {name: self._modules[f"{name}_network_params"] for name in self._own}
        if all(params._param_td is self._own[name][0] for name, params in current.items()):
            return method(self, *args, **kwargs)
        pairs = ((params, getattr(self, f"{name}_network")) for name, params in current.items())
        with RunOn([slot for pair in pairs for slot in find_slots(*pair)]):
            return method(self, *args, **kwargs)

    return call
