"""Makes Gymnasium environments for evaluation and recording."""

from __future__ import annotations

import math
from typing import Any

from torchrl.envs import DoubleToFloat, EnvBase, GymWrapper, SerialEnv, TransformedEnv

from torchrl_bcq.errors import RunError

_REST = 0.005  # episodes should continue until the weight gamma**t of a reward is at most this number
_LONGEST = 1_000  # steps_to_compare raises a time limit to at most this many steps; more steps take too long


def make_env(env_id: str, *, remedy: str = "choose another environment", **settings: Any) -> EnvBase:
    """Make a Gymnasium environment with observations and rewards in float32.

    Args:
        env_id: Gymnasium id of the environment.
        remedy: advice to the user at the end of the error message.
        settings: further arguments of ``gymnasium.make``.

    Raises:
        RunError: if the environment cannot be made; the error's ``__cause__`` is the original error.
    """
    import gymnasium

    try:
        return TransformedEnv(GymWrapper(gymnasium.make(env_id, **settings)), DoubleToFloat())
    except (gymnasium.error.Error, ImportError, KeyError) as error:  # KeyError: TorchRL cannot convert a space
        raise RunError(f"environment {env_id!r} cannot be made: {error}; {remedy}.") from error


def make_envs(env_id: str, episodes: int, device: Any = None, *, max_steps: int | None = None) -> EnvBase:
    """Return a ``SerialEnv`` of environments from ``make_env``, one for each episode.

    ``max_steps`` replaces the time limit of the environment.
    """
    return SerialEnv(episodes, lambda: make_env(env_id, max_episode_steps=max_steps), device=device)


def steps_to_compare(env_id: str, gamma: float) -> int | None:
    """Return how long episodes must be, so that their discounted return can be compared with a critic's estimate.

    A critic estimates the return without a time limit, but a short episode leaves out the rewards of later steps. So a
    time limit below ``log(0.005) / log(gamma)`` steps is raised to this number, but not above 1,000 steps. After this
    number of steps, the weight of a reward, ``gamma^t``, is below 0.5 %. The result is None if the environment has no
    time limit.
    """
    limit = time_limit(env_id)
    if limit is None or not 0 < gamma < 1:
        return limit
    return max(limit, min(_LONGEST, math.ceil(math.log(_REST) / math.log(gamma))))


def time_limit(env_id: str) -> int | None:
    """Return the number of steps after which Gymnasium ends an episode, or None without a time limit."""
    import gymnasium

    return gymnasium.spec(env_id).max_episode_steps


def check_observations(env: EnvBase, env_id: str, shape: tuple[int, ...], whose: str, remedy: str) -> None:
    """Raise a RunError if the observations of ``env`` do not have the shape ``shape``."""
    leaves = sorted(env.observation_spec.items(True, True), key=str)  # for a fixed order in the message
    found = {key: tuple(spec.shape) for key, spec in leaves}
    if found.get("observation") != shape:
        raise RunError(
            f"{env_id} has observations of shape {found.get('observation', found)}, but {whose} has {shape}; {remedy}."
        )
