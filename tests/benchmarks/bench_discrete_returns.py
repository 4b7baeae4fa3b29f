"""Compares the returns of discrete BCQ here with those of other libraries, of cloning and of the recorded behaviour.

python tests/benchmarks/bench_discrete_returns.py run cartpole-mixed.hdf5 --steps 20000
python tests/benchmarks/bench_discrete_returns.py run lunarlander-mixed.hdf5 --steps 60000
python tests/benchmarks/bench_discrete_returns.py report

All contenders train on the same file with the same sizes, steps, batch size and optimizer. One function evaluates all
of them, greedily, from the same initial states. ``run`` appends a line of JSON for each contender and seed, and skips
those that the file of results already has. ``report`` prints the means over seeds, and bootstraps the differences over
seeds: an interval holds 95 % of the resampled differences. With five seeds, these intervals are somewhat too narrow.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from discrete_contenders import CONTENDERS, PEERS, Act, read
from json_lines import append, load
from machine import describe
from scipy.stats import bootstrap, sem

from torchrl_bcq.data.episodes import episode_returns

RESULTS = Path(__file__).parent / "results" / "discrete_returns.jsonl"
FIRST_SEED = 1_000_000  # of the initial states; not among those of the datasets
RESAMPLES = 9999


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    lines = load(args.results)
    if args.command == "report":
        print("\n\n".join(report(name, lines) for name in dict.fromkeys(line["dataset"] for line in lines)))
        return
    torch.set_num_threads(1)
    done = {(line["dataset"], line["contender"], line["seed"]) for line in lines}
    name, data = args.file.stem, read(args.file)
    if (name, "behaviour", None) not in done:
        returns = episode_returns(data.transitions).numpy()
        found = {"return": returns.mean(), "error": sem(returns), "episodes": len(returns)}
        append(args.results, {"dataset": name, "contender": "behaviour", "seed": None, **found})
    for seed in args.seeds:
        for contender in args.only:
            if (name, contender, seed) not in done:
                found = train(contender, data, seed, args)
                append(args.results, {"dataset": name, "contender": contender, "seed": seed, **found})


def train(contender: str, data, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train one contender, and evaluate it several times."""
    update, act = CONTENDERS[contender](data, seed)
    curve, seconds, made = {}, 0.0, 0
    for steps in np.linspace(0, args.steps, args.evaluations + 1, dtype=int)[1:].tolist():
        start = time.perf_counter()
        update(steps - made)
        seconds, made = seconds + time.perf_counter() - start, steps
        returns = evaluate(act, data.env_id, args.episodes)
        curve[steps] = round(returns.mean(), 2)
        print(f"{contender}, seed {seed}, {steps} steps: {returns.mean():.1f} ± {sem(returns):.1f}", flush=True)
    return {
        "return": returns.mean(),
        "error": sem(returns),
        "episodes": args.episodes,
        "steps": args.steps,
        "curve": curve,
        "seconds": round(seconds, 1),
        "versions": describe("cpu", [contender] if contender in PEERS else [])["versions"],
    }


def evaluate(act: Act, env_id: str, episodes: int) -> np.ndarray:
    """Return the undiscounted returns of all episodes, which run side by side: one call of ``act`` for all states."""
    envs = [gymnasium.make(env_id) for _ in range(episodes)]
    states = np.stack([env.reset(seed=FIRST_SEED + number)[0] for number, env in enumerate(envs)])
    returns, running = np.zeros(episodes), np.arange(episodes)
    while len(running):
        goes_on = []
        for number, action in zip(running, act(states[running]), strict=True):
            states[number], reward, terminated, truncated, _ = envs[number].step(int(action))
            returns[number] += float(reward)
            if not (terminated or truncated):
                goes_on.append(number)
        running = np.array(goes_on, dtype=int)
    for env in envs:
        env.close()
    return returns


def report(dataset: str, lines: Iterable[Mapping[str, Any]]) -> str:
    """Return a table of one dataset: means over seeds, and the intervals of the differences of BCQ."""
    found: dict[str, list[float]] = {}
    for line in lines:
        if line["dataset"] == dataset:
            found.setdefault(line["contender"], []).append(line["return"])
    rows = [f"| {dataset} | seeds | return | returns of the seeds |", "| --- | --- | --- | --- |"]
    for name, returns in found.items():
        spread = "" if len(returns) < 2 else f" ± {sem(returns):.1f}"
        number = "" if name == "behaviour" else len(returns)
        each = "" if name == "behaviour" else ", ".join(f"{value:.1f}" for value in returns)
        rows.append(f"| {name} | {number} | {np.mean(returns):.1f}{spread} | {each} |")
    present = [name for name in PEERS if name in found]
    best = [max(present, key=lambda name: np.mean(found[name]))] if present else []
    for other in [*best, "cloning", "behaviour"]:
        if other in found and len(found.get("BCQ", [])) > 1:
            low, high = interval(found["BCQ"], found[other])
            difference = np.mean(found["BCQ"]) - np.mean(found[other])
            rows.append(f"| BCQ - {other} | | {difference:+.1f} | 95 % interval {low:+.1f} to {high:+.1f} |")
    return "\n".join(rows)


def interval(own: list[float], other: list[float]) -> tuple[float, float]:
    """Return the 95 % interval of the difference of means; the seeds of both are drawn with replacement."""
    made = bootstrap(
        (own, other if len(other) > 1 else other * 2),  # a single number, the behaviour's, does not vary
        lambda a, b, axis: a.mean(axis) - b.mean(axis),
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return float(made.confidence_interval.low), float(made.confidence_interval.high)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands, default = parser.add_subparsers(dest="command", required=True), "(default: %(default)s)"
    add = commands.add_parser("run", help="train and evaluate the contenders that are missing").add_argument
    add("file", type=Path, help="HDF5 file with discrete actions, in D4RL's layout")
    add("--steps", type=int, default=20_000, help=f"gradient steps {default}")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help=default)
    add("--episodes", type=int, default=100, help=f"of one evaluation {default}")
    add("--evaluations", type=int, default=5, help=f"evenly over training; the last one counts {default}")
    add("--only", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS), help=default)
    commands.add_parser("report", help="print the tables")
    for command in commands.choices.values():
        command.add_argument("--results", type=Path, default=RESULTS, metavar="FILE", help=default)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
