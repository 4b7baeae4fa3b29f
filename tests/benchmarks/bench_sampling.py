"""Compares the time of a batch from make_replay_buffer with TorchRL's plain buffer, in memory and memory-mapped.

python tests/benchmarks/bench_sampling.py

All buffers are measured in each round, in another order each time, and compared with the plain buffer in the same
round; the table shows medians over rounds. Rows have the size of Hopper's: 11 observations, 3 actions.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import random
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import torch
from tensordict import TensorDict
from torchrl.data import LazyMemmapStorage, LazyTensorStorage, PrioritizedSampler, TensorDictReplayBuffer

from torchrl_bcq import episode_weights, make_replay_buffer, split_episodes

PLAIN = "TorchRL, plain"
EPISODE = 1000  # rows, about


def make_transitions(rows: int) -> TensorDict:
    flags = {name: torch.zeros(rows, 1, dtype=torch.bool) for name in ("done", "terminated", "truncated")}
    following = {"observation": torch.randn(rows, 11), "reward": torch.randn(rows, 1), **flags}
    columns = {"observation": torch.randn(rows, 11), "action": torch.randn(rows, 3)}
    episode = torch.randint(rows // EPISODE + 2, (rows,)).sort().values  # of unequal lengths
    return TensorDict({**columns, "episode": episode, "next": following}, batch_size=[rows])


def plain(transitions: TensorDict, mapped: bool, batch_size: int, **sampler) -> TensorDictReplayBuffer:
    storage = (LazyMemmapStorage if mapped else LazyTensorStorage)(len(transitions))
    generator = torch.Generator().manual_seed(0)
    buffer = TensorDictReplayBuffer(storage=storage, batch_size=batch_size, generator=generator, **sampler)
    buffer.extend(transitions.copy())
    return buffer


def make_buffers(transitions: TensorDict, mapped: bool, batch_size: int) -> dict[str, TensorDictReplayBuffer]:
    kinds = {
        "uniform": {},
        "without_replacement": {"sampler": "without_replacement"},
        "weights: a split": {"weights": split_episodes(transitions)[0]},
        "weights: by episode": {"weights": episode_weights(transitions)},
        "prioritized": {"sampler": "prioritized"},
    }
    buffers = {PLAIN: plain(transitions, mapped, batch_size)}
    with contextlib.suppress(RuntimeError):  # TorchRL's extension does not fit this torch
        sampler = PrioritizedSampler(len(transitions), alpha=0.6, beta=0.4)
        buffers["TorchRL, prioritized"] = plain(transitions, mapped, batch_size, sampler=sampler)
    for name, settings in kinds.items():
        try:
            buffers[name] = make_replay_buffer(transitions, batch_size=batch_size, seed=0, **settings)
        except ImportError as error:
            print(f"left out: {error}")
    return buffers


def measure(buffers: dict[str, TensorDictReplayBuffer], rounds: int, calls: int) -> dict[str, list[float]]:
    """Microseconds per batch, for each buffer and round."""
    times: dict[str, list[float]] = {name: [] for name in buffers}
    names = list(buffers)
    for number in range(rounds + 1):
        random.Random(number).shuffle(names)
        for name in names:
            start = time.perf_counter()
            for _ in range(calls):
                buffers[name].sample()
            if number:  # the first round warms up
                times[name].append((time.perf_counter() - start) / calls * 1e6)
    return times


def report(place: str, times: dict[str, list[float]]) -> None:
    for name, own in times.items():
        ratios = [mine / theirs for mine, theirs in zip(own, times[PLAIN], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        middle = statistics.median(ratios)
        print(f"{place:<11} {name:<20} {statistics.median(own):8.0f} us  {middle:5.2f}x  ({low:.2f} to {high:.2f})")


def main(rows: int, batch_size: int, rounds: int, calls: int, folder: Path | None) -> None:
    logging.getLogger("torchrl").setLevel(logging.ERROR)
    torch.manual_seed(0)
    transitions = make_transitions(rows)
    print(f"{rows} rows, batches of {batch_size}, {torch.get_num_threads()} thread(s), torch {torch.__version__}")
    print(f"{'held in':<11} {'drawn by':<20} {'a batch':>11}  {'ratio':>6}  (quartiles)")
    report("memory", measure(make_buffers(transitions, False, batch_size), rounds, calls))
    with tempfile.TemporaryDirectory(dir=folder) as path:
        mapped = transitions.memmap(path)
        report("memory map", measure(make_buffers(mapped, True, batch_size), rounds, calls))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the dataset (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=256, help="rows of a batch (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=100, help="measurements of each buffer (default: %(default)s)")
    parser.add_argument("--calls", type=int, default=10, help="batches of a measurement (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="of the memory map (default: the temporary folder)")
    main(**vars(parser.parse_args()))
