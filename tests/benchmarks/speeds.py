"""Results as tables for a terminal and as a picture."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from rounds import faster, median_ratio

OWN, PEER, FLOOR = "#0072b2", "#d55e00", "#999999"
OFF = 5  # times the fastest: a limit beyond it is not drawn, as the bars would be too short to compare
UNITS = {
    "training": ("batch size", "updates/s"),
    "vectors": ("discrete actions, vectors, batch size", "updates/s"),
    "frames": ("discrete actions, frames, batch size", "updates/s"),
    "acting": ("states", "calls/s"),
}


def summarize(measured: Mapping[str, Any], peers: Collection[str]) -> dict[str, dict[str, Any]]:
    """Speed, share of the limit and ratios of each contender, in the order of measurement.

    ``slower`` holds the time of each peer, of the peer with the lowest median (``"faster peer"``) and of this package
    without options (``"eager"``), divided by the contender's time.

    Args:
        measured: ``seconds`` per step of each contender in each round, ``flops`` of a step, and ``limit`` in FLOP/s.
        peers: contenders that are other libraries.
    """
    times: dict[str, Sequence[float]] = measured["seconds"]
    rivals = {name: times[name] for name in times if name in peers}
    best = faster(rivals)
    rows = {}
    for name, own in times.items():
        slower = {rival: median_ratio(theirs, own) for rival, theirs in rivals.items() if name not in peers}
        if best and name not in peers:
            slower["faster peer"] = slower[best]
        if "eager" in times and name not in peers:
            slower["eager"] = median_ratio(times["eager"], own)
        seconds = statistics.median(own)
        share = measured["flops"] / seconds / measured["limit"]
        rows[name] = {"seconds": seconds, "per_second": 1 / seconds, "share": share, "slower": slower}
    return rows


def table(kind: str, measured: Mapping[str, Any]) -> str:
    """A table with one line for each contender."""
    what, unit = UNITS[kind]
    summary = measured["summary"]
    rivals = list(dict.fromkeys(rival for row in summary.values() for rival in row["slower"]))
    lines = [
        f"\n{what} {measured['size']}: {measured['flops'] / 1e9:.3f} GFLOP, "
        f"matrix products at {measured['limit'] / 1e9:.1f} GFLOP/s",
        f"{'':<16}{'ms':>10}{unit:>12}{'of limit':>10}" + "".join(f"{'x ' + rival:>16}" for rival in rivals),
    ]
    for name, row in summary.items():
        ratios = "".join(f"{row['slower'][rival]:>16.2f}" if rival in row["slower"] else " " * 16 for rival in rivals)
        line = f"{name:<16}{1e3 * row['seconds']:>10.2f}{row['per_second']:>12.1f}{row['share']:>10.0%}{ratios}"
        lines.append(line.rstrip())
    for name, kernels in measured["kernels"].items():
        lines.append(
            f"{name}: {kernels['kernels_per_step']:.0f} kernels per step, running {kernels['busy']:.0%} of the time"
        )
    return "\n".join(lines)


def draw(results: Mapping[str, Any]) -> Figure:
    """Draw a panel for each batch size and each number of states; the dashed line is the limit."""
    kinds = [kind for kind in UNITS if results.get(kind)]
    columns = max(len(results[kind]) for kind in kinds)
    bars = max(len(measured["summary"]) for kind in kinds for measured in results[kind])
    size = (max(6.0, 4.2 * columns), len(kinds) * (0.32 * bars + 1.1) + 0.8)
    figure = Figure(figsize=size, layout="constrained")
    machine = results["machine"]
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] != 1)}"
    figure.suptitle(f"BCQ on {machine['device']}, {threads}\ndashed: matrix products alone", fontsize=11)
    grid = figure.subplots(len(kinds), columns, squeeze=False)
    for kind, row in zip(kinds, grid, strict=True):
        for measured, axes in zip(results[kind], row, strict=False):
            _panel(axes, kind, measured, results["peers"])
        for axes in row[len(results[kind]) :]:
            axes.remove()
    return figure


def _panel(axes: Any, kind: str, measured: Mapping[str, Any], peers: Collection[str]) -> None:
    what, unit = UNITS[kind]
    speeds = {name: row["per_second"] for name, row in measured["summary"].items()}
    colors = [PEER if name in peers else FLOOR if name == "floor" else OWN for name in speeds]
    bars = axes.barh(list(speeds), list(speeds.values()), color=colors)
    axes.bar_label(bars, [f" {_short(speed)}" for speed in speeds.values()], fontsize=8)
    fastest, limit = max(speeds.values()), measured["limit"] / measured["flops"]
    axes.axvline(limit, color="black", linestyle="--", linewidth=1)
    axes.set_xlim(0, 1.15 * (max(limit, fastest) if limit < OFF * fastest else fastest))
    axes.set(xlabel=f"{unit} (limit {_short(limit)})", title=f"{what} {measured['size']}")
    axes.locator_params(axis="x", nbins=5)
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)


def _short(speed: float) -> str:
    return f"{speed:,.0f}" if speed >= 100 else f"{speed:.3g}"
