"""Compares the speed of this checkout of torchrl_bcq with another checkout, in one run.

git worktree add /tmp/before HEAD~1
python tests/benchmarks/bench_versions.py --against /tmp/before
python tests/benchmarks/bench_versions.py --against /tmp/before --width 0.01 --max-minutes 30 --threads 1

Both train on the same random transitions (17 observations, 6 actions) and act, with the author's network sizes. Each
checkout has a process of its own for each case. In each round both run the same case: first in random order, then in
the reverse order. The ratio of a round is the other checkout's time divided by this one's, so above 1 this checkout is
faster. The table shows the geometric mean of the ratios without the lowest and highest fifth, and its bootstrapped 95 %
interval. All cases are measured until each interval is narrower than ``--width``. The last line of the output is JSON.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from machine import describe
from processes import Contender, hush, in_processes
from rounds import Run
from scipy.stats import bootstrap, trim_mean
from tensordict import TensorDict
from torchrl.data import Bounded, Unbounded
from torchrl.objectives import SoftUpdate
from transitions import ACTIONS, OBSERVATIONS, make_transitions

HERE = Path(__file__).resolve().parents[2]
TURN = 0.25  # seconds for which a checkout runs without a break, twice in a round
BLOCK = 5  # rounds of a case before the next case's turn
MIN_ROUNDS = 20  # over fewer rounds, an interval may be narrow by chance
TRIM = 0.2  # fraction of the ratios that is left out at each end: other processes disturb some rounds
RESAMPLES = 2000


def import_from(checkout: Path) -> ModuleType:
    """Import torchrl_bcq from a checkout into this process, which has not imported it before.

    Raises:
        ImportError: if another checkout is imported.
    """
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    bcq = importlib.import_module("torchrl_bcq")
    if (found := Path(bcq.__file__).resolve().parents[1]) != checkout:
        raise ImportError(f"torchrl_bcq was imported from {found}, expected {checkout}.")
    return bcq


def make_modules(bcq: ModuleType):
    torch.manual_seed(0)
    return bcq.make_bcq_modules(Unbounded((OBSERVATIONS,)), Bounded(-1, 1, (ACTIONS,)))


def learn(batch_size: int, checkout: Path) -> Run:
    """Whole gradient steps of BCQTrainer; a turn is a call of ``train``."""
    bcq = import_from(checkout)
    loss = bcq.BCQLoss(*make_modules(bcq))
    buffer = bcq.make_replay_buffer(make_transitions(), batch_size=batch_size, seed=0)
    updater, stepper = SoftUpdate(loss, tau=0.005), bcq.BCQOptimizationStepper.adam(loss)

    def run(steps: int) -> None:
        bcq.BCQTrainer(
            loss,
            buffer,
            target_net_updater=updater,
            optimization_stepper=stepper,  # the default one, kept so that Adam's state is made once
            total_steps=steps,
            progress_bar=False,
        ).train()

    return run


def act(states: int, checkout: Path) -> Run:
    """Calls of BCQPolicy, which draws 100 candidates for each state."""
    bcq = import_from(checkout)
    policy = bcq.BCQPolicy(*make_modules(bcq), num_action_samples=100)
    batch = TensorDict({"observation": torch.randn(states, OBSERVATIONS)}, [states])

    def run(steps: int) -> None:
        for _ in range(steps):
            policy(batch)

    return run


CASES: dict[str, Callable[[Path], Run]] = {
    "learn, batch 100": partial(learn, 100),
    "learn, batch 256": partial(learn, 256),
    "act, 1 state": partial(act, 1),
    "act, 256 states": partial(act, 256),
}


class Case:
    """The ratios of one case.

    Args:
        before: stopwatch of the other checkout.
        now: stopwatch of this checkout.
    """

    def __init__(self, before: Contender, now: Contender) -> None:
        self.sides = {"before": before, "now": now}
        self.steps = min(side.calibrate(TURN) for side in self.sides.values())
        self.ratios: list[float] = []

    def measure(self) -> None:
        """Run both checkouts twice, in random order and in the reverse order, so that a steady drift cancels."""
        order, seconds = random.sample([*self.sides], k=2), dict.fromkeys(self.sides, 0.0)
        for name in order + order[::-1]:
            seconds[name] += self.sides[name].time(self.steps)
        self.ratios.append(seconds["before"] / seconds["now"])

    def interval(self) -> tuple[float, float, float]:
        """The mean ratio, and the bounds of its 95 % interval."""
        logs, mean = np.log(self.ratios), partial(trim_mean, proportiontocut=TRIM)
        settings = {"n_resamples": RESAMPLES, "method": "percentile", "rng": np.random.default_rng(0)}
        found = bootstrap((logs,), mean, **settings).confidence_interval
        ratio, low, high = np.exp([mean(logs), found.low, found.high]).tolist()
        return ratio, low, high


def compare(cases: Mapping[str, Case], width: float, max_minutes: float) -> dict[str, dict[str, float]]:
    """Measure the cases in turn until all intervals are narrower than ``width``, or the time is up."""
    deadline = time.monotonic() + 60 * max_minutes
    results: dict[str, dict[str, float]] = {}
    while not (results and time.monotonic() >= deadline):
        for name, case in cases.items():
            for _ in range(BLOCK):
                case.measure()
            ratio, low, high = case.interval()
            rounds = len(case.ratios)
            results[name] = {"ratio": ratio, "low": low, "high": high, "rounds": rounds}
            print(f"{name:<18}{ratio:8.3f}   {low:.3f} to {high:.3f}{rounds:8}", flush=True)
        if rounds >= MIN_ROUNDS and all(one["high"] - one["low"] < width for one in results.values()):
            break
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, default = parser.add_argument, "(default: %(default)s)"
    add("--against", type=Path, required=True, metavar="PATH", help="the other checkout")
    add("--width", type=float, default=0.03, help=f"of the 95 %% intervals at which the run ends {default}")
    add("--max-minutes", type=float, default=20.0, metavar="N", help=f"after which it ends in any case {default}")
    add("--threads", type=int, default=torch.get_num_threads(), metavar="N", help=f"of PyTorch {default}")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    checkouts = {"before": args.against.resolve(), "now": HERE}
    with in_processes([(side, name) for name in CASES for side in checkouts], args.threads) as contenders:
        for (side, name), contender in contenders.items():
            contender.set_up(partial(CASES[name], checkouts[side]), "cpu")
        cases = {name: Case(*(contenders[side, name] for side in checkouts)) for name in CASES}
        print(f"{'':<18}{'ratio':>8}   {'95 % interval':<14}{'rounds':>8}", flush=True)
        results = compare(cases, args.width, args.max_minutes)
    print(json.dumps({"against": str(args.against), "machine": describe("cpu", ()), "cases": results}))


if __name__ == "__main__":
    hush()
    main()
