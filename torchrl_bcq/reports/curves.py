"""Curves of a metric over gradient steps, with a confidence interval over seeds."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchrl_bcq.errors import RunError
from torchrl_bcq.reports.logs import Group

Array = NDArray[np.float64]
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Estimate:
    """Statistic over seeds and its bootstrapped interval. Source: arXiv:2108.13264."""

    statistic: str = "mean"  # or "iqm", the mean of the middle half
    confidence: float = 0.95  # of the percentile interval
    resamples: int = 2000

    def __post_init__(self) -> None:
        """Check the numbers. Raises RunError."""
        if not 0 < self.confidence < 1:
            raise RunError(f"confidence is {self.confidence}, expected a number between 0 and 1, such as 0.95.")
        if self.resamples < 1:
            raise RunError(f"resamples is {self.resamples}, expected at least 1.")

    def center(self, values: Array, axis: int = 0) -> Array:
        """The statistic over an axis."""
        from scipy.stats import trim_mean

        return trim_mean(values, 0.25 if self.statistic == "iqm" else 0.0, axis)


@dataclass(frozen=True)
class Curve:
    """A metric of the ``N`` runs of one group at the ``T`` steps that all of them logged."""

    label: str
    metric: str
    steps: NDArray[np.int64]  # [T]
    seeds: Array  # [N, T]
    center: Array  # [T]
    band: Array | None  # [2, T], low and high; None for a single run
    left_out: int  # number of steps that only some of the runs logged

    @property
    def finite(self) -> Any:
        """Steps at which every run has a finite value; center and band are nan at the others. ``[T]``."""
        return np.isfinite(self.seeds).all(0)


def make_curve(group: Group, metric: str, estimate: Estimate) -> Curve | None:
    """Read a metric of a group's runs and estimate it over seeds, at the steps that all logged; None if no run has it.

    Raises:
        RunError: if the runs have no step in common, or a file is malformed.
    """
    read = {run.folder: values for run in group.runs if (values := run.read(metric))}
    if not read:
        return None
    steps = sorted(set.intersection(*(set(values) for values in read.values())))
    if not steps:
        spans = "; ".join(f"{folder}: {len(v)} from {min(v)} to {max(v)}" for folder, v in read.items())
        raise RunError(f"the runs of {group.label} have no step of {metric} in common ({spans}); plot each by itself.")
    seeds = np.array([[values[step] for step in steps] for values in read.values()])  # [N, T]
    finite = np.isfinite(seeds).all(0)
    center, band = np.full(len(steps), np.nan), np.full((2, len(steps)), np.nan)
    center[finite] = estimate.center(seeds[:, finite])
    if len(seeds) > 1:
        band[:, finite] = interval(seeds[:, finite], estimate)
    left_out = len(set().union(*read.values())) - len(steps)
    return Curve(group.label, metric, np.array(steps), seeds, center, band if len(seeds) > 1 else None, left_out)


def interval(seeds: Array, estimate: Estimate) -> Array:
    """Percentile bootstrap of the statistic over seeds; resamples whole curves. ``[N, T] -> [2, T]``."""
    from scipy.stats import bootstrap

    found = bootstrap(
        (seeds,),
        estimate.center,
        n_resamples=estimate.resamples,
        confidence_level=estimate.confidence,
        method="percentile",
        batch=50,  # bounds the memory
        rng=np.random.default_rng(0),  # the same runs give the same picture
    )
    return np.array(found.confidence_interval)


def warn(groups: Sequence[Group], curves: Sequence[Curve]) -> None:
    """Log a warning for steps and runs that the curves leave out; every run should have the metric of the first."""
    for group in groups:
        own = [curve for curve in curves if curve.label == group.label]
        if cut := [f"{c.left_out} of {c.left_out + len(c.steps)} of {c.metric}" for c in own if c.left_out]:
            _logger.warning("%s: steps that not all of its runs have are left out: %s.", group.label, ", ".join(cut))
        if broken := [f"{(~c.finite).sum()} of {c.metric}" for c in own if not c.finite.all()]:
            _logger.warning("%s: steps that are not finite leave gaps: %s.", group.label, ", ".join(broken))
        metrics = dict.fromkeys(c.metric for c in [*curves[:1], *own])  # groups may log different metrics
        for run in group.runs:
            if lacking := [metric for metric in metrics if not run.read(metric)]:
                _logger.warning("%s has no %s; the lines are of the other runs.", run.folder, ", ".join(lacking))
