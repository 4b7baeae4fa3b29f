"""Measures the peak memory of converting a large HDF5 file and of training on it, each in a process of its own.

python tests/benchmarks/large_file.py                  5 million rows of Hopper's size, 595 MB
python tests/benchmarks/large_file.py --rows 100000    quickly
"""

from __future__ import annotations

import argparse
import logging
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np

OBSERVATIONS, ACTIONS, EPISODE = 11, 3, 1000  # Hopper-v5's

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--rows", type=int, default=5_000_000, help="steps in the file (default: %(default)s)")
parser.add_argument("--steps", type=int, default=300, help="gradient steps (default: %(default)s)")
parser.add_argument("--folder", type=Path, help="keeps the file and its copy (default: a temporary folder)")
parser.add_argument("--phase", choices=["import", "convert", "reuse", "train"], help=argparse.SUPPRESS)


def write_file(path: Path, rows: int) -> None:
    """Write random steps in D4RL's layout, one part after the other."""
    rng = np.random.default_rng(0)
    widths = {"observations": (OBSERVATIONS,), "actions": (ACTIONS,), "rewards": ()}
    with h5py.File(path, "w") as file:
        fields = {name: file.create_dataset(name, (rows, *width), "f4") for name, width in widths.items()}
        flags = {name: file.create_dataset(name, (rows,), "?") for name in ("terminals", "timeouts")}
        for start in range(0, rows, 100_000):
            part = slice(start, min(start + 100_000, rows))
            for name, width in widths.items():
                fields[name][part] = rng.uniform(-1, 1, (part.stop - start, *width))
            step = np.arange(start, part.stop) % EPISODE
            flags["terminals"][part] = step == EPISODE // 2
            flags["timeouts"][part] = step == EPISODE - 1


def load_package(folder: Path, steps: int) -> str:
    from torchrl_bcq import BCQTrainer, load_hdf5  # loads torchrl, which import torchrl_bcq does not

    return f"{BCQTrainer.__name__}, {load_hdf5.__name__}"


def convert(folder: Path, steps: int) -> str:
    import torchrl_bcq as bcq

    transitions = bcq.load_hdf5(folder / "large.hdf5", root=folder)
    return f"{len(transitions):,} transitions, {transitions.bytes() / 1e6:.0f} MB"


def train(folder: Path, steps: int) -> str:
    from torchrl.data import Bounded, Unbounded
    from torchrl.objectives import SoftUpdate

    import torchrl_bcq as bcq

    transitions = bcq.load_hdf5(folder / "large.hdf5", root=folder)
    buffer = bcq.make_replay_buffer(transitions, batch_size=256, seed=0)
    loss = bcq.BCQLoss(*bcq.make_bcq_modules(Unbounded((OBSERVATIONS,)), Bounded(-1, 1, (ACTIONS,))))
    trainer = bcq.BCQTrainer(
        loss, buffer, target_net_updater=SoftUpdate(loss, tau=0.005), total_steps=steps, progress_bar=False
    )
    trainer.train()
    return f"{trainer.collected_frames} gradient steps, batch 256"


PHASES = {"import": load_package, "convert": convert, "reuse": convert, "train": train}


def main() -> None:
    args = parser.parse_args()
    if args.phase:
        logging.getLogger("torchrl").setLevel("WARNING")
        start = time.perf_counter()
        what = PHASES[args.phase](args.folder, args.steps)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux
        print(f"{args.phase:<10}{peak:>8.2f} GiB peak{time.perf_counter() - start:>9.1f} s   {what}")
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / "large.hdf5", args.rows)
        size = (folder / "large.hdf5").stat().st_size / 1e6
        print(f"{args.rows:,} rows, {size:.0f} MB in HDF5; peak resident memory of each process:", flush=True)
        for phase in PHASES:
            arguments = ["--phase", phase, "--folder", str(folder), "--steps", str(args.steps)]
            subprocess.run([sys.executable, "-W", "ignore", __file__, *arguments], check=True)


if __name__ == "__main__":
    main()
