"""The folder of a run: facts about its dataset, its checkpoints, and the policies in the checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.checkpoint import Checkpoint, CheckpointError, CheckpointRotation
from torchrl.data import Bounded, TensorSpec, Unbounded

from torchrl_bcq.bounds import action_bounds
from torchrl_bcq.data import load_transitions
from torchrl_bcq.data.episodes import episode_returns
from torchrl_bcq.data.registry import find_source
from torchrl_bcq.data.sources.source import env_id_or_none, scores_or_none
from torchrl_bcq.errors import RunError
from torchrl_bcq.evaluation.environments import check_observations, make_env
from torchrl_bcq.objectives import OfflineLoss
from torchrl_bcq.runs.algorithms import Algorithm, find_algorithm
from torchrl_bcq.runs.build import make_objective, make_policy
from torchrl_bcq.runs.settings import to_settings
from torchrl_bcq.trainers import make_checkpoint
from torchrl_bcq.trainers.best import best_checkpoint

CHECKPOINTS, BEST, BASELINE = "checkpoints", "best", "baseline"  # subfolders of a run's folder
_REMEDY = "choose another with evaluation.env=ID, or none with evaluation.env=null"
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """Facts about the dataset of a run. Each checkpoint of the run contains these facts."""

    observation_size: int
    action_low: list[float]  # lower bound of each action dimension
    action_high: list[float]  # upper bound of each action dimension
    env_id: str | None  # Gymnasium id of the environment in which the policy is evaluated
    reference_scores: Sequence[float] | None  # mean returns of a random policy and of an expert
    behaviour: dict[str, float]  # mean and std of the dataset's returns, and the number of the dataset's episodes

    @property
    def observation_spec(self) -> TensorSpec:
        """Spec of one observation."""
        return Unbounded((self.observation_size,))

    @property
    def action_spec(self) -> TensorSpec:
        """Spec of one action."""
        return Bounded(torch.tensor(self.action_low), torch.tensor(self.action_high), (len(self.action_low),))


def open_dataset(settings: DictConfig) -> tuple[TensorDictBase, Task]:
    """Read the dataset of a run; returns the transitions and a ``Task``.

    Raises:
        RunError: if the environment cannot be made or does not fit the dataset, or the reference scores are invalid.
        DatasetError: if the dataset cannot be read or has defects.
    """
    reader: Any = OmegaConf.to_container(settings.reader, resolve=True)
    source = find_source(settings.dataset, **reader)
    is_auto = settings.evaluation.env == "auto"
    env_id = getattr(source, "env_id", None) if is_auto else settings.evaluation.env
    try:
        env = None if env_id is None else make_env(env_id, remedy=_REMEDY)
    except RunError as error:
        if not is_auto:
            raise
        env, reason = None, error.__cause__
        message = "the dataset names the environment %s, which cannot be made (%s); no policy is evaluated in it."
        _logger.warning(message, env_id, reason)
    spec = env.action_spec if env is not None else getattr(source, "action_spec", None)
    transitions = load_transitions(settings.dataset, action_spec=spec, root=settings.root, **reader)
    if env is not None:
        check_observations(env, str(env_id), tuple(transitions["observation"].shape[1:]), "the dataset", _REMEDY)
    if spec is None:  # the networks need bounds: use the range of the dataset's actions
        spec = Bounded(transitions["action"].amin(0), transitions["action"].amax(0), transitions["action"].shape[1:])
    scores = settings.evaluation.reference_scores
    scores = getattr(source, "reference_scores", None) if scores == "auto" else scores
    references = scores_or_none(scores)
    if scores is not None and references is None:
        raise RunError(f"evaluation.reference_scores is {scores}, expected [random, expert], where expert is higher.")
    (low, high), returns = action_bounds(spec), episode_returns(transitions)
    return transitions, Task(
        observation_size=transitions["observation"].shape[-1],
        action_low=low.tolist(),
        action_high=high.tolist(),
        env_id=None if env is None else env_id,
        reference_scores=references,
        behaviour={"mean": returns.mean().item(), "std": returns.std(correction=0).item(), "episodes": len(returns)},
    )


def choose_device(name: str) -> torch.device:
    """Return the device ``name``; ``auto`` is cuda or cpu. Raises a RunError for an unusable device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise RunError(f"device={name} cannot be used: {error}") from error


def find_checkpoint(run: Path, which: str = "best") -> Path:
    """Find the ``best`` or ``last`` checkpoint of a run. If ``run`` is a checkpoint, return ``run``.

    If the run kept no best checkpoint, ``best`` finds the last checkpoint.

    Raises:
        RunError: if there is no checkpoint.
    """
    if Checkpoint.is_checkpoint(run):
        return run
    found = best_checkpoint(run / BEST) if which == "best" else None
    found = found or CheckpointRotation(run / CHECKPOINTS, keep_last=1).latest()
    if found is None:
        runs = sorted(path.parent.name for path in run.glob(f"*/{CHECKPOINTS}"))
        inside = f" It contains the runs {runs}." if runs else ""
        expected = "choose the folder of a run of torchrl-bcq train, or a checkpoint"
        raise RunError(f"{run} contains no checkpoint; {expected}.{inside}")
    return found


@dataclass(frozen=True)
class Trained:
    """A loaded checkpoint; the attribute ``loss`` contains the networks."""

    path: Path
    step: int  # number of gradient steps that the run had made before this checkpoint
    settings: DictConfig
    task: Task
    loss: OfflineLoss

    @property
    def algorithm(self) -> Algorithm:
        """The entry of the run's algorithm in ``ALGORITHMS``."""
        return find_algorithm(self.settings.algorithm)

    @property
    def policy(self) -> TensorDictModuleBase:
        """The policy of the algorithm, made from the networks."""
        return make_policy(self.settings.algorithm, *self.loss.networks, **self.settings.policy)


def read_metadata(path: Path) -> tuple[DictConfig, Task, int]:
    """Return settings, task and step of a checkpoint, or raise a RunError if ``path`` is not from a run."""
    try:
        metadata = Checkpoint.manifest(path)["metadata"]
        settings, facts, step = metadata["config"], metadata["task"], int(metadata["optim_steps"])
        task = Task(**{field.name: facts[field.name] for field in fields(Task)})
    except Exception as error:
        raise RunError(f"{path} is not a checkpoint of torchrl-bcq train, or it is damaged: {error!r}") from error
    # for safety, drop an environment id such as module:Name-v0: Gymnasium would import the module
    return to_settings(settings, path), replace(task, env_id=env_id_or_none(task.env_id)), step


def load(run: Path, which: str = "best", device: str = "auto") -> Trained:
    """Build the networks of a run and load their weights. Loading needs no dataset or environment.

    Raises:
        RunError: if there is no checkpoint, or if it cannot be loaded.
    """
    path = find_checkpoint(Path(run), which)
    settings, task, step = read_metadata(path)
    target = choose_device(device)
    scaling = "identity" if settings.normalize else None
    loss, _ = make_objective(settings, task.observation_spec, task.action_spec, normalization=scaling, device=target)
    try:
        make_checkpoint(loss_module=loss).load(path, map_location=target)
    except CheckpointError as error:
        raise RunError(f"{path} cannot be loaded: {error}") from error
    return Trained(path, step, settings, task, loss)
