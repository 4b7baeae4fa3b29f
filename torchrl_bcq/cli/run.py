"""A run: its parts, built from its settings; and its policy, from a checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDictBase
from torchrl.checkpoint import Checkpoint, CheckpointError, CheckpointRotation
from torchrl.data import Bounded, TensorSpec, Unbounded
from torchrl.envs import EnvBase
from torchrl.objectives import SoftUpdate

from torchrl_bcq.cli.config import to_config
from torchrl_bcq.cli.errors import RunError
from torchrl_bcq.data import load_transitions
from torchrl_bcq.data.episodes import episode_returns
from torchrl_bcq.data.registry import find_source
from torchrl_bcq.data.sources.source import env_id_or_none, scores_or_none
from torchrl_bcq.modules import BCQPolicy, Normalization, make_bcq_modules
from torchrl_bcq.objectives import BCQLoss
from torchrl_bcq.trainers.best import best_checkpoint
from torchrl_bcq.trainers.checkpoints import make_checkpoint

_logger = logging.getLogger(__name__)
CHECKPOINTS, BEST = "checkpoints", "best"  # folders within a run's
Networks = tuple[Any, Any, Any]


@dataclass(frozen=True)
class Task:
    """What a run knows of its dataset, kept in its checkpoints.

    Args:
        observation_size: of one observation.
        action_low: lower bound of each action dimension.
        action_high: upper bound.
        env_id: Gymnasium id, if there is an environment to evaluate in.
        reference_scores: returns of a random policy and of an expert, if known.
        behaviour: mean and standard deviation of the dataset's returns, and the number of its episodes.
    """

    observation_size: int
    action_low: list[float]
    action_high: list[float]
    env_id: str | None
    reference_scores: list[float] | None
    behaviour: dict[str, float]

    @property
    def observation_spec(self) -> TensorSpec:
        """Of one observation."""
        return Unbounded((self.observation_size,))

    @property
    def action_spec(self) -> TensorSpec:
        """Of one action."""
        return Bounded(torch.tensor(self.action_low), torch.tensor(self.action_high), (len(self.action_low),))

    @property
    def references(self) -> tuple[float, float] | None:
        """``reference_scores`` as the metrics take them."""
        return None if self.reference_scores is None else (self.reference_scores[0], self.reference_scores[1])


def open_dataset(config: DictConfig) -> tuple[TensorDictBase, Task]:
    """Read the transitions, and what is known of where they came from.

    Raises:
        RunError: if the environment cannot be made, or does not fit.
        DatasetError: if the dataset cannot be read.
    """
    reader = OmegaConf.to_container(config.reader, resolve=True)
    source = find_source(config.dataset, **reader)  # type: ignore[arg-type]
    env_id = getattr(source, "env_id", None) if config.evaluation.env == "auto" else config.evaluation.env
    env = None if env_id is None else make_env(env_id, optional=config.evaluation.env == "auto")
    spec = env.action_spec if env is not None else getattr(source, "action_spec", None)
    transitions = load_transitions(config.dataset, action_spec=spec, root=config.root, **reader)  # type: ignore[arg-type]
    if env is not None:
        remedy = "choose another with evaluation.env=ID, or none with evaluation.env=null"
        check_observations(env, str(env_id), tuple(transitions["observation"].shape[1:]), "the dataset", remedy)
    if spec is None:  # a box is needed, phi is a fraction of it
        spec = Bounded(transitions["action"].amin(0), transitions["action"].amax(0), transitions["action"].shape[1:])
    scores = config.evaluation.reference_scores
    scores = getattr(source, "reference_scores", None) if scores == "auto" else scores
    if scores is not None and scores_or_none(*_two(scores)) is None:
        raise RunError(f"evaluation.reference_scores is {scores}, expected [random, expert], the second one higher.")
    returns = episode_returns(transitions)
    task = Task(
        observation_size=transitions["observation"].shape[-1],
        action_low=spec.space.low.tolist(),
        action_high=spec.space.high.tolist(),
        env_id=None if env is None else env_id,
        reference_scores=None if scores is None else [float(score) for score in scores],
        behaviour={"mean": returns.mean().item(), "std": returns.std(correction=0).item(), "episodes": len(returns)},
    )
    return transitions, task


def _two(scores: Any) -> tuple[Any, Any]:
    """The two scores, if they are two."""
    return (scores[0], scores[1]) if isinstance(scores, Sequence) and len(scores) == 2 else (None, None)


def check_observations(env: EnvBase, env_id: str, shape: tuple[int, ...], whose: str, remedy: str) -> None:
    """Whether the ``observation`` of an environment has this shape.

    Raises:
        RunError: if not.
    """
    leaves = sorted(env.observation_spec.items(True, True), key=lambda leaf: str(leaf[0]))
    found = {key: tuple(spec.shape) for key, spec in leaves}
    if found.get("observation") != shape:
        raise RunError(
            f"{env_id} has observations of shape {found.get('observation', found)}, {whose} of {shape}; {remedy}."
        )


def make_env(env_id: str, *, optional: bool = False, device: Any = None, **settings: Any) -> EnvBase | None:
    """A Gymnasium environment with observations in float32; None where it cannot be made and is optional.

    Raises:
        RunError: if it cannot be made.
    """
    import gymnasium
    from torchrl.envs import DoubleToFloat, GymWrapper, TransformedEnv

    try:
        return TransformedEnv(GymWrapper(gymnasium.make(env_id, **settings), device=device), DoubleToFloat())
    except (gymnasium.error.Error, ImportError) as error:
        if optional:
            _logger.warning("no evaluation in %s, which the dataset names: it cannot be made (%s).", env_id, error)
            return None
        raise RunError(
            f"environment {env_id!r} cannot be made: {error}. Choose another, or evaluation.env=null."
        ) from error


def make_envs(task: Task, episodes: int, device: Any = None) -> EnvBase:
    """As many environments as episodes, one after the other in this process."""
    from torchrl.envs import SerialEnv

    return SerialEnv(episodes, lambda: make_env(str(task.env_id)), device=device)


def make_networks(config: DictConfig, task: Task, normalization: Normalization | None, device: Any) -> Networks:
    """The paper's networks in the sizes of the settings."""
    settings = OmegaConf.to_container(config.network)
    return make_bcq_modules(
        task.observation_spec,
        task.action_spec,
        normalization=normalization,
        device=device,
        **settings,  # type: ignore[arg-type]
    )


def make_loss(config: DictConfig, networks: Networks) -> BCQLoss:
    """The objective of the networks."""
    settings = dict(OmegaConf.to_container(config.loss))  # type: ignore[arg-type]
    gamma, _ = settings.pop("gamma"), settings.pop("tau")
    return BCQLoss(*networks, **settings).make_value_estimator(gamma=gamma)


def choose_device(name: str) -> torch.device:
    """``auto`` is cuda if it is there.

    Raises:
        RunError: if there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise RunError(f"device={name} cannot be used: {error}") from error


def find_checkpoint(run: Path, which: str = "best") -> Path:
    """The checkpoint of a run: ``best`` (the last one, if no best was kept), ``last``, or ``run`` is one itself.

    Raises:
        RunError: if there is none.
    """
    if Checkpoint.is_checkpoint(run):
        return run
    found = best_checkpoint(run / BEST) if which == "best" else None
    found = found or CheckpointRotation(run / CHECKPOINTS, keep_last=1).latest()
    if found is None:
        raise RunError(f"{run} holds no checkpoint; name the folder of a run of torchrl-bcq train, or a checkpoint.")
    return found


@dataclass(frozen=True)
class Trained:
    """What a checkpoint holds, put together.

    Args:
        path: of the checkpoint.
        step: gradient steps behind it.
        config: the settings of its run.
        task: what its run knew of the dataset.
        loss: with the networks.
    """

    path: Path
    step: int
    config: DictConfig
    task: Task
    loss: BCQLoss

    @property
    def policy(self) -> BCQPolicy:
        """The paper's policy of the networks."""
        parts = (self.loss.vae_network, self.loss.actor_network, self.loss.qvalue_network)
        return BCQPolicy(*parts, num_action_samples=self.config.policy.num_action_samples)


def read_metadata(path: Path) -> tuple[DictConfig, Task, int]:
    """Settings, task and step of a checkpoint; nothing in it is executed or unpickled.

    Raises:
        RunError: if it is not of a run of ``torchrl-bcq train``.
    """
    try:
        metadata = Checkpoint.manifest(path)["metadata"]
        task = Task(**{field.name: metadata["task"][field.name] for field in fields(Task)})
        task = replace(task, env_id=env_id_or_none(task.env_id))  # a stranger's must not import anything
        return to_config(metadata["config"]), task, int(metadata["optim_steps"])
    except Exception as error:
        raise RunError(f"{path} is no checkpoint of torchrl-bcq train, or a damaged one: {error!r}") from error


def load(run: Path, which: str = "best", device: str = "auto") -> Trained:
    """Build the networks of a run and load them; neither its dataset nor its environment is needed.

    Raises:
        RunError: if there is no checkpoint, or it cannot be loaded.
    """
    path = find_checkpoint(Path(run), which)
    config, task, step = read_metadata(path)
    target = choose_device(device)
    normalization = Normalization.identity(task.observation_spec) if config.normalize else None
    loss = make_loss(config, make_networks(config, task, normalization, target))
    SoftUpdate(loss, tau=config.loss.tau)  # or TorchRL warns of targets that nobody updates
    try:
        make_checkpoint(loss_module=loss).load(path, map_location=target)
    except CheckpointError as error:
        raise RunError(f"{path} cannot be loaded: {error}") from error
    return Trained(path, step, config, task, loss)


def load_policy(run: str | Path, checkpoint: str = "best", device: str = "auto") -> BCQPolicy:
    """The policy of a run of ``torchrl-bcq train``, ready to act.

    Args:
        run: its folder, or that of one of its checkpoints.
        checkpoint: ``"best"`` (by the metric that it monitored) or ``"last"``.
        device: any torch device; ``"auto"`` is cuda if it is there.

    Raises:
        RunError: if there is no checkpoint, or it cannot be loaded. Nothing in it is executed or unpickled.
    """
    return load(Path(run), checkpoint, device).policy
