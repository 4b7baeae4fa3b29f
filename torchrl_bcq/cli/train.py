"""``torchrl-bcq train``: learn a policy from a dataset, and be left alone with it."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import fill

from omegaconf import DictConfig
from omegaconf.errors import MissingMandatoryValue

from torchrl_bcq.cli import processes
from torchrl_bcq.cli.config import YAML, default_config, load_config
from torchrl_bcq.cli.errors import RunError
from torchrl_bcq.cli.job import train
from torchrl_bcq.cli.record import DATASET_ID, record_default
from torchrl_bcq.trainers.distributed import PeerError

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
  torchrl-bcq train dataset=hopper.hdf5 out=runs/hopper 'seeds=[0,1,2]'   three at once, in one process
  torchrl-bcq train dataset=trips.csv 'reader={{observation: [x, v], action: [force], reward: r, terminated: end}}'
  torchrl-bcq train dataset=hopper.hdf5 out=runs/hopper resume=true       begins, or goes on from the last checkpoint
  torchrl-bcq train resume=runs/hopper steps=2000000                      goes on with the settings that it had
  torchrun --nproc-per-node 4 -m torchrl_bcq train dataset=hopper.hdf5    four processes, a batch of each in every step

Ctrl-C and SIGTERM save a checkpoint, with which the run goes on exactly where it was. The folder of a run holds
config.yaml, train.log, log/scalars/*.csv, checkpoints/, best/ and results.json; see torchrl-bcq evaluate and plot.
--cfg job prints the settings, -m runs all combinations of those with commas, --hydra-help tells the rest of Hydra.

{YAML}"""
_logger = logging.getLogger(__name__)


def main(arguments: Sequence[str]) -> int:
    """Run the command with Hydra's overrides and flags; 0 if all went well.

    Raises:
        RunError: if ``resume=RUN`` names no run, or several processes are to make several runs.
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
        with processes.joined():
            if processes.several() and {"-m", "--multirun"} & set(arguments):
                raise RunError("torchrun makes one run; start those of -m one after the other.")
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
    """One run; its exit code. A refusal ends it, and not the others of a sweep; a signal ends them all.

    Of several processes the first one alone has a log and speaks.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    logging.getLogger("torchrl").setLevel("WARNING")
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        config.out = HydraConfig.get().runtime.output_dir
    config.out = processes.from_first(lambda: config.out)  # which may tell the time
    if not processes.is_first():
        with _log_into(level=logging.WARNING):
            return _train_and_tell(config)
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
            with processes.first_goes_first():
                record_default()
        results = train(config)
    except (ValueError, OSError, ImportError, FloatingPointError, MissingMandatoryValue, PeerError) as error:
        if os.environ.get("HYDRA_FULL_ERROR"):
            raise
        if processes.is_first() or not isinstance(error, (FloatingPointError, PeerError)):  # of which the first tells
            _logger.error("%s", error)
        return 1
    except KeyboardInterrupt:
        _logger.warning("left at once; torchrl-bcq train resume=%s goes on from its last checkpoint", config.out)
        raise SystemExit(130) from None
    if stopped := results.get("stopped"):
        raise SystemExit(128 + signal.Signals[stopped])
    return 0


@contextmanager
def _log_into(*files: logging.Handler, level: int = logging.INFO) -> Iterator[None]:
    """Show messages of all loggers, from a level on, on the terminal and in files, which are closed in the end."""
    root, handlers = logging.getLogger(), [logging.StreamHandler(), *files]
    before = root.level
    root.setLevel(level)
    for handler in handlers:
        handler.setFormatter(logging.Formatter(_LOG))
        root.addHandler(handler)
    try:
        yield
    finally:
        root.setLevel(before)
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()
