"""Reads, checks, stores and samples transitions."""

from torchrl_bcq.data.buffer import make_replay_buffer as make_replay_buffer
from torchrl_bcq.data.frames import stack_observations as stack_observations
from torchrl_bcq.data.n_step import multi_step as multi_step
from torchrl_bcq.data.registry import load_transitions as load_transitions
from torchrl_bcq.data.rollouts import from_rollouts as from_rollouts
from torchrl_bcq.data.sampling import (
    WeightedSampler as WeightedSampler,
    episode_weights as episode_weights,
    return_weights as return_weights,
    split_episodes as split_episodes,
)
from torchrl_bcq.data.sources.array_files import load_hdf5 as load_hdf5, load_npz as load_npz
from torchrl_bcq.data.sources.conversion import load_memmap as load_memmap
from torchrl_bcq.data.sources.hubs import load_d4rl as load_d4rl, load_minari as load_minari
from torchrl_bcq.data.sources.tables import load_table as load_table
from torchrl_bcq.data.transitions import from_arrays as from_arrays
from torchrl_bcq.errors import DatasetError as DatasetError
