"""Precision of target networks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

_target_dtype: torch.dtype | None = None


@contextmanager
def target_precision(dtype: torch.dtype | None) -> Iterator[None]:
    """Context manager in which target networks run under autocast to ``dtype``. None adds no autocast."""
    global _target_dtype
    before, _target_dtype = _target_dtype, dtype
    try:
        yield
    finally:
        _target_dtype = before


def target_autocast(device_type: str) -> AbstractContextManager:
    """Context manager that applies the precision set by ``target_precision``."""
    if _target_dtype is None:
        return nullcontext()  # keeps the autocast context of the caller
    return torch.autocast(device_type, _target_dtype)
