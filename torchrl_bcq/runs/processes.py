"""The processes of a run: one, or those that ``torchrun`` has started."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from torchrl_bcq.errors import RunError
from torchrl_bcq.trainers import OfflineTrainer
from torchrl_bcq.trainers.distributed import Processes

T = TypeVar("T")
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_PATIENCE = timedelta(days=1)  # while the first process works alone, converting a dataset or evaluating a policy
_SEEDS = 1_000_003  # between the seeds of two processes, so that runs of neighbouring seeds share none


@contextmanager
def joined() -> Iterator[None]:
    """Join the processes that ``torchrun`` has started into a group; each gets a GPU of its own, if there are any."""
    if not dist.is_torchelastic_launched() or int(os.environ["WORLD_SIZE"]) == 1:
        yield
        return
    local = int(os.environ["LOCAL_RANK"])
    if gpus := torch.cuda.device_count():
        torch.cuda.set_device(local % gpus)
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=_PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def several() -> bool:
    """Whether the run has several processes."""
    return dist.is_initialized()


def is_first() -> bool:
    """Whether this is the process that writes, evaluates and logs."""
    return not several() or dist.get_rank() == 0


def from_first(call: Callable[[], T]) -> T:
    """Call a function in the first process, and give its result to all; if it fails, the others raise a PeerError."""
    return Processes(torch.device("cpu") if several() else None).on_first(call)


@contextmanager
def first_goes_first() -> Iterator[None]:
    """Run a block in the first process, then in the others, which use the files that it has written."""
    if not is_first():
        from_first(lambda: None)
    yield
    if is_first():
        from_first(lambda: None)


def own_seed(seed: int) -> int:
    """The seed from which this process draws its rows; the first process uses that of a single one."""
    return seed + _SEEDS * dist.get_rank() if several() else seed


def check_device(name: str) -> None:
    """Check that each process has a device of its own; raises a RunError if not."""
    gpus = torch.cuda.device_count()
    if not several() or not (name.startswith("cuda") or (name == "auto" and gpus)):
        return
    here = int(os.environ["LOCAL_WORLD_SIZE"])
    if ":" in name:
        raise RunError(f"device={name} is one device for {here} processes; device=cuda gives each its own.")
    if here > gpus:
        remedy = "start as many by torchrun --nproc-per-node, or choose device=cpu"
        raise RunError(f"there are {here} processes for {gpus} GPUs; {remedy}.")


@contextmanager
def stoppable(trainer: OfflineTrainer) -> Iterator[None]:
    """Let SIGINT and SIGTERM end the run with a checkpoint; a second signal ends it at once."""

    def stop(number: int, frame: Any) -> None:
        name = signal.Signals(number).name
        for each in previous:
            signal.signal(each, signal.default_int_handler)
        trainer.request_stop(name)
        if is_first():
            when = "these steps" if several() else "this step"
            print(f"\n{name}: saving after {when}; press again to leave at once", file=sys.stderr, flush=True)

    previous = {number: signal.signal(number, stop) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def stopped_by(trainer: OfflineTrainer) -> str | None:
    """The signal that ended the run, in any of its processes; None if none did."""
    return trainer._stop_reason if trainer._stop_reason in [number.name for number in _SIGNALS] else None
