"""Measuring side by side: in turn within a round, and compared within the same round, as a machine's speed wanders."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

WIDTH = 750
WARM_UP = 5  # steps, in which some compile and capture graphs

Run = Callable[[int], None]


class Stopwatch:
    """Seconds a step of a run, of one agent if there are several, the device's work included.

    Args:
        run: makes so many steps.
        device: that it waits for.
        parts: of a turn, of which the median counts.
    """

    def __init__(self, run: Run, device: str, parts: int = 1) -> None:
        self.run, self.parts = run, parts
        self._wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None

    def calibrate(self, seconds: float) -> int:
        """Warm up, and find how many steps fill so much time, of each agent if there are several; at least one."""
        self.run(WARM_UP)
        steps = 1
        while (taken := steps * self.time(steps)) < seconds / 4:
            steps = max(2 * steps, int(steps * seconds / 4 / taken))
        return max(1, round(steps * seconds / taken))

    def time(self, steps: int) -> float:
        return statistics.median(self._time(max(1, steps // self.parts)) for _ in range(self.parts))

    def _time(self, steps: int) -> float:
        self._wait()
        start = time.perf_counter()
        self.run(steps)
        self._wait()
        return (time.perf_counter() - start) / steps / getattr(self.run, "agents", 1)


def measure(contenders: Mapping[str, Stopwatch], rounds: int, seconds: float) -> Iterator[dict[str, dict[str, Any]]]:
    """Measure all in turn, each second round in reverse.

    Args:
        contenders: stopwatches, or what stands for one in another process.
        rounds: turns of each.
        seconds: that a turn lasts, about.

    Yields:
        After calibration and after each round, by name: ``steps`` of a turn, ``seconds`` a step in each round so far.
    """
    found = {name: {"steps": one.calibrate(seconds), "seconds": []} for name, one in contenders.items()}
    yield found
    for number in range(rounds):
        for name in list(contenders)[:: -1 if number % 2 else 1]:
            found[name]["seconds"].append(contenders[name].time(found[name]["steps"]))
        yield found


def median_ratio(theirs: Sequence[float], own: Sequence[float]) -> float:
    """How many times as long they take: the median over rounds of the ratio within a round."""
    return statistics.median(t / o for t, o in zip(theirs, own, strict=True))


def faster(times: Mapping[str, Sequence[float]]) -> str | None:
    """The one of the lowest median."""
    return min(times, key=lambda name: statistics.median(times[name]), default=None)


def make_matmul(rows: int, device: str) -> Run:
    """A matrix product as the VAE's inner layer has it, ``[rows, 750]`` by ``[750, 750]``."""
    x, weight = torch.randn(rows, WIDTH, device=device), torch.randn(WIDTH, WIDTH, device=device)

    @torch.no_grad()
    def run(steps: int) -> None:
        for _ in range(steps):
            F.linear(x, weight)

    return run


def count_flops(run: Callable[[], object]) -> int:
    """Floating point operations of the matrix products of a call, its backward passes included."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()
