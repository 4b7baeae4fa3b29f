"""Memory of a CPU that networks use again in the next step."""

from __future__ import annotations

import torch

_LARGEST_ADAPTED = 2**25 - 2**14  # bytes, less what an allocation adds to it


def keep_freed_memory(device: torch.device) -> None:
    """Have the C library keep memory that is freed, up to 64 MiB, for what is allocated next; only for a CPU.

    Else activations are given back to the system after each step, which clears their pages again for the next one: a
    tenth of the time of a gradient step, a fifth of acting in many states. glibc adapts to the largest block that was
    freed yet, of at most 32 MiB; here is one. Where its limits are set from outside (``MALLOC_TRIM_THRESHOLD_`` ...)
    they stay as they are, as do those of other libraries and systems.

    Args:
        device: of the networks.

    Source: mallopt(3), M_MMAP_THRESHOLD; DEFAULT_MMAP_THRESHOLD_MAX of malloc.c.
    """
    if device.type == "cpu":
        torch.empty(_LARGEST_ADAPTED, dtype=torch.uint8)
