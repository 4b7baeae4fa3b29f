"""Compares the speed of BCQ here with other libraries, and with the limit of the machine.

python tests/benchmarks/bench_peers.py                      on the CPU
python tests/benchmarks/bench_peers.py --device cuda        also measures for which part of the time kernels run
python tests/benchmarks/bench_peers.py --batch-sizes --states       discrete BCQ alone
python tests/benchmarks/bench_peers.py --only eager floor --rounds 2 --seconds 0.1 --hidden 8 --vae-hidden 8

All contenders train on the same random transitions (17 observations, 6 actions) with the author's settings, each from
its own buffer, and act with 100 candidates for each state. Discrete BCQ trains on the same vectors, or on frames of 4 x
84 x 84 bytes, with 6 discrete actions. Each trains in one process and acts in another, so that they share no allocator,
threads, PyTorch settings or compiled code. In each round they run one after the other, and are compared within rounds:
"x tianshou" is Tianshou's time divided by the contender's. The floor is BCQ in bare PyTorch (floor.py,
discrete_floor.py). The limit is the time of the floor's matrix products and convolutions alone, at the rate of a
product as large as the largest one of a step, measured in the same rounds. Writes benchmark.json, with all rounds, and
benchmark.png.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from contenders import CANDIDATES, MODES, NAMES, PEERS, SetUp, absent, set_ups
from discrete_floor import FRAME_FEATURES
from floor import TARGET_SAMPLES
from machine import describe
from processes import Contender, ContenderError, hush, in_processes
from rounds import count_flops, make_matmul, measure
from speeds import UNITS, draw, summarize, table
from tqdm import tqdm
from transitions import DISCRETE, Sizes

from torchrl_bcq.files import write_whole

BATCH_SIZES = {"cpu": [100, 256, 1024], "cuda": [100, 256, 1024, 4096, 8192]}
# of the largest product of a step or of a call: rows for each row of the batch, inputs, outputs
PRODUCTS = {
    "training": (TARGET_SAMPLES, 750, 750),
    "vectors": (1, *DISCRETE["vectors"].hidden),
    "frames": (1, FRAME_FEATURES, *DISCRETE["frames"].hidden),
    "acting": (CANDIDATES, 750, 750),
}
MATMUL_PARTS = 5
DPI = 130


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
        **{kind: [] for kind in UNITS},
    }
    sizes = {"training": args.batch_sizes, "vectors": args.vectors, "frames": args.frames, "acting": args.states}
    with tqdm(total=sum(map(len, sizes.values())) * args.rounds, unit=" rounds", disable=None) as bar:
        for kind, numbers in sizes.items():
            if numbers:
                compare_all(kind, numbers, args, results, bar)
    print(f"\nbenchmark.json and benchmark.png are in {args.out.resolve()}")


def compare_all(kind: str, sizes: list[int], args: argparse.Namespace, results: dict[str, Any], bar: tqdm) -> None:
    """Measure one size after the other in the same processes, and write the results after each size."""
    left_out = results["left_out"]
    names = [name for name in args.only if name in NAMES[kind] and name not in left_out]
    with in_processes([*names, "matmul"], args.threads) as contenders:
        for size in sizes:
            bar.set_description(f"{kind}, {UNITS[kind][0]} {size}")
            if bar.disable:  # no terminal
                print(bar.desc.removesuffix(": "), file=sys.stderr, flush=True)
            if measured := compare(kind, size, args, contenders, left_out, bar):
                results[kind].append(measured)
                tqdm.write(table(kind, measured), file=sys.stdout)
                write(args.out, results)


def compare(
    kind: str,
    size: int,
    args: argparse.Namespace,
    contenders: Mapping[str, Contender],
    left_out: dict[str, str],
    bar: tqdm,
) -> dict[str, Any]:
    """Measure all contenders at one batch size or number of states; empty if there are none."""
    makes = set_ups(kind, size, args.device, Sizes(args.hidden, args.vae_hidden))
    present = {name: make for name, make in makes.items() if name in contenders and name not in left_out}
    ready = set_up(contenders, present, args.device, left_out)
    if not ready:
        return {}
    flops = count_flops(partial(makes["floor"](), 1))
    each, inputs, outputs = PRODUCTS[kind]
    product_shape = (each * size, inputs, outputs)
    contenders["matmul"].set_up(partial(make_matmul, *product_shape, args.device), args.device, MATMUL_PARTS)
    for found in measure({**ready, "matmul": contenders["matmul"]}, args.rounds, args.seconds):
        bar.update(len(found["matmul"]["seconds"]) > 0)
    product, matmul_flops = found.pop("matmul"), 2 * math.prod(product_shape)
    measured = {
        "size": size,
        "flops": flops,
        "limit": matmul_flops / min(product["seconds"]),
        "matmul": {"shape": list(product_shape), "flops": matmul_flops, **product},
        "steps": {name: one["steps"] for name, one in found.items()},
        "seconds": {name: one["seconds"] for name, one in found.items()},
    }
    measured["summary"] = summarize(measured, PEERS)
    measured["kernels"] = {}
    if kind != "acting" and args.device.startswith("cuda"):
        own = {name: row["seconds"] for name, row in measured["summary"].items() if name in MODES or name == "floor"}
        measured["kernels"] = {name: ready[name].profile_kernels(seconds) for name, seconds in own.items()}
    return measured


def set_up(
    contenders: Mapping[str, Contender], makes: Mapping[str, SetUp], device: str, left_out: dict[str, str]
) -> dict[str, Contender]:
    """Try one step of each; a peer that fails, for example with an unsupported PyTorch, is left out."""
    ready = {}
    for name, make in makes.items():
        try:
            contenders[name].set_up(make, device)
        except ContenderError as error:
            if name not in PEERS:
                raise
            contenders[name].close()
            left_out[name] = error.reason
            print(f"{name} is left out: {left_out[name]}", file=sys.stderr)
        else:
            ready[name] = contenders[name]
    return ready


def write(folder: Path, results: Mapping[str, Any]) -> None:
    """Write benchmark.json and benchmark.png."""
    with write_whole(folder / "benchmark.json") as file:
        file.write_text(json.dumps(results, indent=1) + "\n")
    with write_whole(folder / "benchmark.png") as file:
        draw(results).savefig(file, dpi=DPI)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(dict.fromkeys(name for known in NAMES.values() for name in known))
    add, default = parser.add_argument, "(default: %(default)s)"
    add("--device", default="cpu", help=f"cpu or cuda {default}")
    add("--batch-sizes", type=int, nargs="*", help=f"to train with; no number skips training (default: {BATCH_SIZES})")
    add("--vectors", type=int, nargs="*", default=[64, 256], help=f"batch sizes of discrete BCQ on vectors {default}")
    add("--frames", type=int, nargs="*", default=[32], help=f"batch sizes of discrete BCQ on frames {default}")
    add(
        "--states",
        type=int,
        nargs="*",
        default=[1, 10, 256],
        help=f"in one call of the policy; no number skips acting {default}",
    )
    add("--rounds", type=int, default=10, help=f"in which each contender runs once {default}")
    add("--seconds", type=float, default=1.0, help=f"for which a contender runs in a round, about {default}")
    add("--threads", type=int, default=torch.get_num_threads(), help=f"of PyTorch on the CPU {default}")
    add("--out", type=Path, default=Path("runs/benchmark"), metavar="FOLDER", help=f"of the results {default}")
    add("--only", nargs="+", default=names, choices=names, metavar="NAME", help=f"contenders {default}")
    add("--hidden", type=int, nargs="+", default=[400, 300], help=f"of actor and critics {default}")
    add("--vae-hidden", type=int, nargs="+", default=[750, 750], help=f"of encoder and decoder {default}")
    args = parser.parse_args(arguments)
    if args.batch_sizes is None:
        args.batch_sizes = BATCH_SIZES[args.device.partition(":")[0]]
    return args


if __name__ == "__main__":
    hush()
    main()
