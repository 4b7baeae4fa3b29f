"""Curves of a metric over gradient steps, with an interval over seeds. Nothing is drawn here."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchrl_bcq.cli.errors import RunError
from torchrl_bcq.cli.logs import Group

Array = NDArray[np.float64]
_CHUNK = 500  # steps that are resampled at once: 2,000 resamples of 5 seeds take 40 MB
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Estimate:
    """How several seeds become one line with a band. Source: intervals over runs, arXiv:2108.13264."""

    statistic: str = "mean"  # or iqm, the mean of the middle half
    confidence: float = 0.95  # of the interval, by the percentile bootstrap
    resamples: int = 2000  # of the bootstrap
    random_state: int = 0  # of the bootstrap: the same runs give the same picture


@dataclass(frozen=True)
class Curve:
    """A metric of the runs of one group; ``N`` runs, ``T`` steps common to all of them."""

    label: str
    metric: str
    steps: NDArray[np.int64]  # [T]
    seeds: Array  # [N, T]
    center: Array  # [T]
    band: Array | None  # [2, T], low and high; None where there is one run
    left_out: int  # steps that not all of the runs have

    @property
    def finite(self) -> Any:
        """Steps at which the value of each run is finite; center and band are nan at the others. ``[T]``."""
        return np.isfinite(self.seeds).all(0)


def make_curve(group: Group, metric: str, estimate: Estimate) -> Curve | None:
    """Read a metric of a group's runs and estimate it over seeds, at the steps common to all; None if no run has it.

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
    center = np.full(len(steps), np.nan)
    center[finite] = _statistic(estimate.statistic)(seeds[:, finite], axis=0)
    band = None
    if len(seeds) > 1:
        band = np.full((2, len(steps)), np.nan)
        band[:, finite] = interval(seeds[:, finite], estimate)
    left_out = len(set().union(*read.values())) - len(steps)
    return Curve(group.label, metric, np.array(steps), seeds, center, band, left_out)


def interval(seeds: Array, estimate: Estimate) -> Array:
    """Percentile bootstrap of the statistic over seeds, whole curves resampled together. ``[N, T] -> [2, T]``."""
    from scipy.stats import bootstrap

    bounds = [
        bootstrap(
            (chunk,),
            _statistic(estimate.statistic),
            n_resamples=estimate.resamples,
            confidence_level=estimate.confidence,
            method="percentile",
            rng=np.random.default_rng(estimate.random_state),  # each chunk draws the same seeds
        ).confidence_interval
        for chunk in np.array_split(seeds, range(_CHUNK, seeds.shape[1], _CHUNK), axis=1)
    ]
    return np.array([np.concatenate([b.low for b in bounds]), np.concatenate([b.high for b in bounds])])


def warn(groups: Sequence[Group], curves: Sequence[Curve]) -> None:
    """Log what the curves of each group do not show."""
    metrics = dict.fromkeys(curve.metric for curve in curves)
    for group in groups:
        own = [curve for curve in curves if curve.label == group.label]
        if cut := [f"{c.left_out} of {c.left_out + len(c.steps)} of {c.metric}" for c in own if c.left_out]:
            _logger.warning("%s: steps that not all of its runs have are left out: %s.", group.label, ", ".join(cut))
        if broken := [f"{(~c.finite).sum()} of {c.metric}" for c in own if not c.finite.all()]:
            _logger.warning("%s: steps that are not finite leave gaps: %s.", group.label, ", ".join(broken))
        for run in group.runs:
            if lacking := [metric for metric in metrics if not run.read(metric)]:
                _logger.warning("%s has no %s; the lines are of the other runs.", run.folder, ", ".join(lacking))


def _statistic(name: str) -> Callable[..., Any]:
    if name == "mean":
        return np.mean
    from scipy.stats import trim_mean

    return lambda values, axis: trim_mean(values, 0.25, axis=axis)
