"""The folder of a run: facts about its dataset, its checkpoints, and the policies in the checkpoints."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from tensordict.nn import TensorDictModuleBase
from torchrl.checkpoint import Checkpoint, CheckpointError, CheckpointRotation
from torchrl.data import Binary, Bounded, Categorical, Composite, TensorSpec, Unbounded

from torchrl_bcq.bounds import round_inwards
from torchrl_bcq.data.sources.environment import Environment
from torchrl_bcq.errors import RunError
from torchrl_bcq.files import home
from torchrl_bcq.objectives import OfflineLoss
from torchrl_bcq.runs.algorithms import Algorithm, find_algorithm
from torchrl_bcq.runs.build import make_average, make_objective, make_run_policy
from torchrl_bcq.runs.settings import to_settings
from torchrl_bcq.trainers import make_checkpoint
from torchrl_bcq.trainers.best import best_checkpoint
from torchrl_bcq.trainers.checkpoints import damaged_checkpoints

_MANY = 0.1  # share of episodes that were cut off, from which on their length matters
_logger = logging.getLogger(__name__)
CHECKPOINTS, BEST, BASELINE = "checkpoints", "best", "baseline"  # subfolders of a run's folder


@dataclass(frozen=True)
class Task:
    """Facts about the dataset of a run. Each checkpoint of the run contains these facts."""

    shapes: dict[str, list[int]]  # of the entries of a state, which joins ``stack`` observations; [C, H, W] of frames
    env_id: str | None  # Gymnasium id of the environment in which the policy is evaluated
    reference_scores: Sequence[float] | None  # mean returns of a random policy and of an expert
    behaviour: dict[str, float]  # facts about the recorded episodes, from _describe_behaviour
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    max_episode_steps: int | None = None  # None: the time limit that is registered for env_id
    observation: list[str] | None = None  # entries of a Dict observation that are joined, in this order
    stack: int = 1  # number of observations in a state
    action_low: list[float] = field(default_factory=list)  # lower bound of each dimension of a continuous action
    action_high: list[float] = field(default_factory=list)  # upper bound of each dimension of a continuous action
    n_actions: int | None = None  # number of discrete actions
    has_mask: bool = False  # whether the dataset has masks of the available actions

    @property
    def env(self) -> Environment | None:
        """The environment in which the policy is evaluated."""
        if self.env_id is None:
            return None
        seen: dict[str, Any] = {"observation": self.observation, "stack": self.stack}
        return Environment(self.env_id, self.env_kwargs, self.max_episode_steps, **seen)

    @property
    def observation_spec(self) -> TensorSpec:
        """Spec of one state, with the mask of the available actions if there is one."""
        specs = {
            name: Unbounded(shape, dtype=torch.uint8 if len(shape) == 3 else torch.float32)
            for name, shape in self.shapes.items()
        }
        if self.has_mask:
            specs["action_mask"] = Binary(self.n_actions, dtype=torch.bool)
        return Composite(specs) if len(specs) > 1 else specs["observation"]

    def uneven_length(self, limit: int | None) -> tuple[str, int] | None:
        """Return a text if recorded episodes and those of the policy have other time limits, and the recorded limit."""
        after, length = (self.behaviour.get(name, 0) for name in ("cut_off_after", "length"))
        if limit is None:
            return None
        if length > limit:
            found, steps = f"have {length:g} steps on average", math.ceil(max(length, after))
        # readers drop the last row of an episode that was cut off, if its next observation is missing
        elif self.behaviour.get("cut_off", 0) >= _MANY and not limit - 1 <= after <= limit:
            found, steps = f"were cut off after {after:g} steps (median)", int(after)
        else:
            return None
        policy = f"but episodes of {self.env} have up to {limit} steps"
        return f"the recorded episodes {found}, {policy}, so their returns cannot be compared", steps

    def check_unchanged(self, now: Task, consequence: str) -> None:
        """Raise a RunError if the dataset has other episodes now than in this task."""
        if any(not math.isclose(self.behaviour[name], now.behaviour[name]) for name in ("episodes", "length")):
            steps = [f"{task.behaviour['episodes']} episodes" for task in (self, now)]
            found = f"the dataset has changed since the run began: it had {steps[0]}, and now has {steps[1]}"
            if steps[0] == steps[1]:
                found = "the episodes of the dataset have other lengths than when the run began"
            raise RunError(f"{found}, so {consequence}; use the dataset of the run.")

    @property
    def expected(self) -> dict[str, Any]:
        """Requirements for an environment, as arguments of ``check_fits``."""
        shapes = {name: tuple(shape) for name, shape in self.shapes.items()}
        return {"shapes": shapes, "action_spec": self.action_spec, "has_mask": self.has_mask}

    @property
    def action_spec(self) -> TensorSpec:
        """Spec of one action: its number of choices, or its bounds in float32, rounded inwards."""
        spec = self.exact_action_spec
        if self.n_actions is not None:
            return spec
        return Bounded(*round_inwards(spec.low, spec.high, torch.float32), spec.shape)

    @property
    def exact_action_spec(self) -> Any:
        """Spec of one action: its number of choices, or its bounds in float64."""
        if self.n_actions is not None:
            return Categorical(self.n_actions)
        low, high = (torch.tensor(bound, dtype=torch.float64) for bound in (self.action_low, self.action_high))
        return Bounded(low, high, low.shape, dtype=torch.float64)


def choose_device(name: str) -> torch.device:
    """Return the device ``name``; ``auto`` is cuda or cpu. Raises a RunError for an unusable device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reason = "it holds no numbers"
    try:
        if (device := torch.empty(0, device=name).device).type != "meta":
            return device
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).partition(". ")[0].rstrip(".")  # some messages of PyTorch are pages long
    raise RunError(f"device={name} cannot be used: {reason}; choose another device, such as cpu.")


def find_checkpoint(run: Path, which: str = "best") -> Path:
    """Find the ``best`` or ``last`` checkpoint of a run.

    ``run`` may also be a checkpoint, or the folder ``best`` or ``checkpoints`` of a run. If the run kept no best
    checkpoint, ``best`` finds the last checkpoint.

    Raises:
        RunError: if there is no checkpoint, or ``which`` is another word.
    """
    if which not in ("best", "last"):
        raise RunError(f"checkpoint is {which!r}, expected 'best' or 'last'.")
    if Checkpoint.is_checkpoint(run := home(run)):
        return run
    if run.is_file():
        raise RunError(f"{run} is a file; choose the folder of a run of torchrl-bcq train, or of a checkpoint.")
    found = best_checkpoint(run / BEST) if which == "best" else None
    if which == "best" and found is None and (damaged := damaged_checkpoints(run / BEST)):
        best = run / BEST / damaged[0]
        _logger.warning("the manifest.json of %s cannot be read, so the last checkpoint is used", best)
    found = found or CheckpointRotation(run / CHECKPOINTS, keep_last=1).latest()
    if found is None and run.name == BEST:
        found = best_checkpoint(run)
    elif found is None and run.name == CHECKPOINTS:
        found = CheckpointRotation(run, keep_last=1).latest()
    if found is None:
        if not run.exists():
            raise RunError(f"there is no folder {run}; choose the folder of a run of torchrl-bcq train.")
        if damaged := damaged_checkpoints(run / CHECKPOINTS):
            why = f"{run} has only damaged checkpoints: the manifest.json of {damaged} cannot be read"
            raise RunError(f"{why}; restore this file, or train the run again.")
        runs = sorted(path.parent.name for path in run.glob(f"*/{CHECKPOINTS}"))
        inside = f" It contains the runs {runs}." if runs else ""
        expected = "choose the folder of a run of torchrl-bcq train, or a checkpoint"
        raise RunError(f"{run} contains no checkpoint; {expected}.{inside}")
    return found if run.is_absolute() else Path(os.path.relpath(found))  # TorchRL's paths are absolute


@dataclass(frozen=True)
class Trained:
    """A loaded checkpoint. If the run averages its weights, the networks of ``loss`` have the averaged weights."""

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
        policy: Any = make_run_policy(self.settings, self.loss.networks)
        policy.stack, policy.action_spec = self.task.stack, self.task.action_spec
        return policy


def read_metadata(path: Path) -> tuple[DictConfig, Task, int]:
    """Return settings, task and step of a checkpoint, or raise a RunError if ``path`` is not from a run."""
    if not path.exists():
        found = f"the checkpoint {path} no longer exists; if its run is still training, the run has replaced it"
        raise RunError(f"{found}. Repeat the command with the folder of the run.")
    try:
        metadata = Checkpoint.manifest(path)["metadata"]
        settings, facts, step = metadata["config"], dict(metadata["task"]), int(metadata["optim_steps"])
        task = Task(**{fact.name: facts[fact.name] for fact in fields(Task) if fact.name in facts})
        if task.n_actions is None and not (task.action_low and task.action_high):
            raise ValueError("it has neither action bounds nor a number of actions")
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
    average = make_average(settings, loss)
    parts: dict[str, Any] = {"loss_module": loss}
    if average is not None:
        parts["trainer_module.average"] = average  # the name that TorchRL's trainer gives it
    try:
        make_checkpoint(**parts).load(path, map_location=target)
    except CheckpointError as error:
        raise RunError(f"{path} cannot be loaded, so it may be damaged: {error}; choose another checkpoint.") from error
    return Trained(path, step, settings, task, loss if average is None else average.loss_module)
