"""Kill a training run again and again, and show that it ends up where it would have without that.

python tests/kill_training.py                   50 kills, about eight minutes
python tests/kill_training.py --kills 5 --threads 1

The run is ``torchrl-bcq train`` with a checkpoint every 50 steps, and everything that a checkpoint must hold: warm-up,
frozen VAE, delayed actor, schedulers, a sampler without replacement, held-out episodes, the best checkpoint. Each life
of it is a process of its own, killed (SIGKILL) at a random moment: one in ten while it starts and loads, four at any
time of its training, five while it writes a checkpoint. Then it runs to its end. Exits with 1 if any weight, target,
optimizer state, random state, log line or best checkpoint differs from the undisturbed run in a single bit.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import torch

SPAN = 1.5  # seconds of training before a kill, at most
WRITE = 0.006  # seconds that a checkpoint of such small networks takes, about
STEPS_A_KILL = 600  # several times what a life makes on average, so that the run outlives the kills


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="how often to kill")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="kill_training."))
    try:
        return run(folder, args.kills, args.threads, random.Random(args.seed))
    finally:
        shutil.rmtree(folder)


def run(folder: Path, kills: int, threads: int, rng: random.Random) -> int:
    command = make_command(folder, steps=kills * STEPS_A_KILL, threads=threads)
    start = time.monotonic()
    live([*command, f"out={folder / 'undisturbed'}"])
    print(
        f"undisturbed: {kills * STEPS_A_KILL} steps in {time.monotonic() - start:.0f} s, {threads} threads", flush=True
    )
    out = folder / "killed"
    hit: Counter[str] = Counter()
    for kill in range(kills):
        phase = live_and_die([*command, f"out={out}", "resume=true"], out, rng)
        if phase == "done":
            print(f"the run was over before kill {kill + 1}; raise STEPS_A_KILL")
            return 1
        hit[phase] += 1
        print(f"kill {kill + 1:3} while {phase:<9} the last checkpoint is of step {last_step(out)}", flush=True)
    live([*command, f"out={out}", "resume=true"])
    bad = differences(folder / "undisturbed", out)
    moments = ", ".join(f"{count} while {phase}" for phase, count in sorted(hit.items()))
    print(f"{kills} kills ({moments}), {threads} threads: {'; '.join(bad) or 'every bit is the same'}")
    return bool(bad)


def make_command(folder: Path, steps: int, threads: int) -> list[str]:
    rng, n = np.random.default_rng(0), 2_000
    with h5py.File(folder / "steps.hdf5", "w") as file:
        for name, width in (("observations", 4), ("actions", 2), ("next_observations", 4)):
            file[name] = rng.uniform(-1, 1, (n, width))
        file["rewards"], file["terminals"], file["timeouts"] = rng.normal(size=n), np.zeros(n), np.arange(n) % 50 == 49
    settings = {
        "dataset": folder / "steps.hdf5",
        "steps": steps,
        "batch_size": 32,
        "sampler": "without_replacement",
        "held_out": 0.2,
        "normalize": True,
        "network.hidden": "[16,16]",
        "network.vae_hidden": "[16,16]",
        "optim.scheduler": "CosineAnnealingLR",
        "optim.scheduler_kwargs.T_max": steps,
        "optim.vae.stop_after": steps // 2,
        "optim.qvalue.start_after": steps // 10,
        "optim.actor.start_after": steps // 10,
        "optim.actor.every": 2,
        "evaluation.interval": 200,
        "evaluation.max_rows": 100,
        "checkpoint.interval": 50,
        "checkpoint.monitor": "held_out_loss_vae",
        "checkpoint.mode": "min",
        "log_interval": 25,
        "threads": threads,
    }
    overrides = [f"{name}={value}" for name, value in settings.items()]
    return [sys.executable, "-W", "ignore", "-m", "torchrl_bcq", "train", *overrides]


def live(command: list[str]) -> None:
    """Run it to its end."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2_000:]}")


def live_and_die(command: list[str], out: Path, rng: random.Random) -> str:
    """Start it, and kill it at a random moment; in which phase it was."""
    log = out / "train.log"
    told = told_to_begin(log)
    aim = rng.random()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    if aim < 0.1:
        time.sleep(rng.uniform(0, 6))
    else:
        wait_for(lambda: told_to_begin(log) > told, process)
        time.sleep(rng.uniform(0, SPAN))
    if aim > 0.5:
        wait_for(lambda: is_writing(out), process)
        time.sleep(rng.uniform(0, WRITE))
    process.send_signal(signal.SIGKILL)
    if process.wait() != -signal.SIGKILL:
        return "done"
    if is_writing(out):
        return "writing"
    return "training" if told_to_begin(log) > told else "starting"


def wait_for(what: Callable[[], bool], process: subprocess.Popen) -> None:
    while not what() and process.poll() is None:
        time.sleep(0.002)


def is_writing(out: Path) -> bool:
    """Whether a checkpoint, or the removal of an old one, is unfinished."""
    return any(out.glob("*/.checkpoint-*"))


def told_to_begin(log: Path) -> int:
    """How often the run has said that it begins to train."""
    return log.read_text().count(", steps ") if log.exists() else 0


def last_step(out: Path) -> int:
    return max((int(path.name.rpartition("-")[2]) for path in (out / "checkpoints").glob("checkpoint-*")), default=0)


def differences(first: Path, second: Path) -> list[str]:
    """What is not the same in two runs."""
    found = []
    for folder in ("checkpoints", "best"):
        names = [sorted(path.name for path in (run / folder).iterdir()) for run in (first, second)]
        if names[0] != names[1]:
            found.append(f"{folder} are {names[0]} and {names[1]}")
            continue
        for file in sorted((first / folder).rglob("state.pt")):
            part = file.relative_to(first)
            states = [torch.load(run / part, weights_only=True) for run in (first, second)]
            if part.parent.name.endswith("logger") or equal(*states):
                continue
            found.append(f"{part.parent} differs")
    for file in sorted((first / "log").rglob("*.csv")):
        if file.read_bytes() != (second / file.relative_to(first)).read_bytes():
            found.append(f"{file.relative_to(first)} differs")
    leftovers = [path.name for path in second.rglob(".*") if path.name not in (".lock",)]
    return [*found, *(f"{leftovers} were left behind" for _ in leftovers[:1])]


def equal(a, b) -> bool:
    """Bit by bit, also where values are NaN."""
    if isinstance(a, torch.Tensor):
        a, b = a.contiguous(), b.contiguous()
        return a.shape == b.shape and a.dtype == b.dtype and a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b or (a != a and b != b)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    sys.exit(main())
