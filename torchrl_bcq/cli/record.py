"""``torchrl-bcq record``: what a policy does in an environment, kept as HDF5 or in Minari's local store."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torchrl.collectors import Collector
from torchrl.data import TensorSpec
from torchrl.envs import DoubleToFloat, EnvBase, GymWrapper, TransformedEnv

from torchrl_bcq.cli.errors import RunError
from torchrl_bcq.cli.writers import check_out, write_hdf5, write_minari
from torchrl_bcq.data.episodes import episode_returns

DATASET_ID = "torchrl-bcq/pendulum/swing-up-v0"
_DATASET_ENV = "Pendulum-v1"
_NOISE_LEVELS = (1.0, 4.0, 10.0)  # standard deviation of the torque, N m; the torque limit is 2
_BATCH = 200  # steps between two moves of the progress bar, and an episode of Pendulum-v1
_STEPS = 10_000
_Run = tuple[EnvBase, TensorDictModuleBase | None]  # an environment, and what acts in it

_EXAMPLES = f"""\
examples:
  torchrl-bcq record
      the default dataset, {DATASET_ID} (30,000 steps of {_DATASET_ENV}), once
  torchrl-bcq record --env Hopper-v5 --steps 100000 --out hopper.hdf5
      uniform random actions
  torchrl-bcq record --env Hopper-v5 --policy runs/hopper --noise 0.2 --out minari:mine/hopper/noisy-v0
      a learned policy, disturbed
"""


def swing_up(observation: torch.Tensor, noise: float) -> torch.Tensor:
    """Pump energy until the pole is nearly upright, then balance it. ``[*B, 3] -> [*B, 1]``, torque in N m.

    The energy is that of Gymnasium's rod (mass 1 kg, length 1 m, g = 10 m/s^2) over the upright one's 5 J.
    """
    cos, sin, speed = observation.unbind(-1)
    missing_energy = 5 - (speed.square() / 6 + 5 * cos)
    pump = 2 * torch.sign(speed) * torch.sign(missing_energy)
    balance = -10 * torch.atan2(sin, cos) - 2 * speed
    torque = torch.where(cos > 0.9, balance, pump)
    return (torque + noise * torch.randn_like(torque)).clamp(-2, 2).unsqueeze(-1)


def record(
    env_id: str, policy: TensorDictModuleBase | None, steps: int, *, noise: float = 0.0, seed: int = 0
) -> TensorDictBase:
    """Record what a policy does, one episode after the other.

    Args:
        env_id: Gymnasium id; observations and actions must be one-dimensional boxes, that of the actions bounded.
        policy: reads ``observation [D]`` in float32 and writes ``action [A]``; uniform random actions if None.
        steps: transitions to record; the last episode is cut off, and marked as truncated, where they are used up.
        noise: standard deviation of Gaussian noise on the actions, in half-ranges of their bounds, which they keep.
        seed: of the initial states and of everything random in the policy.

    Returns:
        TorchRL's layout: batch size ``[steps]``, ``observation [steps, D]`` in float32, ``action [steps, A]`` as it was
        carried out, and, under ``next``, ``observation``, ``reward``, ``done``, ``terminated``, ``truncated``
        (``[steps, 1]`` each).

    Raises:
        RunError: if the environment cannot be made or recorded, or a number makes no sense.
    """
    _check_numbers(steps, noise, seed)
    env = _make_env(env_id)
    if policy is not None and noise:
        policy = _disturbed(policy, env.action_spec, noise)
    return _collect([(env, policy)], steps, seed, env_id)


def record_swing_up(steps: int = 30_000, seed: int = 0) -> TensorDictBase:
    """Record :func:`swing_up` on Pendulum-v1: ``[steps]``, a third at each level of noise, the weakest first."""
    _check_numbers(steps // len(_NOISE_LEVELS), 0.0, seed)
    runs: list[_Run] = []
    for noise in _NOISE_LEVELS:
        policy = TensorDictModule(lambda x, noise=noise: swing_up(x, noise), ["observation"], ["action"])
        runs.append((_make_env(_DATASET_ENV), policy))
    return _collect(runs, steps, seed, _DATASET_ENV)


def record_default(*, overwrite: bool = False) -> bool:
    """Keep :func:`record_swing_up` as Minari's ``DATASET_ID``, unless it is there; whether it had to be recorded."""
    from minari.storage import get_dataset_path

    if get_dataset_path(DATASET_ID).exists() and not overwrite:
        return False
    write_minari(
        DATASET_ID,
        record_swing_up(),
        _DATASET_ENV,
        algorithm=f"energy pumping and PD balance with Gaussian noise of {_NOISE_LEVELS} N m",
        overwrite=overwrite,
    )
    return True


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command ``record``; what it sets as ``run`` takes the parsed arguments."""
    what = "Record what a policy does in an environment, as a dataset to learn from."
    command = commands.add_parser(
        "record",
        help=what,
        description=f"{what}\nWithout --env, that is the default dataset: a scripted controller on {_DATASET_ENV}.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("--env", metavar="ID", help="Gymnasium environment, with boxes of one dimension")
    add("--policy", metavar="RUN", help="folder that torchrl-bcq train made, or random (default: random)")
    add("--noise", type=float, metavar="SIGMA", help="Gaussian noise, in half-ranges of the action bounds (default: 0)")
    add("--steps", type=int, metavar="N", help=f"transitions (default: {_STEPS})")
    add("--seed", type=int, metavar="N", help="of initial states and actions (default: 0)")
    add("--out", metavar="OUT", help="FILE.hdf5 or minari:NAMESPACE/DATASET-v0 (default: ID.hdf5, here)")
    add("--overwrite", action="store_true", help="replace what is there")
    command.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    if args.env is None:
        given = [f"--{name}" for name in ("policy", "noise", "steps", "seed", "out") if getattr(args, name) is not None]
        if given:
            raise RunError(f"{', '.join(given)} needs --env; without it, the default dataset is recorded as it is.")
        new = record_default(overwrite=args.overwrite)
        print(f"recorded minari:{DATASET_ID}" if new else f"minari:{DATASET_ID} is there; --overwrite records it anew")
        return
    out = args.out or f"{args.env.rpartition('/')[2]}.hdf5"
    check_out(out, args.overwrite)
    name, noise, seed = args.policy or "random", args.noise or 0.0, args.seed or 0
    if name == "random" and noise:
        raise RunError("--noise needs a --policy to disturb; random actions are uniform over their bounds.")
    policy = None if name == "random" else _learned_policy(Path(name), args.env)
    steps = _STEPS if args.steps is None else args.steps
    transitions = record(args.env, policy, steps, noise=noise, seed=seed)
    if out.startswith("minari:"):
        algorithm = "uniform random actions" if policy is None else f"BCQ, Gaussian noise of {noise} half-ranges"
        write_minari(out[7:], transitions, args.env, algorithm=algorithm, overwrite=args.overwrite)
    else:
        write_hdf5(out, transitions, args.env, overwrite=args.overwrite)
    returns = episode_returns(transitions)
    rows, episodes, mean = len(transitions), len(returns), returns.mean().item()
    print(f"{out}: {rows:,} steps of {args.env} in {episodes:,} episodes, mean return {mean:.1f}")


def _learned_policy(run: Path, env_id: str) -> TensorDictModuleBase:
    """The policy of a run, tried on the environment's shapes."""
    from torchrl_bcq.cli.run import load_policy

    policy, env = load_policy(run, device="cpu"), _make_env(env_id)
    try:
        action = policy(env.fake_tensordict().select("observation"))["action"]
    except RuntimeError as error:
        raise RunError(f"the policy of {run} does not fit the observations of {env_id}: {error}") from error
    if action.shape != env.action_spec.shape:
        raise RunError(
            f"the policy of {run} gives actions {[*action.shape]}, and {env_id} takes {[*env.action_spec.shape]}."
        )
    return policy


def _check_numbers(steps: int, noise: float, seed: int) -> None:
    if steps < 1:
        raise RunError(f"steps is {steps}, expected at least 1.")
    if not 0 <= noise < math.inf:
        raise RunError(f"noise is {noise}, expected a number of half-ranges from 0.")
    if seed < 0:
        raise RunError(f"seed is {seed}, expected at least 0.")


def _make_env(env_id: str) -> EnvBase:
    """The environment, in float32."""
    import gymnasium

    try:
        env = gymnasium.make(env_id)
    except gymnasium.error.Error as error:
        raise RunError(f"environment {env_id!r} cannot be made: {error}") from error
    for name, space in (("observation", env.observation_space), ("action", env.action_space)):
        if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1:
            raise RunError(f"{env_id} has {name} space {space}; only boxes of one dimension can be recorded.")
        if name == "action" and not space.is_bounded():
            raise RunError(f"{env_id} has action space {space}; without bounds there is no range to draw from.")
    return TransformedEnv(GymWrapper(env), DoubleToFloat())


def _disturbed(policy: TensorDictModuleBase, spec: TensorSpec, noise: float) -> TensorDictSequential:
    """Gaussian noise on an action, which keeps its bounds."""
    low, high = spec.space.low, spec.space.high

    def disturb(action: torch.Tensor) -> torch.Tensor:
        return (action + noise * (high - low) / 2 * torch.randn_like(action)).clamp(low, high)

    return TensorDictSequential(policy, TensorDictModule(disturb, ["action"], ["action"]))


def _collect(runs: Sequence[_Run], steps: int, seed: int, desc: str) -> TensorDictBase:
    """The steps of several runs, one after the other, the same number of each."""
    from tqdm import tqdm

    parts, share = [], steps // len(runs)
    with (
        torch.random.fork_rng(devices=[]),
        tqdm(total=steps, desc=f"recording {desc}", unit="step", disable=None) as bar,
    ):
        torch.manual_seed(seed)
        for number, (env, policy) in enumerate(runs):
            env.set_seed(seed + number)
            whole = -(-share // _BATCH) * _BATCH  # a collector gives whole batches
            collector = Collector(
                env, policy, frames_per_batch=_BATCH, total_frames=whole, auto_register_policy_transforms=False
            )
            try:
                batches = []
                for batch in collector:
                    batches.append(batch.select("observation", "action", "next"))
                    bar.update(len(batch))
            finally:
                collector.shutdown()
            parts.append(_cut(torch.cat(batches)[:share]))
    return torch.cat(parts)


def _cut(transitions: TensorDictBase) -> TensorDictBase:
    """The same, the last row marked as truncated if its episode goes on."""
    after = transitions["next"]
    after["truncated"][-1:] |= ~after["terminated"][-1:]
    after["done"][-1:] = True
    return transitions
