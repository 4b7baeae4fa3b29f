"""Data parallelism: processes that train replicas of the same networks, through torch.distributed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class PeerError(RuntimeError):
    """Another process has failed, or has ended; its own message says why."""


class SingleProcess:
    """A group of one process: it shares nothing and waits for nobody."""

    rank, world_size = 0, 1
    is_first = True

    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace each gradient by the mean over processes."""

    def replicate(self, tensors: Iterable[Tensor]) -> None:
        """Replace values by those of the first process."""

    def mean(self, values: Tensor) -> Tensor:
        """Mean over processes of each value."""
        return values

    def agree(self, *flags: bool) -> list[bool]:
        """Tell for each flag whether any process has set it."""
        return list(flags)

    def gather(self, value: T) -> list[T]:
        """The value of each process, on all of them."""
        return [value]

    def collect(self, value: T) -> list[T]:
        """The value of each process, on the first one; nothing on the others."""
        return [value]

    def on_first(self, call: Callable[[], T]) -> T:
        """Call a function in the first process while the others wait, and give its result to all."""
        return call()

    def check_alike(self, plan: Mapping[str, Any]) -> None:
        """Raise a ValueError if the processes are about to do different things."""

    def check_complete(self, steps_left: int) -> None:
        """Raise a RuntimeError if gradient steps are left for which other processes wait."""

    def name(self, rank: int) -> str:
        """Prefix of a message about a process."""
        return ""


class DataParallel(SingleProcess):
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
        self.is_first = self.rank == 0
        self._device = device

    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace each gradient by the mean over processes, all in one message."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        sums = torch.cat([gradient.flatten() for gradient in gradients])
        with self._peers():
            dist.all_reduce(sums)  # gloo has no mean
        means = (sums / self.world_size).split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [mean.view_as(g) for mean, g in zip(means, gradients, strict=True)])

    def replicate(self, tensors: Iterable[Tensor]) -> None:
        """Replace values by those of the first process."""
        for tensor in tensors:
            values = tensor.detach().contiguous()
            with self._peers():
                dist.broadcast(values, src=0)
            tensor.detach().copy_(values)

    def mean(self, values: Tensor) -> Tensor:
        """Mean over processes of each value."""
        sums = values.clone()
        with self._peers():
            dist.all_reduce(sums)
        return sums / self.world_size

    def agree(self, *flags: bool) -> list[bool]:
        """Tell for each flag whether any process has set it."""
        given = torch.tensor(flags, dtype=torch.int32, device=self._device)
        with self._peers():
            dist.all_reduce(given, dist.ReduceOp.MAX)
        return [bool(flag) for flag in given.tolist()]

    def gather(self, value: T) -> list[T]:
        """The value of each process, on all of them."""
        values: list[Any] = [None] * self.world_size
        with self._peers():
            dist.all_gather_object(values, value)
        return values

    def collect(self, value: T) -> list[T]:
        """The value of each process, on the first one; nothing on the others."""
        values: list[Any] = [None] * self.world_size if self.is_first else []
        with self._peers():
            dist.gather_object(value, values or None)
        return values

    def on_first(self, call: Callable[[], T]) -> T:
        """Call a function in the first process while the others wait, and give its result to all.

        Raises:
            PeerError: in the others, if it fails; the first process raises the error itself.
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
        """Check that all processes are about to do the same; else they would wait for one another forever.

        Raises:
            ValueError: naming what differs.
        """
        plans = self.gather(dict(plan))
        for name in plan:
            if any(other[name] != plans[0][name] for other in plans):
                raise ValueError(
                    f"the processes differ in {name}: {[other[name] for other in plans]}; make their trainers alike."
                )

    def check_complete(self, steps_left: int) -> None:
        """Check that no gradient steps are left for which other processes wait.

        Raises:
            RuntimeError: if there are.
        """
        if steps_left:
            raise RuntimeError(
                f"a hook has ended the log interval {steps_left} gradient steps early, for which other processes wait; "
                "call trainer.request_stop(reason) in it instead."
            )

    def name(self, rank: int) -> str:
        """Prefix of a message about a process."""
        return f"in process {rank}: "

    @contextmanager
    def _peers(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise PeerError(
                f"process {self.rank} of {self.world_size} waited for another one, which has ended or does not answer; "
                f"see its own message ({str(error).partition('. ')[0]})."
            ) from error
