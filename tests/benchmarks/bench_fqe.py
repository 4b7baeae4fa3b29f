"""Compares estimated values of policies with their known values, for fitted Q evaluation here and that of d3rlpy.

python tests/benchmarks/bench_fqe.py run FOLDER --tasks cartpole pendulum
python tests/benchmarks/bench_fqe.py report

FOLDER holds datasets and policies with known values, as known_policies.py describes. For each seed, both contenders
learn from the same training episodes, with the same number of gradient steps, and evaluate the same initial states of
the held-out episodes. d3rlpy has its default settings, except the discount factor. During training, d3rlpy calls the
policy again in each update. For the estimate, the value of a state is the mean over the policy's actions: all discrete
actions, or, if they are continuous, one sampled action here and eight with d3rlpy. ``run`` appends a line of JSON
for each policy, seed and contender. It skips a line that the file of results already contains for the same number of
steps.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from json_lines import append, load as load_lines
from known_policies import Known, load
from machine import describe
from scipy.stats import spearmanr
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Bounded, Categorical, TensorSpec
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_bcq import Estimate, OffPolicyEvaluation, load_transitions, policy_actions, split_episodes

RESULTS = Path(__file__).parent / "results" / "fqe.jsonl"
TASKS: dict[str, tuple[str, TensorSpec]] = {
    "cartpole": ("cartpole-mixed", Categorical(2)),
    "pendulum": ("pendulum-mixed", Bounded(-2, 2, (1,))),
    "lunarlander": ("lunarlander-mixed", Categorical(4)),
    "hopper": ("hopper-medium-expert", Bounded(-1, 1, (3,))),
}
CONTENDERS = ("here", "d3rlpy")
HELD_OUT = 0.2
SAMPLES = 8  # actions of a random policy in each initial state, for d3rlpy


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    lines = load_lines(args.results)
    if args.command == "report":
        print(report(lines))
        return
    torch.set_num_threads(1)
    done = {tuple(line[name] for name in ("task", "policy", "seed", "contender", "steps")) for line in lines}
    for seed in args.seeds:
        for task in args.tasks:
            name, spec = TASKS[task]
            data = load_transitions(str(args.folder / f"{name}.hdf5"))
            policies = load(args.folder, task, spec)
            own = {"gamma": policies[0].gamma, "held_out": HELD_OUT, "seed": seed, "steps": args.steps}
            evaluation = OffPolicyEvaluation(data, spec, **own)
            for known in policies:
                for contender in args.only:
                    if (task, known.name, seed, contender, args.steps) in done:
                        continue
                    start = time.perf_counter()
                    if contender == "here":
                        found = asdict(evaluation.estimate(known.policy))
                    else:
                        found = {"value": evaluate_d3rlpy(data, spec, known, seed, args.steps)}
                    facts = {"task": task, "policy": known.name, "seed": seed, "contender": contender}
                    facts |= {"true": known.value, "true_error": known.error, "steps": args.steps}
                    facts |= {"seconds": round(time.perf_counter() - start, 1)}
                    versions = describe("cpu", ["d3rlpy"] if contender == "d3rlpy" else [])["versions"]
                    append(args.results, {**facts, **found, "versions": versions})
                    print({**facts, "value": round(found["value"], 1)}, flush=True)


def evaluate_d3rlpy(data: TensorDictBase, spec: TensorSpec, known: Known, seed: int, steps: int) -> float:
    """Return the mean value of the initial states of the held-out episodes, by d3rlpy's fitted Q evaluation."""
    train, held = split_episodes(data, HELD_OUT, seed=seed)
    states = data[held]
    numbers = states["episode"].reshape(-1)
    starts = states[numbers.diff(prepend=numbers[:1] - 1) != 0]
    rows, discrete = data[train], isinstance(spec, Categorical)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        import d3rlpy
        from d3rlpy.constants import ActionSpace
        from d3rlpy.dataset import MDPDataset
        from d3rlpy.ope import FQE, DiscreteFQE, FQEConfig

        d3rlpy.seed(seed)
        dataset = MDPDataset(
            rows["observation"].numpy(),
            rows["action"].reshape(len(rows), -1).numpy(),
            rows["next", "reward"].numpy(),
            terminals=rows["next", "terminated"].squeeze(-1).numpy().astype(np.float32),
            timeouts=(rows["next", "done"] & ~rows["next", "terminated"]).squeeze(-1).numpy().astype(np.float32),
            action_space=ActionSpace.DISCRETE if discrete else ActionSpace.CONTINUOUS,
            action_size=spec.n if discrete else spec.shape[-1],
        )

        def act(x: torch.Tensor) -> torch.Tensor:
            with set_exploration_type(ExplorationType.RANDOM):
                return known.policy(TensorDict({"observation": x}, [len(x)]))["action"]

        algo = SimpleNamespace(impl=SimpleNamespace(predict_best_action=act))
        fqe = (DiscreteFQE if discrete else FQE)(algo, FQEConfig(gamma=known.gamma))
        fqe.build_with_dataset(dataset)
        for _ in range(steps):
            fqe.update(dataset.sample_transition_batch(fqe.batch_size))
    choices = policy_actions(known.policy, starts, spec, num_samples=SAMPLES, seed=seed)
    state = starts["observation"].numpy()
    if discrete:
        each = [fqe.predict_value(state, np.full(len(state), k)) for k in range(spec.n)]
        return float((np.stack(each, 1) * choices.numpy()).sum(1).mean())
    each = [fqe.predict_value(state, choices[:, i].numpy()) for i in range(SAMPLES)]
    return float(np.mean(each))


def report(lines: Iterable[Mapping[str, Any]]) -> str:
    """Return a table of the errors and rank correlations of each task, means over seeds, and counts of intervals."""
    groups: dict[tuple[str, str, int], list[Mapping[str, Any]]] = {}
    for line in lines:
        task = f"{line['task']}, {line['steps']:,} steps"
        groups.setdefault((task, line["contender"], line["seed"]), []).append(line)
    rows = ["| task | | policies | seeds | mean absolute error | rank correlation | regret | covered | verdicts |"]
    rows += ["| --- |" + " --- |" * 8]
    for task in dict.fromkeys(key[0] for key in groups):
        for contender in CONTENDERS:
            seeds = [group for (of, who, _), group in groups.items() if (of, who) == (task, contender)]
            if not seeds:
                continue
            each = [measure(group) for group in seeds]
            means = {name: np.mean([one[name] for one in each]) for name in each[0]}
            policies = [line for group in seeds for line in group]
            cells = [task, contender, str(len(seeds[0])), str(len(seeds)), f"{means['error']:.1f}"]
            cells += [f"{means['correlation']:.2f}", f"{means['regret']:.1f}", covered(policies), verdicts(policies)]
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def measure(group: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Compare the estimates of the policies of one task and one seed with the known values."""
    value, true = (np.array([line[name] for line in group]) for name in ("value", "true"))
    equal = merge(true, np.array([line["true_error"] for line in group]))
    chosen = max(range(len(group)), key=lambda i: (not objections(group[i]), value[i]))
    return {
        "error": float(abs(value - true).mean()),
        "correlation": float(spearmanr(value, equal).statistic) if len(group) > 2 else np.nan,
        "regret": float(equal.max() - equal[chosen]),
    }


def merge(true: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Replace true values that differ by less than two standard errors from the lowest of them by their mean."""
    merged, order = true.astype(float), np.argsort(true, kind="stable")
    while len(order):
        first = order[0]
        near = true[order] - true[first] <= 2 * np.hypot(error[order], error[first])
        merged[order[near]] = true[order[near]].mean()
        order = order[~near]
    return merged


def objections(line: Mapping[str, Any]) -> list[str]:
    """Return the objections to an estimate of this package, which ``torchrl-bcq rank`` lists last."""
    return estimate_of(line).objections if "interval" in line else []


def estimate_of(line: Mapping[str, Any]) -> Estimate:
    return Estimate(**{name: line[name] for name in Estimate.__dataclass_fields__ if name in line})


def covered(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return how many intervals contain the known value."""
    known = [line for line in lines if "interval" in line]
    inside = sum(line["interval"][0] <= line["true"] <= line["interval"][1] for line in known)
    return f"{inside} of {len(known)}" if known else ""


def verdicts(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return for how many policies the verdict is not "cannot tell", and how many of these verdicts are wrong.

    A verdict is wrong if the known value is on the other side of the estimated value of the recorded behaviour.
    """
    given = [line for line in lines if "interval" in line]
    said = [line for line in given if not estimate_of(line).doubts]
    wrong = [line for line in said if (line["true"] > line["value"] - line["difference"]) != (line["difference"] > 0)]
    return f"{len(said)} of {len(given)} given, {len(wrong)} wrong" if given else ""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands, default = parser.add_subparsers(dest="command", required=True), "(default: %(default)s)"
    add = commands.add_parser("run", help="estimate the values that are missing").add_argument
    add("folder", type=Path, help="folder of the datasets and policies")
    add("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS), help=default)
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help=default)
    add("--steps", type=int, default=10_000, help=f"gradient steps {default}")
    add("--only", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS), help=default)
    commands.add_parser("report", help="print the table")
    for command in commands.choices.values():
        command.add_argument("--results", type=Path, default=RESULTS, metavar="FILE", help=default)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
