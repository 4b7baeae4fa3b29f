"""Paired measurements: contenders run in turn, and are compared within a round, since a machine's speed drifts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

WARM_UP = 5  # steps, in which contenders compile and capture graphs

Run = Callable[[int], None]


class Stopwatch:
    """Measures the seconds that a step of a run takes, including the work of the device.

    Args:
        run: makes the number of steps that it is given.
        device: whose work it waits for.
        parts: of a measurement; their median counts.
    """

    def __init__(self, run: Run, device: str, parts: int = 1) -> None:
        self.run, self.parts = run, parts
        self._wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None

    def calibrate(self, seconds: float) -> int:
        """Warm up, and return the number of steps that take about this time; at least one."""
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
        return (time.perf_counter() - start) / steps


def measure(contenders: Mapping[str, Stopwatch], rounds: int, seconds: float) -> Iterator[dict[str, dict[str, Any]]]:
    """Measure all contenders in turn, in reverse order in every second round.

    Args:
        contenders: stopwatches, in this process or another.
        rounds: number of measurements of each.
        seconds: that a measurement takes, about.

    Yields:
        After calibration and after each round, by name: ``steps`` of a measurement, and ``seconds`` per step in each
        round so far.
    """
    found = {name: {"steps": one.calibrate(seconds), "seconds": []} for name, one in contenders.items()}
    yield found
    for number in range(rounds):
        for name in list(contenders)[:: -1 if number % 2 else 1]:
            found[name]["seconds"].append(contenders[name].time(found[name]["steps"]))
        yield found


def median_ratio(theirs: Sequence[float], own: Sequence[float]) -> float:
    """The median over rounds of their time divided by the own time in the same round."""
    return statistics.median(t / o for t, o in zip(theirs, own, strict=True))


def faster(times: Mapping[str, Sequence[float]]) -> str | None:
    """The name with the lowest median time; None if there is none."""
    return min(times, key=lambda name: statistics.median(times[name]), default=None)


def make_matmul(rows: int, inputs: int, outputs: int, device: str) -> Run:
    """The matrix product of a linear layer."""
    x, weight = torch.randn(rows, inputs, device=device), torch.randn(outputs, inputs, device=device)

    @torch.no_grad()
    def run(steps: int) -> None:
        for _ in range(steps):
            F.linear(x, weight)

    return run


def count_flops(run: Callable[[], object]) -> int:
    """Floating point operations of the matrix products of a call, including backward passes."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()
