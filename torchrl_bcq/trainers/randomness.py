"""PyTorch's global random state, which agents in one process must not share."""

from __future__ import annotations

import torch


class RandomState:
    """The state of PyTorch's global generators, as it is when this is made.

    Args:
        device: whose generator counts, beside the CPU's.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        """Set the generators back to it."""
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)
