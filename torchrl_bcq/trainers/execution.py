"""Precision and compilation of gradient steps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import FunctionType
from typing import Any

import torch
from tensordict import TensorDictBase

from torchrl_bcq.memory import keep_freed_memory
from torchrl_bcq.objectives import OfflineLoss
from torchrl_bcq.objectives.base import target_precision

_MATMUL = ("highest", "high", "medium")  # torch.set_float32_matmul_precision's
PRECISIONS = (*_MATMUL, "bf16-target", "bf16-mixed")
_logger = logging.getLogger(__name__)


class Execution:
    """Evaluates the losses of an :class:`~torchrl_bcq.OfflineTrainer`, which describes the arguments.

    Each loss is compiled, forward and backward, without a graph break.
    """

    def __init__(
        self, loss_module: OfflineLoss, compile: bool | Mapping[str, Any] = False, precision: str | None = None
    ) -> None:
        if not isinstance(compile, (bool, Mapping)):
            raise TypeError(f"compile is {compile!r}, expected True, False, or keywords of torch.compile.")
        if precision is not None and precision not in PRECISIONS:
            raise ValueError(f"precision is {precision!r}, expected None or one of {[*PRECISIONS]}.")
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
        """Evaluate the loss, or one of its methods, on a batch."""
        device = next(self._loss.parameters()).device.type
        with torch.autocast(device, torch.bfloat16) if self._autocast else nullcontext():
            return self._function(method or "forward")(batch)

    def _function(self, method: str) -> Callable:
        if self._settings is None:
            return self._loss if method == "forward" else getattr(self._loss, method)
        if method not in self._compiled:
            _logger.info("compiling %s; its first step takes up to a minute", method)
            _ = self._loss.in_keys  # found now, else a second graph is compiled once they are known
            self._compiled[method] = torch.compile(_with_own_code(getattr(self._loss, method)), **self._settings)
        return self._compiled[method]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Set the precisions, which are global to PyTorch and to the losses, and restore them afterwards."""
        # the present one is not even read unless it changes: that fails if it was set for each backend
        before = None if self._matmul is None else torch.get_float32_matmul_precision()
        try:
            if self._matmul is not None:
                torch.set_float32_matmul_precision(self._matmul)
            with target_precision(self._target_dtype):
                yield
        finally:
            if before is not None:
                torch.set_float32_matmul_precision(before)


def _with_own_code(method: Callable) -> Callable:
    """A function that calls ``method``.

    PyTorch compiles one code object a few times only, and TorchRL has all methods of all losses share one.
    """

    def call(*arguments: Any) -> Any:
        return method(*arguments)

    return FunctionType(call.__code__.replace(), globals(), call.__name__, None, call.__closure__)
