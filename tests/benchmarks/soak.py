"""Does a long run leak? Resident memory of a run of many tiny steps, with logging, evaluation and checkpoints.

python tests/benchmarks/soak.py                    200,000 steps, about 20 minutes
python tests/benchmarks/soak.py --steps 2000 --from 1000

The run is ``torchrl-bcq train`` in this process: a line of the log and a checkpoint every 100 steps, an evaluation on
held-out episodes every 1,000. Exits with 1 if the memory at the end is over 5 % above that after ``--from`` steps.
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

from torchrl_bcq.cli import train as command
from torchrl_bcq.cli.config import default_config, to_config
from torchrl_bcq.trainers import BCQTrainer

ALLOWED = 1.05


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200_000, help="gradient steps (default: %(default)s)")
    parser.add_argument("--from", type=int, default=20_000, dest="begin", help="step of the first look")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak.") as folder:
        return run(Path(folder), args.steps, args.begin)


def run(folder: Path, steps: int, begin: int) -> int:
    rng, n = np.random.default_rng(0), 5_000
    with h5py.File(folder / "steps.hdf5", "w") as file:
        for name, width in (("observations", 4), ("actions", 2), ("next_observations", 4)):
            file[name] = rng.uniform(-1, 1, (n, width))
        file["rewards"], file["terminals"], file["timeouts"] = rng.normal(size=n), np.zeros(n), np.arange(n) % 50 == 49
    small = {"hidden": [8], "vae_hidden": [8]}
    config = default_config()
    config.merge_with(
        {
            "dataset": str(folder / "steps.hdf5"),
            "steps": steps,
            "batch_size": 16,
            "network": small,
            "held_out": 0.1,
            "evaluation": {"interval": 1_000, "max_rows": 100},
            "checkpoint": {"interval": 100, "monitor": "held_out_vae_loss", "mode": "min"},
            "progress_bar": False,
            "threads": 1,
            "out": str(folder / "run"),
        }
    )
    looks: dict[int, float] = {}
    start = time.monotonic()
    with watched(looks, every=max(begin // 4, 1), total=steps):
        command.train(to_config(config))
    first, last = looks[begin], looks[steps]
    print(f"{steps:,} steps in {time.monotonic() - start:.0f} s")
    for step, megabytes in looks.items():
        if step in (begin, steps) or step % max(begin, steps // 10) == 0:
            print(f"{step:>9,} steps {megabytes:8.1f} MB")
    print(f"resident memory at the end against that after {begin:,} steps: {last / first:.3f}x, allowed {ALLOWED}x")
    return last > ALLOWED * first


def resident() -> float:
    """Resident memory of this process, in MB."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(fields["VmRSS"].split()[0]) / 1e3


@contextmanager
def watched(looks: dict[int, float], every: int, total: int) -> Iterator[None]:
    """Look at the memory now and then, after a checkpoint was written."""
    original = BCQTrainer.save_trainer
    bar = tqdm(total=total, unit=" steps", disable=None)

    def save_and_look(trainer: BCQTrainer, force_save: bool = False) -> None:
        original(trainer, force_save)
        step = trainer.collected_frames
        bar.update(step - bar.n)
        if step % every == 0 or step == trainer.total_frames:
            looks[step] = resident()

    BCQTrainer.save_trainer = save_and_look
    try:
        yield
    finally:
        BCQTrainer.save_trainer = original
        bar.close()


if __name__ == "__main__":
    sys.exit(main())
