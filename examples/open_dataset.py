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
from torchrl_bcq.data.registry import find_source


def open_dataset(
    name: str | None, env_id: str | None, root: Path | None = None
) -> tuple[Callable[[], EnvBase], TensorDictBase]:
    """What makes the environment to evaluate in, and the transitions to learn from, recorded if none are named."""
    if name is None:
        if record_pendulum.DATASET_ID not in minari.list_local_datasets():
            record_pendulum.record()
        name = f"minari:{record_pendulum.DATASET_ID}"
    find_source(name)  # refuses what is not there
    env_id = env_id or _env_id(name)
    if not env_id:
        raise ValueError(f"{name} does not name its environment; pass --env")

    def make_env() -> EnvBase:
        return TransformedEnv(GymWrapper(gymnasium.make(env_id)), DoubleToFloat())

    return make_env, bcq.load_transitions(name, action_spec=make_env().action_spec, root=root)


def _env_id(name: str) -> object:
    """The environment that a dataset names, if it does."""
    if name.startswith("minari:"):
        return minari.load_dataset(name.removeprefix("minari:"), download=True).env_spec
    if Path(name).suffix in (".hdf5", ".h5") and h5py.is_hdf5(name):
        with h5py.File(name) as file:
            return file.attrs.get("env_id")
    return None
