"""The ranking of policies by their estimated values, as a table and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from torchrl_bcq.evaluation.estimate import Estimate
from torchrl_bcq.reports.pictures import COLORS, DASHED, GREY

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BEHAVIOUR = "recorded behaviour"
NOTE = (
    "A value by fitted Q evaluation is an expected discounted return without a time limit. Each interval contains the "
    "middle 95 % of the bootstrap resamples of the held-out episodes or groups; for fitted Q evaluation, it contains "
    "the intervals of all critics. The intervals do not cover the choice of the training episodes, and they do not "
    "cover the bias of the estimate. So the true value can lie outside the interval."
)
_OTHERS = {"weighted_importance_sampling": "weighted IS", "weighted_doubly_robust": "weighted DR"}  # in the table


@dataclass(frozen=True)
class Ranked:
    """A policy, its estimate, and its true value if this was measured in an environment, with its standard error."""

    name: str
    estimate: Estimate
    true: tuple[float, float | None] | None = None


def rank(policies: Sequence[Ranked]) -> list[Ranked]:
    """Sort policies by their estimates, the best first. Policies whose estimates have ``objections`` come last."""

    def key(one: Ranked) -> tuple[bool, float]:
        value = one.estimate.value
        return not one.estimate.objections, value if np.isfinite(value) else -np.inf

    return sorted(policies, key=key, reverse=True)


def agreement(policies: Sequence[Ranked]) -> dict[str, float]:
    """Compare estimates with true values, if there are several policies and all have them.

    Returns: ``spearman``, the rank correlation, for three or more policies, and ``regret``, the best true value minus
    that of the first policy of the ranking.
    """
    from scipy.stats import spearmanr

    ranked = rank(policies)
    true = [one.true[0] for one in ranked if one.true is not None]
    if len(true) < max(2, len(ranked)):
        return {}
    found = {"regret": max(true) - true[0]}
    if len(true) > 2:
        found["spearman"] = float(spearmanr([one.estimate.value for one in ranked], true).statistic)
    return found


def table(policies: Sequence[Ranked], behaviour: Ranked) -> list[list[str]]:
    """Return the rows of a table: a header, the policies in the order of ``rank``, and the recorded behaviour."""
    ranked = [*rank(policies), behaviour]
    others = [name for name in _OTHERS if any(name in one.estimate.others for one in ranked)]
    columns: dict[str, Any] = {
        "estimate": lambda one: f"{one.estimate.value:.4g}",
        "interval": lambda one: "{:.4g} to {:.4g}".format(*one.estimate.interval),
        "difference": lambda one: _number(one.estimate.difference, "+.4g"),
        "far": lambda one: _number(one.estimate.far, ".0%"),
        "ESS": lambda one: _number(one.estimate.effective_sample_size, ".1f"),
        **{_OTHERS[name]: lambda one, name=name: _number(one.estimate.others.get(name, (None,))[0]) for name in others},
        "true": lambda one: "-" if one.true is None else " ± ".join(f"{v:.4g}" for v in one.true if v is not None),
    }
    cells = {title: [show(one) for one in ranked] for title, show in columns.items()}
    shown = [title for title, each in cells.items() if any(cell != "-" for cell in each)]
    rows = [[one.name, *(cells[title][i] for title in shown)] for i, one in enumerate(ranked)]
    return [["policy", *shown], *rows]


def draw(policies: Sequence[Ranked], behaviour: Ranked) -> Figure:
    """Draw estimates with intervals, in the order of ``rank``, beside the recorded behaviour."""
    from matplotlib.figure import Figure

    ranked = rank(policies)
    figure = Figure(figsize=(8, 1.8 + 0.32 * len(ranked)), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(ranked))
    value = np.array([one.estimate.value for one in ranked])
    ends = np.array([one.estimate.interval for one in ranked]).T
    ends = np.where(np.isfinite(ends), ends, value)  # the interval of a single episode is infinite
    axes.errorbar(value, places, xerr=abs(ends - value), fmt="o", color=COLORS[0], capsize=3, label="estimate")
    if any(one.true is not None for one in ranked):
        true = [np.nan if one.true is None else one.true[0] for one in ranked]
        axes.plot(true, places, "D", color=COLORS[1], markersize=5, label="true value, in the environment")
    own = behaviour.estimate
    axes.axvline(own.value, color=GREY, linestyle=DASHED, linewidth=1.3, label=f"estimate of the {BEHAVIOUR}")
    if np.isfinite(own.interval).all():
        axes.axvspan(*own.interval, color=GREY, alpha=0.15, linewidth=0)
    doubtful = [i for i, one in enumerate(ranked) if one.estimate.doubts]
    names = [f"{one.name} (?)" if i in doubtful else one.name for i, one in enumerate(ranked)]
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set_xlabel("value: expected discounted return" + (";  (?) cannot tell" if doubtful else ""))
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    return figure


def _number(value: float | None, form: str = ".4g") -> str:
    return "-" if value is None else format(value, form)
