"""Shows which part of a dataset the policies of a run resemble, for a dataset that several policies recorded.

python tests/benchmarks/halves.py measure RUN DATASET
python tests/benchmarks/halves.py draw PNG

``measure`` runs a few episodes with each checkpoint of RUN (train with ``checkpoint.keep=100``). For each pair of a
visited state and the chosen action, it finds the nearest recorded pair, in units of standard deviations, and the part
of the dataset that this pair belongs to. It appends a line of JSON for each checkpoint. The HDF5 file DATASET has an
attribute ``segments`` with the policy and the rows of each part.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import h5py
import numpy as np
import torch
from bench_returns import read_metric
from json_lines import append, load
from scipy.spatial import cKDTree
from torchrl.envs.utils import ExplorationType, set_exploration_type
from tqdm import tqdm

import torchrl_bcq as bcq
from torchrl_bcq.evaluation.environments import make_env

RESULTS = Path(__file__).parent / "results" / "halves.jsonl"
METRICS = ("return", "value_estimate", "discounted_return")  # as the run has logged them


class Parts:
    """The recorded pairs of a state and an action, and the part that recorded them."""

    def __init__(self, file: Path) -> None:
        with h5py.File(file) as held:
            pairs = np.concatenate([held["observations"], held["actions"]], 1)
            segments = json.loads(held.attrs["segments"])
        self.names = [segment["policy"] for segment in segments]
        self.returns = [segment["return_mean"] for segment in segments]
        self.scale = pairs.std(0)
        self.tree = cKDTree(pairs / self.scale)
        self.part = np.concatenate([np.full(s["end_row"] - s["first_row"], i) for i, s in enumerate(segments)])

    def shares(self, pairs: np.ndarray) -> dict[str, float]:
        """Return the share of the pairs ``[N, D]`` whose nearest recorded pair belongs to each part."""
        _, nearest = self.tree.query(pairs / self.scale)
        counts = np.bincount(self.part[nearest], minlength=len(self.names)) / len(pairs)
        return dict(zip(self.names, counts.round(4).tolist(), strict=True))


def measure(run: Path, file: Path, episodes: int, results: Path) -> None:
    parts = Parts(file)
    logged = {name: read_metric(run / "log" / "scalars" / f"{name}.csv") for name in METRICS}
    for checkpoint in tqdm(sorted((run / "checkpoints").iterdir(), key=lambda path: int(path.name.split("-")[-1]))):
        step, policy = int(checkpoint.name.split("-")[-1]), bcq.load_policy(checkpoint)
        with h5py.File(file) as held:
            env = make_env(str(held.attrs["env_id"]))
        env.set_seed(0)
        pairs = []
        with set_exploration_type(ExplorationType.DETERMINISTIC), torch.no_grad():
            for _ in range(episodes):
                steps = env.rollout(1000, policy)
                pairs.append(torch.cat([steps["observation"], steps["action"]], -1).numpy())
        line = {"dataset": file.stem, "step": step, **{name: logged[name].get(step) for name in METRICS}}
        append(results, {**line, "shares": parts.shares(np.concatenate(pairs)), "returns": parts.returns})


def draw(picture: Path, results: Path) -> None:
    """Draw returns, values and shares over steps."""
    from matplotlib.figure import Figure

    lines = sorted(load(results), key=lambda line: line["step"])
    steps = [line["step"] for line in lines]
    figure = Figure(figsize=(15, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    left.plot(steps, [line["return"] for line in lines], color="C0", label="policy")
    for number, (name, value) in enumerate(zip(lines[0]["shares"], lines[0]["returns"], strict=True), 1):
        left.axhline(value, color=f"C{number}", linestyle="--", label=name)
    left.set(title="return", ylim=(0, None))
    middle.plot(steps, [line["value_estimate"] for line in lines], label="critic's estimate", color="C4")
    middle.plot(steps, [line["discounted_return"] for line in lines], label="obtained", color="C0")
    middle.set(title="discounted return", ylim=(0, None))
    for number, name in enumerate(lines[0]["shares"], 1):
        right.plot(steps, [line["shares"][name] for line in lines], color=f"C{number}", label=name)
    right.set(title="share of the visited pairs nearest to each part", ylim=(0, 1))
    for axes in (left, middle, right):
        axes.set_xlabel("gradient steps")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(picture, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands, default = parser.add_subparsers(dest="command", required=True), "(default: %(default)s)"
    one = commands.add_parser("measure", help="measure each checkpoint of a run")
    one.add_argument("run", type=Path, help="folder of the run")
    one.add_argument("dataset", type=Path, help="HDF5 file with the attribute segments")
    one.add_argument("--episodes", type=int, default=5, help=f"episodes of each checkpoint {default}")
    two = commands.add_parser("draw", help="draw returns, values and shares")
    two.add_argument("picture", type=Path, metavar="PNG", help="picture to write")
    for command in (one, two):
        command.add_argument("--results", type=Path, default=RESULTS, metavar="FILE", help=default)
    args = parser.parse_args()
    if args.command == "measure":
        measure(args.run, args.dataset, args.episodes, args.results)
    else:
        draw(args.picture, args.results)


if __name__ == "__main__":
    main()
