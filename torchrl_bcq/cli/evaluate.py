"""``torchrl-bcq evaluate``: evaluate a trained policy and compare it with its baselines."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import chain, count
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from torchrl_bcq.cli.environment import DATASET, REMEDY, add_options, choose_environment
from torchrl_bcq.data.sources.environment import Environment
from torchrl_bcq.errors import RunError
from torchrl_bcq.files import check_writable, home, write_whole

if TYPE_CHECKING:
    from torch import Tensor

RECORDED = "recorded behaviour"  # the policies, or people, that chose the recorded actions
_EXAMPLES = """\
examples:
  torchrl-bcq evaluate runs/hopper --episodes 100
  torchrl-bcq evaluate runs/hopper --baseline runs/hopper-cloning
  torchrl-bcq evaluate runs/hopper --checkpoint last --deterministic
  torchrl-bcq evaluate runs/hopper/checkpoints/checkpoint-000000005000
  torchrl-bcq evaluate runs/sweep                  the runs of torchrl-bcq train -m out=runs/sweep ...
"""
# what each number on a dataset can and cannot tell, by the start of its name
_MEANINGS = {
    "held_out_loss": "a loss on data that was not used for training; it cannot be compared between algorithms.",
    "held_out_td_error": "shows how well the values fit other data; a low error does not mean a good policy.",
    "action_distance": "shows how much the policy differs from the recorded actions, not which of them are better.",
    "action_agreement": "share of the recorded actions that the policy takes too; it does not show which are better.",
    "initial_value": "the critics' estimate of the policy's discounted return; it is not measured, and may be wrong.",
    "return": "mean return of the recorded episodes; to estimate a policy's return, use torchrl-bcq rank RUN.",
    "discounted_return": "the same with discount; if initial_value is far above it, the critics may overestimate.",
}


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command ``evaluate`` to the parser. ``args.run(args)`` then runs this command."""
    what = "Run episodes with the policy of a run and with policies to compare."
    more = "A run without an environment is evaluated on its dataset. For the folder of a sweep (train -m), print a"
    description = fill(f"{what} {more} table of its runs.", 110)
    command = commands.add_parser("evaluate", help=what, description=description, epilog=_EXAMPLES)
    add = command.add_argument
    add("folder", type=Path, metavar="RUN", help="folder of a run, one of its checkpoints, or a sweep")
    add("--baseline", type=Path, metavar="RUN2", help="run to compare with (default: the baseline of RUN)")
    add("--checkpoint", choices=("best", "last"), default="best", help="checkpoint (default: best if kept, else last)")
    add_options(command, "Gymnasium environment (default: the environment of the run)")
    add("--dataset", metavar="NAME", help=f"{DATASET}; for a run without an environment")
    add("--episodes", type=int, default=100, metavar="N", help="episodes of each policy (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="seed of initial states and actions (default: %(default)s)")
    add("--deterministic", action="store_true", help="always take the same action in the same state")
    add("--device", default="auto", help="any torch device (default: cuda if it is available)")
    out = "file for the numbers (default: evaluation.json, evaluation-2.json, ... in RUN, or beside the checkpoint)"
    add("--out", type=home, metavar="JSON", help=out)
    command.set_defaults(run=partial(_run, command))


def _run(command: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    from torchrl_bcq.cli.sweep import is_sweep, print_runs
    from torchrl_bcq.runs.folder import load

    if args.episodes < 1:
        raise RunError(f"--episodes is {args.episodes}, expected at least 1.")
    if not 0 <= args.seed < 2**32:
        raise RunError(f"--seed is {args.seed}, expected a number from 0 to {2**32 - 1}.")
    if args.out is not None and args.out.suffix.lower() != ".json":  # no other file of a run must be replaced
        raise RunError(f"--out is {str(args.out)!r}, expected the name of a JSON file, such as numbers.json.")
    changed = [name for name, value in vars(args).items() if value != command.get_default(name)]
    given = {name: f"--{name.replace('_', '-')}" for name in changed}
    if is_sweep(args.folder):
        if options := [option for name, option in given.items() if name not in ("folder", "reader")]:
            found = f"{args.folder} contains several runs, but {', '.join(options)} needs a single run"
            raise RunError(f"{found}; name one of the runs, or leave the option out to print a table of all runs.")
        return print_runs(args.folder)
    trained = load(args.folder, args.checkpoint, args.device)
    runs = {trained.algorithm.title: trained, **_load_baseline(args, trained)}
    env = choose_fitting(args, trained, runs)
    if env is not None:
        if args.dataset is not None:
            raise RunError("--dataset has an effect only without an environment; leave it out.")
        facts: dict[str, Any] = {"env_id": env.id, "env_kwargs": env.kwargs}
        facts |= {"max_episode_steps": env.max_episode_steps, "observation": env.observation}
        trained = replace(trained, task=replace(trained.task, **facts))
    elif options := [given[name] for name in ("episodes", "seed", "deterministic") if name in given]:
        raise RunError(f"{', '.join(options)} needs an environment; name it with --env ID, or leave the option out.")
    for one in runs.values():
        print(f"{one.path}: {one.step:,} gradient steps on {one.settings.dataset}")
    out = args.out or args.folder / "evaluation.json"
    if args.out is None and trained.path == args.folder:  # RUN is a checkpoint: write next to its folder
        folder = args.folder if args.folder.name not in ("", "..") else args.folder.resolve()
        out = folder.with_name(f"{folder.name}-evaluation.json")
    check_writable(out, "choose another file with --out")
    results = _in_environment(trained, runs, args) if env else _on_the_dataset(trained, runs, args)
    if args.out is None:  # look for a free name as late as possible: another evaluation may have ended meanwhile
        names = chain([out], (out.with_stem(f"{out.stem}-{number}") for number in count(2)))
        out = next(name for name in names if not name.exists())
    with write_whole(out) as aside:
        numbers = {"checkpoint": str(trained.path.resolve()), "step": trained.step, **results}
        aside.write_text(json.dumps(numbers, indent=2) + "\n")
    print(f"\nThe numbers are in {out}.")


def _load_baseline(args: argparse.Namespace, trained: Any) -> dict[str, Any]:
    """Load the baseline, the run with which the trained run is compared.

    Returns ``{name: run}``: the name of the baseline in the printed tables, and the loaded run of the baseline.
    Without a baseline, the dictionary is empty.
    """
    from torchrl_bcq.runs.candidates import check_comparable
    from torchrl_bcq.runs.folder import BASELINE, find_checkpoint, load

    folder = args.baseline or args.folder / BASELINE
    if args.baseline is None:
        try:
            find_checkpoint(folder, args.checkpoint)
        except RunError:
            return {}
    baseline = load(folder, args.checkpoint, args.device)
    check_comparable((baseline.settings, baseline.task), folder, (trained.settings, trained.task), args.folder)
    title = baseline.algorithm.title
    return {title if title != trained.algorithm.title else f"{title}, {folder}": baseline}


def choose_fitting(
    args: argparse.Namespace, trained: Any, runs: dict[str, Any], remedy: str = REMEDY
) -> Environment | None:
    """Return the environment in which the runs are evaluated; raises a RunError if it does not fit a run."""
    from torchrl_bcq.evaluation.environments import check_fits, make_env, with_time_limit

    env = choose_environment(args, trained)
    if env is None:
        return None
    made = make_env(env, remedy=remedy)
    for one in runs.values():
        check_fits(made, env, remedy, whose="the run", setting="--observation ENTRY ...", **one.task.expected)
    return with_time_limit(env, made, "set another number with --env-kwargs max_episode_steps=N.")


def _in_environment(trained: Any, runs: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Run episodes with each policy, print how their returns compare, and return a dictionary of results."""
    from torchrl.envs.utils import ExplorationType, set_exploration_type

    from torchrl_bcq.evaluation.environments import make_envs, steps_to_compare, time_limit
    from torchrl_bcq.evaluation.rollouts import evaluate, summarize
    from torchrl_bcq.functional import change_reward
    from torchrl_bcq.runs.assembly import reward_formula

    task, loss, own, *baselines = trained.task, trained.loss, *runs
    usual = runs[own].task.env  # task has the environment that the user chose
    ids = [str(name).rpartition(":")[2] for name in (task.env_id, usual and usual.id)]  # without the module
    elsewhere = usual is not None and (ids[0] != ids[1] or usual.kwargs != task.env_kwargs)
    if elsewhere:
        task = replace(task, reference_scores=None)
    discount = {"gamma": trained.settings.loss.gamma} if loss.has_values else {}
    limit = time_limit(task.env)
    steps = steps_to_compare(limit, **discount) if discount else None
    envs = make_envs(task.env, args.episodes, next(loss.parameters()).device, max_steps=steps)
    policies: dict[str, Any] = {"random": None}
    policies |= {title: make(*trained.loss.networks) for title, make in trained.algorithm.compared.items()}
    policies |= {title: runs[title].policy for title in (*baselines, own)}
    mode = set_exploration_type(ExplorationType.DETERMINISTIC) if args.deterministic else nullcontext()
    rows = {}
    formula, reward = reward_formula(trained.settings), partial(change_reward, **trained.settings.reward)
    returns: dict[str, Tensor] = {}
    with mode:
        for title, policy in policies.items():
            value = loss.value if title == own else None
            shared = {"seed": args.seed, "time_limit": limit, "reward": reward, **discount}
            episodes: Any = evaluate(envs, policy, value=value, **shared)
            rows[title], returns[title] = summarize(episodes, task.reference_scores), episodes["return"]
    print(f"\n{task.env}, {args.episodes} episodes of each policy\n")
    recorded = {"return": task.behaviour["mean"], "return_std": task.behaviour["std"]}
    if task.reference_scores:
        low, high = task.reference_scores
        recorded["normalized_score"] = 100 * (task.behaviour["mean"] - low) / (high - low)
    recorded["episode_length"] = task.behaviour["length"]
    _print_returns(rows if elsewhere else {RECORDED: recorded, **rows})
    if "value_estimate" in rows[own]:
        within = "" if steps is None else f" in at most {steps:,} steps"
        within += "" if limit is None or steps is None or steps <= limit else ", without the time limit"
        within += "" if formula is None else f" (both with the rewards of training, {formula})"
        print(
            f"\nAt the initial states the critic estimates a discounted return of {rows[own]['value_estimate']:.4g}; "
            f"the policy obtained {rows[own]['discounted_return']:.4g}{within}."
        )
    if uneven := task.uneven_length(limit):
        found, steps = uneven
        print(f"\nNote: {found}. To evaluate episodes of the same length: --env-kwargs max_episode_steps={steps}")
    if elsewhere:
        print(f"\nNote: the run's environment is {usual}, so these returns are not compared with the recorded ones.")
    if args.episodes > 1:
        comparable = not uneven and not elsewhere and task.behaviour["episodes"] > 1
        differences = {f"the {RECORDED}": _from_dataset(returns[own], task.behaviour)} if comparable else {}
        paired = {title: _mean_and_error(returns[own] - returns[title]) for title in baselines}
        differences |= {title: (*found, args.episodes - 1) for title, found in paired.items()}
        if differences:
            print(f"\n{_compare(own, differences)}")
    return {"env": str(task.env), "episodes": args.episodes, "seed": args.seed, "behaviour": task.behaviour, **rows}


def _from_dataset(returns: Tensor, behaviour: Mapping[str, float]) -> tuple[float, float, float]:
    """Return the mean of ``returns`` minus the dataset's mean return, the standard error, and the degrees of freedom.

    The degrees of freedom are those of Welch's t-test (the Welch-Satterthwaite equation).
    """
    mean, error = _mean_and_error(returns)
    freedom = [len(returns) - 1, behaviour["episodes"] - 1]
    variances = [error**2, behaviour["std"] ** 2 / freedom[1]]  # std is without Bessel's correction
    below = sum(variance**2 / number for variance, number in zip(variances, freedom, strict=True))
    total = sum(variances)
    return mean - behaviour["mean"], math.sqrt(total), total**2 / below if below else sum(freedom)


def _mean_and_error(values: Tensor) -> tuple[float, float]:
    return values.mean().item(), values.std(correction=1).item() / math.sqrt(len(values))


def _compare(own: str, differences: Mapping[str, tuple[float, float, float]]) -> str:
    """Return a text that says for each policy in ``differences`` if the policy ``own`` is better or worse.

    A difference is the mean, its standard error and the degrees of freedom.
    """
    from scipy.stats import t

    groups: dict[str, list[str]] = {}
    for title, (mean, error, freedom) in differences.items():
        half = t.ppf(0.975, freedom) * error
        kind = "better than" if mean - half > 0 else "worse than" if mean + half < 0 else "not clearly different from"
        groups.setdefault(kind, []).append(f"{title} ({mean:+.1f} ± {half:.1f})")
    sentences = [f"{own} is {kind} {' and '.join(titles)}." for kind, titles in groups.items()]
    return f"{' '.join(sentences)}\n(Differences in mean return with 95% confidence intervals.)"


def _print_returns(rows: dict[str, dict[str, float]]) -> None:
    columns = {"return": "return", "return_std": "std", "normalized_score": "normalized", "episode_length": "steps"}
    columns = {name: title for name, title in columns.items() if any(name in row for row in rows.values())}
    cells = [[title, *(f"{row[name]:.1f}" if name in row else "-" for name in columns)] for title, row in rows.items()]
    width = max(20, *(len(title) + 2 for title in rows))
    print_table([["policy", *columns.values()], *cells], [width, *[12] * len(columns)])


def print_table(lines: list[list[str]], widths: list[int]) -> None:
    """Print lines of cells in columns of these widths: the first column to the left, the others to the right."""
    for title, *cells in lines:
        print(f"{title:<{widths[0]}}" + "".join(f"{cell:>{n}}" for cell, n in zip(cells, widths[1:], strict=True)))


def _on_the_dataset(trained: Any, runs: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Compute metrics of the run and of its baseline on the dataset; print and return the metrics."""
    from torchrl_bcq.data.episodes import episode_returns
    from torchrl_bcq.evaluation import DatasetMetrics
    from torchrl_bcq.runs.assembly import change_rewards, reward_formula, split
    from torchrl_bcq.runs.dataset import reopen_dataset

    settings = trained.settings
    transitions, task = reopen_dataset(trained, args.dataset)
    if settings.held_out:
        trained.task.check_unchanged(task, "the run may have learned from the episodes that are held out now")
    learned = split(settings, transitions)
    transitions = change_rewards(settings, transitions)
    rows = transitions if learned is None else transitions[~learned]
    found = {}
    for title, one in runs.items():
        if learned is not None and (one.settings.held_out, one.settings.seed) != (settings.held_out, settings.seed):
            why = f"{one.path} held out other episodes than {trained.path}"
            raise RunError(f"{why}; compare runs with the same held_out and the same seed.")
        # draw the same rows for all runs: the rows on which training measured its logged metrics
        drawn = {"max_rows": settings.evaluation.max_rows, "seed": settings.evaluation.seed}
        metrics = DatasetMetrics(one.loss, one.policy, rows, interval=1, held_out=learned is not None, **drawn)
        found[title] = metrics.measure()
    gamma = {"gamma": settings.loss.gamma} if trained.loss.has_values else {}
    behaviour = {"return": episode_returns(rows).mean().item()}
    behaviour |= {"discounted_return": episode_returns(rows, **gamma).mean().item()} if gamma else {}
    where, formula = "the dataset" if learned is None else "held-out episodes", reward_formula(settings)
    changed = "" if formula is None else f", with the rewards of training, {formula}"
    print(f"\nThe run has no environment; --env ID names one. Metrics on {where}{changed}:\n")
    table = {**found, RECORDED: behaviour}
    names = dict.fromkeys(name for row in table.values() for name in row)
    cells = [[name, *(f"{row[name]:.4g}" if name in row else "-" for row in table.values())] for name in names]
    print_table(
        [["", *table], *cells],
        [max(28, *(len(name) + 1 for name in names)), *(max(12, len(title) + 2) for title in table)],
    )
    print()
    for name, meaning in {**trained.algorithm.meanings, **_MEANINGS}.items():
        if any(other.startswith(name) for other in names):
            print(f"{name}: {meaning}")
    return {"behaviour": behaviour, **found}
