"""Trains many runs with continuous actions, and compares their returns.

python tests/benchmarks/bench_returns.py run FOLDER --datasets pendulum-mixed --settings paper cloning
python tests/benchmarks/bench_returns.py report

FOLDER holds the datasets. Each run is one of ``torchrl-bcq train``: a dataset, a setting of SETTINGS and a seed. The
policy is evaluated every 5,000 gradient steps with 20 episodes. A run that was interrupted is resumed bit for bit. When
a run has ended, ``run`` appends a line of JSON for each of its evaluations, and skips the run from then on. A run that
fails does not stop the others. On a GPU, gradient steps are captured into CUDA graphs. The settings "tianshou" and
"d3rlpy" are the BCQ of these libraries with the paper's settings, on the CPU; an interrupted run starts again.

``report`` prints a table for each dataset and draws the returns over steps. A score is the interquartile mean over
seeds of the return, normalized by the file's references (0 is a random policy, 100 is an expert), with a 95 % bootstrap
interval.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gymnasium
import h5py
import numpy as np
from filelock import FileLock
from json_lines import load
from machine import describe
from scipy.stats import bootstrap, trim_mean
from tqdm import tqdm

RESULTS = Path(__file__).parent / "results" / "returns.jsonl"
STEPS = {"pendulum-mixed": 20_000, "lunarlandercontinuous-mixed": 20_000}
LONG = 100_000  # steps on the other datasets
_FEW = ["network.behavior=mixture", "network.phi=null", "loss.num_target_samples=5", "policy.num_action_samples=5"]
SETTINGS: dict[str, list[str]] = {  # settings of torchrl-bcq train
    "paper": [],
    "cloning": ["algorithm=cloning"],
    "mixture": ["network.behavior=mixture"],
    "flow": ["network.behavior=flow"],
    "no actor, 20 samples": ["network.phi=null", "loss.num_target_samples=20"],
    "mixture, no actor, 20 samples": ["network.behavior=mixture", "network.phi=null", "loss.num_target_samples=20"],
    "mixture, no actor, 5 samples": _FEW,
    "mixture, no actor, 5 samples, minimum of 4 critics": [*_FEW, "network.num_critics=4", "loss.lmbda=1"],
    "mixture, no actor, 5 samples, average": [*_FEW, "average_decay=0.999"],
    "mixture, no actor, 5 samples, layer norm": [*_FEW, "network.layer_norm=true"],
    "mixture, no actor, 5 samples, noise 0.5": [*_FEW, "network.noise_clip=0.5"],
    "minimum": ["policy.choose_by=min"],
    "mean": ["policy.choose_by=mean"],
    "average": ["average_decay=0.999"],
    "layer norm": ["network.layer_norm=true"],
    "4 critics": ["network.num_critics=4"],
    "5 steps": ["n_step=5"],
    "5 steps, gamma 0.997": ["n_step=5", "loss.gamma=0.997"],
}
PEERS = ("tianshou", "d3rlpy")  # of peer_returns.py
EVERY, EPISODES = 5_000, 20
LAST = 5  # evaluations, the lowest of which shows how steady the returns are
METRICS = ("return", "return_std", "normalized_score", "value_estimate", "discounted_return")
RESAMPLES = 2_000


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    lines = load(args.results)
    if args.command == "report":
        print("\n\n".join(report(name, lines) for name in dict.fromkeys(line["dataset"] for line in lines)))
        if args.picture:
            draw(lines).savefig(args.picture, dpi=100)
        return
    done = {name_of(line) for line in lines}
    runs = [
        run
        for seed in args.seeds
        for dataset in args.datasets
        for setting in args.settings
        if name_of(run := make_run(dataset, setting, seed, args)) not in done
    ]
    writing, failed = threading.Lock(), []
    with ThreadPoolExecutor(args.jobs) as pool, tqdm(total=len(runs), unit=" runs", disable=None) as bar:

        def one(run: dict[str, Any]) -> None:
            try:
                found = train(run, args)
            except Exception as error:  # the other runs go on
                failed.append(run)
                return bar.write(f"{name_of(run)}: {error}")
            args.results.parent.mkdir(parents=True, exist_ok=True)
            with writing, FileLock(args.results.with_name(f".{args.results.name}.lock")):
                if name_of(run) not in map(name_of, load(args.results)):  # another command may have trained it, too
                    with args.results.open("ab", buffering=0) as file:  # one write, so that no line is cut
                        file.write("".join(json.dumps(line) + "\n" for line in found).encode())
                bar.update()
                bar.write(f"{name_of(run)}: last return {found[-1]['return']:.1f}")

        for _ in pool.map(one, runs):
            pass
    if failed:
        sys.exit(f"{len(failed)} of {len(runs)} runs failed")


def make_run(dataset: str, setting: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    steps = args.steps or STEPS.get(dataset, LONG)
    return {"dataset": dataset, "setting": setting, "seed": seed, "steps": steps, "overrides": args.overrides}


def label_of(run: Mapping[str, Any]) -> str:
    """Return the setting, with the number of steps and the overrides if they are not the usual ones."""
    usual = STEPS.get(run["dataset"], LONG)
    other = [*([] if run["steps"] == usual else [f"{run['steps']:,} steps"]), *run["overrides"]]
    return f"{run['setting']} ({', '.join(other)})" if other else run["setting"]


def name_of(run: Mapping[str, Any]) -> str:
    return f"{run['dataset']}, {label_of(run)}, seed {run['seed']}"


def train(run: dict[str, Any], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Train one run to its end, and return a line for each of its evaluations."""
    out = (args.out / run["dataset"] / folder_of(label_of(run)) / str(run["seed"])).absolute()
    file = (args.folder / f"{run['dataset']}.hdf5").absolute()
    with h5py.File(file) as held:
        if missing := {"env_id", "ref_min_score", "ref_max_score"} - held.attrs.keys():
            raise RuntimeError(f"{file} lacks the attributes {sorted(missing)}, so returns cannot be normalized")
        env, low, high = (held.attrs[name] for name in ("env_id", "ref_min_score", "ref_max_score"))
    gymnasium.make(env).close()  # without the environment, the run would end without returns
    start = time.time()
    command = [
        sys.executable,
        "-W",
        "ignore",
        *(peer_command if run["setting"] in PEERS else own_command)(run, args, file, out),
    ]
    end = _end_with_the_parent if sys.platform == "linux" else None
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=end)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    found = {name: read_metric(out / "log" / "scalars" / f"{name}.csv") for name in METRICS}
    made, results = describe(args.device, {run["setting"]} & {*PEERS}), json.loads((out / "results.json").read_text())
    behaviour = round(float(100 * (results["behaviour"]["mean"] - low) / (high - low)), 4)
    facts = {"behaviour_score": behaviour, "commit": args.commit}
    facts |= {"device": made["device"], "versions": made["versions"]}
    facts["seconds"] = round(time.time() - start)  # since the last resume
    return [
        {**run, "step": step, **{name: found[name].get(step) for name in METRICS}, **facts}
        for step in sorted(found["return"])
    ]


def own_command(run: Mapping[str, Any], args: argparse.Namespace, file: Path, out: Path) -> list[str]:
    return [
        *("-m", "torchrl_bcq", "train", f"dataset={file}", f"out={out}", "resume=true", f"seed={run['seed']}"),
        *(f"steps={run['steps']}", "threads=1", f"evaluation.interval={EVERY}", f"evaluation.episodes={EPISODES}"),
        *(f"checkpoint.interval={EVERY}", "baseline=null", "progress_bar=false", f"device={args.device}"),
        f"cudagraph={str(args.device.startswith('cuda')).lower()}",
        *SETTINGS[run["setting"]],
        *args.overrides,
    ]


def peer_command(run: Mapping[str, Any], args: argparse.Namespace, file: Path, out: Path) -> list[str]:
    words = {"--seed": run["seed"], "--steps": run["steps"], "--interval": EVERY, "--episodes": EPISODES}
    more = [str(word) for pair in words.items() for word in pair]
    return [str(Path(__file__).parent / "peer_returns.py"), run["setting"], str(file), str(out), *more, *args.overrides]


def folder_of(label: str) -> str:
    return re.sub(r"[^\w.=-]+", "-", label).strip("-")


def read_metric(file: Path) -> dict[int, float]:
    """Return a logged metric by step."""
    if not file.exists():
        return {}
    with file.open() as rows:
        return {int(step): round(float(value), 4) for step, value in csv.reader(rows)}


def _end_with_the_parent() -> None:
    """Let Linux end this process when its parent dies, so that nobody else writes into the run's folder."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def scores(lines: Iterable[Mapping[str, Any]], dataset: str) -> dict[str, dict[str, list[float]]]:
    """Return, for each setting, the last, the best and the lowest of the last normalized scores of each seed."""
    curves: dict[str, dict[int, dict[int, float]]] = {}
    for line in lines:
        if line["dataset"] == dataset and line["step"]:
            curve = curves.setdefault(label_of(line), {}).setdefault(line["seed"], {})
            if line["step"] in curve:
                raise ValueError(f"{name_of(line)} has two lines for step {line['step']}")
            curve[line["step"]] = line["normalized_score"]
    found: dict[str, dict[str, list[float]]] = {}
    for setting, seeds in curves.items():
        runs = [[curve[step] for step in sorted(curve)] for curve in seeds.values()]
        found[setting] = {
            "last": [run[-1] for run in runs],
            "best": [max(run) for run in runs],
            "lowest": [min(run[-LAST:]) for run in runs],
        }
    return found


def report(dataset: str, lines: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of one dataset, with the commits and the machines."""
    every = [line for line in lines if line["dataset"] == dataset]
    rows = [
        f"| {dataset} | seeds | last | best | lowest of the last {LAST} | hours of a run |",
        "| --- | --- | --- | --- | --- | --- |",
        f"| recorded behaviour |  | {every[0]['behaviour_score']:.1f} |  |  |  |",
    ]
    for setting, found in scores(lines, dataset).items():
        own = [line for line in every if label_of(line) == setting]
        hours = np.mean([line["seconds"] for line in own]) / 3600
        cells = [" ".join(interval(found[name])) for name in ("last", "best", "lowest")]
        rows.append(f"| {setting} | {len(found['last'])} | {' | '.join(cells)} | {hours:.2f} |")
    made = [", ".join(dict.fromkeys(str(line[name]) for line in every)) for name in ("commit", "device")]
    return "\n".join([*rows, f"\nCommits: {made[0]}; machines: {made[1]}."])


def interquartile_mean(values: np.ndarray, axis: int = -1) -> Any:
    """Return the mean of the middle half of the values."""
    return trim_mean(values, 0.25, axis)


def interval(values: Sequence[float]) -> tuple[str, str]:
    """Return the interquartile mean, and its 95 % bootstrap interval over seeds, as text."""
    mean = f"{float(interquartile_mean(np.array(values))):.1f}"
    if len(values) < 2:
        return mean, ""
    found = bootstrap(
        (values,), interquartile_mean, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return mean, f"({found.low:.1f} to {found.high:.1f})"


def draw(lines: Sequence[Mapping[str, Any]]) -> Any:
    """Draw the return over steps: one line for each setting, and a band from the lowest to the highest seed."""
    from matplotlib.figure import Figure

    datasets = [*dict.fromkeys(line["dataset"] for line in lines)]
    figure = Figure(figsize=(6 * len(datasets), 4), layout="constrained")
    for axes, dataset in zip(figure.subplots(1, len(datasets), squeeze=False)[0], datasets, strict=True):
        own = [line for line in lines if line["dataset"] == dataset]
        for setting in dict.fromkeys(map(label_of, own)):
            points: dict[int, list[float]] = {}
            for line in own:
                if label_of(line) == setting:
                    points.setdefault(line["step"], []).append(line["normalized_score"])
            steps = sorted(points)
            (drawn,) = axes.plot(steps, [np.mean(points[step]) for step in steps], label=setting)
            ends = [[end(points[step]) for step in steps] for end in (min, max)]
            axes.fill_between(steps, *ends, color=drawn.get_color(), alpha=0.15, linewidth=0)
        axes.set(title=dataset, xlabel="gradient steps", ylabel="normalized score")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    return figure


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands, default = parser.add_subparsers(dest="command", required=True), "(default: %(default)s)"
    run = commands.add_parser("run", help="train the runs that are missing")
    add = run.add_argument
    add("folder", type=Path, help="folder of the datasets, HDF5 files in D4RL's layout")
    add("--datasets", nargs="+", default=[*STEPS], metavar="NAME", help=default)
    add("--settings", nargs="+", default=[*SETTINGS], choices=[*SETTINGS, *PEERS], help=default)
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help=default)
    add("--steps", type=int, help=f"gradient steps (default: {STEPS}, otherwise {LONG})")
    add("--jobs", type=int, default=1, help=f"runs at the same time, each with one thread {default}")
    add("--device", default="cpu", help=f"torch device of the runs {default}")
    add("--out", type=Path, default=Path("runs/returns"), help=f"folder of the runs {default}")
    add("--commit", default=_commit(), help=f"commit of the package, for the lines {default}")
    add("--overrides", nargs="*", default=[], metavar="NAME=VALUE", help="more settings, such as compile=true")
    draws = commands.add_parser("report", help="print the tables")
    draws.add_argument("--picture", type=Path, metavar="PNG", help="also draw the returns over steps")
    for command in (run, draws):
        command.add_argument("--results", type=Path, default=RESULTS, metavar="FILE", help=default)
    return parser.parse_args(arguments)


def _commit() -> str | None:
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:  # there is no git
        return None
    return done.stdout.strip() or None


if __name__ == "__main__":
    main()
