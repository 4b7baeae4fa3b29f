"""Files and hubs that hold recorded steps, and memory-mapped copies of them."""

from torchrl_bcq.data.sources.array_files import load_hdf5, load_npz
from torchrl_bcq.data.sources.conversion import load_memmap
from torchrl_bcq.data.sources.hubs import load_d4rl, load_minari
from torchrl_bcq.data.sources.tables import load_table

__all__ = ["load_d4rl", "load_hdf5", "load_memmap", "load_minari", "load_npz", "load_table"]
