"""Folders of runs: what was set, what was logged, and which of them differ by the seed alone."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchrl_bcq.cli.errors import RunError

# settings, and whole sections of them, that may differ between repetitions of one experiment
NOT_COMPARED = {
    "seed",
    "out",
    "resume",
    "device",
    "threads",
    "compile",
    "cudagraph",
    "root",
    "progress_bar",
    "logger",
    "logger_kwargs",
    "checkpoint",
}

_VALUE_CHARACTERS = 40  # of a setting in a label; of a path, its end tells most
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A folder that ``torchrl-bcq train`` has made."""

    folder: Path
    settings: dict[str, Any]  # by dotted name

    @property
    def metrics(self) -> set[str]:
        """Names of the scalars that were logged."""
        scalars = self.folder / "log" / "scalars"
        return {file.relative_to(scalars).with_suffix("").as_posix() for file in scalars.rglob("*.csv")}

    def read(self, metric: str) -> dict[int, float]:
        """A scalar by step, in order; empty where it was not logged. Raises RunError for a malformed line."""
        file = self.folder / "log" / "scalars" / f"{metric}.csv"
        return read_scalar(file) if file.is_file() else {}

    @property
    def behaviour(self) -> float | None:
        """The mean return of the dataset's episodes, if ``results.json`` has it."""
        file = self.folder / "results.json"
        if not file.is_file():
            return None
        try:
            mean = (json.loads(file.read_text()).get("behaviour") or {}).get("mean")
            return None if mean is None else float(mean)
        except (ValueError, TypeError, AttributeError) as error:
            raise RunError(
                f"{file} is not what train writes ({error}); remove it, or evaluate the run again."
            ) from error

    @property
    def compared(self) -> dict[str, Any]:
        """The settings that make it another experiment."""
        return {name: value for name, value in self.settings.items() if name.split(".")[0] not in NOT_COMPARED}


@dataclass(frozen=True)
class Group:
    """Runs that agree on everything but the seed."""

    label: str
    runs: list[Run]


def find_runs(folders: Sequence[Path]) -> list[Run]:
    """Open run folders, and the run folders within multirun folders, each once.

    Raises:
        RunError: if a folder is missing, is no run and holds none, or its settings cannot be read.
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
    """Put runs together that agree on everything but :data:`NOT_COMPARED`; labels say what differs among the groups.

    Two runs of one group that have the same seed are no independent repetitions: a warning names them.
    """
    alike: dict[str, list[Run]] = {}
    for run in runs:
        alike.setdefault(repr(sorted(run.compared.items())), []).append(run)
    firsts = [members[0].compared for members in alike.values()]
    names = dict.fromkeys(name for first in firsts for name in first)
    differing = [name for name in names if len({repr(first.get(name, "unset")) for first in firsts}) > 1]
    labels = [_label(first, differing, shorten) for first in firsts]
    if len(set(labels)) < len(labels):  # they differ in what was cut off
        labels = [_label(first, differing, str) for first in firsts]
    groups = [Group(label, members) for label, members in zip(labels, alike.values(), strict=True)]
    for group in groups:
        _warn_of_repeated_seeds(group)
    return groups


def read_scalar(file: Path) -> dict[int, float]:
    """Read ``step,value`` lines: of a step that occurs twice the last counts, a cut-off last line does not.

    Raises:
        RunError: for any other line that is not an integer and a number.
    """
    *lines, _ = file.read_text().split("\n")  # what follows the last newline was cut off, even if it reads as a number
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
    """A setting's value as text, cut from the left where it is long."""
    text = "null" if value is None else str(value)
    return text if len(text) <= _VALUE_CHARACTERS else f"…{text[1 - _VALUE_CHARACTERS :]}"


def _label(settings: dict[str, Any], differing: Sequence[str], text: Callable[[Any], str]) -> str:
    if not differing:  # there is one group
        return text(settings.get("dataset"))
    return ", ".join(f"{name}={text(settings.get(name, 'unset'))}" for name in differing)


def _warn_of_repeated_seeds(group: Group) -> None:
    seeds = Counter(repr(run.settings.get("seed")) for run in group.runs)
    for seed in [seed for seed, count in seeds.items() if count > 1]:
        same = ", ".join(str(run.folder) for run in group.runs if repr(run.settings.get("seed")) == seed)
        _logger.warning("%s have the same settings and the same seed, %s; each counts as a repetition.", same, seed)


def _read_settings(file: Path) -> dict[str, Any]:
    import yaml
    from omegaconf import OmegaConf  # reads 3e-4 as a number, which YAML's own loader does not
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
