"""TorchRL's loggers of a run, and the log of a resumed run."""

from __future__ import annotations

import hashlib
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

from torchrl.record.loggers import Logger, get_logger

from torchrl_bcq.errors import RunError
from torchrl_bcq.files import write_whole

CSV = "log"  # folder of the CSV log within a run's
_LOCAL = ("csv", "tensorboard")  # take no arguments
_KINDS = ("csv", "tensorboard", "wandb", "mlflow", "trackio")


class Loggers:
    """Several of TorchRL's loggers, each of which gets all scalars."""

    def __init__(self, loggers: Mapping[str, Logger]) -> None:
        self.loggers = dict(loggers)

    def log_scalar(self, name: str, value: float, step: int | None = None) -> None:
        """Log a scalar."""
        for logger in self.loggers.values():
            logger.log_scalar(name, value, step=step)

    def log_hparams(self, settings: Mapping[str, Any]) -> None:
        """Log the settings, in loggers that keep them."""
        for kind, logger in self.loggers.items():
            if kind in ("wandb", "mlflow", "trackio"):
                logger.log_hparams(dict(settings))

    def state_dict(self) -> dict[str, Any]:
        """State of the loggers that have one; the CSV log is in its files."""
        return {kind: logger.state_dict() for kind, logger in self.loggers.items() if kind != "csv"}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the state of the loggers that are the same."""
        for kind in state_dict.keys() & self.loggers.keys():
            self.loggers[kind].load_state_dict(state_dict[kind])

    def close(self) -> None:
        """Close all loggers."""
        for logger in self.loggers.values():
            logger.close()


def make_loggers(kinds: Sequence[str], out: Path, settings: Mapping[str, Any]) -> Loggers | None:
    """The loggers of a run in the folder ``out``; ``settings`` are arguments of each, by kind.

    Raises:
        RunError: if a kind is unknown, or its package is not installed.
    """
    if unknown := [kind for kind in (*kinds, *settings) if kind not in _KINDS]:
        raise RunError(f"there is no logger {unknown[0]!r}; choose of {[*_KINDS]}.")
    for kind, arguments in settings.items():
        if not isinstance(arguments, Mapping) or (arguments and kind in _LOCAL):
            expected = "nothing" if kind in _LOCAL else f"logger_kwargs.{kind}.NAME=VALUE"
            raise RunError(f"logger_kwargs.{kind} is {arguments!r}, expected {expected}.")
    loggers = {}
    for kind in dict.fromkeys(kinds):
        try:
            loggers[kind] = _make_logger(kind, out, dict(settings.get(kind, {})))
        except ImportError as error:
            raise RunError(f"logger {kind} needs its package ({error}): pip install {kind}.") from error
        except TypeError as error:
            raise RunError(f"logger {kind} cannot be made with {settings.get(kind, {})}: {error}") from error
    return Loggers(loggers) if loggers else None


def _make_logger(kind: str, out: Path, settings: dict[str, Any]) -> Logger:
    if kind == "wandb":  # a resumed run appends to the same W&B run
        identity = hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:8]
        settings = {"id": f"{out.name}-{identity}", "resume": "allow", **settings}
    name, folder = {"csv": (CSV, out), "tensorboard": ("tensorboard", out)}.get(kind, (out.name, out / kind))
    nested = {} if kind in _LOCAL else {f"{kind}_kwargs": settings}
    logger = get_logger(kind, str(folder), name, **nested)
    if kind == "csv":
        experiment = logger.experiment
        experiment.scalars = defaultdict(lambda: deque(maxlen=0))  # TorchRL's keeps every value in memory
        experiment.close = partial(_close_files, experiment.files)  # TorchRL closes files only when it is collected
    return logger


def _close_files(files: dict[str, IO]) -> None:
    while files:
        files.popitem()[1].close()


def trim_log(out: Path, step: int) -> None:
    """Remove the lines of a run's CSV log after a step (-1: all), which a killed run wrote after its checkpoint."""
    for file in sorted((out / CSV / "scalars").glob("*.csv")):
        lines = file.read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and int(line.partition(",")[0]) <= step]
        if kept != lines:
            with write_whole(file) as aside:
                aside.write_text("".join(kept))
