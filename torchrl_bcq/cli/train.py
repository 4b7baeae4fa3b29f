"""``torchrl-bcq train``: learn a policy from a dataset, and be left alone with it."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from textwrap import fill
from typing import Any

import torch
from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue
from torchrl.checkpoint import Checkpoint, CheckpointError, CheckpointRotation

from torchrl_bcq.cli.build import build, check_numbers
from torchrl_bcq.cli.config import YAML, check_resumable, default_config, load_config, save_config
from torchrl_bcq.cli.errors import RunError
from torchrl_bcq.cli.loggers import trim_log
from torchrl_bcq.cli.record import DATASET_ID, record_default
from torchrl_bcq.cli.run import BEST, CHECKPOINTS, Task, open_dataset, read_metadata
from torchrl_bcq.trainers import BCQTrainer
from torchrl_bcq.trainers.best import best_checkpoint
from torchrl_bcq.trainers.checkpoints import tidy_rotation

RESULTS = "results.json"
DEFAULT_TASK = [  # small enough to look at: minutes on two cores
    f"dataset=minari:{DATASET_ID}",
    "steps=3500",
    "network.hidden=[256,256]",
    "network.vae_hidden=[256,256]",
    "evaluation.interval=350",
    "evaluation.episodes=20",
    "checkpoint.interval=350",
    "log_interval=50",
]
_LOG = "[%(asctime)s][%(name)s][%(levelname)s] - %(message)s"  # as Hydra's
_HYDRA = [  # it writes nothing into a run's folder, of which it does not know whether it may
    "hydra.run.dir=.",
    "hydra/job_logging=none",
    "hydra/hydra_logging=none",
    "hydra.sweep.dir=${out}",
    "hydra.sweep.subdir=${hydra.job.num}",
    "hydra.output_subdir=null",
    "hydra.job.name=train",
]
HELP = f"""\
usage: torchrl-bcq train [SETTING=VALUE ...] [-m] [--cfg job] [--hydra-help]

Learn a policy from a dataset, offline. Without a dataset, the one of torchrl-bcq record: Pendulum-v1, for which
{fill(", ".join(DEFAULT_TASK[1:]), 110)}.

examples:
  torchrl-bcq train
  torchrl-bcq train dataset=hopper.hdf5 optim.lr=3e-4 seed=1 out=runs/hopper
  torchrl-bcq train dataset=minari:mujoco/hopper/medium-v0 normalize=true
  torchrl-bcq train -m dataset=hopper.hdf5 out=runs/hopper seed=0,1,2     three runs, one after the other
  torchrl-bcq train dataset=trips.csv 'reader={{observation: [x, v], action: [force], reward: r, terminated: end}}'
  torchrl-bcq train dataset=hopper.hdf5 out=runs/hopper resume=true       begins, or goes on from the last checkpoint
  torchrl-bcq train resume=runs/hopper steps=2000000                      goes on with the settings that it had

Ctrl-C and SIGTERM save a checkpoint, with which the run goes on exactly where it was. The folder of a run holds
config.yaml, train.log, log/scalars/*.csv, checkpoints/, best/ and results.json; see torchrl-bcq evaluate and plot.
--cfg job prints the settings, -m runs all combinations of those with commas, --hydra-help tells the rest of Hydra.

{YAML}"""
_logger = logging.getLogger(__name__)


def main(arguments: Sequence[str]) -> int:
    """Run the command with Hydra's overrides and flags; 0 if all went well.

    Raises:
        RunError: if ``resume=RUN`` names no run.
    """
    if {"-h", "--help"} & set(arguments):
        print(HELP)
        return 0
    import hydra
    from hydra.core.config_store import ConfigStore

    config, arguments = _starting_point(list(arguments))
    store = ConfigStore.instance()
    theirs = store.repo  # its groups, such as torchrl_bcq.conf's, would be taken for settings of the same name
    store.repo = {name: node for name, node in theirs.items() if name.startswith(("hydra", "_"))}
    store.store(name="settings", node=config)
    codes: list[int] = []

    @hydra.main(version_base="1.3", config_path=None, config_name="settings")
    def job(config: DictConfig) -> None:
        codes.append(_run(config))

    sys.argv = ["torchrl-bcq train", *arguments]
    try:
        job()
    finally:
        store.repo = theirs
    return max(codes, default=0)


def _starting_point(arguments: list[str]) -> tuple[DictConfig, list[str]]:
    """The settings that the overrides change, and all overrides, ours in front."""
    config, ours = default_config(), list(_HYDRA)
    resumed = [argument.partition("=")[2] for argument in arguments if argument.startswith("resume=")]
    if resumed and resumed[-1].lower() not in ("true", "false"):
        run = Path(resumed[-1])
        config = load_config(run)
        config.out, config.resume = str(run), True
        arguments = [argument for argument in arguments if not argument.startswith("resume=")]
    elif not any(argument.startswith("dataset=") for argument in arguments):
        ours += DEFAULT_TASK
    at = next((i for i, word in enumerate(arguments) if "=" in word and not word.startswith("-")), len(arguments))
    return config, [*arguments[:at], *ours, *arguments[at:]]


def _run(config: DictConfig) -> int:
    """One run; its exit code. A refusal ends it, and not the others of a sweep; a signal ends them all."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    logging.getLogger("torchrl").setLevel("WARNING")
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        config.out = HydraConfig.get().runtime.output_dir
    out = Path(config.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(out / "train.log")
    except OSError as error:
        message = f"{config.out} cannot be the folder of a run: {error}; choose another with out=FOLDER"
        print(f"torchrl-bcq: {message}", file=sys.stderr)
        return 1
    with _log_into(file):
        return _train_and_tell(config)


def _train_and_tell(config: DictConfig) -> int:
    try:
        if config.dataset == f"minari:{DATASET_ID}":
            record_default()
        results = train(config)
    except (ValueError, OSError, ImportError, FloatingPointError, MissingMandatoryValue) as error:
        if os.environ.get("HYDRA_FULL_ERROR"):
            raise
        _logger.error("%s", error)
        return 1
    except KeyboardInterrupt:
        _logger.warning("left at once; torchrl-bcq train resume=%s goes on from its last checkpoint", config.out)
        raise SystemExit(130) from None
    if stopped := results.get("stopped"):
        raise SystemExit(128 + signal.Signals[stopped])
    return 0


@contextmanager
def _log_into(file: logging.Handler) -> Iterator[None]:
    """Show messages of all loggers, from INFO on, on the terminal and in a file, which is closed in the end."""
    root, handlers = logging.getLogger(), [logging.StreamHandler(), file]
    level = root.level
    root.setLevel(logging.INFO)
    for handler in handlers:
        handler.setFormatter(logging.Formatter(_LOG))
        root.addHandler(handler)
    try:
        yield
    finally:
        root.setLevel(level)
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()


def train(config: DictConfig) -> dict[str, Any]:
    """Make a run in the folder ``config.out``, or go on with it.

    Returns:
        What it reached, as in its ``results.json``; ``stopped`` names the signal that ended it, if one did.

    Raises:
        RunError: if a setting does not fit.
        DatasetError: if the dataset is refused.
        FloatingPointError: if a loss is not finite any more.
        OSError: if something cannot be written.
    """
    check_numbers(config)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    with _alone(out):
        last = _last_checkpoint(config, out)
        if last is not None and read_metadata(last)[2] >= config.steps and (out / RESULTS).is_file():
            _logger.info("the run in %s has made its steps; more are made with steps=N", out)
            return json.loads((out / RESULTS).read_text())
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        transitions, task = open_dataset(config)
        trainer = build(config, transitions, task)
        if last is not None:
            _load(trainer, last)
        trim_log(out, -1 if last is None else trainer.collected_frames)
        save_config(config, out)
        _begin(config, task, trainer)
        with _stoppable(trainer) as received, _logs_above_the_bar(trainer.progress_bar):
            trainer.train()
        if trainer.logger is not None:
            trainer.logger.close()
        return _conclude(trainer, task, out, received)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Keep other runs out of the folder."""
    try:
        with FileLock(out / ".lock", timeout=0):
            yield
    except Timeout:
        raise RunError(f"another run is at work in {out}; choose another folder with out=FOLDER.") from None


def _last_checkpoint(config: DictConfig, out: Path) -> Path | None:
    """Where to go on from; None to begin."""
    for folder in (out / CHECKPOINTS, out / BEST):  # a run may have been killed before it wrote the first of the former
        tidy_rotation(folder)
        if (last := CheckpointRotation(folder, keep_last=1).latest()) is not None:
            break
    else:
        return None
    saved, _, step = read_metadata(last)
    if not config.resume:
        raise RunError(
            f"{out} holds a run of {step} steps; go on with it by resume=true, or begin anew in another folder with "
            "out=FOLDER."
        )
    check_resumable(config, saved, out)
    return last


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


@contextmanager
def _stoppable(trainer: BCQTrainer) -> Iterator[list[str]]:
    """Let SIGINT and SIGTERM end the run with a checkpoint, the second one at once; gives the signals received."""
    received: list[str] = []

    def stop(number: int, frame: Any) -> None:
        received.append(signal.Signals(number).name)
        for each in previous:
            signal.signal(each, signal.default_int_handler)
        trainer.request_stop(received[0])
        print(f"\n{received[0]}: saving after this step; once more to leave at once", file=sys.stderr, flush=True)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _logs_above_the_bar(progress_bar: bool) -> Any:
    """Have messages leave the progress bar whole."""
    if not progress_bar:
        return nullcontext()
    from tqdm.contrib.logging import logging_redirect_tqdm

    return logging_redirect_tqdm()


def _conclude(trainer: BCQTrainer, task: Task, out: Path, received: list[str]) -> dict[str, Any]:
    """Write ``results.json``, and say how it ended."""
    steps, metrics = trainer.collected_frames, trainer.metrics
    results: dict[str, Any] = {"steps": steps, "behaviour": task.behaviour}
    if "return" in metrics:
        measured = trainer._last_log["return"]
        results["final"] = {"mean": metrics["return"], "std": metrics["return_std"], "step": measured}
    if (best := best_checkpoint(out / BEST)) is not None:
        kept = Checkpoint.manifest(best)["metadata"]
        monitor = kept["best_of"][0]
        results["best"] = {"mean": kept[monitor], "step": kept["optim_steps"], "metric": monitor}
    if received:
        _logger.warning("%s after %d steps; go on with: torchrl-bcq train resume=%s", received[0], steps, out)
        return {**results, "stopped": received[0]}
    if trainer._stop_reason:
        _logger.info("stopped early: %s", trainer._stop_reason)
    aside = out / f".{RESULTS}.{os.getpid()}"
    aside.write_text(json.dumps(results, indent=2) + "\n")
    aside.replace(out / RESULTS)
    _logger.info("%d steps made; %s", steps, _summary(results))
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
