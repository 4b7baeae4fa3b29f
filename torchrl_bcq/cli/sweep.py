"""Prints a table of the runs of a sweep, for ``torchrl-bcq evaluate SWEEP``."""

from __future__ import annotations

from pathlib import Path
from shlex import quote

from torchrl_bcq.cli.evaluate import print_table
from torchrl_bcq.reports.logs import choose_metric, differing_settings, find_runs, shorten
from torchrl_bcq.runs.folder import CHECKPOINTS
from torchrl_bcq.runs.settings import FILE, flat, load_settings

_NOT_SHOWN = ("out", "resume", "threads")  # threads=auto may choose another number in each run
# shown too, if no policy was evaluated in an environment
_OTHERS = ("initial_value", "action_distance", "action_agreement")


def is_sweep(folder: Path) -> bool:
    """Return whether ``folder`` is not a run, but contains runs."""
    is_run = (folder / FILE).is_file() or (folder / CHECKPOINTS).is_dir()
    return not is_run and any(folder.glob(f"[!.]*/{FILE}"))


def print_runs(folder: Path) -> None:
    """Print the settings in which the runs differ, their last and best logged returns, and which run is best."""
    runs = find_runs([folder], lambda run: flat(load_settings(run)))
    differing = [name for name in differing_settings([run.settings for run in runs]) if name not in _NOT_SHOWN]
    metric = choose_metric(runs, None)
    logged = {run.folder: _after_training(run.read(metric)) for run in runs}
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
    first, *widths = (max(map(len, column)) for column in zip(*lines, strict=True))
    print(f"{folder} contains {len(runs)} runs:\n")
    print_table(lines, [first, *(width + 2 for width in widths)])
    started = {log.parent for log in folder.glob("[!.]*/train.log")}
    if failed := sorted(str(path) for path in started.difference(run.folder for run in runs)):
        print(f"\nNot in the table, because they stopped before their first step (see train.log): {', '.join(failed)}")
    measured = [run.folder for run in runs if metric == "return" and logged[run.folder]]
    if not measured:
        print("\nNo run was evaluated in an environment. These numbers do not show which policy is best.")
        print(f"To evaluate a run: torchrl-bcq evaluate {quote(str(runs[0].folder))}")
        print(f"To estimate without an environment which run is best: torchrl-bcq rank {quote(str(folder))}")
        return
    if "dataset" in differing:
        print("\nThe runs have different datasets, so their returns may belong to different tasks.")
        return
    best = max(measured, key=lambda run: max(logged[run].values()))
    step, value = max(logged[best].items(), key=lambda item: item[1])
    print(f"\nThe best return is {value:.4g}, in {best} after {step:,} gradient steps.")
    print("The best of many evaluations is too high on average. To measure this run in new episodes:")
    print(f"  torchrl-bcq evaluate {quote(str(best))}")


def _after_training(values: dict[int, float]) -> dict[int, float]:
    """Leave out the evaluation before the first gradient step, if there are others."""
    return {step: value for step, value in values.items() if step} or values
