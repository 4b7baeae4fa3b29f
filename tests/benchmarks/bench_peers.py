"""How fast BCQ learns and acts here, beside other libraries and beside what the machine could do.

python tests/benchmarks/bench_peers.py                      on the CPU
python tests/benchmarks/bench_peers.py --device cuda        also tells how much of the time kernels run
python tests/benchmarks/bench_peers.py --only eager floor --rounds 2 --seconds 0.1 --hidden 8 --vae-hidden 8

All learn from the same random transitions (17 observations, 6 actions) with the author's settings, each from its own
buffer, and act with 100 candidates for each state. They take turns in every round, and are compared within rounds:
"x tianshou" is how many times as long Tianshou takes. The limit is the time of a step's matrix products, counted on
the floor, bare PyTorch in floor.py, at the rate of a product as large as the step's largest, measured in the same
rounds. Writes benchmark.json, with every round, and benchmark.png.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contenders import ACTING, CANDIDATES, MODES, PEERS, TRAINING, Act, absent
from floor import TARGET_SAMPLES
from kernels import profile_kernels
from machine import describe
from rounds import WIDTH, Run, Stopwatch, count_flops, make_matmul, measure
from speeds import UNITS, draw, summarize, table
from tqdm import tqdm
from transitions import OBSERVATIONS, Sizes

from torchrl_bcq.data.description.picture import save

BATCH_SIZES = {"cpu": [100, 256, 1024], "cuda": [100, 256, 1024, 4096, 8192]}


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    left_out = absent(args.device)
    for name, reason in left_out.items():
        if name in args.only:
            print(f"{name} is left out: {reason}", file=sys.stderr)
    settings = {"rounds": args.rounds, "seconds": args.seconds, "hidden": args.hidden, "vae_hidden": args.vae_hidden}
    results = {
        "machine": describe(args.device, PEERS.values()),
        "settings": {**settings, "candidates": CANDIDATES, "target_samples": TARGET_SAMPLES},
        "peers": list(PEERS),
        "left_out": left_out,
        "training": [],
        "acting": [],
    }
    sizes = [("training", size) for size in args.batch_sizes] + [("acting", size) for size in args.states]
    with tqdm(total=len(sizes) * args.rounds, unit=" rounds", disable=None) as bar:
        for kind, size in sizes:
            bar.set_description(f"{kind}, {UNITS[kind][0]} {size}")
            if bar.disable:  # no terminal
                print(bar.desc.removesuffix(": "), file=sys.stderr, flush=True)
            if measured := compare(kind, size, args, left_out, bar):
                results[kind].append(measured)
                tqdm.write(table(kind, measured), file=sys.stdout)
                write(args.out, results)
    print(f"\nbenchmark.json and benchmark.png are in {args.out.resolve()}")


def compare(kind: str, size: int, args: argparse.Namespace, left_out: dict[str, str], bar: tqdm) -> dict[str, Any]:
    """Measure all contenders of a batch size or number of states; empty if there are none."""
    torch.compiler.reset()  # else other sizes than the first would be compiled for any size
    setups = (set_up_training if kind == "training" else set_up_acting)(size, args)
    runs = set_up({name: setups[name] for name in setups if name in args.only and name not in left_out}, left_out)
    if not runs:
        return {}
    flops = count_flops(partial(setups["floor"](), 1))
    rows = size * (TARGET_SAMPLES if kind == "training" else CANDIDATES)
    matmul, matmul_flops = make_matmul(rows, args.device)
    for found in measure(runs, matmul, Stopwatch(args.device), args.rounds, args.seconds):
        bar.update(len(found["matmul"]["seconds"]) > 0)
    product = found.pop("matmul")
    measured = {
        "size": size,
        "flops": flops,
        "limit": matmul_flops / min(product["seconds"]),
        "matmul": {"shape": [rows, WIDTH, WIDTH], "flops": matmul_flops, **product},
        "steps": {name: one["steps"] for name, one in found.items()},
        "seconds": {name: one["seconds"] for name, one in found.items()},
    }
    measured["summary"] = summarize(measured, PEERS)
    measured["kernels"] = {}
    if kind == "training" and args.device.startswith("cuda"):
        own = [name for name in runs if name in MODES or name == "floor"]
        measured["kernels"] = {name: profile_kernels(runs[name], measured["summary"][name]["seconds"]) for name in own}
    return measured


def set_up(setups: dict[str, Callable[[], Run]], left_out: dict[str, str]) -> dict[str, Run]:
    """Try a step of each; a peer that fails, as with another PyTorch than its own, is left out."""
    runs = {}
    for name, make in setups.items():
        try:
            run = make()
            run(1)
        except Exception as error:
            if name not in PEERS:
                raise
            left_out[name] = f"{type(error).__name__}: {error}"
            print(f"{name} is left out: {left_out[name]}", file=sys.stderr)
        else:
            runs[name] = run
    return runs


def set_up_training(batch_size: int, args: argparse.Namespace) -> dict[str, Callable[[], Run]]:
    sizes = Sizes(args.hidden, args.vae_hidden)
    return {name: partial(train, batch_size, args.device, sizes) for name, train in TRAINING.items()}


def set_up_acting(number: int, args: argparse.Namespace) -> dict[str, Callable[[], Run]]:
    states = np.random.default_rng(0).standard_normal((number, OBSERVATIONS), dtype=np.float32)

    def repeat(make: Act) -> Run:
        act = make(args.device, Sizes(args.hidden, args.vae_hidden))

        def run(steps: int) -> None:
            for _ in range(steps):
                act(states)

        return run

    return {name: partial(repeat, act) for name, act in ACTING.items()}


def write(folder: Path, results: Mapping[str, Any]) -> None:
    """Write both files aside, which then take the place of those before."""
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / ".benchmark.json.part"
    aside.write_text(json.dumps(results, indent=1) + "\n")
    aside.replace(folder / "benchmark.json")
    save(draw(results), folder / "benchmark.png")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(dict.fromkeys([*TRAINING, *ACTING]))
    add, default = parser.add_argument, "(default: %(default)s)"
    add("--device", default="cpu", help=f"cpu or cuda {default}")
    add("--batch-sizes", type=int, nargs="*", help=f"to learn from; none skips it (default: {BATCH_SIZES})")
    add("--states", type=int, nargs="*", default=[1, 10, 256], help=f"to act in at a time; none skips it {default}")
    add("--rounds", type=int, default=10, help=f"turns of each {default}")
    add("--seconds", type=float, default=1.0, help=f"that a turn lasts, about {default}")
    add("--threads", type=int, default=torch.get_num_threads(), help=f"of PyTorch on the CPU {default}")
    add("--out", type=Path, default=Path("runs/benchmark"), metavar="FOLDER", help=f"for the results {default}")
    add("--only", nargs="+", default=names, choices=names, metavar="NAME", help=f"contenders {default}")
    add("--hidden", type=int, nargs="+", default=[400, 300], help=f"of actor and critics {default}")
    add("--vae-hidden", type=int, nargs="+", default=[750, 750], help=f"of encoder and decoder {default}")
    args = parser.parse_args(arguments)
    if args.batch_sizes is None:
        args.batch_sizes = BATCH_SIZES[args.device.partition(":")[0]]
    return args


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.getLogger("torchrl").setLevel(logging.ERROR)
    main()
