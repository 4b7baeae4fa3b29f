"""Chooses the number of CPU threads of a run: times gradient steps with one thread and with PyTorch's default."""

from __future__ import annotations

import copy
import logging
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torchrl
from tensordict import TensorDictBase

from torchrl_bcq.evaluation.rollouts import own_random_state
from torchrl_bcq.objectives import OfflineLoss

_ROUNDS, _SECONDS = 20, 1.0  # a measurement ends after this number of rounds, or after this time and three rounds
_GAIN = 0.9  # several threads must need less than this fraction of the time of one thread
_logger = logging.getLogger(__name__)


def use_threads(threads: int) -> None:
    """Set PyTorch's number of threads, and the number that TorchRL sets when vectorised environments are closed."""
    torch.set_num_threads(threads)
    torchrl._THREAD_POOL_INIT = threads


def choose_threads(loss: OfflineLoss, batch: TensorDictBase) -> int:
    """Return 1 or PyTorch's number of threads, whichever makes a forward and backward pass of ``loss`` faster.

    PyTorch's number is reduced to the CPUs that the process may use. The passes use a copy of the loss. Weights, random
    states and PyTorch's number of threads do not change. With a GPU, nothing is timed.

    Args:
        loss: loss of the run.
        batch: transitions ``[B]`` with the batch size of the run.
    """
    before = torch.get_num_threads()
    several = min(before, usable_cpus())
    if several == 1 or next(loss.parameters()).device.type != "cpu":
        return several
    loss, seconds, rounds = copy.deepcopy(loss), {1: 0.0, several: 0.0}, 0
    batch = batch.clone().set(loss.tensor_keys.priority_weight, torch.ones(len(batch)))
    try:
        with own_random_state(0, torch.device("cpu")):
            while rounds <= 3 or (rounds <= _ROUNDS and sum(seconds.values()) < _SECONDS):
                for threads in seconds:
                    torch.set_num_threads(threads)
                    seconds[threads] += _time_step(loss, batch) * (rounds > 0)  # the first round is a warm-up
                rounds += 1
    finally:
        torch.set_num_threads(before)
    chosen = several if seconds[several] < _GAIN * seconds[1] else 1
    times = (1e3 * total / (rounds - 1) for total in seconds.values())
    message = "threads: %d; the passes of a gradient step took %.3g ms with 1 thread and %.3g ms with %d threads"
    _logger.info(message, chosen, *times, several)
    return chosen


def _time_step(loss: OfflineLoss, batch: TensorDictBase) -> float:
    """Return the seconds that the forward and backward passes of a gradient step take."""
    start = time.perf_counter()
    losses = loss(batch.copy())
    torch.stack([value.sum() for name, value in losses.items() if name.startswith("loss_")]).sum().backward()
    loss.zero_grad()
    return time.perf_counter() - start


def usable_cpus() -> int:
    """Return the number of CPUs that this process may use: its affinity and the CPU quotas of its cgroups count."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([cpus, *(max(1, math.ceil(quota)) for quota in _quotas())])


def _quotas(mounts: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Iterator[float]:
    """Yield the CPU quotas, in CPUs, of the process's cgroups and of their parents; versions 1 and 2 of Linux."""
    for line in own.read_text().splitlines() if own.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = mounts / "cpu" if controllers else mounts
        group = mount / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(mount):
                break
            try:
                if controllers:
                    quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
                else:
                    quota, period = (folder / "cpu.max").read_text().split()
                if quota.strip() not in ("max", "-1"):  # no limit
                    yield int(quota) / int(period)
            except (OSError, ValueError):  # the group is not visible in this container, or has no such file
                continue
