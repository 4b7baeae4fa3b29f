"""The work of ``torchrl-bcq train``: one run, or those of several agents together, in their folders."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDictBase
from torchrl.checkpoint import Checkpoint, CheckpointError, CheckpointRotation

from torchrl_bcq.cli import processes
from torchrl_bcq.cli.build import build, check_numbers
from torchrl_bcq.cli.config import check_resumable, save_config
from torchrl_bcq.cli.errors import RunError
from torchrl_bcq.cli.loggers import trim_log
from torchrl_bcq.cli.run import BEST, CHECKPOINTS, Task, open_dataset, read_metadata
from torchrl_bcq.trainers import BCQTrainer, train_together
from torchrl_bcq.trainers.best import best_checkpoint
from torchrl_bcq.trainers.checkpoints import tidy_rotation

RESULTS = "results.json"
_SEED: ContextVar[int | None] = ContextVar("seed", default=None)  # of the agent that is at work, of several
_logger = logging.getLogger(__name__)


def train(config: DictConfig) -> dict[str, Any]:
    """Make a run in the folder ``config.out``, or go on with it; of each of ``config.seeds`` in a folder within.

    Returns:
        What it reached, as in its ``results.json``, which is the first process's to know; ``stopped`` names the signal
        that ended it, if one did. Of several agents, these by seed, and ``stopped``.

    Raises:
        RunError: if a setting does not fit, or, in the end, an agent among several failed.
        DatasetError: if the dataset is refused.
        FloatingPointError: if a loss is not finite any more.
        OSError: if something cannot be written.
    """
    check_numbers(config)
    processes.check_device(config.device)
    if config.seeds is None:
        return _make_runs([config])[0]
    if processes.several():
        raise RunError("seeds= makes several runs in one process, torchrun one run in several; leave one of them.")
    if len(set(config.seeds)) != len(config.seeds) or not config.seeds:
        raise RunError(f"seeds is {list(config.seeds)}, expected different ones, at least one.")
    results = _make_runs([_own(config, number, seed) for number, seed in enumerate(config.seeds)])
    stopped = next((result["stopped"] for result in results if result.get("stopped")), None)
    return {**{str(seed): result for seed, result in zip(config.seeds, results, strict=True)}, "stopped": stopped}


def _own(config: DictConfig, number: int, seed: int) -> DictConfig:
    """The settings of one of several agents, those of a run of its own; the first one has the progress bar."""
    own = config.copy()
    own.seeds, own.seed, own.out = None, seed, str(Path(config.out) / str(seed))
    own.progress_bar = config.progress_bar if number == 0 else False
    return own


def _make_runs(configs: Sequence[DictConfig]) -> list[dict[str, Any]]:
    """Make all of these runs at once, or go on with them; what each reached."""
    outs = [Path(config.out) for config in configs]
    with ExitStack() as stack:
        for out in outs:
            out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_alone(out))
        starts = processes.from_first(lambda: _starts(configs))
        results = {k: _results(config, start) for k, (config, start) in enumerate(zip(configs, starts, strict=True))}
        left = [k for k, result in results.items() if result is None]
        if left:
            results |= zip(left, _train([configs[k] for k in left], [starts[k] for k in left]), strict=True)
    return [result or {} for result in results.values()]


def _results(config: DictConfig, start: Path | None) -> dict[str, Any] | None:
    """What a run reached that has made its steps already."""
    file = Path(config.out) / RESULTS
    if start is None or not file.is_file() or read_metadata(start)[2] < config.steps:
        return None
    _logger.info("the run in %s has made its steps; more are made with steps=N", config.out)
    return json.loads(file.read_text())


def _train(configs: Sequence[DictConfig], starts: Sequence[Path | None]) -> list[dict[str, Any]]:
    """Train the agents of these settings, from their checkpoints if there are."""
    if configs[0].threads is not None:
        torch.set_num_threads(configs[0].threads)
    with processes.first_goes_first():
        transitions, task = open_dataset(configs[0])
    trainers = [_make(config, transitions, task, last) for config, last in zip(configs, starts, strict=True)]
    failure = None
    with processes.stoppable(*trainers), _logs_above_the_bar(trainers[0].progress_bar):
        if len(trainers) == 1:
            trainers[0].train()
        else:
            try:
                with _seeds_in_logs(trainers, [config.seed for config in configs]):
                    train_together(trainers)
            except RuntimeError as error:  # some failed; the others have come to their ends
                failure = error
    for trainer in trainers:
        if trainer.logger is not None:
            trainer.logger.close()
    stopped = [processes.stopped_by(trainer) for trainer in trainers]
    if not processes.is_first():
        return [{"stopped": stopped[0]}]
    results = [
        _conclude(trainer, task, Path(config.out), signal)
        for trainer, config, signal in zip(trainers, configs, stopped, strict=True)
        if trainer.collected_frames >= config.steps or trainer._stop_reason
    ]
    if failure is not None:
        raise RunError(str(failure)) from failure
    return results


def _make(config: DictConfig, transitions: TensorDictBase, task: Task, last: Path | None) -> BCQTrainer:
    """The trainer of a run, which goes on from ``last``, if there is one."""
    out = Path(config.out)
    trainer = build(config, transitions, task)
    if last is not None:
        _load(trainer, last)
    if processes.is_first():
        trim_log(out, -1 if last is None else trainer.collected_frames)
        save_config(config, out)
        _begin(config, task, trainer)
    return trainer


@contextmanager
def _seeds_in_logs(trainers: Sequence[BCQTrainer], seeds: Sequence[int]) -> Iterator[None]:
    """Have each message of an agent say whose it is."""
    make_record = logging.getLogRecordFactory()

    def name_seed(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make_record(*args, **kwargs)
        if (seed := _SEED.get()) is not None:
            record.msg = f"seed {seed}: {record.msg}"
        return record

    for trainer, seed in zip(trainers, seeds, strict=True):
        trainer.register_op("setup", partial(_SEED.set, seed))  # in the context of the agent, where it trains
    logging.setLogRecordFactory(name_seed)
    try:
        yield
    finally:
        logging.setLogRecordFactory(make_record)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Keep other runs out of the folder."""
    if not processes.is_first():
        yield
        return
    try:
        with FileLock(out / ".lock", timeout=0):
            yield
    except Timeout:
        raise RunError(f"another run is at work in {out}; choose another folder with out=FOLDER.") from None


def _starts(configs: Sequence[DictConfig]) -> list[Path | None]:
    """Where runs go on from, several from the last step of which all have a checkpoint; None to begin."""
    kept = [_checkpoints(config) for config in configs]
    if len({tuple(steps) for steps in kept}) > 1:
        unfinished = [
            steps for steps, config in zip(kept, configs, strict=True) if max(steps, default=0) < config.steps
        ]
        common = set(unfinished[0]).intersection(*unfinished[1:]) if unfinished else set()
        if unfinished and not common and any(unfinished):
            raise RunError(
                f"the runs in {[config.out for config in configs]} have no checkpoint of the same step to go on from "
                "together; go on with each by resume=FOLDER."
            )
        kept = [
            steps if max(steps, default=0) >= config.steps else {step: steps[step] for step in steps if step in common}
            for steps, config in zip(kept, configs, strict=True)
        ]
    return [steps[max(steps)] if steps else None for steps in kept]


def _checkpoints(config: DictConfig) -> dict[int, Path]:
    """What a run may go on from, by step.

    Raises:
        RunError: if it may not.
    """
    out = Path(config.out)
    for folder in (out / CHECKPOINTS, out / BEST):  # a run may have been killed before it wrote the first of the former
        tidy_rotation(folder)
        if found := CheckpointRotation(folder, keep_last=1).checkpoints():
            break
    else:
        return {}
    by_step = {read_metadata(path)[2]: path for path in found}
    saved, _, step = read_metadata(by_step[max(by_step)])
    if not config.resume:
        raise RunError(
            f"{out} holds a run of {step} steps; go on with it by resume=true, or begin anew in another folder with "
            "out=FOLDER."
        )
    check_resumable(config, saved, out)
    return by_step


def _load(trainer: BCQTrainer, last: Path) -> None:
    try:
        trainer.load_from_file(last)
    except CheckpointError as error:
        raise RunError(f"{last} cannot be loaded: {error}") from error


def _begin(config: DictConfig, task: Task, trainer: BCQTrainer) -> None:
    """Say what is going to happen."""
    where = f"evaluated in {task.env_id}" if task.env_id else "without an environment"
    span = f"steps {trainer.collected_frames:,} to {config.steps:,}"
    device = next(trainer.loss_module.parameters()).device
    _logger.info("%s: %s, %s, %s on %s", config.out, config.dataset, where, span, device)
    if trainer.logger is not None and not trainer.collected_frames:
        trainer.logger.log_hparams(OmegaConf.to_container(config, resolve=True))


def _logs_above_the_bar(progress_bar: bool) -> Any:
    """Have messages leave the progress bar whole."""
    if not progress_bar:
        return nullcontext()
    from tqdm.contrib.logging import logging_redirect_tqdm

    return logging_redirect_tqdm()


def _conclude(trainer: BCQTrainer, task: Task, out: Path, stopped: str | None) -> dict[str, Any]:
    """Write ``results.json``, and say how it ended: by this signal, if not of itself."""
    steps, metrics = trainer.collected_frames, trainer.metrics
    results: dict[str, Any] = {"steps": steps, "behaviour": task.behaviour}
    if "return" in metrics:
        measured = trainer._last_log["return"]
        results["final"] = {"mean": metrics["return"], "std": metrics["return_std"], "step": measured}
    if (best := best_checkpoint(out / BEST)) is not None:
        kept = Checkpoint.manifest(best)["metadata"]
        monitor = kept["best_of"][0]
        results["best"] = {"mean": kept[monitor], "step": kept["optim_steps"], "metric": monitor}
    if stopped:
        _logger.warning("%s after %d steps; go on with: torchrl-bcq train resume=%s", stopped, steps, out)
        return {**results, "stopped": stopped}
    if trainer._stop_reason:
        _logger.info("stopped early: %s", trainer._stop_reason)
    aside = out / f".{RESULTS}.{os.getpid()}"
    aside.write_text(json.dumps(results, indent=2) + "\n")
    aside.replace(out / RESULTS)
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
