"""Pictures of curves."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torchrl_bcq.cli.curves import Curve, Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")  # Okabe and Ito, for all kinds of eyes
GREY = "#555555"
DASHED = (0, (4, 1.5))
LABELS = {
    "return": "return per episode (undiscounted)",
    "return_std": "standard deviation of returns per episode",
    "discounted_return": "discounted return per episode",
    "normalized_score": "normalized score (0: random, 100: expert)",
    "episode_length": "length of an episode (steps)",
    "initial_value": "critic's value at the start of an episode",
    "value_estimate": "critic's value at the start of an episode",
    "td_error": "absolute TD error",
    "held_out_td_error": "absolute TD error, held-out episodes",
    "held_out_vae_loss": "VAE loss, held-out episodes",
    "loss_vae": "VAE loss",
    "loss_qvalue": "critics' loss",
    "loss_actor": "actor's loss",
}
_DIVERGED = 50  # times the largest return: a linear axis would hide the returns
_LOGARITHMIC = 3  # times the smallest loss: less looks alike on both axes, and may have no tick on a logarithmic one
_LEGEND_CHARACTERS = 85  # of a row of the legend


@dataclass(frozen=True)
class Style:
    """What the pictures of a command share."""

    title: str
    labels: list[str]  # of all groups, so that each keeps its color in all pictures
    estimate: Estimate

    def color(self, label: str) -> Any:
        """The group's color; more groups than a palette can tell apart are shades in their order."""
        from matplotlib import colormaps

        index = self.labels.index(label)
        if len(self.labels) <= len(COLORS):
            return COLORS[index]
        return colormaps["viridis"](0.95 * index / (len(self.labels) - 1))

    def explain(self, curves: Sequence[Curve], thin: bool) -> str:
        """What lines and bands are; empty if each is one run."""
        if all(curve.band is None for curve in curves):
            return ""
        line = {"mean": "mean", "iqm": "interquartile mean"}[self.estimate.statistic]
        text = f"line: {line} of the seeds, band: {100 * self.estimate.confidence:g} % confidence interval of it"
        return f"{text}, thin: each seed" if thin else text


def draw_metric(curves: Sequence[Curve], behaviours: Mapping[float, str], style: Style) -> Figure:
    """A line for each group, its seeds behind it; of returns, also the mean of each dataset's own.

    Args:
        curves: one metric.
        behaviours: labels by the mean return of the group's dataset.
        style: of all pictures.
    """
    figure, ((axes,),) = _figure(style)
    for curve in curves:
        _draw(axes, curve, style.color(curve.label), thin=True, label=_legend_label(curve))
    if curves[0].metric == "return":
        for mean, label in behaviours.items():
            color = GREY if len(behaviours) == 1 else style.color(label)
            axes.axhline(mean, color=color, linestyle=DASHED, linewidth=1.3, label="mean return of the dataset")
    axes.set_ylabel(LABELS.get(curves[0].metric, curves[0].metric.replace("_", " ")))
    _legend(figure, axes.get_legend_handles_labels()[0], style, curves, thin=True)
    return figure


def draw_values(estimated: Sequence[Curve], obtained: Sequence[Curve], style: Style) -> Figure:
    """What the critic promises at the start of an episode, and what it then brings: overestimation, if any.

    Source: arXiv:1802.09477, fig. 1; arXiv:1812.02900, fig. 1.
    """
    figure, ((axes,),) = _figure(style)
    several = len(style.labels) > 1
    kinds = [("critic's value", "-", estimated, COLORS[1]), ("discounted return obtained", DASHED, obtained, COLORS[0])]
    handles: list[Line2D] = []
    for name, dashes, curves, own in kinds:
        for curve in curves:
            _draw(axes, curve, style.color(curve.label) if several else own, linestyle=dashes)
        label = name if several else f"{name} ({_seeds(curves[0])})"
        handles += axes.plot([], [], color=GREY if several else own, linestyle=dashes, label=label)
    if several:
        for curve in {curve.label: curve for curve in [*estimated, *obtained]}.values():
            handles += axes.plot([], [], color=style.color(curve.label), linewidth=4, label=_legend_label(curve))
    promised, true = (max(abs(c.center[c.finite]).max(initial=0) for c in cs) for cs in (estimated, obtained))
    if promised > _DIVERGED * true > 0:
        axes.set_yscale("symlog", linthresh=true)
    axes.set_ylabel("discounted value at the start of an episode")
    _legend(figure, handles, style, [*estimated, *obtained])
    return figure


def draw_losses(metrics: Sequence[Sequence[Curve]], style: Style) -> Figure:
    """A panel for each metric, its axis logarithmic where all of it is positive and it changes much."""
    columns = 2 if len(metrics) in (2, 4) else min(3, len(metrics))
    rows = -(-len(metrics) // columns)
    everything = [curve for curves in metrics for curve in curves]
    figure, grid = _figure(style, rows, columns)
    handles: dict[str, Line2D] = {}
    for axes, curves in zip(grid.flat, metrics, strict=False):
        for curve in curves:
            handles[curve.label] = _draw(axes, curve, style.color(curve.label), 1.1, label=_legend_label(curve))
        _scale(axes, curves)
        axes.set_title(LABELS.get(curves[0].metric, curves[0].metric.replace("_", " ")), fontsize=10)
    for axes in grid.flat[len(metrics) :]:
        axes.remove()
    _legend(figure, list(handles.values()), style, everything)
    return figure


def _figure(style: Style, rows: int = 1, columns: int = 1) -> tuple[Figure, Any]:
    """A figure with a title, and its axes ``[rows, columns]``."""
    from matplotlib.figure import Figure  # not pyplot: the user's backend and figures are left alone

    size = (8, 4.8) if rows == columns == 1 else (4.2 * columns, 2.9 * rows + 0.6)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(style.title, weight="bold")
    grid: Any = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_xlabel("gradient steps")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.locator_params(axis="x", nbins=5)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, grid


def _draw(axes: Axes, curve: Curve, color: Any, width: float = 1.8, thin: bool = False, **line: Any) -> Line2D:
    if curve.band is not None:
        if thin:
            axes.plot(curve.steps, curve.seeds.T, color=color, linewidth=0.7, alpha=0.35)
        axes.fill_between(curve.steps, *curve.band, color=color, alpha=0.2, linewidth=0)
    marker = "o" if len(curve.steps) == 1 else None  # a line of one point would not be seen
    return axes.plot(curve.steps, curve.center, color=color, linewidth=width, marker=marker, **line)[0]


def _scale(axes: Axes, curves: Sequence[Curve]) -> None:
    """A logarithmic axis with ticks at 0.05, 0.1, 0.2, where the default has powers of ten, for what spans a factor."""
    values = [value for curve in curves for value in curve.seeds[:, curve.finite].flat]
    if not values or min(values) <= 0 or max(values) < _LOGARITHMIC * min(values):
        return
    from matplotlib.ticker import LogLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    low, high = axes.get_ylim()
    axes.yaxis.set_minor_locator(LogLocator(subs=(2.0, 5.0)))
    axes.yaxis.set_minor_formatter("{x:g}" if high < 1e3 * low else "")


def _legend(figure: Figure, handles: Sequence[Any], style: Style, curves: Sequence[Curve], thin: bool = False) -> None:
    """Below the axes, where it hides nothing, in as many columns as fit."""
    labels = [textwrap.fill(str(handle.get_label()), _LEGEND_CHARACTERS) for handle in handles]
    columns = max(1, min(_LEGEND_CHARACTERS // (max(map(len, labels)) + 6), len(handles)))
    figure.set_figheight(figure.get_figheight() + 0.2 * sum(label.count("\n") + 1 for label in labels) / columns)
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=columns,
        title=style.explain(curves, thin),
        title_fontsize=8,
        fontsize=9,
        frameon=False,
    )


def _legend_label(curve: Curve) -> str:
    return f"{curve.label} ({_seeds(curve)})"


def _seeds(curve: Curve) -> str:
    return f"{len(curve.seeds)} seed{'s' * (len(curve.seeds) != 1)}"
