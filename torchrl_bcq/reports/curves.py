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
STATISTICS = {"mean": 0.0, "iqm": 0.25}  # share of the seeds that is cut at each end before the mean is computed
_logger = logging.getLogger(__name__)


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


def make_curve(group: Group, metric: str, statistic: str = "mean") -> Curve | None:
    """Read a metric of a group's runs and compute its curve, at the steps that all of these runs logged.

    ``statistic`` is the one over seeds, of ``STATISTICS``. Returns None if no run logged the metric.

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
    center[finite] = _center(seeds[:, finite], statistic)
    if len(seeds) > 1:
        band[:, finite] = interval(seeds[:, finite], statistic)
    left_out = len(set().union(*read.values())) - len(steps)
    return Curve(group.label, metric, np.array(steps), seeds, center, band if len(seeds) > 1 else None, left_out)


def _center(seeds: Array, statistic: str, axis: int = 0) -> Array:
    from scipy.stats import trim_mean

    return trim_mean(seeds, STATISTICS[statistic], axis)


def interval(seeds: Array, statistic: str = "mean", *, confidence: float = 0.95, resamples: int = 2000) -> Array:
    """Compute the confidence interval of the statistic by the bootstrap.

    Each resample draws ``N`` whole curves, with replacement. ``[N, T] -> [2, T]``. Source: arXiv:2108.13264.
    """
    from scipy.stats import bootstrap

    found = bootstrap(
        (seeds,),
        lambda values, axis: _center(values, statistic, axis),
        n_resamples=resamples,
        confidence_level=confidence,
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
