"""Measures how long a policy takes to act in one state: the median and the 99th percentile of single calls.

python tests/benchmarks/act_latency.py
python tests/benchmarks/act_latency.py --calls 50 --hidden 8 --vae-hidden 8

The contenders of bench_peers.py act in random order in one process, each with NumPy arrays in and out and 100
candidates. "file" is the policy as an ONNX file. The ratio to "floor", bare PyTorch, is the median over all rounds of
one call of each, with a 95 % interval (bootstrap over rounds).
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from contenders import ACTING, PEERS, absent
from processes import hush
from tqdm import trange
from transitions import OBSERVATIONS, Sizes

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--calls", type=int, default=2_000, help="of each contender (default: %(default)s)")
parser.add_argument("--threads", type=int, default=1, help="of PyTorch (default: %(default)s)")
parser.add_argument("--hidden", type=int, nargs="+", default=[400, 300], help="of actor and critics")
parser.add_argument("--vae-hidden", type=int, nargs="+", default=[750, 750], help="of encoder and decoder")


def main() -> None:
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    left_out = absent("cpu")
    for name in set(left_out) & set(ACTING):
        print(f"{name} is left out: {left_out[name]}")
    sizes = Sizes(args.hidden, args.vae_hidden)
    acts = {name: make("cpu", sizes) for name, make in ACTING.items() if name not in left_out}
    random = np.random.default_rng(0)
    states = random.standard_normal((args.calls, 1, OBSERVATIONS), dtype=np.float32)
    for act in acts.values():  # compiles, and fills caches
        for state in states[:20]:
            act(state)
    seconds = {name: np.empty(args.calls) for name in acts}
    for number in trange(args.calls, unit=" calls", disable=None):
        for name in random.permutation([*acts]):  # the contender before decides what is left in the caches
            start = time.perf_counter()
            acts[name](states[number])
            seconds[name][number] = time.perf_counter() - start
    found = {name: np.percentile(1e3 * each, [50, 99]) for name, each in seconds.items()}
    fastest = min((found[name][0] for name in PEERS if name in found), default=None)
    print(f"\nmilliseconds, {args.calls} calls, {args.threads} thread(s)")
    print(f"{'':<12}{'median':>10}{'99th percentile':>18}{'ratio to floor':>18}{'95 % interval':>18}")
    for name, (median, high) in found.items():
        ratios = seconds[name] / seconds["floor"]
        drawn = np.median(random.choice(ratios, (1_000, args.calls)), 1)
        low, top = np.percentile(drawn, [2.5, 97.5])
        faster = "" if fastest is None else f"   {fastest / median:.2f}x the faster peer"
        print(
            f"{name:<12}{median:>10.3f}{high:>18.3f}{np.median(ratios):>18.2f}{f'{low:.2f} to {top:.2f}':>18}{faster}"
        )


if __name__ == "__main__":
    hush()
    main()
