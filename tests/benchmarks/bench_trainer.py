"""Compares the trainer with a bare loop around the same stepper, on the same batches.

python tests/benchmarks/bench_trainer.py
python tests/benchmarks/bench_trainer.py --rounds 2 --hidden 8 --vae-hidden 8

Both draw batches and make gradient steps with the author's network sizes, 17 observations and 6 actions, one after the
other in each round, in alternating order. The trainer also writes a CSV log every 100 steps, checks its losses and
shows a progress bar. Prints median times, and the median of the ratios within rounds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from types import SimpleNamespace

import torch
from tensordict import TensorDict
from torchrl.data import Bounded, Unbounded
from torchrl.objectives import SoftUpdate
from torchrl.record import CSVLogger
from transitions import ACTIONS, OBSERVATIONS, make_transitions

from torchrl_bcq import BCQLoss, BCQTrainer, OfflineOptimizationStepper, make_bcq_modules, make_replay_buffer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=256, help="rows of a batch (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="in a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="measurements of each (default: %(default)s)")
    parser.add_argument("--hidden", type=int, nargs="+", default=[400, 300], help="default: %(default)s")
    parser.add_argument("--vae-hidden", type=int, nargs="+", default=[750, 750], help="default: %(default)s")
    args = parser.parse_args()
    transitions = make_transitions()
    rounds = {"loop": [], "trainer": []}
    with tempfile.TemporaryDirectory() as folder:
        runs = {"loop": make_loop(args, transitions), "trainer": make_training(args, transitions, folder)}
        for run in runs.values():
            run()  # warm up
        for number in range(args.rounds):
            for name in sorted(runs, reverse=number % 2 == 1):
                start = time.perf_counter()
                runs[name]()
                rounds[name].append((time.perf_counter() - start) / args.steps)
    report(args, rounds)


def report(args: argparse.Namespace, rounds: dict[str, list[float]]) -> None:
    print(f"batch {args.batch_size}, {args.rounds} rounds of {args.steps} steps, {torch.get_num_threads()} threads")
    for name, times in rounds.items():
        print(
            f"{name:<10}{1e3 * statistics.median(times):8.2f} ms per step  ({1 / statistics.median(times):.1f} steps/s)"
        )
    ratios = sorted(trainer / loop for trainer, loop in zip(rounds["trainer"], rounds["loop"], strict=True))
    print(f"trainer / loop: {statistics.median(ratios):.4f}  ({ratios[0]:.4f} to {ratios[-1]:.4f})")


def make_parts(args: argparse.Namespace, transitions: TensorDict):
    torch.manual_seed(0)
    specs = Unbounded((OBSERVATIONS,)), Bounded(-1, 1, (ACTIONS,))
    loss = BCQLoss(*make_bcq_modules(*specs, hidden=args.hidden, vae_hidden=args.vae_hidden))
    buffer = make_replay_buffer(transitions, batch_size=args.batch_size, seed=0)
    return loss, buffer, SoftUpdate(loss, tau=0.005), OfflineOptimizationStepper.adam(loss)


def make_loop(args: argparse.Namespace, transitions: TensorDict):
    loss, buffer, updater, stepper = make_parts(args, transitions)
    trainer = SimpleNamespace(
        loss_module=loss, clip_norm=None, compute_loss=lambda batch, method: getattr(loss, method)(batch)
    )

    def run() -> None:
        for _ in range(args.steps):
            stepper.step(trainer, buffer.sample())
            updater.step()

    return run


def make_training(args: argparse.Namespace, transitions: TensorDict, folder: str):
    loss, buffer, updater, stepper = make_parts(args, transitions)
    logger = CSVLogger("log", log_dir=folder)

    def run() -> None:
        trainer = BCQTrainer(
            loss,
            buffer,
            target_net_updater=updater,
            optimization_stepper=stepper,
            total_steps=args.steps,
            logger=logger,
            progress_bar=sys.stderr.isatty(),
        )
        trainer.train()

    return run


if __name__ == "__main__":
    main()
