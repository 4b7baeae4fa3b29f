"""Does the work of ``torchrl-bcq train``: starts or resumes a run, then trains its baseline."""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from filelock import FileLock, Timeout
from omegaconf import DictConfig
from torchrl.checkpoint import Checkpoint, CheckpointError, CheckpointRotation
from tqdm.contrib.logging import logging_redirect_tqdm

from torchrl_bcq.errors import RunError
from torchrl_bcq.evaluation.environments import time_limit
from torchrl_bcq.files import write_whole
from torchrl_bcq.runs import processes
from torchrl_bcq.runs.assembly import CHANGED, assemble, check_numbers, reward_formula
from torchrl_bcq.runs.dataset import open_dataset
from torchrl_bcq.runs.folder import BASELINE, BEST, CHECKPOINTS, Task, choose_device, find_checkpoint, read_metadata
from torchrl_bcq.runs.initial import load_networks
from torchrl_bcq.runs.loggers import trim_log
from torchrl_bcq.runs.settings import FILE, check_resumable, default_settings, save_settings, to_plain, to_settings
from torchrl_bcq.runs.threads import choose_threads, use_threads
from torchrl_bcq.trainers import OfflineTrainer
from torchrl_bcq.trainers.best import best_checkpoint
from torchrl_bcq.trainers.checkpoints import damaged_checkpoints, tidy_rotation

RESULTS = "results.json"
_SAME_IN_BASELINE = (
    "dataset", "reader", "root", "action_low", "action_high", "action_clip", "n_actions", "reward", "sampler",
    "weights", "stack", "normalize", "held_out", "steps", "batch_size", "seed", "device", "threads",
    "average_decay", "log_interval", "logger", "logger_kwargs", "progress_bar", "evaluation",
)  # fmt: skip
_logger = logging.getLogger(__name__)


def train(settings: DictConfig) -> dict[str, Any]:
    """Start a run in the folder ``settings.out``, or resume it; then train its baseline, if the settings name one.

    Returns:
        The first process returns the contents of ``results.json``. If a signal stopped the run, the entry ``stopped``
        holds the name of the signal.

    Raises:
        RunError: if a setting is invalid, or does not fit the other settings or the dataset.
        DatasetError: if the dataset cannot be read or has defects.
        FloatingPointError: if a loss becomes infinite or NaN.
        OSError: if a file cannot be written.
    """
    check_numbers(settings)
    processes.check_device(settings.device)
    choose_device(settings.device)  # an unusable device is reported before the dataset is read
    check_folder(Path(settings.out) / BASELINE)
    results = _make_run(settings)
    if settings.baseline is not None and not results.get("stopped"):
        baseline = baseline_settings(settings)
        if settings.init_from is not None:  # that run may have given the bounds or the number of the actions
            task = processes.from_first(lambda: read_metadata(find_checkpoint(Path(settings.out)))[1])
            if task.n_actions is None:
                baseline.action_low, baseline.action_high = task.action_low, task.action_high
            else:
                baseline.n_actions = task.n_actions
        gc.collect()  # reference cycles hold the dataset of the run
        stopped = _make_run(baseline).get("stopped")
        results = {**results, "stopped": stopped} if stopped else results
    if processes.is_first() and not results.get("stopped"):
        commands = ("evaluate", "plot") if "final" in results else ("rank", "plot")  # without an environment: rank
        shown = (f"torchrl-bcq {word} {quote(settings.out)}" for word in commands)
        _logger.info("what to do next: %s", "; ".join(shown))
    return results


def check_folder(out: Path) -> None:
    """Raise a RunError if a run in the folder would replace files that are not those of a run."""
    if out.is_file():
        raise RunError(f"{out} is a file; choose a folder with out=FOLDER.")
    if any(out.glob("*/checkpoint-*")):
        return
    if not (out / FILE).is_file() and (runs := sorted(path.parent.name for path in out.glob(f"[0-9]*/{FILE}"))):
        found = f"{out} contains the runs {', '.join(runs)}"
        raise RunError(f"{found}; add -m to continue their sweep, or choose another folder with out=FOLDER.")
    file = out / FILE if (out / FILE).is_file() else out / RESULTS
    if file.is_file() and (file.name == RESULTS or "\nlog_interval:" not in file.read_text(errors="replace")):
        raise RunError(f"{file} is not a file of a run, and a run would replace it; choose another out=FOLDER.")


def baseline_settings(settings: DictConfig) -> DictConfig:
    """Return the settings of the baseline: mostly those of the run, but with a subfolder as ``out``."""
    plain, own = to_plain(settings), default_settings(settings.baseline)
    values = {name: plain[name] for name in ("version", *_SAME_IN_BASELINE) if name in plain}
    values |= {"algorithm": settings.baseline, "out": str(Path(settings.out) / BASELINE), "resume": True}
    values["network"] = {name: value for name, value in plain["network"].items() if name in own.network}
    values["checkpoint"] = {"interval": settings.checkpoint.interval}
    return to_settings(values, settings.out)  # text such as ${...} in the values is not resolved


def _make_run(settings: DictConfig) -> dict[str, Any]:
    out = Path(settings.out)
    check_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    with _alone(out):
        start = processes.from_first(lambda: _find_start(settings))
        file = out / RESULTS
        saved, _, step = (None, None, 0) if start is None else read_metadata(start)
        if step > settings.steps:
            found = f"the run in {out} has made {step:,} steps, but steps is {settings.steps}"
            raise RunError(f"{found}; set a larger number of steps.")
        if saved is not None and file.is_file():
            results = json.loads(file.read_text())
            early = results.get("stopped_early") and saved.early_stopping == settings.early_stopping
            if results["steps"] == step and (step == settings.steps or early):
                off = "set early_stopping.monitor=null"
                off += " early_stopping.threshold=null" if settings.early_stopping.threshold is not None else ""
                remedy = off if early else "increase steps=N"
                _logger.info("the run in %s is complete; to train it further, %s", out, remedy)
                return results
        return _train(settings, start)


def _train(settings: DictConfig, start: Path | None) -> dict[str, Any]:
    """Train from the checkpoint ``start`` (None: from the beginning), and return the results."""
    if start is not None and settings.threads == "auto":  # an exact resume needs the number of the run
        settings.threads = read_metadata(start)[0].threads
    if isinstance(settings.threads, int):
        use_threads(settings.threads)
    try:
        with processes.first_goes_first():
            transitions, task = open_dataset(settings)
    except FileNotFoundError as error:
        if start is None:
            raise
        raise RunError(f"{error} If the dataset has moved, name its new place with dataset=PATH.") from error
    if start is not None:
        _check_bounds(task, read_metadata(start)[1], start)
    out, trainer = Path(settings.out), assemble(settings, transitions, task)
    if settings.threads == "auto":
        chosen = choose_threads(trainer.loss_module, transitions[: settings.batch_size])
        settings.threads = processes.from_first(lambda: chosen)  # all processes have timed at the same time
        use_threads(settings.threads)
    try:
        if start is not None:
            _load(trainer, start, out)
        elif settings.init_from is not None:
            load_networks(trainer.loss_module, settings, task)
        if processes.is_first():
            trim_log(out, -1 if start is None else trainer.collected_frames)
            save_settings(settings, out)
            _announce(settings, task, trainer)
        logs_above_the_bar = logging_redirect_tqdm() if trainer.progress_bar else nullcontext()
        with processes.stoppable(trainer), logs_above_the_bar:
            trainer.train()
    finally:
        if trainer.logger is not None:
            trainer.logger.close()
    stopped = processes.stopped_by(trainer)
    return _conclude(trainer, task, out, stopped) if processes.is_first() else {"stopped": stopped}


def _load(trainer: OfflineTrainer, start: Path, out: Path) -> None:
    """Load the checkpoint ``start`` into the trainer of the run in the folder ``out``."""
    try:
        trainer.load_from_file(start)
    except CheckpointError as error:
        missing = {name.rpartition(".")[2] for name in getattr(error.result, "missing", ())}
        if new := " and ".join(sorted(missing & {"early_stopping", "logger"})):
            found = f"{start} has no state of {new}, because the run began without it"
            raise RunError(f"{found}; resume the run without it, or start a new run with init_from={out}.") from error
        if type(error.__cause__) is ValueError:  # raised by a part of the trainer that has changed
            raise RunError(f"{start} cannot be resumed: {error.__cause__}") from error
        advice = "to resume from the checkpoint before it, move it away"
        raise RunError(f"{start} cannot be loaded, so it may be damaged: {error}; {advice}.") from error


def _check_bounds(task: Task, saved: Task, start: Path) -> None:
    """Raise a RunError if the actions differ from those of the checkpoint ``start``."""
    saved.check_unchanged(task, f"{start} cannot be resumed exactly")
    if task.n_actions != saved.n_actions:
        found = f"{start} was trained with {saved.n_actions} actions, but there are now {task.n_actions}"
        raise RunError(f"{found}; set n_actions={saved.n_actions}.")
    before, now = ([one.action_low, one.action_high] for one in (saved, task))
    if not torch.equal(torch.tensor(before), torch.tensor(now)):  # float32: a few digits of a file may differ
        remedy = f"set 'action_low={before[0]}' 'action_high={before[1]}'".replace(", ", ",")
        found = f"{start} was trained with actions from {before[0]} to {before[1]}"
        raise RunError(f"{found}, but the bounds are now {now[0]} to {now[1]}; {remedy}.")


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Lock the folder, so that no other run can use it."""
    try:
        with FileLock(out / ".lock", timeout=0) if processes.is_first() else nullcontext():
            yield
    except Timeout:
        raise RunError(f"another run is using {out}; wait, or choose another folder with out=FOLDER.") from None


def _find_start(settings: DictConfig) -> Path | None:
    """Return the checkpoint to resume from; None for a new run. Raises a RunError if the run must not be resumed."""
    out = Path(settings.out)
    for folder in (out / CHECKPOINTS, out / BEST):
        tidy_rotation(folder)
    # a run that was killed early may have only a best checkpoint
    last = CheckpointRotation(out / CHECKPOINTS, keep_last=1).latest() or best_checkpoint(out / BEST)
    damaged = damaged_checkpoints(out / CHECKPOINTS, "" if last is None else last.name)
    what = f"the manifest.json of {damaged} in {out / CHECKPOINTS} cannot be read"
    if last is None and damaged:
        raise RunError(f"{what}, so the run cannot be resumed; restore it, or start a new run with out=FOLDER.")
    if last is None:
        return None
    if damaged:
        _logger.warning("%s, so the run resumes from the earlier checkpoint %s", what, last)
    saved, _, step = read_metadata(last)
    if not settings.resume:
        choice = "resume it with resume=true, or start a new one in another folder with out=FOLDER"
        raise RunError(f"{out} holds a run of {step} steps; {choice}.")
    check_resumable(settings, saved, out)
    return last


def _announce(settings: DictConfig, task: Task, trainer: OfflineTrainer) -> None:
    advice = [] if settings.evaluation.env is None else ["evaluation.env=ID names one"]
    advice += [] if settings.held_out else ["held_out=0.2 keeps a fifth of the episodes for metrics and rank"]
    where = f"without an environment ({'; '.join(advice)})".replace(" ()", "")
    where = f"evaluated in {task.env}" if task.env else where
    span = f"steps {trainer.collected_frames:,} to {settings.steps:,}"
    device = next(trainer.loss_module.parameters()).device
    what = f"{settings.algorithm} on {settings.dataset}"
    _logger.info("%s: %s, %s, %s on %s", settings.out, what, where, span, device)
    if device.type == "cuda" and not (settings.cudagraph or settings.compile):
        _logger.info("cudagraph=true makes gradient steps on a GPU several times as fast")
    if (formula := reward_formula(settings)) is not None:
        _logger.info("%s: rewards are changed to %s; %s", settings.out, formula, CHANGED)
    if task.env is not None and (uneven := task.uneven_length(time_limit(task.env))):
        message = "%s; to evaluate episodes of the same length, set evaluation.max_episode_steps=%d"
        _logger.warning(message, *uneven)
    if trainer.logger is not None and not trainer.collected_frames:
        trainer.logger.log_hparams(to_plain(settings))


def _conclude(trainer: OfflineTrainer, task: Task, out: Path, stopped: str | None) -> dict[str, Any]:
    """Log how the run ended, and return the results; write ``results.json`` if no signal ended the run."""
    steps, metrics = trainer.collected_frames, trainer.metrics
    results: dict[str, Any] = {"steps": steps, "behaviour": task.behaviour}
    if task.env is not None and "return" in metrics:
        step = trainer.logged_at("return")
        results["final"] = {"mean": metrics["return"], "std": metrics["return_std"], "step": step}
    if (best := best_checkpoint(out / BEST)) is not None:
        kept = Checkpoint.manifest(best)["metadata"]
        monitor = kept["best_of"][0]
        results["best"] = {"mean": kept[monitor], "step": kept["optim_steps"], "metric": monitor}
    if stopped:
        command = f"{processes.program()} train {quote(f'resume={out}')}"
        _logger.warning("stopped by %s after %d steps; resume with: %s", stopped, steps, command)
        return {**results, "stopped": stopped}
    if trainer._stop_reason:
        _logger.info("stopped early: %s", trainer._stop_reason)
        results["stopped_early"] = trainer._stop_reason
    with write_whole(out / RESULTS) as aside:
        aside.write_text(json.dumps(results, indent=2) + "\n")
    _logger.info("%s: the run has made %d steps; %s", out, steps, _summary(results))
    return results


def _summary(results: dict[str, Any]) -> str:
    parts = [f"mean return of the dataset {results['behaviour']['mean']:.1f}"]
    if "final" in results:
        parts.append(f"of the policy {results['final']['mean']:.1f} +- {results['final']['std']:.1f}")
    if "best" in results:
        best = results["best"]
        parts.append(f"best {best['metric']} {best['mean']:.4g} at step {best['step']}")
    return ", ".join(parts)
