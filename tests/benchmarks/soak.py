"""Checks a long run for memory leaks: many small steps with logging, evaluation and checkpoints.

python tests/benchmarks/soak.py                    200,000 steps, about 20 minutes
python tests/benchmarks/soak.py --steps 2000 --from 1000

The run is ``torchrl-bcq train`` in this process. It logs and writes a checkpoint every 100 steps, and evaluates on
held-out episodes every 1,000. Exits with 1 if resident memory at the end is over 5 % above that after ``--from`` steps.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
from tqdm import tqdm

from torchrl_bcq import OfflineTrainer
from torchrl_bcq.__main__ import main as command

ALLOWED = 1.05


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200_000, help="gradient steps (default: %(default)s)")
    parser.add_argument("--from", type=int, default=20_000, dest="begin", help="step to compare with")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak.") as folder:
        return run(Path(folder), args.steps, args.begin)


def run(folder: Path, steps: int, begin: int) -> int:
    rng, n = np.random.default_rng(0), 5_000
    with h5py.File(folder / "steps.hdf5", "w") as file:
        for name, width in (("observations", 4), ("actions", 2), ("next_observations", 4)):
            file[name] = rng.uniform(-1, 1, (n, width))
        file["rewards"], file["terminals"], file["timeouts"] = rng.normal(size=n), np.zeros(n), np.arange(n) % 50 == 49
    settings = {
        "dataset": folder / "steps.hdf5",
        "out": folder / "run",
        "steps": steps,
        "batch_size": 16,
        "network.hidden": "[8]",
        "network.vae_hidden": "[8]",
        "held_out": 0.1,
        "evaluation.interval": 1_000,
        "evaluation.max_rows": 100,
        "checkpoint.interval": 100,
        "checkpoint.monitor": "held_out_loss_vae",
        "checkpoint.mode": "min",
        "progress_bar": "false",
        "threads": 1,
    }
    memory: dict[int, float] = {}
    start = time.monotonic()
    with watched(memory, every=max(begin // 4, 1), total=steps):
        if code := command(["train", *(f"{name}={value}" for name, value in settings.items())]):
            return code
    first, last = memory[begin], memory[steps]
    print(f"{steps:,} steps in {time.monotonic() - start:.0f} s")
    for step, megabytes in memory.items():
        if step in (begin, steps) or step % max(begin, steps // 10) == 0:
            print(f"{step:>9,} steps {megabytes:8.1f} MB")
    print(f"resident memory at the end is {last / first:.3f}x that after {begin:,} steps; {ALLOWED}x is allowed")
    return last > ALLOWED * first


def resident() -> float:
    """Resident memory of this process, in MB."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(fields["VmRSS"].split()[0]) / 1e3


@contextmanager
def watched(memory: dict[int, float], every: int, total: int) -> Iterator[None]:
    """Record resident memory by step, after checkpoints were written."""
    original = OfflineTrainer.save_trainer
    bar = tqdm(total=total, unit=" steps", disable=None)

    def save_and_measure(trainer: OfflineTrainer, force_save: bool = False) -> None:
        original(trainer, force_save)
        step = trainer.collected_frames
        bar.update(step - bar.n)
        if step % every == 0 or step == trainer.total_frames:
            memory[step] = resident()

    OfflineTrainer.save_trainer = save_and_measure
    try:
        yield
    finally:
        OfflineTrainer.save_trainer = original
        bar.close()


if __name__ == "__main__":
    sys.exit(main())
