"""Decorator: users can call a module with tensors, and the batch size is found from their shapes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from itertools import takewhile
from typing import Any

from tensordict import TensorDictBase, is_tensor_collection
from tensordict.nn import dispatch


def accepts_tensors(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Let a module be called with tensors: ``module(x, y)`` or ``module(observation=x, action=y)``.

    Pass one tensor for each entry in ``in_keys``. As with ``tensordict.nn.dispatch``, the result is the entry in
    ``out_keys``, or a tuple if ``out_keys`` has several entries. The last dimension of each tensor holds its features,
    unless the module has ``observation_specs``, which tell the shape of each observation. The batch size is the longest
    common prefix of the tensors' shapes without their features. For example, ``[B, D]`` gives the batch size ``[B]``,
    and ``[D]`` gives ``[]``. Call a module that reads only images and has no ``observation_specs`` with a tensordict,
    because images ``[B, C, H, W]`` would give the batch size ``[B, C, H]``.
    """

    @dispatch(auto_batch_size=False)  # with True, dispatch would use the batch size [B, D] instead of [B]
    def call_with_tensors(self, tensordict: TensorDictBase, *args: Any, **kwargs: Any) -> TensorDictBase:
        specs = getattr(self, "observation_specs", None) or {}
        shapes = ((tensor.shape, specs.get(key)) for key, tensor in tensordict.items(True, True))
        batches = (shape[: len(shape) - (1 if spec is None else len(spec.shape))] for shape, spec in shapes)
        sizes = zip(*batches, strict=False)
        shared = takewhile(lambda same: all(size == same[0] for size in same), sizes)
        tensordict.batch_size = [same[0] for same in shared]
        return forward(self, tensordict, *args, **kwargs)

    @functools.wraps(forward)
    def call(self, *args: Any, **kwargs: Any) -> Any:
        first = args[0] if args else kwargs.get("tensordict")
        return (forward if is_tensor_collection(first) else call_with_tensors)(self, *args, **kwargs)

    call.__signature__ = _accept_more(inspect.signature(forward))  # type: ignore[attr-defined]
    return call


def _accept_more(signature: inspect.Signature) -> inspect.Signature:
    """Add ``*args`` and ``**kwargs``. torch.export reads the signature, and would otherwise accept only one tensor."""
    own, tensordict, *others = signature.parameters.values()
    args, kwargs = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    named = [parameter.replace(kind=parameter.KEYWORD_ONLY) for parameter in others]
    first = [own, tensordict.replace(default=None), inspect.Parameter("args", args)]
    return signature.replace(parameters=[*first, *named, inspect.Parameter("kwargs", kwargs)])
