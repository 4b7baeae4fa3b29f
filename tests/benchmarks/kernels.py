"""Measures for which part of a gradient step CUDA kernels run; for the rest the GPU waits for the CPU."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

STEPS = 5


def busy_time(intervals: Iterable[tuple[float, float]]) -> float:
    """Time in which at least one kernel runs, from the ``(start, duration)`` of each kernel."""
    busy, reached = 0.0, float("-inf")
    for start, duration in sorted(intervals):
        end = start + duration
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return busy


def kernel_intervals(trace: Mapping[str, Any]) -> list[tuple[float, float]]:
    """The ``(start, duration)`` of each kernel in a trace of torch.profiler, in seconds."""
    return [(e["ts"] * 1e-6, e["dur"] * 1e-6) for e in trace["traceEvents"] if e.get("cat") == "kernel"]


def profile_kernels(update: Callable[[int], None], step_seconds: float) -> dict[str, float]:
    """Profile a few steps; ``busy`` is the fraction of the time in which a kernel runs.

    Args:
        update: makes gradient steps; already warmed up.
        step_seconds: time of a step without the profiler, which slows the CPU but not the kernels.
    """
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        update(STEPS)
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        intervals = kernel_intervals(json.loads(path.read_text()))
    kernel_seconds = busy_time(intervals) / STEPS
    return {
        "kernels_per_step": len(intervals) / STEPS,
        "kernel_seconds": kernel_seconds,
        "busy": kernel_seconds / step_seconds,
    }
