"""Transitions in: read, checked, described, stored, sampled."""

from torchrl_bcq.data.buffer import make_replay_buffer
from torchrl_bcq.data.checks import DatasetError
from torchrl_bcq.data.description import Description, describe
from torchrl_bcq.data.n_step import multi_step
from torchrl_bcq.data.registry import load_transitions
from torchrl_bcq.data.rollouts import from_rollouts
from torchrl_bcq.data.sampling import WeightedSampler, episode_weights, return_weights, split_episodes
from torchrl_bcq.data.sources import load_d4rl, load_hdf5, load_memmap, load_minari, load_npz, load_table
from torchrl_bcq.data.transitions import from_arrays

__all__ = [
    "DatasetError",
    "Description",
    "WeightedSampler",
    "describe",
    "episode_weights",
    "from_arrays",
    "from_rollouts",
    "load_d4rl",
    "load_hdf5",
    "load_memmap",
    "load_minari",
    "load_npz",
    "load_table",
    "load_transitions",
    "make_replay_buffer",
    "multi_step",
    "return_weights",
    "split_episodes",
]
