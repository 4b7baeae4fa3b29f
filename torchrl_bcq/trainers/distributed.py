"""Data parallelism with ``torch.distributed``: each process trains a replica of the same networks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class PeerError(RuntimeError):
    """Raised if another process has failed or ended; see the error message of the other process."""


class Processes:
    """Exchanges values in the default process group; all processes must call the same methods in the same order.

    Args:
        device: device of the networks. If nccl is the only backend of the process group, ``device`` must be the current
            CUDA device of the process. None means that this process runs alone and does not communicate.

    Raises:
        ValueError: if a device is given, but there is no process group.
        PeerError: in each method, if another process has ended or does not answer within the group's timeout.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        if device is not None and not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                "data_parallel=True needs a process group: start the script with torchrun --nproc-per-node N, and let "
                "it call torch.distributed.init_process_group() before it makes the trainer."
            )
        self.rank, self.world_size = (0, 1) if device is None else (dist.get_rank(), dist.get_world_size())
        self.is_first = self.rank == 0
        self._device = device

    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace each gradient by its mean over the processes, with one all-reduce for all gradients."""
        if self.world_size == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        sums = self._all_reduce(torch.cat([gradient.flatten() for gradient in gradients]))
        means = (sums / self.world_size).split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [mean.view_as(g) for mean, g in zip(means, gradients, strict=True)])

    def replicate(self, tensors: Iterable[Tensor]) -> None:
        """Copy the values of the tensors from the first process to all processes."""
        for tensor in tensors if self.world_size > 1 else ():
            values = tensor.detach().contiguous()
            with self._peers():
                dist.broadcast(values, src=0)
            tensor.detach().copy_(values)

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of each value over the processes."""
        return self._all_reduce(values.clone()) / self.world_size

    def agree(self, *flags: bool) -> list[bool]:
        """Return one bool for each of the ``flags``: whether this flag is True in any process."""
        if self.world_size == 1:
            return list(flags)
        given = torch.tensor(flags, dtype=torch.int32, device=self._device)
        return [bool(flag) for flag in self._all_reduce(given, op=dist.ReduceOp.MAX).tolist()]

    def gather(self, value: T) -> list[T]:
        """Collect the ``value`` of each process in a list, and return the list in every process."""
        values: list[Any] = [value] * self.world_size
        if self.world_size > 1:
            with self._peers():
                dist.all_gather_object(values, value)
        return values

    def collect(self, value: T) -> list[T]:
        """Return each process's ``value`` in a list in the first process; return an empty list in the others."""
        values: list[Any] = [value] * self.world_size if self.is_first else []
        if self.world_size > 1:
            with self._peers():
                dist.gather_object(value, values or None)
        return values

    def on_first(self, call: Callable[[], T]) -> T:
        """Run the function ``call`` in the first process only, and return its result in every process.

        Raises:
            PeerError: in the other processes, if ``call`` raises an error. The first process raises the original error.
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

    def _all_reduce(self, values: Tensor, **op: Any) -> Tensor:  # adds values by default: gloo cannot compute a mean
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
                f"process {self.rank} of {self.world_size} waited for another process, which has ended or does not "
                f"answer; see the error message of that process ({str(error).partition('. ')[0]})."
            ) from error
