"""Data parallelism: processes that train replicas of the same networks, through torch.distributed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class PeerError(RuntimeError):
    """Another process has failed, or has ended; its own message says why."""


class Processes:
    """This process alone, or those of the default process group, which call the same methods in the same order.

    Args:
        device: of the networks of a group. With nccl alone it must be the process's current CUDA device. None stands
            for this process alone, which shares nothing and waits for nobody.

    Raises:
        ValueError: if there is a device, but no process group.
        PeerError: in each method, if another process has ended, or does not answer for as long as the group waits.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        if device is not None and not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                "data_parallel=True needs a process group: start the script by torchrun --nproc-per-node N, and call "
                "torch.distributed.init_process_group() in it before the trainer is made."
            )
        self.rank, self.world_size = (0, 1) if device is None else (dist.get_rank(), dist.get_world_size())
        self.is_first = self.rank == 0
        self._device = device

    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace each gradient by the mean over processes, all in one message."""
        if self.world_size == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        sums = self._all_reduce(torch.cat([gradient.flatten() for gradient in gradients]))
        means = (sums / self.world_size).split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [mean.view_as(g) for mean, g in zip(means, gradients, strict=True)])

    def replicate(self, tensors: Iterable[Tensor]) -> None:
        """Replace values by those of the first process."""
        for tensor in tensors if self.world_size > 1 else ():
            values = tensor.detach().contiguous()
            with self._peers():
                dist.broadcast(values, src=0)
            tensor.detach().copy_(values)

    def mean(self, values: Tensor) -> Tensor:
        """Mean over processes of each value."""
        return self._all_reduce(values.clone()) / self.world_size

    def agree(self, *flags: bool) -> list[bool]:
        """Tell for each flag whether any process has set it."""
        if self.world_size == 1:
            return list(flags)
        given = torch.tensor(flags, dtype=torch.int32, device=self._device)
        return [bool(flag) for flag in self._all_reduce(given, op=dist.ReduceOp.MAX).tolist()]

    def gather(self, value: T) -> list[T]:
        """The value of each process, on all of them."""
        values: list[Any] = [value] * self.world_size
        if self.world_size > 1:
            with self._peers():
                dist.all_gather_object(values, value)
        return values

    def collect(self, value: T) -> list[T]:
        """The value of each process, on the first one; nothing on the others."""
        values: list[Any] = [value] * self.world_size if self.is_first else []
        if self.world_size > 1:
            with self._peers():
                dist.gather_object(value, values or None)
        return values

    def on_first(self, call: Callable[[], T]) -> T:
        """Call a function in the first process while the others wait, and give its result to all.

        Raises:
            PeerError: in the others, if it fails; the first process raises the error itself.
        """
        if self.world_size == 1:
            return call()
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

    def _all_reduce(self, values: Tensor, **op: Any) -> Tensor:  # the sum by default; gloo has no mean
        if self.world_size > 1:
            with self._peers():
                dist.all_reduce(values, **op)
        return values

    @contextmanager
    def _peers(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise PeerError(
                f"process {self.rank} of {self.world_size} waited for another one, which has ended or does not answer; "
                f"see its own message ({str(error).partition('. ')[0]})."
            ) from error
