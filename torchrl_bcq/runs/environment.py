"""Chooses the environment in which the policy of a run is evaluated."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torchrl.envs import EnvBase

from torchrl_bcq.data.sources.environment import Environment, RecordedEnvironment, change_environment
from torchrl_bcq.errors import RunError
from torchrl_bcq.evaluation.environments import make_env, with_time_limit
from torchrl_bcq.runs.settings import FILE, load_settings

REMEDY = (
    "choose another with evaluation.env=ID, set its arguments with evaluation.env_kwargs.NAME=VALUE, or use none with "
    "evaluation.env=null"
)
_logger = logging.getLogger(__name__)


def choose_environment(
    evaluation: DictConfig, recorded: RecordedEnvironment | None
) -> tuple[Environment, EnvBase] | tuple[None, None]:
    """Return the environment of a new or resumed run, and the same environment made by Gymnasium; or two times None.

    Args:
        evaluation: section ``evaluation`` of the settings. If the user names no environment, the environment that the
            dataset names is used. No module that the dataset names is imported.
        recorded: environment that the dataset names.

    Raises:
        RunError: if an environment that the user named or changed cannot be made.
    """
    kwargs: Any = OmegaConf.to_container(evaluation.env_kwargs, resolve=True)
    named = None if evaluation.env == "auto" else evaluation.env
    if evaluation.env is None:
        return None, None
    entries, known = evaluation.observation and list(evaluation.observation), recorded and recorded.observation
    if entries and known and entries != list(known):
        raise RunError(f"evaluation.observation is {entries}, but the dataset joins {list(known)}; leave it out.")
    env = change_environment(recorded, named, kwargs, evaluation.max_episode_steps, entries)
    if env is None:
        if kwargs or evaluation.max_episode_steps is not None:
            name = "env_kwargs" if kwargs else "max_episode_steps"
            raise RunError(f"evaluation.{name} is set, but the dataset names no environment; set evaluation.env=ID.")
        return None, None
    try:
        if named is None:
            _check_package(recorded)
        made = make_env(env, remedy=REMEDY)
    except RunError as error:
        if named is not None or kwargs:
            raise
        module = getattr(recorded, "module", None)
        remedy = "to name an environment, set evaluation.env=ID"
        if module not in (None, "gymnasium"):
            remedy = f"to import the module {module}, which the dataset names, set evaluation.env={module}:{env.id}"
        message = "the dataset names the environment %s, which cannot be made (%s); no policy is evaluated in it; %s."
        _logger.warning(message, env, error.__cause__ or error, remedy)
        return None, None
    if named is None and recorded is not None:
        for note in recorded.notes:
            remedy = "to use another environment, set evaluation.env=MODULE:ID or evaluation.env_kwargs.NAME=VALUE."
            _logger.warning("the dataset names the environment %s, but %s; %s", recorded, note, remedy)
    return with_time_limit(env, made, "set another number with evaluation.max_episode_steps."), made


def _check_package(recorded: RecordedEnvironment | None) -> None:
    """Raise a RunError if another package has registered an environment with the id of the recorded one."""
    import gymnasium

    spec = gymnasium.registry.get(recorded.id) if recorded is not None else None
    if recorded is None or spec is None or recorded.module is None:
        return
    entry = spec.entry_point
    code = entry if isinstance(entry, str) else getattr(entry, "__module__", "")
    package, expected = code.partition(":")[0].split(".")[0], recorded.module.split(".")[0]
    if package != expected:
        raise RunError(f"{recorded.id} is registered by {package}, but the dataset was recorded with {expected}")


def check_trusted(
    env: Environment | None, checkpoint: Path, given: Mapping[str, Any], remedy: str | None = None
) -> None:
    """Raise a RunError if making the environment of a checkpoint can import a module that only the checkpoint names.

    Args:
        env: environment of the checkpoint, maybe changed by the user; None has no module.
        checkpoint: folder of the checkpoint. The settings file of its run contains what the user of the run named.
        given: id and arguments of the environment that the user has named for this command.
        remedy: advice if the command has no option for the environment.
    """
    code = {} if env is None else env.named_code
    named = {name: value for name, value in code.items() if given.get(name) != value}
    if named and (run := checkpoint.resolve().parents[1]).joinpath(FILE).is_file():
        evaluation: Any = OmegaConf.to_container(load_settings(run).evaluation, resolve=True)
        settings = {**evaluation["env_kwargs"], "id": evaluation["env"]}
        named = {name: value for name, value in named.items() if settings.get(name) != value}
    if named:
        words = [f"--env {value}" if name == "id" else f"--env-kwargs {name}={value}" for name, value in named.items()]
        found = f"{checkpoint} names the environment {env}. A module that only a checkpoint names is not imported"
        raise RunError(f"{found}; {remedy or 'to allow the import, add ' + ' '.join(words)}.")
