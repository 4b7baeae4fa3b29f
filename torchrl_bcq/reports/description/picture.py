"""Draws the picture of a dataset."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from torchrl_bcq.reports.description.scan import Survey

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

ACTIONS = 8  # number of action histograms that fit side by side
COLUMNS = 200  # number of quantile bars that fit side by side
NAMED = 10  # draw the names of the columns if there are at most this many
FINDINGS = 6  # number of findings shown as text
HEALTHY = "nothing looks wrong"
BLUE, DARK, RED, GREY = "#4c78a8", "#1f3b5c", "#c44e52", "#777777"


def draw(survey: Survey, findings: list[str]) -> Figure:
    """Draw histograms of returns, lengths, rewards and actions, ranges of observations, and findings as text."""
    from matplotlib.figure import Figure  # not pyplot, which would change the user's backend and figures
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    shown = [textwrap.fill(f"- {finding}", 165, subsequent_indent="  ") for finding in findings[:FINDINGS]]
    more = [f"... {len(findings) - FINDINGS} more in the printed text"] if len(findings) > FINDINGS else []
    lines = "\n".join([*shown, *more] or [HEALTHY]).split("\n")
    heights = [3.0, 2.6, 3.0, 0.2 * len(lines) + 0.25]
    figure = Figure(figsize=(12, sum(heights) + 0.5), layout=ConstrainedLayoutEngine(h_pad=0.08, hspace=0.04))
    figure.suptitle(size_of(survey), weight="bold")
    # Any, because the annotation of subfigures() is wrong: the function returns an array
    parts: Any = figure.subfigures(4, 1, height_ratios=heights)
    top, middle, bottom, text = parts
    for axes, values, title, label, counted in zip(
        top.subplots(1, 3),
        (survey.returns, survey.lengths, survey.rewards.sample[:, 0]),
        ("returns", "episode lengths", "rewards"),
        ("return per episode", "length of an episode (steps)", "reward per step"),
        ("episodes", "episodes", "rows"),
        strict=True,
    ):
        _histogram(axes, values, label, counted, log=counted == "rows")
        axes.set_title(title, fontsize=11)
    _actions(survey, middle)
    _observations(survey, bottom.subplots())
    for number, line in enumerate(lines):
        text.text(0.02, 1 - (number + 0.5) / len(lines), line, va="center", fontsize=9, parse_math=False)
    return figure


def size_of(survey: Survey) -> str:
    """Return the size of a dataset as text, such as ``30,000 transitions in 150 episodes of 12 groups``."""
    counted = [("", survey.rows, "transition"), (" in ", len(survey.lengths), "episode")]
    counted += [(" of ", survey.groups, "group")] if survey.groups else []
    return "".join(f"{link}{count:,} {what}{'s' * (count != 1)}" for link, count, what in counted)


def _histogram(axes: Axes, values: Tensor, label: str, counted: str, log: bool = False) -> None:
    finite = values[values.isfinite()].double().numpy()
    if len(finite):
        low, high = finite.min(), finite.max()
        is_narrow = high - low <= 1e-9 * max(abs(low), abs(high))  # too narrow for 40 bins
        around = max(1.0, 0.1 * abs(low)) if is_narrow else 0.0
        axes.hist(finite, bins=40, range=(low - around, high + around), color=BLUE, log=log)
    axes.set(xlabel=label, ylabel=f"{counted} (log scale)" if log else counted)
    axes.locator_params(axis="x", nbins=5)
    if not log:
        axes.locator_params(axis="y", integer=True)
    axes.spines[["top", "right"]].set_visible(False)


def _choices(counts: Tensor, figure: SubFigure) -> None:
    """Draw a bar for each discrete action."""
    figure.suptitle("discrete actions", fontsize=11)
    axes: Any = figure.subplots()
    axes.bar(range(len(counts)), counts.numpy(), color=BLUE)
    axes.set(xlabel="action", ylabel="rows", xlim=(-0.7, len(counts) - 0.3))
    axes.locator_params(axis="x", integer=True)
    axes.spines[["top", "right"]].set_visible(False)


def _actions(survey: Survey, figure: SubFigure) -> None:
    if survey.frequencies is not None:
        return _choices(survey.frequencies, figure)
    sample, bounds = survey.actions.sample[:, :ACTIONS], survey.bounds or ()
    rows, shown = sample.shape
    width = len(survey.actions.low)
    more = f", the first {shown} of {width} columns" if shown < width else ""
    figure.suptitle(f"actions{more}" + (" (dashed: bounds of the spec)" if bounds else ""), fontsize=11)
    grid: Any = figure.subplots(1, shown, squeeze=False)
    for column, axes in enumerate(grid[0]):
        _histogram(
            axes,
            sample[:, column],
            f"column {_drawable(survey.actions.labels)[column]}",
            "" if column else f"rows of {rows:,}",
        )
        axes.locator_params(axis="x", nbins=3)
        axes.set_yticks([])
        for bound in bounds:
            if torch.isfinite(bound[column]):
                axes.axvline(float(bound[column]), color=RED, linestyle="--", linewidth=1.2)


def _drawable(labels: Sequence[str]) -> list[str]:
    """Return the labels of columns, or the numbers of the columns if the font lacks a character of a label."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties()))
    known = all(font.get_char_index(ord(character)) for label in labels for character in label)
    # a backslash stops matplotlib from reading a formula between two dollar signs
    return [label.replace("$", r"\$") for label in labels] if known else [str(at) for at in range(len(labels))]


def _observations(survey: Survey, axes: Axes) -> None:
    """Draw a line from min to max, a bar from 5 to 95 %, a darker bar from 25 to 75 %, and a dot at the median."""
    fields, rows = survey.observations, len(survey.rewards.sample)
    sample = torch.cat([torch.empty(rows, 0), *(field.sample for field in fields)], 1).double()
    total, drawn = sample.shape[1], min(sample.shape[1], COLUMNS)
    sample = sample[:, :drawn].masked_fill(~sample[:, :drawn].isfinite(), torch.nan)
    axes.set(xlabel="column of " + ", ".join(field.name for field in fields), ylabel="value (units of the data)")
    title = "observations: min, 5, 25, 50, 75, 95 %, max"
    if rows < survey.rows:
        title += f" (percentiles and histograms use {rows:,} rows)"
    axes.set_title(title + (f", the first {drawn} of {total} columns" if drawn < total else ""), fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    at = np.flatnonzero(~sample.isnan().all(0))
    if not len(at):
        axes.text(0.5, 0.5, "no columns to draw", ha="center", transform=axes.transAxes)
        return
    low, high = (np.concatenate([getattr(field, end) for field in fields])[at] for end in ("low", "high"))
    q05, q25, q50, q75, q95 = np.nanquantile(sample[:, at], [0.05, 0.25, 0.5, 0.75, 0.95], axis=0, method="lower")
    thick = max(1.2, min(14.0, 420 / drawn))
    axes.vlines(at, low, high, color=GREY, linewidth=0.8)
    axes.vlines(at, q05, q95, color=BLUE, alpha=0.45, linewidth=thick)
    axes.vlines(at, q25, q75, color=BLUE, linewidth=thick)
    axes.plot(at, q50, "o", color=DARK, markersize=max(1.5, thick / 3), linestyle="none")
    axes.set_xlim(-0.7, drawn - 0.3)
    axes.locator_params(axis="x", integer=True)
    labels = [label for field in fields for label in _drawable(field.labels)]
    if len(labels) <= NAMED and not all(map(str.isdigit, labels)):
        axes.set_xticks(range(len(labels)), labels)
    usual = np.sort(q95 - q05)[len(at) // 4]
    if 0 < 50 * usual < np.abs([low, high]).max():  # a linear axis would make a quarter of the columns too small to see
        # use a power of ten as linthresh, so that no ticks lie inside the linear part of the axis
        axes.set_yscale("symlog", linthresh=10.0 ** math.ceil(math.log10(usual)))
        axes.set_ylabel("value (log scale)")
