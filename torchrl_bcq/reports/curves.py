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
    """Settings of a statistic over seeds and of its bootstrap interval. Source: arXiv:2108.13264."""

    statistic: str = "mean"  # "mean" of all seeds, or "iqm": mean of the middle half of the seeds
    confidence: float = 0.95  # confidence level of the interval
    resamples: int = 2000  # number of bootstrap resamples

    def __post_init__(self) -> None:
        """Raise a RunError if ``confidence`` or ``resamples`` is out of range."""
        if not 0 < self.confidence < 1:
            raise RunError(f"confidence is {self.confidence}, expected a number between 0 and 1, such as 0.95.")
        if self.resamples < 1:
            raise RunError(f"resamples is {self.resamples}, expected at least 1.")

    def center(self, values: Array, axis: int = 0) -> Array:
        """Compute the mean of the values, or of their middle half, along an axis."""
        from scipy.stats import trim_mean

        return trim_mean(values, 0.25 if self.statistic == "iqm" else 0.0, axis)


@dataclass(frozen=True)
class Curve:
    """A metric of the ``N`` runs of one group at the ``T`` steps that all of these runs logged."""

    label: str
    metric: str
    steps: NDArray[np.int64]  # [T]
    seeds: Array  # [N, T], values of the metric
    center: Array  # [T], statistic over seeds
    band: Array | None  # [2, T], lower and upper bound of the interval; None for a single run
    left_out: int  # number of steps that only some of the runs logged

    @property
    def finite(self) -> Any:
        """Mask ``[T]`` of steps with finite values in all runs. ``center`` and ``band`` are NaN elsewhere."""
        return np.isfinite(self.seeds).all(0)


def make_curve(group: Group, metric: str, estimate: Estimate) -> Curve | None:
    """Read a metric of a group's runs and compute its curve, at the steps that all of these runs logged.

    Returns None if no run logged the metric.

    Raises:
        RunError: if the runs have no step in common, or a file is malformed.
    """
    read = {run.folder: values for run in group.runs if (values := run.read(metric))}
    if not read:
        return None
    steps = sorted(set.intersection(*(set(values) for values in read.values())))
    if not steps:
        spans = "; ".join(f"{folder}: steps {min(v)} to {max(v)}" for folder, v in read.items())
        raise RunError(f"the runs of {group.label} have no step of {metric} in common ({spans}); plot each run alone.")
    seeds = np.array([[values[step] for step in steps] for values in read.values()])  # [N, T]
    finite = np.isfinite(seeds).all(0)
    center, band = np.full(len(steps), np.nan), np.full((2, len(steps)), np.nan)
    center[finite] = estimate.center(seeds[:, finite])
    if len(seeds) > 1:
        band[:, finite] = interval(seeds[:, finite], estimate)
    left_out = len(set().union(*read.values())) - len(steps)
    return Curve(group.label, metric, np.array(steps), seeds, center, band if len(seeds) > 1 else None, left_out)


def interval(seeds: Array, estimate: Estimate) -> Array:
    """Compute the confidence interval of the statistic by the bootstrap.

    Each resample draws ``N`` whole curves, with replacement. ``[N, T] -> [2, T]``.
    """
    from scipy.stats import bootstrap

    found = bootstrap(
        (seeds,),
        estimate.center,
        n_resamples=estimate.resamples,
        confidence_level=estimate.confidence,
        method="percentile",
        batch=50,  # limits the memory use
        rng=np.random.default_rng(0),  # fixed seed: equal runs give equal pictures
    )
    return np.array(found.confidence_interval)


def warn(groups: Sequence[Group], curves: Sequence[Curve]) -> None:
    """Warn about steps that curves leave out or that are not finite, and about runs that lack a metric."""
    for group in groups:
        own = [curve for curve in curves if curve.label == group.label]
        if cut := [f"{c.left_out} of {c.left_out + len(c.steps)} for {c.metric}" for c in own if c.left_out]:
            _logger.warning("%s: steps that only some runs logged are left out: %s.", group.label, ", ".join(cut))
        if broken := [f"{(~c.finite).sum()} for {c.metric}" for c in own if not c.finite.all()]:
            _logger.warning(
                "%s: curves have gaps at steps whose values are not finite: %s.", group.label, ", ".join(broken)
            )
        metrics = dict.fromkeys(c.metric for c in [*curves[:1], *own])  # of the first curve and of the group's own
        for run in group.runs:
            if lacking := [metric for metric in metrics if not run.read(metric)]:
                message = "%s has not logged %s; the curves show the other runs only."
                _logger.warning(message, run.folder, ", ".join(lacking))
