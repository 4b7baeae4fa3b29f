"""The estimate of a policy's value, its bootstrap interval, and the verdict."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

_CONFIDENCE, _RESAMPLES = 0.95, 1000
_BATCH = 2**22  # number of drawn episodes that are held in memory at a time
_MOST_FAR = 0.3  # largest share of far actions with which a verdict is given
_FEWEST = 10  # smallest effective sample size with which a verdict is given
_SLACK = 0.1  # values may lie outside of the range that the rewards allow by this part of the range


@dataclass(frozen=True)
class Estimate:
    """Estimated value of a policy: its expected discounted return from the initial states of held-out episodes.

    Args:
        value: the estimate.
        interval: bootstrap interval over episodes or groups. That of fitted Q evaluation covers the intervals of all
            critics.
        difference: for fitted Q evaluation, ``value`` minus the estimated value of the recorded behaviour. For other
            estimators, ``value`` minus the mean discounted return of the held-out episodes; for doubly robust
            estimators, critics add the rewards after an episode was cut off to these returns. None for the recorded
            behaviour itself.
        difference_interval: bootstrap interval of the difference, over the same episodes.
        critics: the estimate of each critic of fitted Q evaluation.
        limits: smallest and largest value that the rewards of the dataset allow.
        residual: mean TD error of the critics on held-out rows, times the mean discounted length of the episodes. This
            is the error of the value if each step has this mean TD error. It is far from 0 if training was too short.
        behaviour_residual: residual of the critics of the recorded behaviour.
        far: share of the policy's actions that are far from the recorded ones; see ``Support``. None for frames.
        effective_sample_size: that of ``ImportanceSampling``; None for continuous actions.
        others: for discrete actions, all estimates of ``ImportanceSampling``, each ``(value, low, high)``.
        uses_critics, uses_weights: whether ``value`` depends on critics, and on importance weights.
    """

    value: float
    interval: tuple[float, float]
    critics: tuple[float, ...]
    limits: tuple[float, float]
    residual: float
    difference: float | None = None
    difference_interval: tuple[float, float] | None = None
    far: float | None = None
    effective_sample_size: float | None = None
    others: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)
    behaviour_residual: float = 0.0
    uses_critics: bool = True
    uses_weights: bool = False

    @property
    def objections(self) -> list[str]:
        """Reasons not to use the estimate: the rewards do not allow it, or many actions are far from the data."""
        found, (low, high) = [], self.limits
        slack = _SLACK * (high - low)
        allowed = f"the rewards of the dataset allow only values from {low:.4g} to {high:.4g}"
        outside = [value for value in self.critics if not low - slack <= value <= high + slack]  # also NaN
        if self.uses_critics and outside:
            found.append(f"the critics diverge: the estimate of one critic is {outside[0]:.4g}, but {allowed}")
        elif not low - slack <= self.value <= high + slack:
            found.append(f"the estimate is {self.value:.4g}, but {allowed}")
        if self.far is not None and self.far > _MOST_FAR:
            found.append(f"{self.far:.0%} of the policy's actions are far from the recorded actions")
        return found

    @property
    def doubts(self) -> list[str]:
        """Reasons why it is unknown whether the policy is better than the recorded behaviour."""
        found = self.objections
        residual = np.abs([self.residual, self.behaviour_residual]).max()  # NaN if one of them is NaN
        if self.uses_critics and self.difference is not None and not residual < abs(self.difference):
            found.append(
                f"the critics do not fit held-out rows well enough: their mean TD error corresponds to an error of "
                f"{residual:.4g} in the value, which is not below the difference, {abs(self.difference):.4g}"
            )
        if self.uses_weights and self.effective_sample_size is not None and not self.effective_sample_size >= _FEWEST:
            size = f"{self.effective_sample_size:.1f} episodes, but a verdict needs at least {_FEWEST}"
            found.append(f"the effective sample size is {size}")
        if self.difference_interval is not None and not (
            self.difference_interval[0] > 0 or self.difference_interval[1] < 0
        ):
            low, high = self.difference_interval
            found.append(f"the interval of the difference, {low:+.4g} to {high:+.4g}, includes 0")
        return found

    @property
    def verdict(self) -> str:
        """Whether the policy is estimated better or worse than the recorded behaviour, or why this is unknown."""
        if self.difference is None or self.difference_interval is None:
            return "the recorded behaviour"
        if self.doubts:
            return f"cannot tell: {'; '.join(self.doubts)}"
        low, high = self.difference_interval
        kind = "better" if self.difference > 0 else "worse"
        interval = f"interval {low:+.4g} to {high:+.4g}, which does not cover the bias of the estimate"
        return f"estimated {kind}: difference {self.difference:+.4g}, {interval}"


def bootstrap_interval(
    statistic: Callable[[np.ndarray], np.ndarray], episodes: int, groups: np.ndarray | None = None, *, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Return the lower and upper ends of the 95 % percentile intervals of statistics of drawn episodes.

    Args:
        statistic: function from the numbers of the drawn episodes to one or more statistics.
        episodes: number of episodes. With fewer than two episodes or groups, the intervals are infinite.
        groups: group of each episode, ``[E]``. If given, groups are drawn, each with all of its episodes.
        seed: seed of the draws.
    """
    from scipy.stats import bootstrap

    members = None if groups is None else [np.flatnonzero(groups == group) for group in np.unique(groups)]
    count = episodes if members is None else len(members)
    if count < 2:
        one = statistic(np.arange(episodes))
        return np.full_like(one, -np.inf), np.full_like(one, np.inf)
    found = bootstrap(
        (np.arange(count),),
        lambda drawn: statistic(drawn if members is None else np.concatenate([members[group] for group in drawn])),
        vectorized=False,
        n_resamples=_RESAMPLES,
        batch=max(1, _BATCH // count),
        confidence_level=_CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return found.low, found.high
