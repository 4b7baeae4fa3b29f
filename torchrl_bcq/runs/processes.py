"""The processes of a run: a single process, or all processes that ``torchrun`` has started."""

from __future__ import annotations

import os
import signal
import sys
import time
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
_REPETITION = 2.0  # seconds
_PATIENCE = timedelta(days=1)  # long timeout: the first process may convert a dataset or evaluate while the others wait
# difference between the seeds of two processes: large, so that two runs have no seed in common
_SEEDS = 1_000_003


@contextmanager
def joined() -> Iterator[None]:
    """Run a block. If ``torchrun`` started several processes, they form a process group in the block."""
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


def program() -> str:
    """Return the words that start ``torchrl-bcq`` with as many processes as this run has on this machine."""
    if not several():
        return "torchrl-bcq"
    return f"torchrun --nproc-per-node {os.environ.get('LOCAL_WORLD_SIZE', dist.get_world_size())} -m torchrl_bcq"


def is_first() -> bool:
    """Whether this is the first process, the only one that writes, evaluates and logs."""
    return not several() or dist.get_rank() == 0


def from_first(call: Callable[[], T]) -> T:
    """Run ``call`` in the first process only, and return the result of ``call`` in all processes."""
    return Processes(torch.device("cpu") if several() else None).on_first(call)


@contextmanager
def first_goes_first() -> Iterator[None]:
    """Run a block in the first process. When it has ended, run the block in the other processes."""
    if not is_first():
        from_first(lambda: None)
    yield
    if is_first():
        from_first(lambda: None)


def own_seed(seed: int) -> int:
    """Return the seed for drawing rows in this process; the first process uses ``seed`` unchanged."""
    return seed + _SEEDS * dist.get_rank() if several() else seed


def check_device(name: str) -> None:
    """Raise a RunError if several processes would have to share a GPU."""
    gpus = torch.cuda.device_count()
    if not several() or not (name.startswith("cuda") or (name == "auto" and gpus)):
        return
    here = int(os.environ["LOCAL_WORLD_SIZE"])
    if ":" in name:
        raise RunError(f"device={name} is one GPU for {here} processes; with device=cuda, each process has its own.")
    if here > gpus:
        remedy = "start one process for each GPU (torchrun --nproc-per-node), or choose device=cpu"
        raise RunError(f"there are {here} processes, but the number of GPUs is {gpus}; {remedy}.")


@contextmanager
def stoppable(trainer: OfflineTrainer) -> Iterator[None]:
    """Run a block. A SIGINT or SIGTERM saves a checkpoint and stops training; a second signal exits at once.

    If there are several processes, a repetition within two seconds is no second signal: a terminal or a cluster sends a
    signal to all processes, and torchrun then sends it to its workers once more.
    """
    first: list[float] = []  # time of the first signal

    def stop(number: int, frame: Any) -> None:
        name = signal.Signals(number).name
        if first and not (several() and time.monotonic() - first[0] < _REPETITION):
            signal.default_int_handler(number, frame)
        if first:
            return
        first.append(time.monotonic())
        trainer.request_stop(name)
        if is_first():
            when = "log interval" if several() else "gradient step or measurement"
            message = f"{name}: the run stops after this {when} and saves a checkpoint; a second signal ends it at once"
            print(f"\n{message}", file=sys.stderr, flush=True)

    previous = {number: signal.signal(number, stop) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def stopped_by(trainer: OfflineTrainer) -> str | None:
    """Return the name of the signal that stopped any process of the run; None if no signal stopped it."""
    return trainer._stop_reason if trainer._stop_reason in [number.name for number in _SIGNALS] else None
