"""A dataset by its name, and the environment that it came from, to evaluate in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gymnasium
import h5py
import minari
import record_pendulum
from tensordict import TensorDictBase
from torchrl.envs import DoubleToFloat, EnvBase, GymWrapper, TransformedEnv

import torchrl_bcq as bcq


def open_dataset(name: str | None, env_id: str | None) -> tuple[Callable[[], EnvBase], TensorDictBase]:
    """What makes the environment to evaluate in, and the transitions to learn from, recorded if none are named."""
    if name is None:
        if record_pendulum.DATASET_ID not in minari.list_local_datasets():
            record_pendulum.record()
        name = f"minari:{record_pendulum.DATASET_ID}"
    kind, _, dataset_id = name.partition(":")
    if kind == "minari":
        transitions = bcq.load_minari(dataset_id)
        env_id = env_id or minari.load_dataset(dataset_id).env_spec
    elif not Path(name).is_file():
        raise ValueError(f"there is no file {name}")
    elif not env_id:
        with h5py.File(name) as file:
            env_id = file.attrs.get("env_id")
    if not env_id:
        raise ValueError(f"{name} does not name its environment; pass --env")

    def make_env() -> EnvBase:
        return TransformedEnv(GymWrapper(gymnasium.make(env_id)), DoubleToFloat())

    return make_env, transitions if kind == "minari" else bcq.load_hdf5(name, action_spec=make_env().action_spec)
