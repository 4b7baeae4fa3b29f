"""Prints a table of the runs of a sweep, for ``torchrl-bcq evaluate SWEEP``."""

from __future__ import annotations

from pathlib import Path

from torchrl_bcq.reports.logs import choose_metric, find_runs, shorten
from torchrl_bcq.runs.settings import flat, load_settings

_ALWAYS_DIFFERENT = ("out", "resume")
_OTHERS = ("initial_value", "action_distance")  # shown too, if no policy was evaluated in an environment


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
    others = [] if metric == "return" else [name for name in _OTHERS if any(name in run.metrics for run in runs)]
    best_of = [f"best {metric}"] if metric == "return" else [f"last {name}" for name in others]
    lines = [["run", *differing, "steps", f"last {metric}", *best_of]]
    for run in runs:
        values = logged[run.folder]
        cells = [run.folder.name, *(shorten(run.settings.get(name, "-")) for name in differing)]
        last = [[*each.values()][-1:] for each in (values, *map(run.read, others))]
        numbers = [f"{value[0]:.4g}" if value else "-" for value in last]
        numbers += [f"{max(values.values()):.4g}" if values else "-"] if metric == "return" else []
        lines.append([*cells, f"{max(values):,}" if values else "-", *numbers])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print(f"{folder} contains {len(runs)} runs:\n")
    for name, *others in lines:
        cells = [f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join([f"{name:<{widths[0]}}", *cells]))
    measured = [run.folder for run in runs if metric == "return" and logged[run.folder]]
    if not measured:
        print("\nNo run was evaluated in an environment. These numbers do not show which policy is best.")
        print(f"To evaluate a run: torchrl-bcq evaluate {runs[0].folder}")
        return
    best = max(measured, key=lambda run: max(logged[run].values()))
    step, value = max(logged[best].items(), key=lambda item: item[1])
    print(f"\nThe best return is {value:.4g}, in {best} after {step:,} gradient steps.")
    print("The best of many evaluations is too high on average. To measure this run in new episodes:")
    print(f"  torchrl-bcq evaluate {best}")
