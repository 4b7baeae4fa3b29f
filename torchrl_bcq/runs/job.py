"""The work of ``torchrl-bcq train``: a run in its folder, begun or resumed, and its baseline."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from omegaconf import DictConfig
from torchrl.checkpoint import Checkpoint, CheckpointError, CheckpointRotation
from tqdm.contrib.logging import logging_redirect_tqdm

from torchrl_bcq.errors import RunError
from torchrl_bcq.files import write_whole
from torchrl_bcq.runs import processes
from torchrl_bcq.runs.assembly import assemble, check_numbers
from torchrl_bcq.runs.folder import BASELINE, BEST, CHECKPOINTS, Task, open_dataset, read_metadata
from torchrl_bcq.runs.loggers import trim_log
from torchrl_bcq.runs.settings import check_resumable, default_settings, save_settings, to_plain, to_settings
from torchrl_bcq.trainers import OfflineTrainer
from torchrl_bcq.trainers.best import best_checkpoint
from torchrl_bcq.trainers.checkpoints import tidy_rotation

RESULTS = "results.json"
_SAME_IN_BASELINE = (
    "dataset", "reader", "root", "sampler", "weights", "normalize", "held_out", "steps", "batch_size", "seed", "device",
    "threads", "log_interval", "logger", "logger_kwargs", "progress_bar", "evaluation",
)  # fmt: skip
_logger = logging.getLogger(__name__)


def train(settings: DictConfig) -> dict[str, Any]:
    """Make a run in the folder ``settings.out``, or resume it; then its baseline, if it has one.

    Returns:
        The contents of its ``results.json``, in the first process; ``stopped`` names the signal that ended it, if any.

    Raises:
        RunError: if a setting does not fit.
        DatasetError: if the dataset is refused.
        FloatingPointError: if a loss is not finite any more.
        OSError: if something cannot be written.
    """
    check_numbers(settings)
    processes.check_device(settings.device)
    results = _make_run(settings)
    if settings.baseline is not None and not results.get("stopped"):
        stopped = _make_run(baseline_settings(settings)).get("stopped")
        results = {**results, "stopped": stopped} if stopped else results
    return results


def baseline_settings(settings: DictConfig) -> DictConfig:
    """Settings of a run's baseline: the same data, steps, batches and sizes, in a folder within the run's."""
    plain, own = to_plain(settings), default_settings(settings.baseline)
    values = {name: plain[name] for name in ("version", *_SAME_IN_BASELINE)}
    values |= {"algorithm": settings.baseline, "out": str(Path(settings.out) / BASELINE), "resume": True}
    values["network"] = {name: value for name, value in plain["network"].items() if name in own.network}
    values["checkpoint"] = {"interval": settings.checkpoint.interval}
    return to_settings(values, settings.out)  # where interpolations stay text


def _make_run(settings: DictConfig) -> dict[str, Any]:
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    with _alone(out):
        start = processes.from_first(lambda: _find_start(settings))
        file = out / RESULTS
        if start is not None and file.is_file() and read_metadata(start)[2] >= settings.steps:
            _logger.info("the run in %s has made its steps; make more with steps=N", out)
            return json.loads(file.read_text())
        return _train(settings, start)


def _train(settings: DictConfig, start: Path | None) -> dict[str, Any]:
    """Train, from a checkpoint if there is one."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    with processes.first_goes_first():
        transitions, task = open_dataset(settings)
    out, trainer = Path(settings.out), assemble(settings, transitions, task)
    if start is not None:
        try:
            trainer.load_from_file(start)
        except CheckpointError as error:
            raise RunError(f"{start} cannot be loaded: {error}") from error
    if processes.is_first():
        trim_log(out, -1 if start is None else trainer.collected_frames)
        save_settings(settings, out)
        _announce(settings, task, trainer)
    logs_above_the_bar = logging_redirect_tqdm() if trainer.progress_bar else nullcontext()
    try:
        with processes.stoppable(trainer), logs_above_the_bar:
            trainer.train()
    finally:
        if trainer.logger is not None:
            trainer.logger.close()
    stopped = processes.stopped_by(trainer)
    return _conclude(trainer, task, out, stopped) if processes.is_first() else {"stopped": stopped}


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Keep other runs out of the folder."""
    try:
        with FileLock(out / ".lock", timeout=0) if processes.is_first() else nullcontext():
            yield
    except Timeout:
        raise RunError(f"another run is at work in {out}; choose another folder with out=FOLDER.") from None


def _find_start(settings: DictConfig) -> Path | None:
    """The checkpoint from which a run resumes; None if it begins. Raises a RunError if it may not resume."""
    out = Path(settings.out)
    for folder in (out / CHECKPOINTS, out / BEST):  # a run may have been killed before it wrote the first of the former
        tidy_rotation(folder)
        if (last := CheckpointRotation(folder, keep_last=1).latest()) is not None:
            break
    else:
        return None
    saved, _, step = read_metadata(last)
    if not settings.resume:
        choice = "resume it with resume=true, or start a new one in another folder with out=FOLDER"
        raise RunError(f"{out} holds a run of {step} steps; {choice}.")
    check_resumable(settings, saved, out)
    return last


def _announce(settings: DictConfig, task: Task, trainer: OfflineTrainer) -> None:
    where = f"evaluated in {task.env_id}" if task.env_id else "without an environment"
    span = f"steps {trainer.collected_frames:,} to {settings.steps:,}"
    device = next(trainer.loss_module.parameters()).device
    what = f"{settings.algorithm} on {settings.dataset}"
    _logger.info("%s: %s, %s, %s on %s", settings.out, what, where, span, device)
    if trainer.logger is not None and not trainer.collected_frames:
        trainer.logger.log_hparams(to_plain(settings))


def _conclude(trainer: OfflineTrainer, task: Task, out: Path, stopped: str | None) -> dict[str, Any]:
    """Write ``results.json`` and log how the run ended: by this signal, if it did not end by itself."""
    steps, metrics = trainer.collected_frames, trainer.metrics
    results: dict[str, Any] = {"steps": steps, "behaviour": task.behaviour}
    if "return" in metrics:
        step = trainer.logged_at("return")
        results["final"] = {"mean": metrics["return"], "std": metrics["return_std"], "step": step}
    if (best := best_checkpoint(out / BEST)) is not None:
        kept = Checkpoint.manifest(best)["metadata"]
        monitor = kept["best_of"][0]
        results["best"] = {"mean": kept[monitor], "step": kept["optim_steps"], "metric": monitor}
    if stopped:
        _logger.warning("%s after %d steps; resume with: torchrl-bcq train resume=%s", stopped, steps, out)
        return {**results, "stopped": stopped}
    if trainer._stop_reason:
        _logger.info("stopped early: %s", trainer._stop_reason)
    with write_whole(out / RESULTS) as aside:
        aside.write_text(json.dumps(results, indent=2) + "\n")
    _logger.info("%s: %d steps made; %s", out, steps, _summary(results))
    _logger.info("torchrl-bcq evaluate %s; torchrl-bcq plot %s", out, out)
    return results


def _summary(results: dict[str, Any]) -> str:
    parts = [f"return of the behaviour {results['behaviour']['mean']:.1f}"]
    if "final" in results:
        parts.append(f"of the policy {results['final']['mean']:.1f} +- {results['final']['std']:.1f}")
    if "best" in results:
        best = results["best"]
        parts.append(f"best {best['metric']} {best['mean']:.4g} at step {best['step']}")
    return ", ".join(parts)
