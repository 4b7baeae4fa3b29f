"""Stops glibc from returning freed activations to the system between steps."""

from __future__ import annotations

import torch

_LARGEST_THRESHOLD = 2**25 - 2**14  # bytes; glibc adapts up to 32 MiB, overhead of an allocation included


def keep_freed_memory(device: torch.device) -> None:
    """Let glibc keep up to 64 MiB of freed memory for the next allocation; does nothing unless the device is a CPU.

    Without this, glibc returns the activations to the system after each step, and the system zeroes the pages again in
    the next one: 10% of the time of a gradient step, 20% of acting in many states. glibc raises its thresholds to the
    largest block freed so far, at most 32 MiB, so one such block is allocated and freed here. Thresholds set by
    environment variables (``MALLOC_TRIM_THRESHOLD_`` ...) and other C libraries are not affected.

    Args:
        device: of the networks.

    Source: mallopt(3), M_MMAP_THRESHOLD; DEFAULT_MMAP_THRESHOLD_MAX of malloc.c.
    """
    if device.type == "cpu":
        torch.empty(_LARGEST_THRESHOLD, dtype=torch.uint8)
