"""Gymnasium environments to evaluate and record in."""

from __future__ import annotations

import logging
from typing import Any, Literal, overload

from torchrl.envs import DoubleToFloat, EnvBase, GymWrapper, SerialEnv, TransformedEnv

from torchrl_bcq.errors import RunError

_logger = logging.getLogger(__name__)


@overload
def make_env(env_id: str, *, optional: Literal[False] = False, remedy: str = "", **settings: Any) -> EnvBase: ...
@overload
def make_env(env_id: str, *, optional: bool, remedy: str = "", **settings: Any) -> EnvBase | None: ...
def make_env(env_id: str, *, optional: bool = False, remedy: str = "choose another", **settings: Any) -> EnvBase | None:
    """Make a Gymnasium environment with observations and rewards in float32.

    Args:
        env_id: Gymnasium id.
        optional: log a warning and return None if it cannot be made.
        remedy: end of the error message: what the user can do.
        settings: arguments of ``gymnasium.make``.

    Raises:
        RunError: if it cannot be made.
    """
    import gymnasium

    try:
        return TransformedEnv(GymWrapper(gymnasium.make(env_id, **settings)), DoubleToFloat())
    except (gymnasium.error.Error, ImportError, KeyError) as error:  # KeyError: TorchRL does not know a space
        if optional:
            _logger.warning("no evaluation in %s, which the dataset names: it cannot be made (%s).", env_id, error)
            return None
        raise RunError(f"environment {env_id!r} cannot be made: {error}; {remedy}.") from error


def make_envs(env_id: str, episodes: int, device: Any = None) -> EnvBase:
    """Make one environment for each episode, stepped one after another in this process.

    Raises:
        RunError: if it cannot be made.
    """
    return SerialEnv(episodes, lambda: make_env(env_id), device=device)


def check_observations(env: EnvBase, env_id: str, shape: tuple[int, ...], whose: str, remedy: str) -> None:
    """Check the shape of an environment's ``observation``.

    Args:
        env: the environment.
        env_id: its name in the message.
        shape: expected shape.
        whose: where the expected shape comes from, such as "the dataset".
        remedy: end of the error message: what the user can do.

    Raises:
        RunError: if it has another shape, or no such entry.
    """
    leaves = sorted(env.observation_spec.items(True, True), key=str)  # the order of a spec varies
    found = {key: tuple(spec.shape) for key, spec in leaves}
    if found.get("observation") != shape:
        raise RunError(
            f"{env_id} has observations of shape {found.get('observation', found)}, {whose} of {shape}; {remedy}."
        )
