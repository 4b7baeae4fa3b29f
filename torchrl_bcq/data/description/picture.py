"""The picture of a dataset."""

from __future__ import annotations

import math
import os
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchrl_bcq.data.description.survey import Survey

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ACTIONS = 8  # histograms that fit side by side
COLUMNS = 200  # quantile bars that fit side by side
FINDINGS = 6
BLUE, DARK, RED, GREY = "#4c78a8", "#1f3b5c", "#c44e52", "#777777"


def save(figure: Figure, path: Path) -> None:
    """Write a PNG aside, which then takes the place of ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        figure.savefig(aside, format="png", dpi=130)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def draw(survey: Survey, findings: list[str]) -> Figure:
    """Histograms of returns, lengths, rewards and actions, ranges of observations, and findings as text."""
    from matplotlib.figure import Figure  # not pyplot: the user's backend and figures are left alone
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    lines = _lines(findings)
    heights = [3.0, 2.6, 3.0, 0.2 * len(lines) + 0.25]
    figure = Figure(figsize=(12, sum(heights) + 0.5), layout=ConstrainedLayoutEngine(h_pad=0.08, hspace=0.04))
    figure.suptitle(size_of(survey), weight="bold")
    parts: Any = figure.subfigures(4, 1, height_ratios=heights)  # an array, whatever its annotation says
    top, middle, bottom, text = parts
    first = top.subplots(1, 3)
    _histogram(first[0], survey.returns, "return per episode", "episodes")
    _histogram(first[1], survey.lengths.double(), "length of an episode (steps)", "episodes")
    _histogram(first[2], survey.rewards.sample[:, 0], "reward per step", "rows", log=True)
    for axes, title in zip(first, ("returns", "episode lengths", "rewards"), strict=True):
        axes.set_title(title, fontsize=11)
    shown = min(len(survey.actions.low), ACTIONS)
    _actions(survey, middle.subplots(1, shown, squeeze=False)[0])
    more = f", the first {shown} of {len(survey.actions.low)} columns" if shown < len(survey.actions.low) else ""
    middle.suptitle(f"actions{more}" + (" (dashed: bounds of the spec)" if survey.bounds else ""), fontsize=11)
    _observations(survey, bottom.subplots())
    for number, line in enumerate(lines):
        text.text(0.02, 1 - (number + 0.5) / len(lines), line, va="center", fontsize=9, parse_math=False)
    return figure


def size_of(survey: Survey) -> str:
    """``30,000 transitions in 150 episodes``."""
    counted = [(survey.rows, "transition"), (len(survey.lengths), "episode")]
    return " in ".join(f"{count:,} {what}{'s' * (count != 1)}" for count, what in counted)


def _lines(findings: list[str]) -> list[str]:
    if not findings:
        return ["nothing looks wrong"]
    kept = [textwrap.fill(f"- {finding}", 165, subsequent_indent="  ") for finding in findings[:FINDINGS]]
    more = [f"... {len(findings) - FINDINGS} more in the text"] if len(findings) > FINDINGS else []
    return "\n".join([*kept, *more]).split("\n")


def _histogram(axes: Axes, values: Tensor, label: str, counted: str, log: bool = False) -> None:
    finite = values[values.isfinite()].double().numpy()
    if len(finite) and finite.min() < finite.max():
        axes.hist(finite, bins=40, color=BLUE, log=log)
    elif len(finite):
        around = max(1.0, 0.1 * abs(finite[0]))
        axes.bar(finite[0], len(finite), width=0.05 * around, color=BLUE, log=log)
        axes.set_xlim(finite[0] - around, finite[0] + around)
    axes.set(xlabel=label, ylabel=f"{counted} (log scale)" if log else counted)
    axes.locator_params(axis="x", nbins=5)
    if not log:
        axes.locator_params(axis="y", integer=True)
    axes.spines[["top", "right"]].set_visible(False)


def _actions(survey: Survey, row: list[Axes]) -> None:
    for column, axes in enumerate(row):
        values = survey.actions.sample[:, column]
        _histogram(axes, values, f"column {column}", "rows")
        axes.set(ylabel="" if column else f"rows of {len(values):,}")
        axes.locator_params(axis="x", nbins=3)
        axes.set_yticks([])
        for bound in survey.bounds or ():
            if torch.isfinite(bound[column]):
                axes.axvline(float(bound[column]), color=RED, linestyle="--", linewidth=1.2)


def _observations(survey: Survey, axes: Axes) -> None:
    """A thin line from min to max, a bar from 5 to 95 %, a thick one from 25 to 75 %, a dot at the median."""
    fields = survey.observations
    total, rows = sum(len(field.low) for field in fields), len(survey.rewards.sample)
    drawn = 0
    bars = []
    for field in fields:
        for column in range(min(len(field.low), COLUMNS - drawn)):
            sample = field.sample[:, column].double()
            sample = sample[sample.isfinite()]
            if len(sample):
                levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)
                inner = sample.sort().values[(levels * (len(sample) - 1)).long()].tolist()
                bars.append((drawn + column, float(field.low[column]), *inner, float(field.high[column])))
        drawn += min(len(field.low), COLUMNS - drawn)
    axes.set(xlabel="column of " + ", ".join(field.name for field in fields), ylabel="value (units of the data)")
    title = "observations: min, 5, 25, 50, 75, 95 %, max"
    if rows < survey.rows:
        title += f" (percentiles and histograms: of {rows:,} rows)"
    axes.set_title(title + (f", the first {drawn} of {total} columns" if drawn < total else ""), fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    if not bars:
        axes.text(0.5, 0.5, "no columns to draw", ha="center", transform=axes.transAxes)
        return
    at, low, q05, q25, q50, q75, q95, high = zip(*bars, strict=True)
    thick = max(1.2, min(14.0, 420 / drawn))
    axes.vlines(at, low, high, color=GREY, linewidth=0.8)
    axes.vlines(at, q05, q95, color=BLUE, alpha=0.45, linewidth=thick)
    axes.vlines(at, q25, q75, color=BLUE, linewidth=thick)
    axes.plot(at, q50, "o", color=DARK, markersize=max(1.5, thick / 3), linestyle="none")
    axes.set_xlim(-0.7, drawn - 0.3)
    axes.locator_params(axis="x", integer=True)
    spread = max(max(map(abs, low)), max(map(abs, high)))
    usual = sorted(b - a for a, b in zip(q05, q95, strict=True))[len(at) // 4]
    if usual > 0 and spread > 50 * usual:  # a linear axis would hide a quarter of the columns
        axes.set_yscale("symlog", linthresh=10.0 ** math.ceil(math.log10(usual)))  # a power of ten: no ticks inside
        axes.set_ylabel("value (log scale)")
