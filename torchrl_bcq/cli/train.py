"""``torchrl-bcq train``: train a policy on a dataset."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from shlex import quote
from textwrap import fill

import torch
from omegaconf import DictConfig, OmegaConf

from torchrl_bcq.errors import RunError, with_packages
from torchrl_bcq.evaluation.recording import DATASET_ID, record_default
from torchrl_bcq.runs import processes
from torchrl_bcq.runs.algorithms import algorithms_of, find_algorithm
from torchrl_bcq.runs.job import check_folder, train
from torchrl_bcq.runs.settings import AUTO, FILE, compose, default_settings
from torchrl_bcq.runs.threads import use_threads
from torchrl_bcq.trainers.distributed import PeerError

_FOLDER = files("torchrl_bcq.cli")
YAML, YAML_DISCRETE = ((_FOLDER / f"{name}.yaml").read_text("utf-8") for name in ("train", "train_discrete"))
DEFAULT_TASK = [  # settings if the user names no dataset; this run takes a few minutes on two CPU cores
    f"dataset=minari:{DATASET_ID}",
    "normalize=true",
    "steps=3500",
    "evaluation.interval=500",
    "evaluation.episodes=20",
    "checkpoint.interval=500",
    "log_interval=50",
]
# with the paper's 0.99 and 0.005, value estimates need tens of thousands of steps to converge
_DEFAULT_LOSS = ["loss.gamma=0.95", "loss.tau=0.02"]
_DEFAULT_LAYERS = "[256,256]"
_LOG = "[%(asctime)s][%(name)s][%(levelname)s] - %(message)s"
_FLAGS = {"-m": "sweep", "--multirun": "sweep", "--cfg": "show"}
HELP = f"""\
usage: torchrl-bcq train [SETTING=VALUE ...] [-m] [--cfg]

Train a policy on a fixed dataset (offline). Without dataset=..., the command uses the dataset that torchrl-bcq record
makes on Pendulum-v1, trains the algorithm's baseline too, and has other defaults: layers of {_DEFAULT_LAYERS} and
{fill(", ".join([*DEFAULT_TASK[1:], *_DEFAULT_LOSS]), 110)}.

algorithms: {", ".join(algorithms_of(False))} (continuous actions); {", ".join(algorithms_of(True))} (discrete actions)

examples:
  torchrl-bcq train
  torchrl-bcq train dataset=hopper.hdf5 optim.lr=3e-4 seed=1 out=runs/hopper
  torchrl-bcq train dataset=hopper.hdf5 algorithm=cloning out=runs/hopper-cloning
  torchrl-bcq train dataset=cartpole.hdf5 loss.unlikely_action_threshold=0.5     discrete actions: discrete BCQ
  torchrl-bcq train dataset=minari:mujoco/hopper/medium-v0 normalize=true
  torchrl-bcq train -m dataset=hopper.hdf5 out=runs/hopper seed=0,1,2     three runs, one after the other
  torchrl-bcq train dataset=trips.csv \\
    'reader={{observation: [x, v], action: [force], reward: r, terminated: crashed, episode: trip}}'
  torchrl-bcq train dataset=hopper.hdf5 out=runs/hopper resume=true       starts the run, or resumes it
  torchrl-bcq train resume=runs/hopper steps=2000000                      resumes the run with its own settings
  torchrun --nproc-per-node 4 -m torchrl_bcq train dataset=hopper.hdf5    four processes, each with its own batches

Ctrl-C or SIGTERM saves a checkpoint and stops the run; a resumed run continues exactly from its last checkpoint.
The folder of a run holds config.yaml, train.log, log/scalars/*.csv, checkpoints/, best/, results.json and baseline/;
torchrl-bcq evaluate and torchrl-bcq plot read it. --cfg prints the settings without training; unless
algorithm=NAME is set, the dataset must exist. -m (--multirun) trains one run for each combination of values; separate
the values of a setting by commas.

{YAML}
{YAML_DISCRETE}"""
_logger = logging.getLogger(__name__)


def main(arguments: Sequence[str]) -> int:
    """Run ``torchrl-bcq train`` and return its exit code; raises a RunError for an invalid setting or flag."""
    if {"-h", "--help"} & set(arguments):
        print(HELP)
        return 0
    overrides = [word for word in arguments if not word.startswith("-")]
    flags = {_FLAGS.get(word, word) for word in arguments if word.startswith("-")}
    if unknown := flags - {*_FLAGS.values()}:
        found = f"there is no flag {', '.join(sorted(unknown))}"
        raise RunError(f"{found}; write a setting as NAME=VALUE without dashes; see torchrl-bcq train --help.")
    with processes.joined():
        try:
            return _start(overrides, flags)
        except PeerError as error:  # the process that failed prints its own error
            if processes.is_first():
                print(f"torchrl-bcq: {error}", file=sys.stderr)
            return 1


def _start(overrides: Sequence[str], flags: set[str]) -> int:
    with processes.first_goes_first():  # to download a dataset only once
        runs = compose([*_defaults(overrides), *overrides], sweep="sweep" in flags)
    if "show" in flags:
        for settings in runs:
            print(OmegaConf.to_yaml(settings))
        return 0
    sweep = Path(runs[0].out).parent
    if "sweep" in flags and (any(sweep.glob("*/checkpoint-*")) or (sweep / FILE).is_file()):
        raise RunError(f"{sweep} is the folder of a run; choose another folder for the sweep with out=FOLDER.")
    if missing := sorted(OmegaConf.missing_keys(runs[0])):
        raise RunError(f"{', '.join(missing)} has no value; set it with {missing[0]}=VALUE.")
    if processes.several() and len(runs) > 1:
        raise RunError("torchrun cannot start several runs with -m; start them one after another without -m.")
    threads = torch.get_num_threads()
    try:
        return max([_run(settings, threads, alone=len(runs) == 1) for settings in runs], default=0)
    except SystemExit:
        if len(runs) > 1:
            words = f"{quote(f'out={sweep}')} resume=true"
            print(f"torchrl-bcq: to continue the sweep, repeat its command with {words}", file=sys.stderr)
        raise


def _defaults(overrides: Sequence[str]) -> list[str]:
    """Return the settings of a run without ``dataset=``. With a dataset or a folder to resume, return []."""
    given = dict(word.lstrip("+").partition("=")[::2] for word in overrides)
    if "dataset" in given or given.get("resume", "false").lower() not in ("true", "false"):
        return []
    name = given.get("algorithm", AUTO)
    if "," in name:
        raise RunError(f"algorithm={name} needs dataset=...; without a dataset, give one algorithm only.")
    name = algorithms_of(discrete=False)[0] if name == AUTO else name
    record, settings = find_algorithm(name), default_settings(name)
    if record.discrete:
        raise RunError(f"algorithm={name} needs dataset=...: the default dataset has continuous actions.")
    loss = [word for word in _DEFAULT_LOSS if OmegaConf.select(settings, word.partition("=")[0]) is not None]
    layers = [f"network.{key}={_DEFAULT_LAYERS}" for key, value in settings.network.items() if OmegaConf.is_list(value)]
    baseline = [] if record.baseline is None else [f"baseline={record.baseline}"]
    # the dataset does not exist before the first run, so it cannot decide about the algorithm
    return [*DEFAULT_TASK, f"algorithm={name}", *loss, *layers, *baseline]


def _run(settings: DictConfig, threads: int, *, alone: bool) -> int:
    """Train one run and return its exit code. With several processes, only the first writes train.log.

    ``threads`` is PyTorch's default number of threads, which an earlier run of a sweep may have changed.
    In a sweep of several runs, an error of a run ends only this run, but a signal ends all runs.
    """
    logging.getLogger("torchrl").setLevel("WARNING")
    gc.collect()  # reference cycles hold the dataset of an earlier run of the sweep
    use_threads(threads)
    settings.out = processes.from_first(lambda: settings.out)  # all processes use the folder of the first process
    if not processes.is_first():
        with _log_into(level=logging.WARNING):
            return _train(settings, alone=alone)
    out = Path(settings.out)
    try:
        check_folder(out)
        out.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(out / "train.log", encoding="utf-8", errors="backslashreplace")
    except (RunError, OSError) as error:
        found = f"{settings.out} cannot be the folder of a run: {error}; choose another folder with out=FOLDER"
        print(f"torchrl-bcq: {error if isinstance(error, RunError) else found}", file=sys.stderr)
        return 1
    with _log_into(file):
        return _train(settings, alone=alone)


def _train(settings: DictConfig, *, alone: bool) -> int:
    try:
        if settings.dataset == f"minari:{DATASET_ID}":
            with processes.first_goes_first():
                record_default()
        results = train(settings)
    except (ValueError, OSError, ImportError, FloatingPointError, PeerError, torch.OutOfMemoryError) as error:
        if os.environ.get("HYDRA_FULL_ERROR"):
            raise
        # log FloatingPointError and PeerError only in the first process, other errors in each process
        if processes.is_first() or not isinstance(error, (FloatingPointError, PeerError)):
            _logger.error("%s", with_packages(error))
        return 1
    except KeyboardInterrupt:
        how = "the run has no checkpoint yet; if you repeat the command, it starts from the beginning"
        if any(Path(settings.out).glob("*/checkpoint-*")):
            how = f"to resume from the last one: {processes.program()} train {quote(f'resume={settings.out}')}"
        _logger.warning("interrupted; no new checkpoint was saved; %s", how)
        raise SystemExit(130) from None
    except Exception:
        if alone:
            raise
        _logger.exception("this run of the sweep failed")
        return 1
    if stopped := results.get("stopped"):
        raise SystemExit(128 + signal.Signals[stopped])
    return 0


@contextmanager
def _log_into(*handlers: logging.Handler, level: int = logging.INFO) -> Iterator[None]:
    """While the context is open, log messages of at least ``level`` to the terminal and ``handlers``."""
    root, all_handlers = logging.getLogger(), [logging.StreamHandler(), *handlers]
    before = root.level
    root.setLevel(level)
    for handler in all_handlers:
        handler.setFormatter(logging.Formatter(_LOG))
        root.addHandler(handler)
    try:
        yield
    finally:
        root.setLevel(before)
        for handler in all_handlers:
            root.removeHandler(handler)
            handler.close()
