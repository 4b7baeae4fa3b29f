"""Configs of the readers and of the replay buffer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING
from torchrl.trainers.algorithms.configs.common import ConfigBase
from torchrl.trainers.algorithms.configs.data import ReplayBufferBaseConfig


@dataclass
class DatasetConfig(ConfigBase):
    """What all readers take."""

    action_spec: Any = None  # bounds that the actions must keep; a trainer's config fills in its environment's
    root: str | None = None  # folder for a memory-mapped copy, made once

    def __post_init__(self) -> None:
        """Nothing is derived."""


@dataclass
class HDF5DatasetConfig(DatasetConfig):
    """Transitions of an HDF5 file, by :func:`~torchrl_bcq.load_hdf5`."""

    path: str = MISSING  # the file
    names: dict[str, str] | None = None  # where a field is, if under no common name
    max_episode_steps: int | None = None  # time limit, for files without time-outs
    _target_: str = "torchrl_bcq.data.load_hdf5"


@dataclass
class NPZDatasetConfig(HDF5DatasetConfig):
    """Transitions of an NPZ file, by :func:`~torchrl_bcq.load_npz`."""

    _target_: str = "torchrl_bcq.data.load_npz"


@dataclass
class TableDatasetConfig(DatasetConfig):
    """Transitions of a CSV or Parquet file, by :func:`~torchrl_bcq.load_table`."""

    path: str = MISSING  # the file
    observation: list[str] = MISSING  # columns of the state
    action: list[str] = MISSING  # columns of the action
    reward: str = MISSING  # column of the reward
    terminated: str = MISSING  # column of flags: the episode ended in a final state
    truncated: str | None = None  # column of flags: the episode was cut off
    next_observation: list[str] | None = None  # columns of the state that followed
    episode: str | None = None  # column of the episode's number or name
    step: str | None = None  # column of the step within the episode
    delimiter: str = ","  # between the cells of a CSV file
    decimal_point: str = "."  # in the numbers of a CSV file
    _convert_: str = "all"
    _target_: str = "torchrl_bcq.data.load_table"


@dataclass
class MinariDatasetConfig(DatasetConfig):
    """Transitions of a Minari dataset, by :func:`~torchrl_bcq.load_minari`."""

    dataset_id: str = MISSING  # such as mujoco/hopper/medium-v0
    _target_: str = "torchrl_bcq.data.load_minari"


@dataclass
class D4RLDatasetConfig(DatasetConfig):
    """Transitions of a D4RL dataset, by :func:`~torchrl_bcq.load_d4rl`."""

    dataset_id: str = MISSING  # such as hopper-medium-v2
    max_episode_steps: int | None = None  # time limit, for files without time-outs; those of the Gym tasks are known
    _target_: str = "torchrl_bcq.data.load_d4rl"


@dataclass
class MemmapDatasetConfig(ConfigBase):
    """Transitions of a memory-mapped copy, by :func:`~torchrl_bcq.load_memmap`."""

    path: str = MISSING  # the folder
    _target_: str = "torchrl_bcq.data.load_memmap"

    def __post_init__(self) -> None:
        """Nothing is derived."""


@dataclass
class BCQReplayBufferConfig(ReplayBufferBaseConfig):
    """The replay buffer of a fixed dataset, by :func:`~torchrl_bcq.make_replay_buffer`."""

    transitions: Any = MISSING  # what a reader gives; a trainer's config fills in its dataset
    batch_size: int = 100  # rows of each sample
    device: Any = None  # where the dataset lives; a trainer's config fills in its own
    seed: int | None = None  # of the order of rows; a trainer's config fills in its own
    sampler: Any = "uniform"  # or without_replacement, prioritized, or one of TorchRL's
    weights: Any = None  # of the rows
    _target_: str = "torchrl_bcq.data.make_replay_buffer"
