"""A dataset by its name, and the environment that it came from, to evaluate in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gymnasium
from tensordict import TensorDictBase
from torchrl.envs import DoubleToFloat, EnvBase, GymWrapper, TransformedEnv

import torchrl_bcq as bcq
from torchrl_bcq.cli.record import DATASET_ID, record_default
from torchrl_bcq.data.registry import find_source


def open_dataset(
    name: str | None, env_id: str | None, root: Path | None = None
) -> tuple[Callable[[], EnvBase], TensorDictBase]:
    """What makes the environment to evaluate in, and the transitions to learn from, recorded if none are named."""
    if name is None:
        record_default()
        name = f"minari:{DATASET_ID}"
    env_id = env_id or _env_id(name)
    if not env_id:
        raise ValueError(f"{name} does not name its environment; pass --env")

    def make_env() -> EnvBase:
        return TransformedEnv(GymWrapper(gymnasium.make(env_id)), DoubleToFloat())

    return make_env, bcq.load_transitions(name, action_spec=make_env().action_spec, root=root)


def _env_id(name: str) -> str | None:
    """The environment that a dataset names, if it does."""
    source = find_source(name)
    return None if source is None else source.env_id
