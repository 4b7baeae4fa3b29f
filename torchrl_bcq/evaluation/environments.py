"""Gymnasium environments to evaluate and record in."""

from __future__ import annotations

from typing import Any

from torchrl.envs import DoubleToFloat, EnvBase, GymWrapper, SerialEnv, TransformedEnv

from torchrl_bcq.errors import RunError


def make_env(env_id: str, *, remedy: str = "choose another", **settings: Any) -> EnvBase:
    """Make a Gymnasium environment with observations and rewards in float32.

    Args:
        env_id: Gymnasium id.
        remedy: end of the error message: what the user can do.
        settings: arguments of ``gymnasium.make``.

    Raises:
        RunError: if it cannot be made; its cause is Gymnasium's error.
    """
    import gymnasium

    try:
        return TransformedEnv(GymWrapper(gymnasium.make(env_id, **settings)), DoubleToFloat())
    except (gymnasium.error.Error, ImportError, KeyError) as error:  # KeyError: TorchRL does not know a space
        raise RunError(f"environment {env_id!r} cannot be made: {error}; {remedy}.") from error


def make_envs(env_id: str, episodes: int, device: Any = None) -> EnvBase:
    """Make one environment for each episode, as :func:`make_env` does; they are stepped one after another."""
    return SerialEnv(episodes, lambda: make_env(env_id), device=device)


def check_observations(env: EnvBase, env_id: str, shape: tuple[int, ...], whose: str, remedy: str) -> None:
    """Raise a RunError if an environment's ``observation`` has not the shape of ``whose``, such as "the dataset"."""
    leaves = sorted(env.observation_spec.items(True, True), key=str)  # the order of a spec varies
    found = {key: tuple(spec.shape) for key, spec in leaves}
    if found.get("observation") != shape:
        raise RunError(
            f"{env_id} has observations of shape {found.get('observation', found)}, {whose} of {shape}; {remedy}."
        )
