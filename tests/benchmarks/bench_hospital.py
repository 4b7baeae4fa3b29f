"""Trains the policies of examples/hospital.py on a file of the model's transitions, and computes their exact values.

PYTHONPATH=examples python tests/benchmarks/bench_hospital.py run icu-sepsis.hdf5
PYTHONPATH=examples python tests/benchmarks/bench_hospital.py report

``run`` appends a line of JSON for each policy and seed, and does not repeat those that the file of results has.
``report`` prints the means over seeds and their standard errors.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path

import h5py
import numpy as np
import torch
from hospital import THRESHOLDS, learn
from json_lines import append, load
from sepsis_model import SepsisModel

RESULTS = Path(__file__).parent / "results" / "hospital.jsonl"
STEPS = 6000


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "report"])
    parser.add_argument("file", type=Path, nargs="?", help="HDF5 file with infos/state, actions and infos/next_state")
    parser.add_argument("--steps", type=int, default=STEPS, help="gradient steps (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="(default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE", help="(default: %(default)s)")
    args = parser.parse_args(arguments)
    lines = load(args.results)
    if args.command == "report":
        print(report(lines))
        return
    torch.set_num_threads(1)
    model = SepsisModel.load()
    with h5py.File(args.file) as file:
        data = model.to_transitions(*(file[name][()] for name in ("infos/state", "actions", "infos/next_state")))
    policies = [*product((False, True), (1.0,), (None, *THRESHOLDS)), (False, 0.99, 0.3)]
    for seed, (masked, gamma, threshold) in product(args.seeds, policies):
        settings = {"threshold": threshold, "masked": masked, "gamma": gamma, "seed": seed, "steps": args.steps}
        if any(settings.items() <= line.items() for line in lines):
            continue
        table = learn(model, data, threshold, args.steps, seed=seed, masked=masked, gamma=gamma)
        share = model.admissible[: model.living][table[: model.living] == 1].mean()
        line = {**settings, "value": model.value(table), "admissible_share": share}
        append(args.results, line)
        print(line, flush=True)


def report(lines: list[dict]) -> str:
    """Return a table of values: means over seeds, standard errors, and shares of states with an admissible choice."""
    variants = {(False, 1.0): "value", (True, 1.0): "value with the action mask", (False, 0.99): "value, gamma 0.99"}
    rows = [f"| policy | {' | '.join(variants.values())} |", "| --- " * (len(variants) + 1) + "|"]
    for threshold in (None, *THRESHOLDS):
        name = "cloning" if threshold is None else f"BCQ, threshold {threshold}"
        kept = [line for line in lines if line["threshold"] == threshold]
        cells = [cell([line for line in kept if (line["masked"], line["gamma"]) == variant]) for variant in variants]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*rows, f"\nTraining seeds: {sorted({line['seed'] for line in lines})}"])


def cell(runs: list[dict]) -> str:
    """Return the mean value ± its standard error, and the mean share of admissible choices."""
    if not runs:
        return ""
    values = [run["value"] for run in runs]
    spread = f" ± {np.std(values, ddof=1) / np.sqrt(len(values)):.4f}" if len(values) > 1 else ""
    return f"{np.mean(values):.4f}{spread} ({np.mean([run['admissible_share'] for run in runs]):.0%})"


if __name__ == "__main__":
    main()
