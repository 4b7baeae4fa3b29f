"""``torchrl-bcq train``: learn a policy from a dataset."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from textwrap import fill

from omegaconf import DictConfig, OmegaConf

from torchrl_bcq.errors import RunError
from torchrl_bcq.evaluation.recording import DATASET_ID, record_default
from torchrl_bcq.runs import processes
from torchrl_bcq.runs.algorithms import ALGORITHMS, find_algorithm
from torchrl_bcq.runs.job import train
from torchrl_bcq.runs.settings import compose, default_settings
from torchrl_bcq.trainers.distributed import PeerError

YAML = (files("torchrl_bcq.cli") / "train.yaml").read_text(encoding="utf-8")
DEFAULT_TASK = [  # minutes on two cores
    f"dataset=minari:{DATASET_ID}",
    "steps=3500",
    "evaluation.interval=350",
    "evaluation.episodes=20",
    "checkpoint.interval=350",
    "log_interval=50",
]
_DEFAULT_LAYERS = "[256,256]"
_LOG = "[%(asctime)s][%(name)s][%(levelname)s] - %(message)s"
_FLAGS = {"-m": "sweep", "--multirun": "sweep", "--cfg": "show"}
HELP = f"""\
usage: torchrl-bcq train [SETTING=VALUE ...] [-m] [--cfg]

Learn a policy from a dataset, offline. Without a dataset, that of torchrl-bcq record: Pendulum-v1, with
{fill(", ".join(DEFAULT_TASK[1:]), 110)},
layers of {_DEFAULT_LAYERS} in all networks, and the algorithm's baseline.

algorithms: {", ".join(f"{name} ({record.title})" for name, record in ALGORITHMS.items())}

examples:
  torchrl-bcq train
  torchrl-bcq train dataset=hopper.hdf5 optim.lr=3e-4 seed=1 out=runs/hopper
  torchrl-bcq train dataset=hopper.hdf5 algorithm=cloning out=runs/hopper-cloning
  torchrl-bcq train dataset=minari:mujoco/hopper/medium-v0 normalize=true
  torchrl-bcq train -m dataset=hopper.hdf5 out=runs/hopper seed=0,1,2     three runs, one after the other
  torchrl-bcq train dataset=trips.csv \\
    'reader={{observation: [x, v], action: [force], reward: r, terminated: end, episode: trip}}'
  torchrl-bcq train dataset=hopper.hdf5 out=runs/hopper resume=true       begins, or resumes from the last checkpoint
  torchrl-bcq train resume=runs/hopper steps=2000000                      resumes with the settings of that run
  torchrun --nproc-per-node 4 -m torchrl_bcq train dataset=hopper.hdf5    four processes, a batch of each in every step

Ctrl-C and SIGTERM save a checkpoint, from which the run resumes exactly. The folder of a run holds config.yaml,
train.log, log/scalars/*.csv, checkpoints/, best/, results.json and baseline/; see torchrl-bcq evaluate and plot.
--cfg prints the settings and does not train; -m makes a run for each combination of values with commas.

{YAML}"""
_logger = logging.getLogger(__name__)


def main(arguments: Sequence[str]) -> int:
    """Run the command with settings and flags; 0 if all went well. Raises a RunError if one is refused."""
    if {"-h", "--help"} & set(arguments):
        print(HELP)
        return 0
    overrides = [word for word in arguments if not word.startswith("-")]
    flags = {_FLAGS.get(word, word) for word in arguments if word.startswith("-")}
    if unknown := flags - {*_FLAGS.values()}:
        raise RunError(f"there is no flag {', '.join(sorted(unknown))}; see torchrl-bcq train --help.")
    runs = compose([*_defaults(overrides), *overrides], sweep="sweep" in flags)
    if "show" in flags:
        for settings in runs:
            print(OmegaConf.to_yaml(settings))
        return 0
    if missing := sorted(OmegaConf.missing_keys(runs[0])):
        raise RunError(f"{', '.join(missing)} has no value; give it one, as {missing[0]}=VALUE.")
    with processes.joined():
        if processes.several() and len(runs) > 1:
            raise RunError("torchrun makes one run; start those of -m one after the other.")
        return max([_run(settings) for settings in runs], default=0)


def _defaults(overrides: Sequence[str]) -> list[str]:
    """The settings of the run that the command makes without a dataset."""
    given = dict(word.partition("=")[::2] for word in overrides)
    if "dataset" in given or given.get("resume", "false").lower() not in ("true", "false"):
        return []
    name = given.get("algorithm", "bcq")
    if "," in name:
        raise RunError(f"algorithm={name} needs a dataset; the default run has one algorithm.")
    record, network = find_algorithm(name), default_settings(name).network
    layers = [f"network.{key}={_DEFAULT_LAYERS}" for key, value in network.items() if OmegaConf.is_list(value)]
    baseline = [] if record.baseline is None else [f"baseline={record.baseline}"]
    return [*DEFAULT_TASK, *layers, *baseline]


def _run(settings: DictConfig) -> int:
    """Make one run, which the first process logs; its exit code. An error ends it, a signal all runs of a sweep."""
    logging.getLogger("torchrl").setLevel("WARNING")
    settings.out = processes.from_first(lambda: settings.out)  # which may tell the time
    if not processes.is_first():
        with _log_into(level=logging.WARNING):
            return _train(settings)
    out = Path(settings.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(out / "train.log")
    except OSError as error:
        message = f"{settings.out} cannot be the folder of a run: {error}; choose another with out=FOLDER"
        print(f"torchrl-bcq: {message}", file=sys.stderr)
        return 1
    with _log_into(file):
        return _train(settings)


def _train(settings: DictConfig) -> int:
    try:
        if settings.dataset == f"minari:{DATASET_ID}":
            with processes.first_goes_first():
                record_default()
        results = train(settings)
    except (ValueError, OSError, ImportError, FloatingPointError, PeerError) as error:
        if os.environ.get("HYDRA_FULL_ERROR"):
            raise
        if processes.is_first() or not isinstance(error, (FloatingPointError, PeerError)):  # which the first one logs
            _logger.error("%s", error)
        return 1
    except KeyboardInterrupt:
        _logger.warning("left at once; repeat the command with resume=true to resume from the last checkpoint")
        raise SystemExit(130) from None
    if stopped := results.get("stopped"):
        raise SystemExit(128 + signal.Signals[stopped])
    return 0


@contextmanager
def _log_into(*handlers: logging.Handler, level: int = logging.INFO) -> Iterator[None]:
    """Write the messages of all loggers, from a level on, to the terminal and to files, which are closed at the end."""
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
