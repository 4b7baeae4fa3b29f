"""Saves the random states of one or several processes in a checkpoint."""

from __future__ import annotations

import hashlib
import io
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchrl.checkpoint import GlobalRNGState
from torchrl.data import ReplayBuffer, SamplerWithoutReplacement

from torchrl_bcq.trainers.checkpoints import SamplerState
from torchrl_bcq.trainers.distributed import Processes


class RankStates(GlobalRNGState):
    """Saves the random and sampler states of all processes; the first process writes the checkpoint.

    The state of the first process has the format of ``torchrl.checkpoint.GlobalRNGState``, so a run with any number of
    processes can load this state. The entry ``ranks`` holds the sampler states and random states of the other
    processes. Each process saves only the random state of its own GPU (``device``), so a resumed run may use another
    GPU.
    """

    def __init__(
        self, processes: Processes, replay_buffer: ReplayBuffer, sampler: SamplerState, device: torch.device
    ) -> None:
        self._processes = processes
        self._buffer = replay_buffer
        self._sampler = sampler
        self._device = device
        self._others: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return this process's random state and, in ``ranks``, the states that ``collect`` has received."""
        return {**self._own_state(), "ranks": self._others}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load the first process's random state. The caller must then load the sampler and call ``restore``."""
        self._load_own_state(state_dict)
        self._others = dict(state_dict.get("ranks", {}))

    def collect(self) -> None:
        """Send the states of all processes to the first process; call this before a checkpoint is written."""
        content = io.BytesIO()
        if not self._processes.is_first:
            torch.save({"sampler": self._sampler.state_dict(), "random_state": self._own_state()}, content)
        states = self._processes.collect(content.getvalue())
        self._others = {
            str(rank): torch.load(io.BytesIO(state), map_location="cpu", weights_only=True)
            for rank, state in enumerate(states)
            if rank > 0
        }

    def restore(self, step: int) -> None:
        """Restore this process's states from the loaded checkpoint, or make new states if it has none.

        For new states, this method computes the seed for drawing rows from the first process's random state, the rank
        and the step. The method ``begin`` makes the new random state for sampling latents.
        """
        if self._processes.is_first:
            return
        if (own := self._others.get(str(self._processes.rank))) is not None:
            self._sampler.load_state_dict(own["sampler"])
            self._load_own_state(own["random_state"])
            return
        if (generator := self._buffer._rng) is not None:
            generator.manual_seed(self._new_seed(generator.get_state(), step))
        if isinstance(self._buffer.sampler, SamplerWithoutReplacement):
            self._buffer.sampler._empty()  # start a new epoch, shuffled with the new seed

    def begin(self, step: int) -> None:
        """Give each process other random latents; raise a ValueError if two replay buffers have the same seed."""
        generator = self._buffer._rng
        rows = None if generator is None else _digest(generator.get_state())
        others = self._processes.gather((rows, _digest(self._noise)))
        seen: dict[str, int] = {}
        for rank, (digest, _) in enumerate(others):
            if digest is not None and seen.setdefault(digest, rank) != rank:
                raise ValueError(
                    f"the replay buffers of processes {seen[digest]} and {rank} would draw the same rows; give each "
                    "buffer a different seed: make_replay_buffer(..., seed=seed + rank)."
                )
        noise = [digest for _, digest in others]
        if noise.index(noise[self._processes.rank]) < self._processes.rank:
            self._renew_noise(step)

    @property
    def _noise(self) -> Tensor:
        """State of the PyTorch random generator from which this process draws latents."""
        cuda = self._device.type == "cuda"
        return torch.cuda.get_rng_state(self._device) if cuda else torch.random.get_rng_state()

    def _own_state(self) -> dict[str, Any]:
        state = self._without_other_devices(super().state_dict())
        if "torch_cuda" in state:  # TorchRL saves all GPUs' states; keep only that of this process's GPU
            state["torch_cuda"] = [self._noise] if self._device.type == "cuda" else []
        return state

    def _load_own_state(self, state: Mapping[str, Any]) -> None:
        own = self._without_other_devices(state)
        super().load_state_dict({name: value for name, value in own.items() if name != "torch_cuda"})
        if self._device.type == "cuda" and (saved := state.get("torch_cuda")):
            torch.cuda.set_rng_state(saved[0].cpu(), self._device)

    def _without_other_devices(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Leave out the states of devices that the run does not use and that the machine of a resume may lack."""
        others = {"torch_mps", "torch_xpu"} - {f"torch_{self._device.type}"}
        return {name: value for name, value in state.items() if name not in others}

    def _renew_noise(self, step: int) -> None:
        seed = self._new_seed(self._noise, step)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)

    def _new_seed(self, state: Tensor, step: int) -> int:
        return int(_digest(state, self._processes.rank, step)[:15], 16)


def _digest(state: Tensor, *numbers: int) -> str:
    return hashlib.sha256(state.cpu().numpy().tobytes() + str(numbers).encode()).hexdigest()
