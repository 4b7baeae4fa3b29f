"""Measuring side by side: in turn within a round, and compared within the same round, as a machine's speed wanders."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

WIDTH, PARTS = 750, 5
WARM_UP = 5  # steps, in which some compile and capture graphs

Run = Callable[[int], None]


class Stopwatch:
    """Seconds a step, of one agent if there are several, the device's work included."""

    def __init__(self, device: str) -> None:
        self._wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None

    def time(self, run: Run, steps: int) -> float:
        self._wait()
        start = time.perf_counter()
        run(steps)
        self._wait()
        return (time.perf_counter() - start) / steps / getattr(run, "agents", 1)

    def time_median(self, run: Run, steps: int) -> float:
        """The same in parts, of which the median counts."""
        return statistics.median(self.time(run, max(1, steps // PARTS)) for _ in range(PARTS))

    def calibrate(self, run: Run, seconds: float) -> int:
        """Warm up, and find how many steps fill so much time, of each agent if there are several; at least one."""
        run(WARM_UP)
        steps = 1
        while (taken := steps * self.time(run, steps)) < seconds / 4:
            steps = max(2 * steps, int(steps * seconds / 4 / taken))
        return max(1, round(steps * seconds / taken))


def measure(
    runs: Mapping[str, Run], matmul: Run, stopwatch: Stopwatch, rounds: int, seconds: float
) -> Iterator[dict[str, list]]:
    """Measure all runs in turn, each second round in reverse.

    Yields:
        After calibration and after each round, by run and for ``"matmul"``: ``steps`` of a round and ``seconds`` a
        step in each round so far.
    """
    everything = {**runs, "matmul": matmul}
    found = {name: {"steps": stopwatch.calibrate(run, seconds), "seconds": []} for name, run in everything.items()}
    yield found
    for number in range(rounds):
        for name in list(everything)[:: -1 if number % 2 else 1]:
            take = stopwatch.time_median if name == "matmul" else stopwatch.time
            found[name]["seconds"].append(take(everything[name], found[name]["steps"]))
        yield found


def median_ratio(theirs: Sequence[float], own: Sequence[float]) -> float:
    """How many times as long they take: the median over rounds of the ratio within a round."""
    return statistics.median(t / o for t, o in zip(theirs, own, strict=True))


def faster(times: Mapping[str, Sequence[float]]) -> str | None:
    """The one of the lowest median."""
    return min(times, key=lambda name: statistics.median(times[name]), default=None)


def make_matmul(rows: int, device: str) -> tuple[Run, int]:
    """A matrix product as the VAE's inner layer has it, ``[rows, 750]`` by ``[750, 750]``, and its FLOP."""
    x, weight = torch.randn(rows, WIDTH, device=device), torch.randn(WIDTH, WIDTH, device=device)

    @torch.no_grad()
    def run(steps: int) -> None:
        for _ in range(steps):
            F.linear(x, weight)

    return run, 2 * rows * WIDTH**2


def count_flops(run: Callable[[], object]) -> int:
    """Floating point operations of the matrix products of a call, its backward passes included."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()
