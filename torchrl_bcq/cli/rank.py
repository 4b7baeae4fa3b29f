"""``torchrl-bcq rank``: estimate the values of policies on their dataset."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock

from torchrl_bcq.cli.environment import DATASET, REMEDY, add_options
from torchrl_bcq.cli.evaluate import choose_fitting, print_table
from torchrl_bcq.errors import RunError
from torchrl_bcq.files import check_writable, home, write_whole

_REMEDY = f"{REMEDY}, or measure no true values: --episodes 0"
_OF_EPISODES = ("env", "env_kwargs", "observation")  # options that choose the environment
_EPILOG = """\
In fitted Q evaluation, critics learn the value of each policy from the dataset, without the environment. The estimate
is the mean value of the initial states of the held-out episodes. For discrete actions, the command also computes
importance-sampling estimates. --estimator chooses the estimate that ranks the policies. With fqe, each policy is
compared with the estimated value of the recorded behaviour: the policy or policies that recorded the dataset. With
another estimator, each policy is compared with the mean discounted return of the held-out episodes; for doubly robust
estimators, critics add the rewards after an episode was cut off. For each policy, the command prints one of three
verdicts: estimated better, estimated worse, cannot tell. The policies with the highest estimates come first. A
policy whose estimate is outside the range that the rewards allow, or whose actions are often far from the recorded
actions, comes last.

columns:
  estimate, interval         estimated value and its bootstrap interval, which does not cover the bias
  difference                 estimated value minus the value that the policy is compared with
  far                        share of the policy's actions that are far from the recorded actions
  ESS                        effective sample size of importance sampling, in episodes
  weighted IS, weighted DR   weighted importance-sampling and weighted doubly robust estimate
  true                       mean discounted return in the environment, and its standard error

files:
  ranking.json    all estimates; with the same settings, policies in this file are not estimated again
  ranking.png     estimates with intervals

examples:
  torchrl-bcq rank runs/sweep                             the runs of a sweep
  torchrl-bcq rank runs/a runs/b --episodes 0             without an environment
  torchrl-bcq rank runs/a --checkpoint all                all checkpoints of one run
  torchrl-bcq rank runs/a --policy mine:policy            beside a policy of mine.py
"""


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command ``rank`` to the parser. ``args.run(args)`` then runs this command."""
    from torchrl_bcq.evaluation.selection import ESTIMATORS

    what = "Estimate from a dataset, without an environment, which policies are better than the recorded behaviour."
    command = commands.add_parser("rank", help=what, description=what, epilog=_EPILOG)
    add, shown = command.add_argument, "(default: %(default)s)"
    which = "checkpoints of each run (default: best if kept, else last)"
    runs = "folder of a run or a sweep, or a checkpoint; all policies are evaluated on the dataset of the first run"
    add("runs", metavar="RUN", nargs="+", type=Path, help=runs)
    add("--dataset", metavar="NAME", help=DATASET)
    add("--policy", metavar="MODULE:OBJECT", nargs="+", default=[], help="TensorDict policies of Python modules")
    add("--checkpoint", choices=("best", "last", "all"), default="best", help=which)
    add("--estimator", choices=ESTIMATORS, default=ESTIMATORS[0], help=f"estimate that ranks the policies {shown}")
    add("--steps", type=int, default=10_000, metavar="N", help=f"gradient steps of the critics of each policy {shown}")
    add("--gamma", type=float, metavar="G", help="discount factor (default: that of the first run, or 0.99)")
    split = (
        "fraction of the episodes, or of the groups, that the critics do not learn from, but on which the values are "
        "estimated (default: that of the first run, or 0.2)"
    )
    add("--held-out", type=float, metavar="PART", help=split)
    samples = "number of actions in each state that are drawn from a stochastic policy without known probabilities"
    add("--num-samples", type=int, default=1, metavar="N", help=f"{samples} {shown}")
    seed = (
        "seed of the critics, of the policies' actions and of the environment; also of the choice of the held-out "
        f"episodes, unless the first run held out episodes and --held-out is not given {shown}"
    )
    add("--seed", type=int, default=0, metavar="N", help=seed)
    add_options(command, "Gymnasium environment for the true values (default: the environment of the first run)")
    add("--episodes", type=int, default=20, metavar="N", help=f"episodes for the true value; 0 measures none {shown}")
    add("--device", default="auto", help="any torch device (default: cuda if it is available)")
    add("--out", type=home, metavar="FOLDER", help="folder of the files (default: RUN if only one is given, else .)")
    command.set_defaults(run=_rank)


def _rank(args: argparse.Namespace) -> None:
    from torchrl.checkpoint import Checkpoint
    from tqdm import tqdm

    from torchrl_bcq.reports import ranking
    from torchrl_bcq.reports.pictures import save
    from torchrl_bcq.runs.candidates import find_candidates, import_policy
    from torchrl_bcq.runs.folder import load

    _check(args)
    candidates = find_candidates(args.runs, args.checkpoint, args.device)
    candidates += [import_policy(name, args.device) for name in args.policy]
    first = load(Path(candidates[0].facts["checkpoint"]), device=args.device)
    env = choose_fitting(args, first, {"": first}, _REMEDY) if args.episodes else None
    evaluation, settings = _open(args, first)
    measure = _true_values(args, first, settings["gamma"], env)
    is_folder = len(args.runs) == 1 and not Checkpoint.is_checkpoint(args.runs[0])
    out = args.out or (args.runs[0] if is_folder else Path())
    settings |= {"env": None, "episodes": 0, "env_seed": None}
    settings |= {} if env is None else {"env": str(env), "episodes": args.episodes, "env_seed": args.seed}
    check_writable(out / "ranking.json", "choose another folder with --out")
    results = _Results(out / "ranking.json", settings)
    count = "1 policy" if len(candidates) == 1 else f"{len(candidates)} policies"
    dataset = args.dataset or settings["dataset"]
    print(f"{dataset}: {count}, {settings['held_out']:.0%} of the {evaluation.units} are held out")
    if settings["rewards"]:
        print(f"All values are of the rewards that {candidates[0].name} was trained with: {settings['rewards']}.")
    names = (settings["dataset"], args.dataset)  # a dataset that has moved keeps its estimates
    if learned := [one.name for one in candidates if _learned_from_held_out(one, settings, names)]:
        print("These policies may have learned from the episodes that are held out now, so their estimates may be")
        print(f"too high: {', '.join(learned)}.")
        print(f"To exclude the episodes from training, train with held_out={settings['held_out']} and equal seeds.")

    def finite(name: str, estimate: Callable[[], Any]) -> dict[str, Any]:
        try:
            return _plain(estimate())
        except FloatingPointError as error:
            found = f"the value of {name} cannot be estimated, because a loss of its critics is not finite"
            raise RunError(f"{found}; correct outliers of the rewards, which torchrl-bcq describe shows.") from error

    def compute(candidate: Any) -> dict[str, Any]:
        try:
            policy = candidate.load()
            return {**finite(candidate.name, partial(evaluation.estimate, policy)), **measure(policy)}
        except RunError:
            raise
        except (KeyError, TypeError, RuntimeError, ValueError) as error:
            if "policy" not in candidate.facts:
                raise
            remedy = "correct its in_keys, or the shape of its actions"
            raise RunError(f"--policy {candidate.name} cannot act on this dataset: {error!r}; {remedy}.") from error

    behaviour = results.get(
        ranking.BEHAVIOUR, {}, lambda: finite(f"the {ranking.BEHAVIOUR}", lambda: evaluation.behaviour)
    )
    ranked = [
        results.get(one.name, one.facts, partial(compute, one))
        for one in tqdm(candidates, desc="policies", unit="policy", disable=None)
    ]
    lines = ranking.table(ranked, behaviour)
    first_width, *widths = (max(map(len, column)) for column in zip(*lines, strict=True))
    print()
    print_table(lines, [first_width, *(width + 2 for width in widths)])
    print(f"\nThe mean discounted return of the held-out episodes is {evaluation.recorded_return:.4g}.")
    print("It leaves out the rewards after an episode was cut off; fitted Q evaluation counts these rewards.\n")
    for one in ranking.rank(ranked):
        print(f"{one.name}: {one.estimate.verdict}")
    print(f"\n{ranking.NOTE}")
    if found := ranking.agreement(ranked):
        below = f"{found['regret']:.4g} below the highest true value"
        print(f"The true value of the first policy in the table is {below}.")
        if "spearman" in found:
            rho = f"{found['spearman']:.2f}"
            print(f"The rank correlation (Spearman) of the estimates and the true values is {rho}.")
    save(ranking.draw(ranked, behaviour), out / "ranking.png")
    print(f"\nThe numbers are in {results.file}, the picture is {out / 'ranking.png'}.")


class _Results:
    """The estimates in ``ranking.json``. Each is written as soon as it is known, and computed only once."""

    def __init__(self, file: Path, settings: dict[str, Any]) -> None:
        self.file, self._settings = file, settings
        self._lines = self._read()

    def _read(self) -> list[dict[str, Any]]:
        if not self.file.is_file():
            return []
        try:
            return [dict(line) for line in json.loads(self.file.read_text())["estimates"]]
        except (ValueError, KeyError, TypeError) as error:
            found = f"{self.file} cannot be read as results of torchrl-bcq rank: {error!r}"
            raise RunError(f"{found}. Move this file away, or choose another folder with --out.") from error

    def get(self, name: str, source: dict[str, Any], compute: Callable[[], dict[str, Any]]) -> Any:
        """Return the estimate for this source and these settings; compute and store it if the file lacks it."""
        from torchrl_bcq.evaluation.estimate import Estimate
        from torchrl_bcq.reports.ranking import Ranked

        known = {"source": source, "settings": self._settings}
        names = [field.name for field in fields(Estimate)]
        same = (line for line in self._lines if {key: line.get(key) for key in known} == known)
        found = next((line for line in same if line.keys() >= {*names}), None)  # older versions wrote fewer fields
        if found is None:
            found = {"name": name, **compute(), **known}
            with FileLock(self.file.with_name(f".{self.file.name}.lock")):
                lines = [line for line in self._read() if {key: line.get(key) for key in known} != known]
                self._lines = [*lines, found]  # another rank may have added estimates meanwhile
                with write_whole(self.file) as aside:
                    aside.write_text(json.dumps({"estimates": self._lines}, indent=2) + "\n")
        return Ranked(name, Estimate(**{field: found[field] for field in names}), found.get("true"))


def _plain(estimate: Any) -> dict[str, Any]:
    return {**asdict(estimate), "verdict": estimate.verdict}


def _check(args: argparse.Namespace) -> None:
    """Raise a RunError if an argument is out of range."""
    for name, fits, expected in (
        ("steps", lambda value: value >= 1, "at least 1"),
        ("gamma", lambda value: value is None or 0 <= value <= 1, "a number from 0 to 1"),
        ("held_out", lambda value: value is None or 0 < value < 1, "a number between 0 and 1"),
        ("num_samples", lambda value: value >= 1, "at least 1"),
        ("seed", lambda value: 0 <= value < 2**32, f"a number from 0 to {2**32 - 1}"),
        ("episodes", lambda value: value >= 0, "at least 0"),
    ):
        if not fits(value := getattr(args, name)):
            raise RunError(f"--{name.replace('_', '-')} is {value}, expected {expected}.")
    if not args.episodes and (given := [name for name in _OF_EPISODES if getattr(args, name) is not None]):
        options = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        raise RunError(f"--episodes 0 measures no true values; leave out {options}, or set another number of episodes.")


def _open(args: argparse.Namespace, first: Any) -> tuple[Any, dict[str, Any]]:
    """Open the dataset of the first run; return its evaluation, and the settings that determine the estimates."""
    from torchrl_bcq.evaluation import OffPolicyEvaluation
    from torchrl_bcq.runs.assembly import change_rewards, reward_formula
    from torchrl_bcq.runs.dataset import reopen_dataset
    from torchrl_bcq.trainers.checkpoints import dataset_digest

    own = first.settings
    gamma = args.gamma if args.gamma is not None else own.loss.get("gamma", 0.99)
    settings: dict[str, Any] = {
        "gamma": gamma,
        "held_out": args.held_out or own.held_out or 0.2,
        "estimator": args.estimator,
        "steps": args.steps,
        "num_samples": args.num_samples,
        "seed": args.seed,
        "split_seed": own.seed if own.held_out and not args.held_out else args.seed,
    }
    transitions, task = reopen_dataset(first, args.dataset)
    if own.held_out and not args.held_out:
        first.task.check_unchanged(task, "the run may have learned from the episodes that are held out now")
    transitions = change_rewards(own, transitions)
    if args.estimator != "fqe" and task.n_actions is None:
        raise RunError(f"--estimator {args.estimator} needs discrete actions; use --estimator fqe.")
    device = next(first.loss.parameters()).device
    keys = list(task.shapes)
    evaluation = OffPolicyEvaluation(transitions, task.action_spec, observation_keys=keys, device=device, **settings)
    facts = {"dataset": str(own.dataset), "contents": dataset_digest(transitions), "rewards": reward_formula(own)}
    return evaluation, {**facts, **settings}


def _learned_from_held_out(candidate: Any, settings: dict[str, Any], names: Sequence[str | None]) -> bool:
    """Return whether a run on a dataset of these names may have learned from the episodes that are held out now."""
    from torchrl_bcq.runs.folder import read_metadata

    if "checkpoint" not in candidate.facts:
        return False
    own = read_metadata(Path(candidate.facts["checkpoint"]))[0]
    is_same = str(own.dataset) in names
    others = (own.held_out, own.seed) != (settings["held_out"], settings["split_seed"])
    return is_same and (others or own.init_from is not None)


def _true_values(args: argparse.Namespace, first: Any, gamma: float, env: Any) -> Callable[[Any], dict[str, Any]]:
    """Return a function that measures the true value of a policy in ``env``, or nothing if ``env`` is None."""
    from torchrl.envs.utils import ExplorationType, exploration_type, set_exploration_type

    from torchrl_bcq.evaluation.environments import make_envs, steps_to_compare, time_limit
    from torchrl_bcq.evaluation.policy_actions import has_probabilities
    from torchrl_bcq.evaluation.rollouts import evaluate
    from torchrl_bcq.functional import change_reward

    if env is None:
        return lambda policy: {}
    device = next(first.loss.parameters()).device
    envs = make_envs(env, args.episodes, device, max_steps=steps_to_compare(time_limit(env), gamma))
    reward = partial(change_reward, **first.settings.reward)

    def measure(policy: Any) -> dict[str, Any]:
        is_random = has_probabilities(policy, first.task.action_spec)  # the estimate is that of its random actions
        with set_exploration_type(ExplorationType.RANDOM if is_random else exploration_type()):
            found: Any = evaluate(envs, policy, gamma=gamma, seed=args.seed, reward=reward)
        returns = found["discounted_return"]
        error = returns.std().item() / args.episodes**0.5 if args.episodes > 1 else None
        return {"true": (returns.mean().item(), error)}

    return measure
