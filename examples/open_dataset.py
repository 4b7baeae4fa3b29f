"""Open a dataset by its name, and the environment in which it was recorded."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from tensordict import TensorDictBase
from torchrl.envs import EnvBase

import torchrl_bcq as bcq
from torchrl_bcq.data.registry import find_source
from torchrl_bcq.data.sources.environment import Environment
from torchrl_bcq.evaluation.environments import make_env
from torchrl_bcq.evaluation.recording import DATASET_ID, record_default


def open_dataset(
    name: str | None, env_id: str | None, root: Path | None = None
) -> tuple[Callable[[], EnvBase], TensorDictBase]:
    """Return a function that makes the environment, and the transitions. Without a name, use the default dataset."""
    if name is None:
        record_default()
        name = f"minari:{DATASET_ID}"
    env = env_id or _env(name)
    if not env:
        raise ValueError(f"{name} does not name its environment; pass a Gymnasium id with --env")

    make = partial(make_env, env)
    return make, bcq.load_transitions(name, action_spec=make().base_env.action_spec, root=root)  # exact bounds


def _env(name: str) -> Environment | None:
    """Return the environment that the dataset names, or None."""
    source = find_source(name)
    return None if source is None else source.env
