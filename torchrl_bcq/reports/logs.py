"""Reads the settings and logged scalars of run folders, and groups runs that differ only in the seed."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchrl_bcq.errors import RunError

# Settings and sections of settings that may differ between repetitions of one experiment
NOT_COMPARED = {
    *("seed", "out", "resume", "device", "threads", "compile", "cudagraph", "root", "progress_bar"),
    *("logger", "logger_kwargs", "checkpoint", "baseline"),
}
# in order of preference: the picture shows the first of these metrics that the runs logged
DEFAULT_METRICS = ("return", "held_out_td_error", "td_error")
_VALUE_CHARACTERS = 40  # largest number of characters of a value in a label; of a long path, a label shows the end
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A run: a folder that ``torchrl-bcq train`` has made."""

    folder: Path
    settings: dict[str, Any]  # values by dotted name, such as loss.gamma

    @property
    def compared(self) -> dict[str, Any]:
        """The settings that repetitions of one experiment share."""
        return {name: value for name, value in self.settings.items() if name.split(".")[0] not in NOT_COMPARED}

    @property
    def metrics(self) -> set[str]:
        """Names of the logged scalars."""
        scalars = self.folder / "log" / "scalars"
        return {file.relative_to(scalars).with_suffix("").as_posix() for file in scalars.rglob("*.csv")}

    def read(self, metric: str) -> dict[int, float]:
        """Return the logged values of ``metric``: a dict from step to value, empty if nothing was logged.

        If a step was logged several times, its last value counts. An incomplete last line is skipped.

        Raises:
            RunError: if a complete line does not consist of an integer and a number.
        """
        file = self.folder / "log" / "scalars" / f"{metric}.csv"
        if not file.is_file():
            return {}
        *lines, _ = file.read_text().split("\n")  # the line after the last newline may be unfinished
        values = {}
        for number, line in enumerate(lines, 1):
            try:
                step, value = line.split(",")
                values[int(step)] = float(value)
            except ValueError:
                raise RunError(
                    f"{file}, line {number}: {line[:80]!r} is not STEP,VALUE; remove this line to plot the rest."
                ) from None
        return dict(sorted(values.items()))

    @property
    def behaviour(self) -> float | None:
        """Mean return of the episodes in the dataset; None if there is no ``results.json``."""
        file = self.folder / "results.json"
        if not file.is_file():
            return None
        try:
            return float(json.loads(file.read_text())["behaviour"]["mean"])
        except (ValueError, TypeError, KeyError) as error:
            raise RunError(
                f"{file} was not written by torchrl-bcq train ({error}); remove the file to plot without it, or "
                f"remove it and run torchrl-bcq train resume={self.folder} to write it again."
            ) from error


@dataclass(frozen=True)
class Group:
    """Runs that differ only in the seed."""

    label: str
    runs: list[Run]


def find_runs(folders: Sequence[Path], read_settings: Callable[[Path], dict[str, Any]]) -> list[Run]:
    """Open the runs in ``folders``; a folder is a run or contains runs. Each run is opened only once.

    ``read_settings`` takes the folder of a run and returns its settings by dotted name, such as ``loss.gamma``.

    Raises:
        RunError: if a folder does not exist, or if a folder neither is a run nor contains one.
    """
    found: dict[Path, Run] = {}
    for folder in folders:
        inner = folder.glob("[!.]*/config.yaml")  # [!.] skips the folder .hydra and its config.yaml
        files = [*folder.glob("config.yaml")] or sorted(inner, key=lambda file: (len(str(file)), file))
        if not files:
            what = "it and its subfolders have no config.yaml" if folder.is_dir() else "there is no such folder"
            raise RunError(f"{folder} is not a run: {what}; choose a folder that torchrl-bcq train has made.")
        for run in (file.parent for file in files):
            found.setdefault(run.resolve(), Run(run, read_settings(run)))
    return list(found.values())


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Group runs whose settings differ only in ``NOT_COMPARED``; labels show the settings that differ between groups.

    Logs a warning if runs of one group have the same seed, because runs with equal seeds are not independent
    repetitions.
    """
    alike: dict[str, list[Run]] = {}
    for run in runs:
        alike.setdefault(repr(sorted(run.compared.items())), []).append(run)
    firsts = [members[0].compared for members in alike.values()]
    differing = differing_settings(firsts)
    labels = [_label(first, differing, shorten) for first in firsts]
    if len(set(labels)) < len(labels):  # some labels differ only in the part that was cut off
        labels = [_label(first, differing, str) for first in firsts]
    for members in alike.values():
        for seed in sorted({run.settings["seed"] for run in members}):
            same = [str(run.folder) for run in members if run.settings["seed"] == seed]
            if len(same) > 1:
                message = "%s have the same settings and the same seed, %s; each of them counts as one repetition."
                _logger.warning(message, ", ".join(same), seed)
    return [Group(label, members) for label, members in zip(labels, alike.values(), strict=True)]


def differing_settings(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Return the names of the settings that have several values; an algorithm that lacks a setting does not count."""
    names = dict.fromkeys(name for settings in runs for name in settings)
    return [name for name in names if len({repr(settings[name]) for settings in runs if name in settings}) > 1]


def choose_metric(runs: Sequence[Run], wanted: str | None) -> str:
    """Return ``wanted``; if None, the first logged metric of ``DEFAULT_METRICS``, or else the first loss.

    Raises:
        RunError: if the wanted metric was not logged, or if nothing was logged.
    """
    available = sorted({name for run in runs for name in run.metrics})
    folders = ", ".join(str(run.folder) for run in runs)
    if not available:
        raise RunError(f"nothing was logged in {folders}: no log/scalars/*.csv; choose runs that have made some steps.")
    for name in (*DEFAULT_METRICS, *loss_metrics(runs)) if wanted is None else (wanted,):
        if name in available:
            return name
    missing = wanted or f"{', '.join(DEFAULT_METRICS)} or loss"
    known = ", ".join(available)
    raise RunError(f"no {missing} was logged in {folders}; use torchrl-bcq plot --metric with one of {known}.")


def loss_metrics(runs: Sequence[Run]) -> list[str]:
    """Names of the logged losses, then TD errors, then the same metrics on held-out episodes."""
    logged = {name for run in runs for name in run.metrics}
    found = [name for name in logged if re.fullmatch(r"(held_out_)?(loss_.+|td_error)", name)]
    return sorted(found, key=lambda name: (name.startswith("held_out_"), name.endswith("td_error"), name))


def dataset_returns(groups: Sequence[Group]) -> dict[float, str]:
    """Map the mean return of each dataset to the label of the first group of runs that used this dataset."""
    pairs = [(run.behaviour, group.label) for group in groups for run in group.runs]
    # in reversed order, the first label of a mean return is written last, so it stays
    return {mean: label for mean, label in reversed(pairs) if mean is not None}


def shared_title(runs: Sequence[Run]) -> str:
    """Return the names of the environment and the dataset; leave out a name that differs between runs."""
    found = ({str(run.settings.get(name)) for run in runs} for name in ("evaluation.env", "dataset"))
    shared = (values - {"auto", "None"} for values in found if len(values) == 1)
    return ", ".join(shorten(value) for values in shared for value in values)


def shorten(value: Any) -> str:
    """Convert the value of a setting to text; keep only the end of a long text."""
    text = "null" if value is None else str(value)
    return text if len(text) <= _VALUE_CHARACTERS else f"…{text[1 - _VALUE_CHARACTERS :]}"


def _label(settings: dict[str, Any], differing: Sequence[str], text: Callable[[Any], str]) -> str:
    if not differing:  # there is only one group
        return text(settings.get("dataset"))
    return ", ".join(f"{name}={text(settings.get(name, 'unset'))}" for name in differing)
