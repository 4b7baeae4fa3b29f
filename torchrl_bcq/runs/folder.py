"""The folder of a run: facts about its dataset, its checkpoints, and the policies in the checkpoints."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.checkpoint import Checkpoint, CheckpointError, CheckpointRotation
from torchrl.data import Bounded, TensorSpec, Unbounded

from torchrl_bcq.bounds import round_inwards
from torchrl_bcq.data import DatasetError, load_transitions, stack_observations
from torchrl_bcq.data.episodes import episode_returns
from torchrl_bcq.data.frames import stack_in_folder
from torchrl_bcq.data.registry import find_source
from torchrl_bcq.data.sources.environment import Environment
from torchrl_bcq.data.sources.source import scores_or_none
from torchrl_bcq.errors import RunError, on_command_line
from torchrl_bcq.evaluation.environments import check_continuous, check_fits
from torchrl_bcq.files import home
from torchrl_bcq.objectives import OfflineLoss
from torchrl_bcq.runs import processes
from torchrl_bcq.runs.algorithms import Algorithm, find_algorithm
from torchrl_bcq.runs.bounds import DATA, Box, check_actions, choose_bounds, clip_actions
from torchrl_bcq.runs.build import make_objective, make_policy
from torchrl_bcq.runs.environment import REMEDY, choose_environment
from torchrl_bcq.runs.settings import to_settings
from torchrl_bcq.trainers import make_checkpoint
from torchrl_bcq.trainers.best import best_checkpoint

CHECKPOINTS, BEST, BASELINE = "checkpoints", "best", "baseline"  # subfolders of a run's folder


@dataclass(frozen=True)
class Task:
    """Facts about the dataset of a run. Each checkpoint of the run contains these facts."""

    observation_size: int  # of a state, which joins ``stack`` observations
    action_low: list[float]  # lower bound of each action dimension
    action_high: list[float]  # upper bound of each action dimension
    env_id: str | None  # Gymnasium id of the environment in which the policy is evaluated
    reference_scores: Sequence[float] | None  # mean returns of a random policy and of an expert
    behaviour: dict[str, float]  # mean and std of the dataset's returns, and the number of the dataset's episodes
    env_kwargs: dict[str, Any] = field(default_factory=dict)  # older checkpoints lack this field and the next ones
    max_episode_steps: int | None = None  # None: the time limit that is registered for env_id
    observation: list[str] | None = None  # entries of a Dict observation that are joined, in this order
    stack: int = 1  # number of observations in a state

    @property
    def env(self) -> Environment | None:
        """The environment in which the policy is evaluated."""
        if self.env_id is None:
            return None
        seen: dict[str, Any] = {"observation": self.observation, "stack": self.stack}
        return Environment(self.env_id, self.env_kwargs, self.max_episode_steps, **seen)

    @property
    def observation_spec(self) -> TensorSpec:
        """Spec of one state."""
        return Unbounded((self.observation_size,))

    @property
    def action_spec(self) -> TensorSpec:
        """Spec of one action in float32; its bounds are rounded inwards."""
        low, high = (torch.tensor(bound, dtype=torch.float64) for bound in (self.action_low, self.action_high))
        return Bounded(*round_inwards(low, high, torch.float32), low.shape)


@on_command_line()  # the user writes settings
def open_dataset(settings: DictConfig) -> tuple[TensorDictBase, Task]:
    """Read the dataset of a run; returns the transitions and a ``Task``.

    Raises:
        RunError: if the environment cannot be made or does not fit the dataset, or if the action bounds or the
            reference scores are invalid.
        DatasetError: if the dataset cannot be read or has defects.
    """
    reader: Any = OmegaConf.to_container(settings.reader, resolve=True)
    source = find_source(settings.dataset, **reader)
    recorded = getattr(source, "env", None)
    env, made = choose_environment(settings.evaluation, recorded)
    specs = {f"environment {env}": None, "dataset's spec": getattr(source, "action_spec", None)}
    if settings.init_from is not None:
        specs["run of init_from"] = _earlier_bounds(settings.out, settings.init_from)
    if made is not None:
        check_continuous(made, str(env), REMEDY)
        specs[f"environment {env}"] = made.base_env.action_spec  # bounds that are not rounded
    transitions, box = _read_in_bounds(settings, specs, reader)
    if env is not None and made is not None:
        states = transitions["observation"]
        shape = tuple(states[..., : states.shape[-1] // settings.stack].shape[1:])  # of one observation
        check_fits(made, env, REMEDY, whose="the dataset", observations=shape)
    scores = settings.evaluation.reference_scores
    scores = getattr(source, "reference_scores", None) if scores == "auto" else scores
    references = scores_or_none(scores)
    if scores is not None and references is None:
        raise RunError(f"evaluation.reference_scores is {scores}, expected [random, expert], where expert is higher.")
    returns = episode_returns(transitions)
    entries = settings.evaluation.observation or getattr(env or recorded, "observation", None)
    if processes.is_first():
        box.report()
    return transitions, Task(
        observation_size=transitions["observation"].shape[-1],
        action_low=box.low.tolist(),
        action_high=box.high.tolist(),
        env_id=None if env is None else env.id,
        reference_scores=references,
        behaviour={"mean": returns.mean().item(), "std": returns.std(correction=0).item(), "episodes": len(returns)},
        env_kwargs={} if env is None else dict(env.kwargs),
        max_episode_steps=None if env is None else env.max_episode_steps,
        observation=None if entries is None else list(entries),
        stack=settings.stack,
    )


def _read_in_bounds(
    settings: DictConfig, specs: dict[str, TensorSpec | None], reader: dict[str, Any]
) -> tuple[TensorDictBase, Box]:
    """Read the transitions; check or clip their actions. Bounds that no source has are the range of the data."""
    box, spec = choose_bounds(settings, specs), None
    chosen = box
    if box is not None:
        box.check()
        spec = Unbounded(box.low.shape) if settings.action_clip else box.spec
    try:
        transitions = load_transitions(settings.dataset, action_spec=spec, root=settings.root, **reader)
        if settings.stack > 1 and settings.root is not None and transitions.is_memmap():
            transitions = stack_in_folder(transitions, settings.stack)
        elif settings.stack > 1:
            transitions = stack_observations(transitions, settings.stack)
        low, high = transitions["action"].aminmax(dim=0)
        chosen = choose_bounds(settings, {**specs, DATA: Bounded(low, high, low.shape)})
        assert chosen is not None
        chosen.check()
        if settings.action_clip:
            transitions = clip_actions(transitions, chosen)
        elif box is None:
            check_actions(transitions, chosen)
    except DatasetError as error:
        message = str(error)
        if chosen is not None and "action spec" in message:
            origins = " and ".join(dict.fromkeys(source for side in chosen.origins for source in side))
            message += f" The action spec comes from: {origins}."
        raise DatasetError(message) from error.__cause__
    return transitions, chosen


def _earlier_bounds(*runs: str) -> TensorSpec | None:
    """Return the action spec of the first run that has a checkpoint, or None."""
    for run in runs:
        try:
            return read_metadata(find_checkpoint(Path(run)))[1].action_spec
        except RunError:
            continue  # load_networks raises this error if the checkpoint is needed
    return None


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
    if Checkpoint.is_checkpoint(run := home(run)):
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
        policy: Any = make_policy(self.settings.algorithm, *self.loss.networks, **self.settings.policy)
        policy.stack = self.task.stack
        return policy


def read_metadata(path: Path) -> tuple[DictConfig, Task, int]:
    """Return settings, task and step of a checkpoint, or raise a RunError if ``path`` is not from a run."""
    try:
        metadata = Checkpoint.manifest(path)["metadata"]
        settings, facts, step = metadata["config"], metadata["task"], int(metadata["optim_steps"])
        task = Task(**{fact.name: facts[fact.name] for fact in fields(Task) if fact.name in facts})
        if task.env is not None and not re.fullmatch(r"([\w.]+:)?[\w./-]+", str(task.env_id)):
            raise ValueError(f"{task.env_id!r} is not the id of an environment")
    except Exception as error:
        raise RunError(f"{path} is not a checkpoint of torchrl-bcq train, or it is damaged: {error!r}") from error
    return to_settings(settings, path), task, step


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
