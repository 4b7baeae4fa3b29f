"""The processes of a run: this one, or as many as ``torchrun`` has started."""

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

from torchrl_bcq.cli.errors import RunError
from torchrl_bcq.trainers import BCQTrainer
from torchrl_bcq.trainers.distributed import DataParallel

T = TypeVar("T")
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_PATIENCE = timedelta(days=1)  # for what the first one does alone: a dataset is converted, a policy evaluated
_SEEDS = 1_000_003  # from one process's seed to the next one's, so that runs of neighbouring seeds share none


@contextmanager
def joined() -> Iterator[None]:
    """Let processes that ``torchrun`` has started know one another; each gets a GPU of its own, if there are."""
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
    """Whether others make the run with this one."""
    return dist.is_initialized()


def is_first() -> bool:
    """Whether this is the process that reads the clock, writes, evaluates and speaks."""
    return not several() or dist.get_rank() == 0


def from_first(call: Callable[[], T]) -> T:
    """Have the first process call something, while the others wait for what it gives.

    Raises:
        PeerError: in the others, if it fails there.
    """
    return DataParallel(torch.device("cpu")).on_first(call) if several() else call()


@contextmanager
def first_goes_first() -> Iterator[None]:
    """Have the others begin when the first process is done, with what it has recorded, converted or downloaded."""
    if not is_first():
        from_first(lambda: None)
    yield
    if is_first():
        from_first(lambda: None)


def own_seed(seed: int) -> int:
    """What this process draws its rows with; the first one's is that of a single process."""
    return seed + _SEEDS * dist.get_rank() if several() else seed


def check_device(name: str) -> None:
    """Whether each process has a device of its own.

    Raises:
        RunError: if not.
    """
    gpus = torch.cuda.device_count()
    if not several() or not (name.startswith("cuda") or (name == "auto" and gpus)):
        return
    here = int(os.environ["LOCAL_WORLD_SIZE"])
    if ":" in name:
        raise RunError(f"device={name} is one device for {here} processes; device=cuda gives each its own.")
    if here > gpus:
        raise RunError(
            f"there are {here} processes for {gpus} GPUs; start as many by torchrun --nproc-per-node, or "
            "choose device=cpu."
        )


@contextmanager
def stoppable(*trainers: BCQTrainer) -> Iterator[None]:
    """Let SIGINT and SIGTERM end the runs with checkpoints, the second one at once."""

    def stop(number: int, frame: Any) -> None:
        name = signal.Signals(number).name
        for each in previous:
            signal.signal(each, signal.default_int_handler)
        for trainer in trainers:
            trainer.request_stop(name)
        if is_first():
            when = "these steps" if several() else "this step"
            print(f"\n{name}: saving after {when}; once more to leave at once", file=sys.stderr, flush=True)

    previous = {number: signal.signal(number, stop) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def stopped_by(trainer: BCQTrainer) -> str | None:
    """The signal that has ended the run, in whichever process it came; None if it ended of itself."""
    return trainer._stop_reason if trainer._stop_reason in [number.name for number in _SIGNALS] else None
