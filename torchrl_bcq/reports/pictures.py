"""Pictures of runs: learning curves, value estimates and losses."""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from torchrl_bcq.errors import RunError
from torchrl_bcq.files import write_whole
from torchrl_bcq.reports.curves import Curve, make_curve, warn
from torchrl_bcq.reports.logs import Run, dataset_returns, group_runs, loss_metrics, shared_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")  # palette for colour-blind readers
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
}
ESTIMATED, OBTAINED = "value_estimate", "discounted_return"
_OF_REWARDS = (ESTIMATED, OBTAINED, "td_error", "held_out_td_error", "initial_value")
_DIVERGED = 50  # if the critic's values exceed the returns by this factor, a logarithmic axis shows both
_LOGARITHMIC = 3  # make the axis logarithmic if the largest loss is at least this many times the smallest
_LEGEND_CHARACTERS = 85  # length of a row in the legend
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Style:
    """Title, group labels and statistic, which all pictures of one command share."""

    title: str
    labels: list[str]  # labels of all groups; each group has one colour in all pictures
    statistic: str = "mean"  # statistic over seeds
    rewards: str = ""  # note in the labels of values, if the run changed its rewards

    def color(self, label: str) -> Any:
        """Return the colour of a group; if there are more groups than ``COLORS``, take it from a colormap."""
        from matplotlib import colormaps

        index = self.labels.index(label)
        if len(self.labels) <= len(COLORS):
            return COLORS[index]
        return colormaps["viridis"](0.95 * index / (len(self.labels) - 1))

    def explain(self, curves: Sequence[Curve], thin: bool) -> str:
        """Return the title of the legend: it explains lines and bands, and is empty if there are no bands."""
        if all(curve.band is None for curve in curves):
            return ""
        line = {"mean": "mean", "iqm": "interquartile mean"}[self.statistic]
        text = f"line: {line} over seeds, band: its 95 % confidence interval"
        return f"{text}, thin lines: single seeds" if thin else text


def _reward_note(runs: Sequence[Run]) -> str:
    """Return the end of the labels of values if runs were trained with changed rewards."""
    kept = {"reward.shift": 0.0, "reward.scale": 1.0, "reward.clip": None}
    changed = any(run.settings.get(name, value) != value for run in runs for name, value in kept.items())
    return "\n(with the changed rewards of training)" if changed else ""


def metric_label(metric: str) -> str:
    """Return the label of a metric: "x loss" for ``loss_x``, "x loss, held-out episodes" for ``held_out_loss_x``."""
    if metric.startswith("held_out_"):
        return f"{metric_label(metric.removeprefix('held_out_'))}, held-out episodes"
    if metric.startswith("loss_"):
        metric = f"{metric.removeprefix('loss_')}_loss"
    return LABELS.get(metric, metric.replace("_", " "))


def draw_runs(runs: Sequence[Run], metric: str, statistic: str = "mean") -> dict[str, Figure]:
    """Draw the learning curve, value estimates and losses; return a dict from file name to figure.

    Raises:
        RunError: if the logs have no complete line of the metric, or if a log cannot be read.
    """
    groups, losses = group_runs(runs), loss_metrics(runs)
    curves = {
        name: [curve for group in groups if (curve := make_curve(group, name, statistic))]
        for name in dict.fromkeys([metric, ESTIMATED, OBTAINED, *losses])
    }
    if not curves[metric]:
        raise RunError(f"the runs have no complete line of {metric} in their logs yet; plot the runs later.")
    warn(groups, [curve for each in curves.values() for curve in each])
    style = Style(shared_title(runs), [group.label for group in groups], statistic, _reward_note(runs))
    figures = {"learning_curve.png": draw_metric(curves[metric], dataset_returns(groups), style)}
    if curves[ESTIMATED] and curves[OBTAINED]:
        figures["value_estimates.png"] = draw_values(curves[ESTIMATED], curves[OBTAINED], style)
    else:
        message = "no value_estimates.png: no run logged both %s and %s, which need an environment."
        _logger.warning(message, ESTIMATED, OBTAINED)
    if shown := [curves[name] for name in losses if curves[name]]:
        figures["losses.png"] = draw_losses(shown, style)
    else:
        _logger.warning("no losses.png: no run logged a loss.")
    return figures


def draw_metric(curves: Sequence[Curve], behaviours: Mapping[float, str], style: Style) -> Figure:
    """Draw each group and its seeds as lines; if the metric is the return, add each dataset's mean return.

    The keys of ``behaviours`` are mean returns of datasets; each value is the label of a group trained on the dataset.
    """
    figure, ((axes,),) = _figure(style)
    for curve in curves:
        _draw(axes, curve, style.color(curve.label), thin=True)
    if curves[0].metric == "return":
        for mean, label in behaviours.items():
            color, whose = (GREY, "") if len(behaviours) == 1 else (style.color(label), f"{label}: ")
            name = f"{whose}mean return of the dataset"
            axes.axhline(mean, color=color, linestyle=DASHED, linewidth=1.3, label=name)
    axes.set_ylabel(metric_label(curves[0].metric) + (style.rewards if curves[0].metric in _OF_REWARDS else ""))
    _legend(figure, style, curves, thin=True)
    return figure


def draw_values(estimated: Sequence[Curve], obtained: Sequence[Curve], style: Style) -> Figure:
    """Draw the critic's values of initial states and the real discounted returns, to show overestimation.

    Source: arXiv:1802.09477, fig. 1; arXiv:1812.02900, fig. 1.
    """
    figure, ((axes,),) = _figure(style)
    kinds = [("critic's value", "-", estimated, COLORS[1]), ("discounted return obtained", DASHED, obtained, COLORS[0])]
    several = len(style.labels) > 1
    for name, dashes, curves, own in kinds:
        for curve in curves:
            color = style.color(curve.label) if several else own
            _draw(axes, curve, color, name=f"{curve.label}: {name}" if several else name, linestyle=dashes)
    promised, true = (max(abs(c.center[c.finite]).max(initial=0) for c in cs) for cs in (estimated, obtained))
    if promised > _DIVERGED * true > 0:
        axes.set_yscale("symlog", linthresh=true)
    axes.set_ylabel(f"discounted value at the start of an episode{style.rewards}")
    _legend(figure, style, [*estimated, *obtained])
    return figure


def draw_losses(metrics: Sequence[Sequence[Curve]], style: Style) -> Figure:
    """Draw a panel for each metric; the axis is logarithmic if its values are positive and vary widely."""
    columns = 2 if len(metrics) in (2, 4) else min(3, len(metrics))
    figure, grid = _figure(style, -(-len(metrics) // columns), columns)
    for axes, curves in zip(grid.flat, metrics, strict=False):
        for curve in curves:
            _draw(axes, curve, style.color(curve.label))
        values = np.concatenate([curve.seeds[:, curve.finite].ravel() for curve in curves])
        if len(values) and values.max() >= _LOGARITHMIC * values.min() > 0:
            axes.set_yscale("log")
        axes.set_title(metric_label(curves[0].metric), fontsize=10)
    for axes in grid.flat[len(metrics) :]:
        axes.remove()
    _legend(figure, style, [curve for curves in metrics for curve in curves])
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a PNG; an existing file is replaced only if writing succeeds."""
    with write_whole(path) as aside:
        figure.savefig(aside, format="png", dpi=130)


def _figure(style: Style, rows: int = 1, columns: int = 1) -> tuple[Figure, Any]:
    """Make a figure with a title and a grid of axes; return the figure and the axes."""
    from matplotlib.figure import Figure  # not pyplot, which would change the user's backend and figures

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


def _draw(
    axes: Axes, curve: Curve, color: Any, *, name: str | None = None, linestyle: Any = "-", thin: bool = False
) -> None:
    if curve.band is not None:
        if thin:
            axes.plot(curve.steps, curve.seeds.T, color=color, linewidth=0.7, alpha=0.35)
        axes.fill_between(curve.steps, *curve.band, color=color, alpha=0.2, linewidth=0)
    label = f"{name or curve.label} ({len(curve.seeds)} seed{'s' * (len(curve.seeds) != 1)})"
    marker = "o" if len(curve.steps) == 1 else None  # a line of one point would be invisible
    axes.plot(curve.steps, curve.center, color=color, linestyle=linestyle, linewidth=1.5, marker=marker, label=label)


def _legend(figure: Figure, style: Style, curves: Sequence[Curve], thin: bool = False) -> None:
    """Add a legend below the axes, in as many columns as fit."""
    lines = [line for axes in figure.axes for line in axes.get_legend_handles_labels()[0]]
    handles = {textwrap.fill(str(line.get_label()), _LEGEND_CHARACTERS): line for line in lines}  # each label once
    columns = max(1, min(_LEGEND_CHARACTERS // (max(map(len, handles)) + 6), len(handles)))
    figure.set_figheight(figure.get_figheight() + 0.2 * sum(label.count("\n") + 1 for label in handles) / columns)
    place: dict[str, Any] = {"loc": "outside lower center", "ncols": columns, "fontsize": 9, "frameon": False}
    title = style.explain(curves, thin)
    figure.legend([*handles.values()], [*handles], title=title, title_fontsize=8, **place)
