"""``torchrl-bcq record``: record the transitions of a policy in an HDF5 file or in Minari's local store."""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from pathlib import Path

from torchrl_bcq.actions import number_of
from torchrl_bcq.cli.environment import REMEDY, add_options, choose_environment
from torchrl_bcq.data.episodes import episode_returns
from torchrl_bcq.data.sources.dict_spaces import check_entries
from torchrl_bcq.data.writers import check_out, write_hdf5, write_minari
from torchrl_bcq.errors import RunError
from torchrl_bcq.evaluation.environments import check_fits, check_steps, make_env
from torchrl_bcq.evaluation.recording import DATASET_ENV, DATASET_ID, record, record_default
from torchrl_bcq.files import check_writable, home

_STEPS = 10_000
_EXAMPLES = f"""\
examples:
  torchrl-bcq record
      records the default dataset {DATASET_ID} (30,000 steps of {DATASET_ENV}), if it does not exist
  torchrl-bcq record --env Hopper-v5 --steps 100000 --out hopper.hdf5
      records uniformly random actions
  torchrl-bcq record --env Hopper-v5 --policy runs/hopper --noise 0.2 --out minari:mine/hopper/noisy-v0
      records a trained policy with noise
"""


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command ``record`` to the parser. ``args.run(args)`` then runs this command."""
    what = "Record the transitions of a policy in an environment, as a dataset to learn from."
    default = f"Without --env and --policy, it records the default dataset: a scripted controller in {DATASET_ENV}."
    description = f"{what}\n{default}"
    command = commands.add_parser("record", help=what, description=description, epilog=_EXAMPLES)
    add = command.add_argument
    add_options(command, "Gymnasium environment with vectors as observations (default: that of --policy RUN)")
    add("--policy", metavar="RUN", help="folder of a run of torchrl-bcq train, or random (default: random)")
    noise = "standard deviation of Gaussian action noise, as a fraction of half the action range (default: 0)"
    add("--noise", type=float, metavar="SIGMA", help=noise)
    add("--epsilon", type=float, metavar="P", help="probability of a random discrete action (default: 0)")
    add("--steps", type=int, metavar="N", help=f"number of transitions (default: {_STEPS})")
    add("--seed", type=int, metavar="N", help="seed of initial states and actions (default: 0)")
    add("--out", metavar="OUT", help="FILE.hdf5 or minari:NAMESPACE/DATASET-v0 (default: ./ID.hdf5)")
    add("--overwrite", action="store_true", help="replace an existing dataset")
    command.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    learned = args.policy not in (None, "random")
    if args.env is None and not learned:
        names = ("policy", "noise", "epsilon", "steps", "seed", "out", "env_kwargs", "observation")
        given = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) is not None]
        if given:
            raise RunError(f"{', '.join(given)} needs --env; the default dataset is always recorded in the same way.")
        new = record_default(overwrite=args.overwrite)
        exists = f"minari:{DATASET_ID} exists already; use --overwrite to record it again"
        print(f"recorded minari:{DATASET_ID}" if new else exists)
        return
    from gymnasium.spaces import Dict

    noise, epsilon = args.noise or 0.0, args.epsilon or 0.0
    trained, policy, algorithm = None, None, "uniform random actions"
    if learned:
        from torchrl_bcq.runs.folder import load

        trained = load(Path(args.policy), "best", "cpu")
        how = f"epsilon {epsilon}" if trained.algorithm.discrete else f"Gaussian noise of {noise} half-ranges"
        policy, algorithm = trained.policy, f"{trained.algorithm.title}, {how}"
    elif noise or epsilon:
        name = "--noise" if noise else "--epsilon"
        raise RunError(f"{name} needs --policy RUN; without a policy, all actions are uniformly random.")
    if (env := choose_environment(args, trained)) is None:
        raise RunError(f"{args.policy} has no environment; name one with --env ID.")
    out = args.out or f"{re.split('[/:]', env.id)[-1]}.hdf5"
    made = make_env(env, remedy=REMEDY)
    if trained is not None:
        check_fits(made, env, REMEDY, whose="the run", setting="--observation ENTRY ...", **trained.task.expected)
    check_steps(made, env, REMEDY)
    if isinstance(made.observation_space, Dict):
        env = replace(env, observation=check_entries(made.observation_space, env.observation))
    elif args.observation is not None:
        raise RunError(f"the observation of {env.id} is one vector, without entries; leave --observation out.")
    check_out(out, args.overwrite, env)
    if not out.startswith("minari:"):
        check_writable(home(out), "choose another file with --out")
    steps = _STEPS if args.steps is None else args.steps
    transitions = record(env, policy, steps, noise=noise, epsilon=epsilon, seed=args.seed or 0)
    env = replace(env, stack=1)  # the dataset holds single observations
    if out.startswith("minari:"):
        write_minari(out[7:], transitions, env, algorithm=algorithm, overwrite=args.overwrite)
    else:
        write_hdf5(out, transitions, env, n_actions=number_of(made.action_spec), overwrite=args.overwrite)
    returns = episode_returns(transitions)
    rows, episodes, mean = len(transitions), len(returns), returns.mean().item()
    print(f"{out}: {rows:,} steps of {env} in {episodes:,} episodes, mean return {mean:.1f}")
