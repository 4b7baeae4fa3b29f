"""Configs of the readers and of the replay buffer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING
from torchrl.trainers.algorithms.configs.common import ConfigBase
from torchrl.trainers.algorithms.configs.data import ReplayBufferBaseConfig


@dataclass
class HDF5DatasetConfig(ConfigBase):
    """Transitions of a file in D4RL's layout, by :func:`~torchrl_bcq.load_hdf5`."""

    path: str = MISSING  # the file
    action_spec: Any = None  # bounds that the actions must keep; a trainer's config fills in its environment's
    _target_: str = "torchrl_bcq.data.load_hdf5"

    def __post_init__(self) -> None:
        """Nothing is derived."""


@dataclass
class MinariDatasetConfig(ConfigBase):
    """Transitions of a Minari dataset, by :func:`~torchrl_bcq.load_minari`."""

    dataset_id: str = MISSING  # such as mujoco/hopper/medium-v0
    _target_: str = "torchrl_bcq.data.load_minari"

    def __post_init__(self) -> None:
        """Nothing is derived."""


@dataclass
class BCQReplayBufferConfig(ReplayBufferBaseConfig):
    """The replay buffer of a fixed dataset, by :func:`~torchrl_bcq.make_replay_buffer`."""

    transitions: Any = MISSING  # what a reader gives; a trainer's config fills in its dataset
    batch_size: int = 100  # rows of each sample
    device: Any = None  # where the dataset lives; a trainer's config fills in its own
    seed: int | None = None  # of the order of rows; a trainer's config fills in its own
    _target_: str = "torchrl_bcq.data.make_replay_buffer"
