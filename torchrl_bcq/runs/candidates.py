"""The policies that ``torchrl-bcq rank`` compares: checkpoints of runs, and policies from Python modules."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from torchrl.checkpoint import Checkpoint

from torchrl_bcq.errors import RunError
from torchrl_bcq.modules.acting import weights_digest
from torchrl_bcq.reports.logs import find_runs
from torchrl_bcq.runs.folder import BEST, CHECKPOINTS, Task, choose_device, find_checkpoint, load, read_metadata
from torchrl_bcq.trainers.best import best_checkpoint

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidate:
    """A policy that can be loaded, and facts that change if the policy changes."""

    name: str
    facts: dict[str, Any]
    load: Callable[[], Any]


def find_candidates(folders: Sequence[Path], which: str, device: str) -> list[Candidate]:
    """Return the checkpoints of runs, of the runs of sweeps, or given checkpoints.

    Args:
        folders: runs, sweeps or checkpoints.
        which: ``"best"``, ``"last"`` or ``"all"`` checkpoints of each run.
        device: device of the networks.

    Raises:
        RunError: if there is no checkpoint, or if the runs have other observations or actions than the first one.
    """
    found: dict[Path, str] = {}
    for folder in folders:
        runs = (
            [folder] if Checkpoint.is_checkpoint(folder) else [run.folder for run in find_runs([folder], lambda _: {})]
        )
        for run in runs:
            try:
                paths = _all_checkpoints(run) if which == "all" else [find_checkpoint(run, which)]
            except RunError:
                if len(runs) == 1:
                    raise
                _logger.warning("%s contains no checkpoint, so it is left out.", run)  # a run of a sweep that failed
                continue
            for path in paths:
                name = str(run) if len(paths) == 1 else f"{run}, step {read_metadata(path)[2]:,}"
                found.setdefault(path.resolve(), name if name not in found.values() else f"{name}, {path.parent.name}")
    if not found:
        raise RunError(f"the runs in {', '.join(map(str, folders))} contain no checkpoint; train them first.")
    first, *others = found
    settings, task, _ = read_metadata(first)
    for path in others:
        check_comparable(read_metadata(path)[:2], found[path], (settings, task), found[first])
    _warn_of_other_data(found)
    return [Candidate(name, _facts(path), partial(_load, path, device)) for path, name in found.items()]


Recorded = tuple[Any, Task]  # the settings and the task of a run
# settings of readers that name what the networks read
_COLUMNS = ("observation", "action", "action_mask", "observations", "actions", "frames", "action_masks")


def check_comparable(one: Recorded, name: str | Path, other: Recorded, other_name: str | Path) -> None:
    """Raise a RunError if two runs have other observations or actions, or read them in another order."""
    (own, task), (others, other_task) = one, other
    if task.stack != other_task.stack:
        stacks = f"stack={task.stack}, but {other_name} with stack={other_task.stack}"
        raise RunError(f"{name} was trained with {stacks}; compare runs with the same stack.")
    here, there = ({**settings.reader, **(settings.reader.get("names") or {})} for settings in (own, others))
    same = task.observation == other_task.observation
    for what in _COLUMNS:
        columns = [[names] if isinstance(names := read.get(what), str) else list(names or ()) for read in (here, there)]
        # other files may have other names, but not the same names in another order
        may_differ = own.dataset != others.dataset and sorted(columns[0]) != sorted(columns[1])
        same &= columns[0] == columns[1] or may_differ
    if not same:
        raise RunError(
            f"{name} reads other columns or entries than {other_name}; compare runs with the same columns or entries, "
            "in the same order."
        )
    for what, same in {
        "observations": task.shapes == other_task.shapes,
        "actions": task.action_spec == other_task.action_spec,
        "masks of the available actions": task.has_mask == other_task.has_mask,
    }.items():
        if not same:
            raise RunError(f"{name} has other {what} than {other_name}; compare runs with the same {what}.")


def _warn_of_other_data(found: dict[Path, str]) -> None:
    """Log a warning if a checkpoint was trained on other data or rewards than the first one."""
    facts = {name: read_metadata(path)[0] for path, name in found.items()}
    first, *others = facts
    for name in others:
        for what in ("dataset", "reward"):
            own, wanted = facts[name][what], facts[first][what]
            if own != wanted:
                _logger.warning(
                    "%s was trained with %s=%s, but %s with %s=%s; all policies are evaluated on the data of %s.",
                    *(name, what, own, first, what, wanted, first),
                )


def import_policy(name: str, device: str) -> Candidate:
    """Return the policy ``MODULE:OBJECT``, on the device; the module may lie in the current folder.

    Raises:
        RunError: if there is no such object, or it is no policy.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise RunError(f"--policy is {name!r}, expected MODULE:OBJECT, such as mine:policy.")
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the code of the module raises any exception
        raise RunError(f"--policy {name}: the module {module_name} cannot be imported: {error!r}") from error
    policy = getattr(module, attribute, None)
    if not callable(policy) or not hasattr(policy, "in_keys") or isinstance(policy, type):
        found = "does not exist" if policy is None else f"is a {type(policy).__name__}"
        raise RunError(f"{attribute} of {module_name} {found}, expected a TensorDict policy, such as TensorDictModule.")
    file = getattr(module, "__file__", None)
    facts = {"policy": name, "changed": os.stat(file).st_mtime_ns if file else 0}
    if isinstance(policy, nn.Module):  # the weights may come from another file
        facts["weights"] = weights_digest(policy)
        policy = policy.to(choose_device(device))
    return Candidate(name, facts, lambda: policy)


def _load(path: Path, device: str) -> Any:
    read_metadata(path)  # its error is better than that of load, if the run has replaced this checkpoint
    return load(path, device=device).policy


def _all_checkpoints(run: Path) -> list[Path]:
    """Return all checkpoints of a run, by their number of steps, the best one last."""
    kept = [path for path in sorted((run / CHECKPOINTS).glob("*")) if Checkpoint.is_checkpoint(path)]
    best = best_checkpoint(run / BEST)
    if not kept and best is None:
        return [find_checkpoint(run)]  # raises an error
    return kept if best is None else [*kept, best]


def _facts(path: Path) -> dict[str, Any]:
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return {"checkpoint": str(path), "changed": max(file.stat().st_mtime_ns for file in files)}
