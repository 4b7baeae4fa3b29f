"""Running a network on other weights than its own."""

from __future__ import annotations

from typing import Any

from tensordict import TensorDictParams
from torch import Tensor, nn

Slots = list[tuple[dict[str, Any], str, Tensor]]


def find_slots(params: TensorDictParams, network: nn.Module) -> Slots:
    """Where a network holds its weights, and what of ``params`` belongs there.

    Args:
        params: of the network, as :meth:`tensordict.TensorDict.from_module` names them; their tensors are those of now.
        network: of the same structure.
    """
    modules, slots = dict(network.named_modules()), []
    for key, tensor in params.items(True, True):
        *path, name = (key,) if isinstance(key, str) else key
        module = modules[".".join(path)]
        slots.append((module._parameters if name in module._parameters else module._buffers, name, tensor))
    return slots


class RunOn:
    """A context in which a network holds other weights.

    tensordict's ``params.to_module(network)`` walks through both at each use, which takes longer than the small
    networks that it is used on, and where the context fails it leaves the weights in the network. Slots are found once,
    a context is made for each use: PyTorch before 2.14 compiles those only that are made where they are entered.

    Args:
        slots: of :func:`find_slots`; the network has its own weights again after the context.
        detached: whether the weights are taken without their gradients.
    """

    def __init__(self, slots: Slots, *, detached: bool = False) -> None:
        self._slots = slots
        self._detached = detached

    def __enter__(self) -> None:
        """Put them in."""
        self._own = [place[name] for place, name, _ in self._slots]
        for place, name, tensor in self._slots:
            place[name] = tensor.detach() if self._detached else tensor

    def __exit__(self, *failure: Any) -> None:
        """Put the network's own back."""
        for (place, name, _), tensor in zip(self._slots, self._own, strict=True):
            place[name] = tensor


def put(params: TensorDictParams, network: Any) -> None:
    """Have a network hold these weights, as they are: tensordict's default would unfreeze frozen ones."""
    params.to_module(network, preserve_module_state=False)
