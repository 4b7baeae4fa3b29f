"""``torchrl-bcq evaluate``: run episodes with the policy of a run and with its baselines."""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from torchrl_bcq.errors import RunError
from torchrl_bcq.files import write_whole

_EXAMPLES = """\
examples:
  torchrl-bcq evaluate runs/hopper --episodes 100
  torchrl-bcq evaluate runs/hopper --baseline runs/hopper-cloning
  torchrl-bcq evaluate runs/hopper --checkpoint last --deterministic
  torchrl-bcq evaluate runs/hopper/checkpoints/checkpoint-000000005000
"""


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command ``evaluate``; what it sets as ``run`` takes the parsed arguments."""
    what = "Run episodes with the policy of a run and with its baselines."
    description = f"{what} A run without an environment is evaluated on its dataset."
    command = commands.add_parser("evaluate", help=what, description=description, epilog=_EXAMPLES)
    add = command.add_argument
    add("folder", type=Path, metavar="RUN", help="folder that torchrl-bcq train made, or one of its checkpoints")
    add("--baseline", type=Path, metavar="RUN2", help="run to compare with; default: the baseline that RUN trained")
    add("--checkpoint", choices=("best", "last"), default="best", help="default: best, or last if none was kept")
    add("--env", metavar="ID", help="Gymnasium environment; default: that of the run")
    add("--episodes", type=int, default=100, metavar="N", help="of each policy (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of initial states and actions (default: %(default)s)")
    add("--deterministic", action="store_true", help="the same action for the same state, without random candidates")
    add("--device", default="auto", help="any torch device (default: cuda if it is available)")
    out = "file of the numbers; default: evaluation.json in RUN, or beside the checkpoint"
    add("--out", type=Path, metavar="JSON", help=out)
    command.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    from torchrl_bcq.runs.folder import load

    if args.episodes < 1:
        raise RunError(f"--episodes is {args.episodes}, expected at least 1.")
    trained = load(args.folder, args.checkpoint, args.device)
    runs = {trained.algorithm.title: trained, **_load_baseline(args, trained)}
    if args.env:
        for one in runs.values():
            _check_env(args.env, one.task)
        trained = replace(trained, task=replace(trained.task, env_id=args.env))
    for one in runs.values():
        print(f"{one.path}: {one.step:,} gradient steps on {one.settings.dataset}")
    out = args.out or args.folder / "evaluation.json"
    if args.out is None and trained.path == args.folder:  # a checkpoint stays as it was written
        out = args.folder.with_name(f"{args.folder.name}-evaluation.json")
    results = _in_environment(trained, runs, args) if trained.task.env_id else _on_the_dataset(trained, runs)
    with write_whole(out) as aside:
        numbers = {"checkpoint": str(trained.path), "step": trained.step, **results}
        aside.write_text(json.dumps(numbers, indent=2) + "\n")
    print(f"\nThe numbers are in {out}.")


def _load_baseline(args: argparse.Namespace, trained: Any) -> dict[str, Any]:
    """The run to compare with, if there is one, by its title in tables."""
    from torchrl_bcq.runs.folder import BASELINE, find_checkpoint, load

    folder = args.baseline or args.folder / BASELINE
    if args.baseline is None:
        try:
            find_checkpoint(folder, args.checkpoint)
        except RunError:
            return {}
    baseline = load(folder, args.checkpoint, args.device)
    for what in ("observation", "action"):
        if getattr(trained.task, f"{what}_spec") != getattr(baseline.task, f"{what}_spec"):
            raise RunError(f"{folder} has other {what}s than {args.folder}; compare runs of one dataset.")
    title = baseline.algorithm.title
    return {title if title != trained.algorithm.title else f"{title}, {folder}": baseline}


def _check_env(env_id: str, task: Any) -> None:
    """Refuse an environment that the policy does not fit."""
    from torchrl_bcq.evaluation.environments import check_observations, make_env

    remedy = "choose another with --env ID"
    env = make_env(env_id, remedy=remedy)
    check_observations(env, env_id, (task.observation_size,), "the run", remedy)
    if env.action_spec.shape != task.action_spec.shape:
        found, expected = tuple(env.action_spec.shape), tuple(task.action_spec.shape)
        raise RunError(f"{env_id} has actions of shape {found}, the run of {expected}; {remedy}.")


def _in_environment(trained: Any, runs: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Returns of a random policy, the dataset, the baselines and the run's policy."""
    from torchrl.envs.utils import ExplorationType, set_exploration_type

    from torchrl_bcq.evaluation.environments import make_envs
    from torchrl_bcq.evaluation.rollouts import evaluate, summarize

    task, loss, own, *baselines = trained.task, trained.loss, *runs
    envs = make_envs(task.env_id, args.episodes, next(loss.parameters()).device)
    policies: dict[str, Any] = {"random": None}
    policies |= {title: make(*loss.networks) for title, make in trained.algorithm.compared.items()}
    policies |= {title: runs[title].policy for title in (*baselines, own)}
    mode = set_exploration_type(ExplorationType.DETERMINISTIC) if args.deterministic else nullcontext()
    gamma = trained.settings.loss.get("gamma", 0.99)
    rows: dict[str, dict[str, float]] = {}
    with mode:
        for title, policy in policies.items():
            value = loss.value if title == own else None
            episodes = evaluate(envs, policy, value=value, gamma=gamma, seed=args.seed)
            rows[title] = summarize(episodes, task.reference_scores)
    print(f"\n{task.env_id}, {args.episodes} episodes of each policy\n")
    _print_returns({"the dataset": {"return": task.behaviour["mean"], "return_std": task.behaviour["std"]}, **rows})
    if "value_estimate" in rows[own]:
        print(
            f"\nAt the initial states the critic estimates {rows[own]['value_estimate']:.4g}; the discounted return "
            f"from there was {rows[own]['discounted_return']:.4g}."
        )
    return {"env": task.env_id, "episodes": args.episodes, "seed": args.seed, "behaviour": task.behaviour, **rows}


def _print_returns(rows: dict[str, dict[str, float]]) -> None:
    columns = {"return": 12, "return_std": 10, "normalized_score": 12, "episode_length": 10}
    cells = [[title, *(f"{row[name]:.1f}" if name in row else "-" for name in columns)] for title, row in rows.items()]
    width = max(20, *(len(title) + 2 for title in rows))
    _print_table([["policy", "return", "std", "normalized", "steps"], *cells], [width, *columns.values()])


def _print_table(lines: list[list[str]], widths: list[int]) -> None:
    for title, *cells in lines:
        print(f"{title:<{widths[0]}}" + "".join(f"{cell:>{n}}" for cell, n in zip(cells, widths[1:], strict=True)))


def _on_the_dataset(trained: Any, runs: dict[str, Any]) -> dict[str, Any]:
    """Metrics that need no environment, of the run and its baseline."""
    from torchrl_bcq.evaluation import DatasetMetrics
    from torchrl_bcq.runs.assembly import split
    from torchrl_bcq.runs.folder import open_dataset

    settings = trained.settings
    transitions, _ = open_dataset(settings)
    learned = split(settings, transitions)
    rows = transitions if learned is None else transitions[~learned]
    found = {}
    for title, one in runs.items():
        if learned is not None and (one.settings.held_out, one.settings.seed) != (settings.held_out, settings.seed):
            raise RunError(f"{one.path} held out other episodes than {trained.path}; compare runs of one seed.")
        drawn = {"max_rows": settings.evaluation.max_rows, "seed": settings.evaluation.seed}  # as the run has logged
        metrics = DatasetMetrics(one.loss, one.policy, rows, interval=1, held_out=learned is not None, **drawn)
        found[title] = metrics.measure()
    print(f"\nno environment; on {'the dataset' if learned is None else 'held-out episodes'}:\n")
    names = dict.fromkeys(name for row in found.values() for name in row)
    cells = [[name, *(f"{row[name]:.4g}" if name in row else "-" for row in found.values())] for name in names]
    _print_table([["", *found], *cells], [28, *(max(12, len(title) + 2) for title in found)])
    return found
