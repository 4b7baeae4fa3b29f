"""Calls with tensors instead of a tensordict, for modules that need the batch size."""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import takewhile
from typing import Any

from tensordict import TensorDictBase, is_tensor_collection
from tensordict.nn import dispatch


def accepts_tensors(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Let a module be called with tensors: ``module(x, y)`` or ``module(observation=x, action=y)``.

    The tensors are the entries in ``in_keys``. As with :class:`tensordict.nn.dispatch`, the result is the entry in
    ``out_keys``, or a tuple of several. The batch size is made of the leading dimensions that are equal in all tensors;
    the last dimension of each tensor holds its features: ``[B, D]`` gives ``[B]``, and ``[D]`` gives ``[]``. A module
    that reads nothing but images needs a tensordict.
    """

    @dispatch(auto_batch_size=False)  # dispatch's own search would take [B, D] for a batch of B * D rows
    def call_with_tensors(self, tensordict: TensorDictBase, *args: Any, **kwargs: Any) -> TensorDictBase:
        sizes = zip(*(tensor.shape[:-1] for tensor in tensordict.values(True, True)), strict=False)
        shared = takewhile(lambda same: all(size == same[0] for size in same), sizes)
        tensordict.batch_size = [same[0] for same in shared]
        return forward(self, tensordict, *args, **kwargs)

    @functools.wraps(forward)
    def call(self, *args: Any, **kwargs: Any) -> Any:
        first = args[0] if args else kwargs.get("tensordict")
        return (forward if is_tensor_collection(first) else call_with_tensors)(self, *args, **kwargs)

    return call
