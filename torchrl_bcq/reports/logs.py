"""Run folders: their settings, their logged scalars, and which runs differ only in the seed."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchrl_bcq.errors import RunError

# Settings, and sections of settings, that may differ among repetitions of one experiment
NOT_COMPARED = {
    *("seed", "out", "resume", "device", "threads", "compile", "cudagraph", "root", "progress_bar"),
    *("logger", "logger_kwargs", "checkpoint"),
}
DEFAULT_METRICS = ("return", "held_out_td_error", "td_error")  # the first one that was logged is drawn
_VALUE_CHARACTERS = 40  # of a setting in a label; the end of a path says most
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A folder made by ``torchrl-bcq train``."""

    folder: Path
    settings: dict[str, Any]  # by dotted name

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
        """Values of a scalar by step, in order; empty if it was not logged.

        The last value of a step counts. An incomplete last line is skipped.

        Raises:
            RunError: for any other line that is not an integer and a number.
        """
        file = self.folder / "log" / "scalars" / f"{metric}.csv"
        if not file.is_file():
            return {}
        *lines, _ = file.read_text().split("\n")  # text after the last newline is incomplete, even if it is a number
        values = {}
        for number, line in enumerate(lines, 1):
            try:
                step, value = line.split(",")
                values[int(step)] = float(value)
            except ValueError:
                raise RunError(
                    f"{file}, line {number}: {line[:80]!r} is not STEP,VALUE; remove the line to plot the others."
                ) from None
        return dict(sorted(values.items()))

    @property
    def behaviour(self) -> float | None:
        """Mean return of the dataset's episodes, if there is a ``results.json``."""
        file = self.folder / "results.json"
        if not file.is_file():
            return None
        try:
            return float(json.loads(file.read_text())["behaviour"]["mean"])
        except (ValueError, TypeError, KeyError) as error:
            raise RunError(
                f"{file} was not written by train ({error}); remove it, or evaluate the run again."
            ) from error


@dataclass(frozen=True)
class Group:
    """Runs that differ only in the seed."""

    label: str
    runs: list[Run]


def find_runs(folders: Sequence[Path], read_settings: Callable[[Path], dict[str, Any]]) -> list[Run]:
    """Open run folders, and the run folders inside multirun folders, each once.

    ``read_settings`` reads the settings of a run folder, by dotted name.

    Raises:
        RunError: if a folder is missing, or neither is a run nor contains one.
    """
    found: dict[Path, Run] = {}
    for folder in folders:
        inner = folder.glob("[!.]*/config.yaml")  # .hydra has one, too
        files = [*folder.glob("config.yaml")] or sorted(inner, key=lambda file: (len(str(file)), file))
        if not files:
            what = "neither it nor a folder in it has a config.yaml" if folder.is_dir() else "there is no such folder"
            raise RunError(f"{folder} is no run: {what}; pass one that torchrl-bcq train has made.")
        for run in (file.parent for file in files):
            found.setdefault(run.resolve(), Run(run, read_settings(run)))
    return list(found.values())


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Group runs that agree in all but :data:`NOT_COMPARED`; labels name the settings that differ among the groups.

    Logs a warning for runs of one group with the same seed: they are not independent repetitions.
    """
    alike: dict[str, list[Run]] = {}
    for run in runs:
        alike.setdefault(repr(sorted(run.compared.items())), []).append(run)
    firsts = [members[0].compared for members in alike.values()]
    names = dict.fromkeys(name for first in firsts for name in first)  # algorithms have settings of their own
    differing = [name for name in names if len({repr(first[name]) for first in firsts if name in first}) > 1]
    labels = [_label(first, differing, shorten) for first in firsts]
    if len(set(labels)) < len(labels):  # they differ in the part that was cut off
        labels = [_label(first, differing, str) for first in firsts]
    for members in alike.values():
        for seed in sorted({run.settings["seed"] for run in members}):
            same = [str(run.folder) for run in members if run.settings["seed"] == seed]
            if len(same) > 1:
                message = "%s have the same settings and the same seed, %s; each counts as a repetition."
                _logger.warning(message, ", ".join(same), seed)
    return [Group(label, members) for label, members in zip(labels, alike.values(), strict=True)]


def choose_metric(runs: Sequence[Run], wanted: str | None) -> str:
    """Check the wanted metric, or choose one: of :data:`DEFAULT_METRICS`, or else the first loss.

    Raises:
        RunError: if the wanted metric, or any metric, was not logged.
    """
    available = sorted({name for run in runs for name in run.metrics})
    folders = ", ".join(str(run.folder) for run in runs)
    if not available:
        raise RunError(f"nothing was logged in {folders}: no log/scalars/*.csv; pass runs that have made some steps.")
    for name in (*DEFAULT_METRICS, *loss_metrics(runs)) if wanted is None else (wanted,):
        if name in available:
            return name
    missing = wanted or f"{', '.join(DEFAULT_METRICS)} or loss"
    raise RunError(f"no {missing} was logged in {folders}; choose a --metric of {', '.join(available)}.")


def loss_metrics(runs: Sequence[Run]) -> list[str]:
    """Names of the logged losses and TD errors, in this order; those on held-out episodes come last."""
    logged = {name for run in runs for name in run.metrics}
    found = [name for name in logged if re.fullmatch(r"(held_out_)?(loss_.+|td_error)", name)]
    return sorted(found, key=lambda name: (name.startswith("held_out_"), name.endswith("td_error"), name))


def dataset_returns(groups: Sequence[Group]) -> dict[float, str]:
    """Mean returns of the datasets, each with the label of a group that was trained on it."""
    pairs = [(run.behaviour, group.label) for group in groups for run in group.runs]
    return {mean: label for mean, label in reversed(pairs) if mean is not None}  # the label of the first group


def shared_title(runs: Sequence[Run]) -> str:
    """Environment and dataset, where all runs name the same."""
    found = ({str(run.settings.get(name)) for run in runs} for name in ("evaluation.env", "dataset"))
    shared = (values - {"auto", "None"} for values in found if len(values) == 1)
    return ", ".join(shorten(value) for values in shared for value in values)


def shorten(value: Any) -> str:
    """The value of a setting as text; a long one loses its beginning."""
    text = "null" if value is None else str(value)
    return text if len(text) <= _VALUE_CHARACTERS else f"…{text[1 - _VALUE_CHARACTERS :]}"


def _label(settings: dict[str, Any], differing: Sequence[str], text: Callable[[Any], str]) -> str:
    if not differing:  # there is one group
        return text(settings.get("dataset"))
    return ", ".join(f"{name}={text(settings.get(name, 'unset'))}" for name in differing)
