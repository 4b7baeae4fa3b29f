"""Stops glibc from returning freed memory to the operating system between steps."""

from __future__ import annotations

import torch

_LARGEST_THRESHOLD = 2**25 - 2**14  # size in bytes of the block to free: glibc's maximum, 32 MiB, minus overhead


def keep_freed_memory(device: torch.device) -> None:
    """Let glibc keep up to 64 MiB of freed memory for later allocations. Do nothing if the device is not a CPU.

    By default, glibc returns the memory of activations to the system after each step, and the system must zero the
    pages in the next step. Returning and zeroing memory takes 10% of the time of a gradient step, and 20% of the time
    of choosing actions for a large batch of states. When a block of up to 32 MiB is freed, glibc raises its limit for
    kept memory to twice the size of the block. Therefore this function allocates and frees one block of almost 32 MiB.
    The function has no effect with other C libraries, or if an environment variable such as ``MALLOC_TRIM_THRESHOLD_``
    sets the limit.

    Args:
        device: device of the networks.

    Source: mallopt(3), M_MMAP_THRESHOLD; DEFAULT_MMAP_THRESHOLD_MAX of malloc.c.
    """
    if device.type == "cpu":
        torch.empty(_LARGEST_THRESHOLD, dtype=torch.uint8)
