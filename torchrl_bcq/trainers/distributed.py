"""What processes do together that train replicas of the same networks, by torch.distributed."""

from __future__ import annotations

import hashlib
import io
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torchrl.checkpoint import GlobalRNGState
from torchrl.data import ReplayBuffer, SamplerWithoutReplacement

from torchrl_bcq.trainers.checkpoints import SamplerState

T = TypeVar("T")


class PeerError(RuntimeError):
    """Another process has failed, or has ended; its own message says why."""


class DataParallel:
    """The processes of the default process group; each must call the same methods in the same order.

    Args:
        device: of the networks. With nccl alone it must be the process's current CUDA device.

    Raises:
        ValueError: if there is no process group.
        PeerError: in each method, if another process has ended, or does not answer for as long as the group waits.
    """

    def __init__(self, device: torch.device) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                "data_parallel=True needs a process group: start the script by torchrun --nproc-per-node N, and call "
                "torch.distributed.init_process_group() in it before the trainer is made."
            )
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._device = device

    @property
    def is_first(self) -> bool:
        """Whether this is the process that logs and writes."""
        return self.rank == 0

    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Put the mean over processes in place of each gradient, all of them in one message."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        sums = torch.cat([gradient.flatten() for gradient in gradients])
        with self._peers():
            dist.all_reduce(sums)  # gloo has no mean
        means = (sums / self.world_size).split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [mean.view_as(g) for mean, g in zip(means, gradients, strict=True)])

    def replicate(self, tensors: Iterable[Tensor]) -> None:
        """Put the first process's values in place of these."""
        for tensor in tensors:
            values = tensor.detach().contiguous()
            with self._peers():
                dist.broadcast(values, src=0)
            tensor.detach().copy_(values)

    def mean(self, values: Tensor) -> Tensor:
        """The mean over processes of each value."""
        sums = values.clone()
        with self._peers():
            dist.all_reduce(sums)
        return sums / self.world_size

    def agree(self, *flags: bool) -> list[bool]:
        """Of each flag, whether it is set in any process."""
        given = torch.tensor(flags, dtype=torch.int32, device=self._device)
        with self._peers():
            dist.all_reduce(given, dist.ReduceOp.MAX)
        return [bool(flag) for flag in given.tolist()]

    def gather(self, value: T) -> list[T]:
        """The value of each process, for all of them."""
        values: list[Any] = [None] * self.world_size
        with self._peers():
            dist.all_gather_object(values, value)
        return values

    def collect(self, value: T) -> list[T]:
        """The value of each process, for the first one; none for the others."""
        values: list[Any] = [None] * self.world_size if self.is_first else []
        with self._peers():
            dist.gather_object(value, values or None)
        return values

    def on_first(self, call: Callable[[], T]) -> T:
        """Have the first process call something while the others wait, and give its result to all.

        Raises:
            PeerError: in the others, if it fails there; the first one raises what the call raised.
        """
        outcome: list[Any] = [None, None]
        error = None
        if self.is_first:
            try:
                outcome[0] = call()
            except Exception as raised:
                error, outcome[1] = raised, str(raised)
        with self._peers():
            dist.broadcast_object_list(outcome, src=0)
        if error is not None:
            raise error
        if outcome[1] is not None:
            raise PeerError(f"in process 0: {outcome[1]}")
        return outcome[0]

    def check_alike(self, plan: Mapping[str, Any]) -> None:
        """Whether all processes are about to do the same; else they would wait for one another in vain.

        Raises:
            ValueError: naming what differs.
        """
        plans = self.gather(dict(plan))
        for name in plan:
            if any(other[name] != plans[0][name] for other in plans):
                raise ValueError(
                    f"the processes differ in {name}: {[other[name] for other in plans]}; make their trainers alike."
                )

    @contextmanager
    def _peers(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise PeerError(
                f"process {self.rank} of {self.world_size} waited for another one, which has ended or does not answer; "
                f"see its own message ({str(error).partition('. ')[0]})."
            ) from error


class RankStates(GlobalRNGState):
    """What each process needs to go on drawing its own rows and noise, in the first one's checkpoints.

    It stands where a single process has its random state, and holds that of the first process in the same form; so a
    checkpoint is loaded by any number of processes. The other processes' samplers and random states are in ``ranks``.
    Of several GPUs it holds the state of the one that a process uses, so that they may be other ones next time.

    Args:
        parallel: the processes.
        replay_buffer: of this one.
        sampler: the state of that buffer.
        device: on which noise is drawn.
    """

    def __init__(
        self, parallel: DataParallel, replay_buffer: ReplayBuffer, sampler: SamplerState, device: torch.device
    ) -> None:
        self._parallel = parallel
        self._buffer = replay_buffer
        self._sampler = sampler
        self._device = device
        self._others: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """As they were collected."""
        return {**self._own_state(), "ranks": self._others}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take the first process's; :meth:`restore` does the rest, after the sampler's state was loaded, too."""
        self._load_own_state(state_dict)
        self._others = dict(state_dict.get("ranks", {}))

    def collect(self) -> None:
        """Before a checkpoint: tell the first process the states of all."""
        own, content = {"sampler": self._sampler.state_dict(), "random_state": self._own_state()}, io.BytesIO()
        torch.save(own, content)
        states = self._parallel.collect(content.getvalue())
        self._others = {
            str(rank): torch.load(io.BytesIO(state), map_location="cpu", weights_only=True)
            for rank, state in enumerate(states)
            if rank > 0
        }

    def restore(self, step: int) -> None:
        """After a checkpoint was loaded: take this process's own states, or new ones if it held none for it.

        New ones follow from those of the first process, from the rank and the step; :meth:`begin` makes those of noise.
        """
        if self._parallel.is_first:
            return
        if (own := self._others.get(str(self._parallel.rank))) is not None:
            self._sampler.load_state_dict(own["sampler"])
            self._load_own_state(own["random_state"])
            return
        if (generator := self._buffer._rng) is not None:
            generator.manual_seed(self._new_seed(generator.get_state(), step))
        if isinstance(self._buffer.sampler, SamplerWithoutReplacement):
            self._buffer.sampler._empty()  # begins a round of its own

    def begin(self, step: int) -> None:
        """Before training: have no two processes draw the same noise or the same rows.

        Raises:
            ValueError: if two replay buffers would draw the same rows.
        """
        generator = self._buffer._rng
        rows = None if generator is None else _digest(generator.get_state())
        others = self._parallel.gather((rows, _digest(self._noise)))
        seen: dict[str, int] = {}
        for rank, (digest, _) in enumerate(others):
            if digest is not None and seen.setdefault(digest, rank) != rank:
                raise ValueError(
                    f"the replay buffers of processes {seen[digest]} and {rank} would draw the same rows; give each a "
                    "seed of its own: make_replay_buffer(..., seed=seed + rank)."
                )
        noise = [digest for _, digest in others]
        if noise.index(noise[self._parallel.rank]) < self._parallel.rank:
            self._renew_noise(step)

    @property
    def _noise(self) -> Tensor:
        """The state from which latents are drawn."""
        cuda = self._device.type == "cuda"
        return torch.cuda.get_rng_state(self._device) if cuda else torch.random.get_rng_state()

    def _own_state(self) -> dict[str, Any]:
        state = super().state_dict()
        if "torch_cuda" in state:  # of all GPUs
            state["torch_cuda"] = [self._noise] if self._device.type == "cuda" else []
        return state

    def _load_own_state(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict({name: value for name, value in state.items() if name != "torch_cuda"})
        if self._device.type == "cuda" and (saved := state.get("torch_cuda")):
            torch.cuda.set_rng_state(saved[0].cpu(), self._device)

    def _renew_noise(self, step: int) -> None:
        seed = self._new_seed(self._noise, step)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)

    def _new_seed(self, state: Tensor, step: int) -> int:
        return int(_digest(state, self._parallel.rank, step)[:15], 16)


def _digest(state: Tensor, *numbers: int) -> str:
    return hashlib.sha256(state.cpu().numpy().tobytes() + str(numbers).encode()).hexdigest()
