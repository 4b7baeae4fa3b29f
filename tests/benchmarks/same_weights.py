"""Compares the weights that two checkouts of torchrl_bcq train, bit for bit.

git worktree add /tmp/before HEAD~1
python tests/benchmarks/same_weights.py --against /tmp/before
python tests/benchmarks/same_weights.py --against /tmp/before --steps 1000

Each checkout trains BCQ in a process of its own: float32, nothing compiled, one thread, the author's settings, the same
seed and the same 3,000 recorded steps of Pendulum-v1. Prints the largest difference of all weights and targets, and
exits with 1 if any bit differs.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from tensordict import TensorDict

HERE = Path(__file__).resolve().parents[2]
ROWS = 3000
NETWORKS = ("vae", "qvalue", "actor")


def record(file: Path) -> None:
    """Write a recording to an NPZ file, whose names are paths such as ``next/reward``."""
    try:
        from torchrl_bcq.evaluation.recording import record_swing_up
    except ImportError:  # a checkout from before it moved
        from torchrl_bcq.cli.record import record_swing_up
    np.savez(file, **{name: value.numpy() for name, value in record_swing_up(ROWS, seed=0).flatten_keys("/").items()})


def train(file: Path, steps: int, out: Path) -> None:
    """Train on a recording, and write all weights and targets to an NPZ file."""
    from torchrl.data import Bounded, Unbounded
    from torchrl.objectives import SoftUpdate

    from torchrl_bcq import BCQLoss, BCQTrainer, make_bcq_modules, make_replay_buffer

    torch.set_num_threads(1)
    torch.manual_seed(0)
    columns = {name: torch.from_numpy(value) for name, value in np.load(file).items()}
    transitions = TensorDict(columns, [ROWS]).unflatten_keys("/")
    loss = BCQLoss(*make_bcq_modules(Unbounded((3,)), Bounded(-2, 2, (1,))))
    buffer = make_replay_buffer(transitions, batch_size=100, seed=0)
    updater = SoftUpdate(loss, tau=0.005)
    BCQTrainer(loss, buffer, target_net_updater=updater, total_steps=steps, progress_bar=False).train()
    weights = {}
    for name in (f"{target}{network}_network" for network in NETWORKS for target in ("", "target_")):
        if (params := getattr(loss, f"{name}_params", None)) is not None:
            flat = params.data.flatten_keys(".")
            weights |= {f"{name}.{key}": value.numpy() for key, value in flat.items()}
    np.savez(out, **weights)


def differences(before: Mapping[str, np.ndarray], now: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Largest absolute difference of each tensor of which a bit differs.

    Raises:
        ValueError: if names or shapes differ.
    """
    shapes = [{name: value.shape for name, value in weights.items()} for weights in (before, now)]
    if differing := dict(shapes[0].items() ^ shapes[1].items()):
        raise ValueError(f"names or shapes of the weights differ: {sorted(differing)}.")
    return {
        name: float(np.abs(before[name] - now[name]).max())
        for name in before
        if before[name].tobytes() != now[name].tobytes()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, required=True, metavar="PATH", help="the other checkout")
    parser.add_argument("--steps", type=int, default=200, help="gradient steps (default: %(default)s)")
    args = parser.parse_args()
    other = args.against.resolve()
    with tempfile.TemporaryDirectory() as folder:
        recording, before, now = (Path(folder) / f"{name}.npz" for name in ("recording", "before", "now"))
        call(other, f"record(Path({str(recording)!r}))")
        for checkout, out in ((other, before), (HERE, now)):
            call(checkout, f"train(Path({str(recording)!r}), {args.steps}, Path({str(out)!r}))")
        weights = dict(np.load(before)), dict(np.load(now))
    differing = differences(*weights)
    for name, difference in differing.items():
        print(f"{name}: {difference:.3g}")
    print(
        f"{len(differing)} of {len(weights[0])} tensors differ after {args.steps} steps, "
        f"by at most {max(differing.values(), default=0.0):.3g}"
    )
    return bool(differing)


def call(checkout: Path, statement: str) -> None:
    """Run a function of this file in a new process, which imports torchrl_bcq from ``checkout``."""
    check = f"import torchrl_bcq; assert Path(torchrl_bcq.__file__).is_relative_to({str(checkout)!r}), torchrl_bcq"
    program = f"from pathlib import Path; {check}; from same_weights import record, train; {statement}"
    path = os.pathsep.join([str(checkout), str(Path(__file__).parent)])
    command = [sys.executable, "-W", "ignore", "-c", program]
    # Python looks into the working directory first
    subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, cwd=checkout, check=True)


if __name__ == "__main__":
    sys.exit(main())
