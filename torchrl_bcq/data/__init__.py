"""Transitions in: read, checked, stored."""

from torchrl_bcq.data.buffer import make_replay_buffer
from torchrl_bcq.data.readers import load_hdf5, load_minari
from torchrl_bcq.data.transitions import from_arrays

__all__ = ["from_arrays", "load_hdf5", "load_minari", "make_replay_buffer"]
