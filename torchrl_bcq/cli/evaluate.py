"""``torchrl-bcq evaluate``: what the policy of a run is worth."""

from __future__ import annotations

import argparse
import json
import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from torchrl_bcq.cli.errors import RunError

_EXAMPLES = """\
examples:
  torchrl-bcq evaluate runs/hopper --episodes 100
  torchrl-bcq evaluate runs/hopper --checkpoint last --deterministic
  torchrl-bcq evaluate runs/hopper/checkpoints/checkpoint-000000005000
"""


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command ``evaluate``; what it sets as ``run`` takes the parsed arguments."""
    what = "Run episodes with the policy of a run, and with what it must beat."
    command = commands.add_parser(
        "evaluate",
        help=what,
        description=f"{what} Of a run without an environment, measure what its dataset tells.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("folder", type=Path, metavar="RUN", help="folder that torchrl-bcq train made, or one of its checkpoints")
    add("--checkpoint", choices=("best", "last"), default="best", help="default: best, or last if none was kept")
    add("--env", metavar="ID", help="Gymnasium environment; default: that of the run")
    add("--episodes", type=int, default=100, metavar="N", help="of each policy (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of initial states and actions (default: %(default)s)")
    add("--deterministic", action="store_true", help="one action for each state, in place of newly drawn candidates")
    add("--device", default="auto", help="any torch device (default: cuda if it is there)")
    add(
        "--out",
        type=Path,
        metavar="JSON",
        help="of the numbers; default: evaluation.json in RUN, or beside the checkpoint",
    )
    command.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    from torchrl_bcq.cli.run import load

    if args.episodes < 1:
        raise RunError(f"--episodes is {args.episodes}, expected at least 1.")
    trained = load(args.folder, args.checkpoint, args.device)
    if args.env:
        _check_env(args.env, trained.task)
        trained = replace(trained, task=replace(trained.task, env_id=args.env))
    print(f"{trained.path}: {trained.step:,} gradient steps on {trained.config.dataset}")
    out = args.out or args.folder / "evaluation.json"
    if args.out is None and trained.path == args.folder:  # a checkpoint stays as it was written
        out = args.folder.with_name(f"{args.folder.name}-evaluation.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    results = _in_environment(trained, args) if trained.task.env_id else _on_the_dataset(trained)
    aside = out.with_name(f".{out.name}.{os.getpid()}")
    aside.write_text(json.dumps({"checkpoint": str(trained.path), "step": trained.step, **results}, indent=2) + "\n")
    aside.replace(out)
    print(f"\nThe numbers are in {out}.")


def _check_env(env_id: str, task: Any) -> None:
    """Refuse an environment that the policy cannot act in."""
    from torchrl_bcq.cli.run import check_observations, make_env

    env: Any = make_env(env_id)
    check_observations(env, env_id, (task.observation_size,), "the run", "choose another with --env ID")
    if env.action_spec.shape != task.action_spec.shape:
        found, expected = tuple(env.action_spec.shape), tuple(task.action_spec.shape)
        raise RunError(f"{env_id} has actions of shape {found}, the run of {expected}; choose another with --env ID.")


def _in_environment(trained: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Returns of a random policy, of the dataset, of behaviour cloning and of BCQ."""
    from torchrl.envs.utils import ExplorationType, set_exploration_type

    from torchrl_bcq.cli.run import make_envs
    from torchrl_bcq.modules import BehaviorCloningPolicy
    from torchrl_bcq.trainers.metrics import evaluate, summarize

    task, loss = trained.task, trained.loss
    envs = make_envs(task, args.episodes, next(loss.parameters()).device)
    policies = {"random": None, "behaviour cloning": BehaviorCloningPolicy(loss.vae_network), "BCQ": trained.policy}
    mode = set_exploration_type(ExplorationType.DETERMINISTIC) if args.deterministic else nullcontext()
    rows: dict[str, dict[str, float]] = {}
    with mode:
        for name, policy in policies.items():
            critics = loss.qvalue_network if name == "BCQ" else None
            episodes = evaluate(envs, policy, critics=critics, gamma=trained.config.loss.gamma, seed=args.seed)
            rows[name] = summarize(episodes, task.references)
    print(f"\n{task.env_id}, {args.episodes} episodes of each policy")
    print(f"\n{'policy':<20}{'return':>12}{'std':>10}{'normalized':>12}{'steps':>10}")
    behaviour = {"return": task.behaviour["mean"], "return_std": task.behaviour["std"]}
    for name, row in {"the dataset": behaviour, **rows}.items():
        cells = [(row["return"], 12), (row["return_std"], 10), (row.get("normalized_score"), 12)]
        cells += [(row.get("episode_length"), 10)]
        print(f"{name:<20}" + "".join(f"{'-' if value is None else f'{value:.1f}':>{width}}" for value, width in cells))
    found = rows["BCQ"]
    print(
        f"\nAt the initial states the first critic estimates {found['value_estimate']:.4g}; the discounted return from "
        f"there was {found['discounted_return']:.4g}."
    )
    return {"env": task.env_id, "episodes": args.episodes, "seed": args.seed, "behaviour": task.behaviour, **rows}


def _on_the_dataset(trained: Any) -> dict[str, Any]:
    """What can be known without an environment."""
    from torchrl_bcq.cli.build import split
    from torchrl_bcq.cli.run import open_dataset
    from torchrl_bcq.trainers.metrics import DatasetMetrics

    config = trained.config
    transitions, _ = open_dataset(config)
    learned = split(config, transitions)
    rows = transitions if learned is None else transitions[~learned]
    metrics = DatasetMetrics(
        trained.loss,
        trained.policy,
        rows,
        interval=1,
        held_out=learned is not None,
        max_rows=config.evaluation.max_rows,
        seed=config.evaluation.seed,  # so that they are those that the run has logged
    ).measure()
    of = "held-out episodes" if learned is not None else "the dataset"
    print(f"\nno environment; on {of}:\n")
    for name, value in metrics.items():
        print(f"{name:<24}{value:>12.4g}")
    return metrics
