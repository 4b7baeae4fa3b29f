"""Run folders: their settings, their logged scalars, and which runs differ only in the seed."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
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
    def metrics(self) -> set[str]:
        """Names of the logged scalars."""
        scalars = self.folder / "log" / "scalars"
        return {file.relative_to(scalars).with_suffix("").as_posix() for file in scalars.rglob("*.csv")}

    def read(self, metric: str) -> dict[int, float]:
        """Values of a scalar by step, in order; empty if it was not logged. Raises RunError for a malformed line."""
        file = self.folder / "log" / "scalars" / f"{metric}.csv"
        return read_scalar(file) if file.is_file() else {}

    @property
    def behaviour(self) -> float | None:
        """Mean return of the dataset's episodes, if ``results.json`` has it."""
        file = self.folder / "results.json"
        try:
            mean = (json.loads(file.read_text()).get("behaviour") or {}).get("mean") if file.is_file() else None
            return None if mean is None else float(mean)
        except (ValueError, TypeError, AttributeError) as error:
            raise RunError(
                f"{file} was not written by train ({error}); remove it, or evaluate the run again."
            ) from error


@dataclass(frozen=True)
class Group:
    """Runs that differ only in the seed."""

    label: str
    runs: list[Run]


def find_runs(folders: Sequence[Path]) -> list[Run]:
    """Open run folders, and the run folders inside multirun folders, each once.

    Raises:
        RunError: if a folder is missing, neither is a run nor contains one, or its settings cannot be read.
    """
    found: dict[Path, Run] = {}
    for folder in folders:
        if not folder.is_dir():
            raise RunError(f"there is no folder {folder}; pass one that torchrl-bcq train has made.")
        inner = (path for path in folder.iterdir() if not path.name.startswith("."))  # .hydra has a config.yaml, too
        candidates = [folder, *sorted(inner, key=lambda path: (len(path.name), path.name))]
        runs = [path for path in candidates if (path / "config.yaml").is_file()]
        if not runs:
            raise RunError(
                f"{folder} is no run: neither it nor a folder in it has a config.yaml; "
                "pass one that torchrl-bcq train has made."
            )
        for path in runs[:1] if runs[0] == folder else runs:
            found.setdefault(path.resolve(), Run(path, _read_settings(path / "config.yaml")))
    return list(found.values())


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Group runs that agree in all but :data:`NOT_COMPARED`; labels name the settings that differ among the groups.

    Logs a warning for runs of one group with the same seed: they are not independent repetitions.
    """
    alike: dict[str, tuple[dict[str, Any], list[Run]]] = {}
    for run in runs:
        compared = {name: value for name, value in run.settings.items() if name.split(".")[0] not in NOT_COMPARED}
        alike.setdefault(repr(sorted(compared.items())), (compared, []))[1].append(run)
    firsts = [compared for compared, _ in alike.values()]
    names = dict.fromkeys(name for first in firsts for name in first)
    differing = [name for name in names if any(_differ(name, *pair) for pair in combinations(firsts, 2))]
    labels = [_label(first, differing, shorten) for first in firsts]
    if len(set(labels)) < len(labels):  # they differ in the part that was cut off
        labels = [_label(first, differing, str) for first in firsts]
    for _, members in alike.values():
        by_seed: dict[str, list[str]] = {}
        for run in members:
            by_seed.setdefault(repr(run.settings.get("seed")), []).append(str(run.folder))
        for seed, same in by_seed.items():
            if len(same) > 1:
                message = "%s have the same settings and the same seed, %s; each counts as a repetition."
                _logger.warning(message, ", ".join(same), seed)
    return [Group(label, members) for label, (_, members) in zip(labels, alike.values(), strict=True)]


def choose_metric(runs: Sequence[Run], wanted: str | None) -> str:
    """Check the wanted metric, or choose one: of :data:`DEFAULT_METRICS`, or else the first loss.

    Raises:
        RunError: if the wanted metric, or any metric, was not logged.
    """
    available = sorted(_metrics(runs))
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
    found = [name for name in _metrics(runs) if re.fullmatch(r"(held_out_)?(loss_.+|td_error)", name)]
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


def read_scalar(file: Path) -> dict[int, float]:
    """Read lines ``step,value``. The last value of a step counts; an incomplete last line is skipped.

    Raises:
        RunError: for any other line that is not an integer and a number.
    """
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


def shorten(value: Any) -> str:
    """The value of a setting as text; a long one loses its beginning."""
    text = "null" if value is None else str(value)
    return text if len(text) <= _VALUE_CHARACTERS else f"…{text[1 - _VALUE_CHARACTERS :]}"


def _metrics(runs: Sequence[Run]) -> set[str]:
    return set().union(*(run.metrics for run in runs))


def _differ(name: str, one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether a setting differs; algorithms are not compared in settings that only one of them has."""
    shared = one.get("algorithm") == other.get("algorithm") or (name in one and name in other) or name == "algorithm"
    return shared and repr(one.get(name, "unset")) != repr(other.get(name, "unset"))


def _label(settings: dict[str, Any], differing: Sequence[str], text: Callable[[Any], str]) -> str:
    if not differing:  # there is one group
        return text(settings.get("dataset"))
    return ", ".join(f"{name}={text(settings.get(name, 'unset'))}" for name in differing)


def _read_settings(file: Path) -> dict[str, Any]:
    import yaml
    from omegaconf import OmegaConf  # reads 3e-4 as a number, unlike PyYAML's loader
    from omegaconf.errors import OmegaConfBaseException

    try:
        settings = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise RunError(f"{file} cannot be read as settings: {error}") from error
    if not isinstance(settings, dict):
        raise RunError(f"{file} holds a {type(settings).__name__}, expected the settings that train writes.")
    return dict(_leaves(settings))


def _leaves(settings: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
