"""Prints a table of the runs of a sweep, for ``torchrl-bcq evaluate SWEEP``."""

from __future__ import annotations

from pathlib import Path

from torchrl_bcq.reports.logs import choose_metric, find_runs, shorten
from torchrl_bcq.runs.settings import flat, load_settings

_ALWAYS_DIFFERENT = ("out", "resume")


def is_sweep(folder: Path) -> bool:
    """Return whether ``folder`` is not a run, but contains runs."""
    return not (folder / "config.yaml").is_file() and any(folder.glob("[!.]*/config.yaml"))


def print_runs(folder: Path) -> None:
    """Print the settings in which the runs differ, their last and best logged returns, and which run is best."""
    runs = find_runs([folder], lambda run: flat(load_settings(run)))
    names = [name for name in runs[0].settings if name not in _ALWAYS_DIFFERENT]
    differing = [name for name in names if len({repr(run.settings.get(name)) for run in runs}) > 1]
    metric = choose_metric(runs, None)
    logged = {run.folder: run.read(metric) for run in runs}
    lines = [["run", *differing, "steps", f"last {metric}", *([f"best {metric}"] if metric == "return" else [])]]
    for run in runs:
        values = logged[run.folder]
        cells = [run.folder.name, *(shorten(run.settings.get(name, "-")) for name in differing)]
        numbers = [f"{[*values.values()][-1]:.4g}", f"{max(values.values()):.4g}"] if values else ["-", "-"]
        lines.append([*cells, f"{max(values):,}" if values else "-", *numbers][: len(lines[0])])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print(f"{folder} contains {len(runs)} runs:\n")
    for name, *others in lines:
        cells = [f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join([f"{name:<{widths[0]}}", *cells]))
    measured = [run.folder for run in runs if metric == "return" and logged[run.folder]]
    if not measured:
        print(f"\nNo run was evaluated in an environment. The {metric} does not show which policy is best.")
        print(f"To evaluate a run: torchrl-bcq evaluate {runs[0].folder}")
        return
    best = max(measured, key=lambda run: max(logged[run].values()))
    step, value = max(logged[best].items(), key=lambda item: item[1])
    print(f"\nThe best return is {value:.4g}, in {best} after {step:,} gradient steps.")
    print("The best of many evaluations is too high on average. To measure this run in new episodes:")
    print(f"  torchrl-bcq evaluate {best}")
