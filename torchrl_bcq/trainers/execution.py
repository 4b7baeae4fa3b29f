"""Precision and compilation of losses."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import FunctionType
from typing import Any

import torch
from tensordict import TensorDictBase, TensorDictParams
from torchrl.objectives.value import TD1Estimator

from torchrl_bcq.memory import keep_freed_memory
from torchrl_bcq.objectives import OfflineLoss

_MATMUL = ("highest", "high", "medium")  # the values of torch.set_float32_matmul_precision
PRECISIONS = (*_MATMUL, "bf16-target", "bf16-mixed")
_logger = logging.getLogger(__name__)


class Execution:
    """Evaluates losses in a chosen precision, with or without ``torch.compile``; see ``OfflineTrainer``.

    A compiled loss is one graph: ``torch.compile`` raises an error at a graph break.
    """

    def __init__(
        self, loss_module: OfflineLoss, compile: bool | Mapping[str, Any] = False, precision: str | None = None
    ) -> None:
        if not isinstance(compile, (bool, Mapping)):
            raise TypeError(f"compile is {compile!r}, expected True, False, or a mapping of torch.compile arguments.")
        if precision is not None and precision not in PRECISIONS:
            raise ValueError(f"precision is {precision!r}, expected None or one of {[*PRECISIONS]}.")
        networks = (getattr(loss_module, f"{name}_network") for name in loss_module.network_names)
        layers = (layer for network in networks for layer in network.modules())
        if compile is not False and any(isinstance(layer, TensorDictParams) for layer in layers):
            # measured with EnsembleModule, PyTorch 2.14 and tensordict 0.14: the compiled values can be wrong
            raise ValueError("networks with a TensorDictParams, such as EnsembleModule, need compile=False.")
        self.compile = compile
        self.precision = precision
        self._loss = loss_module
        self._matmul = precision if precision in _MATMUL else None
        self._autocast = precision == "bf16-mixed"
        self._target_dtype = torch.bfloat16 if precision == "bf16-target" else None
        keep_freed_memory(next(loss_module.parameters()).device)
        self._compiled: dict[str, Callable] = {}
        self._settings = None if compile is False else {"fullgraph": True, **({} if compile is True else compile)}

    def compute(self, batch: TensorDictBase, method: str | None = None) -> Any:
        """Call the loss module, or its method named ``method``, with a batch, and return the result."""
        device = next(self._loss.parameters()).device.type
        with torch.autocast(device, torch.bfloat16) if self._autocast else nullcontext():
            return self._function(method or "forward")(batch)

    def _function(self, method: str) -> Callable:
        if self._settings is None:
            return self._loss if method == "forward" else getattr(self._loss, method)
        if method not in self._compiled:
            if isinstance(getattr(self._loss, "_value_estimator", None), TD1Estimator):  # of TorchRL 0.14.1
                raise ValueError("a compiled TD1Estimator ignores gamma; use ValueEstimators.TD1 or compile=False.")
            _logger.info("compiling %s; the first step of this loss takes up to a minute", method)
            _ = self._loss.in_keys  # fill the cache of in_keys before compiling; otherwise PyTorch compiles twice
            self._compiled[method] = torch.compile(_with_own_code(getattr(self._loss, method)), **self._settings)
        return self._compiled[method]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Use the chosen precision inside a ``with`` block; afterwards, restore the previous precision."""
        # read the precision only if needed: reading fails if the user has set one for a single backend
        before = None if self._matmul is None else torch.get_float32_matmul_precision()
        target_dtype = self._loss.target_dtype
        try:
            if self._matmul is not None:
                torch.set_float32_matmul_precision(self._matmul)
            self._loss.target_dtype = self._target_dtype or target_dtype
            yield
        finally:
            self._loss.target_dtype = target_dtype
            if before is not None:
                torch.set_float32_matmul_precision(before)


def _with_own_code(method: Callable) -> Callable:
    """Return a function that calls ``method`` and has its own code object.

    TorchRL wraps the methods of all losses in functions that share one code object. PyTorch limits the number of
    recompilations of each code object. Without this function, all losses together would share one limit.
    """

    def call(*arguments: Any) -> Any:
        return method(*arguments)

    return FunctionType(call.__code__.replace(), globals(), call.__name__, None, call.__closure__)
