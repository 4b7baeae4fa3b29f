"""Makes the TorchRL loggers of a run, and trims the CSV log of a resumed run."""

from __future__ import annotations

import hashlib
import logging
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import IO, Any

from torchrl.record.loggers import Logger, get_logger

from torchrl_bcq.errors import RunError
from torchrl_bcq.files import write_whole

_logger = logging.getLogger(__name__)

CSV = "log"  # folder of the CSV log, inside the folder of the run
_LOCAL = ("csv", "tensorboard")  # these loggers accept no arguments in logger_kwargs
_KINDS = ("csv", "tensorboard", "wandb", "mlflow", "trackio")


class Loggers:
    """Combines several TorchRL loggers; each of the loggers logs all scalars."""

    def __init__(self, loggers: Mapping[str, Logger]) -> None:
        self.loggers = dict(loggers)
        self._failed: set[str] = set()  # services of which an error has been reported

    def log_scalar(self, name: str, value: float, step: int | None = None) -> None:
        """Log a scalar with each logger."""
        for kind, logger in self.loggers.items():
            self._call(kind, partial(logger.log_scalar, name, value, step=step))

    def log_hparams(self, settings: Mapping[str, Any]) -> None:
        """Log the settings with the loggers that can store settings."""
        for kind, logger in self.loggers.items():
            if kind not in _LOCAL:
                self._call(kind, partial(logger.log_hparams, dict(settings)))

    def state_dict(self) -> dict[str, Any]:
        """Return the state of each logger. The CSV logger is left out, because its files keep its state."""
        return {kind: logger.state_dict() for kind, logger in self.loggers.items() if kind != "csv"}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the state of each logger that is in ``state_dict``; warn if a service now has another run."""
        for kind in state_dict.keys() & self.loggers.keys():
            try:
                self.loggers[kind].load_state_dict(state_dict[kind])
            except RuntimeError as error:  # the folder of the run was moved, and the id in W&B comes from its path
                if "id" not in state_dict[kind]:
                    raise
                advice = f"to append to the earlier one, set logger_kwargs.{kind}.id={state_dict[kind]['id']}"
                _logger.warning("%s continues in another run of its service (%s); %s", kind, error, advice)

    def close(self) -> None:
        """Close all loggers."""
        for kind, logger in self.loggers.items():
            self._call(kind, logger.close)

    def _call(self, kind: str, method: Callable[[], Any]) -> None:
        """Call a method of a logger. The error of a service is reported once, and does not end the run."""
        try:
            method()
        except Exception as error:
            if kind in _LOCAL:
                raise
            if kind not in self._failed:
                self._failed.add(kind)
                _logger.warning("logger %s fails, so its log has gaps: %r", kind, error)


def make_loggers(kinds: Sequence[str], out: Path, settings: Mapping[str, Any]) -> Loggers | None:
    """Make the loggers of a run; returns None if there are no ``kinds``.

    Args:
        kinds: names of the loggers, such as ``"csv"``.
        out: folder of the run.
        settings: mapping from the name of a logger to the arguments of this logger.

    Raises:
        RunError: if a logger is unknown, its arguments are invalid, or its package is not installed.
    """
    if unknown := [kind for kind in (*kinds, *settings) if kind not in _KINDS]:
        raise RunError(f"there is no logger {unknown[0]!r}; choose from {[*_KINDS]}.")
    for kind, arguments in settings.items():
        if not isinstance(arguments, Mapping) or (arguments and kind in _LOCAL):
            expected = "no arguments" if kind in _LOCAL else f"arguments as logger_kwargs.{kind}.NAME=VALUE"
            raise RunError(f"logger_kwargs.{kind} is {arguments!r}, expected {expected}.")
    if kinds and (unused := settings.keys() - {*kinds}):
        _logger.warning("logger_kwargs has %s, which have no effect: logger is %s", sorted(unused), [*kinds])
    made = Loggers({})
    with ExitStack() as after_failure:
        after_failure.callback(made.close)
        for kind in dict.fromkeys(kinds):
            try:
                made.loggers[kind] = _make_logger(kind, out, dict(settings.get(kind, {})))
            except ImportError as error:
                raise RunError(f"the package of logger {kind} is missing ({error}); run pip install {kind}.") from error
            except TypeError as error:
                raise RunError(f"logger {kind} rejects the arguments {settings.get(kind, {})}: {error}") from error
        after_failure.pop_all()
    return made if made.loggers else None


def _make_logger(kind: str, out: Path, settings: dict[str, Any]) -> Logger:
    if kind == "mlflow":
        return _make_mlflow_logger(out, settings)
    # a resumed run gets the same id, so W&B and Trackio append to the same run
    identity = f"{out.name}-{hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:8]}"
    if kind == "wandb":
        settings = {"id": identity, "resume": "allow", **settings}
    names = {"csv": (CSV, out), "tensorboard": ("tensorboard", out), "trackio": (identity, out / kind)}
    name, folder = names.get(kind, (out.name, out / kind))
    nested = {} if kind in _LOCAL else {f"{kind}_kwargs": settings}
    logger = get_logger(kind, str(folder), name, **nested)
    if kind == "csv":
        experiment = logger.experiment
        experiment.scalars = defaultdict(lambda: deque(maxlen=0))  # TorchRL's logger would keep every value in memory
        experiment.close = partial(_close_files, experiment.files)  # TorchRL closes files only at garbage collection
    return logger


def _make_mlflow_logger(out: Path, settings: dict[str, Any]) -> Logger:
    """Make a logger that writes to a database in the folder of the run. New versions of MLflow refuse plain files."""
    from torchrl.record.loggers.mlflow import MLFlowLogger

    place = {"tracking_uri": f"sqlite:///{(out / 'mlflow.db').resolve().as_posix()}"}
    logger = MLFlowLogger(out.name, **{**place, "artifact_location": (out / "mlflow").resolve().as_uri(), **settings})
    import mlflow

    logger.experiment.close = mlflow.end_run  # otherwise the next run in this process would find an active run
    return logger


def _close_files(files: dict[str, IO]) -> None:
    while files:
        files.popitem()[1].close()


def trim_log(out: Path, step: int) -> None:
    """Remove the lines after a step from the CSV log of a run; step -1 removes all lines.

    A killed run may have logged steps after its last checkpoint. The resumed run repeats these steps and logs the steps
    again.
    """
    for file in sorted((out / CSV / "scalars").glob("*.csv")):
        lines = file.read_text().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]
        for number, line in enumerate(whole, 1):
            if not line.partition(",")[0].isdigit():
                raise RunError(f"line {number} of {file} is {line.strip()!r}, expected STEP,VALUE; remove this line.")
        kept = [line for line in whole if int(line.partition(",")[0]) <= step]
        if kept != lines:
            with write_whole(file) as aside:
                aside.write_text("".join(kept))
