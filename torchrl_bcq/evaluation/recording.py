"""Records the transitions of a policy in an environment."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from filelock import FileLock
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type, step_mdp
from torchrl.modules import EGreedyModule

from torchrl_bcq.data.sources.dict_spaces import MASK, holds_mask
from torchrl_bcq.data.sources.environment import Environment
from torchrl_bcq.data.writers import write_minari
from torchrl_bcq.errors import RunError, remedy
from torchrl_bcq.evaluation.environments import make_env
from torchrl_bcq.evaluation.rollouts import own_random_state

DATASET_ID = "torchrl-bcq/pendulum/swing-up-v0"  # id of the default dataset in Minari's local store
DATASET_ENV = "Pendulum-v1"
_NOISE_LEVELS = (1.0, 4.0, 10.0)  # standard deviations of the torque noise, in N m; the torque limit is 2 N m
_BATCH = 200  # number of steps that are recorded at a time; one episode of Pendulum-v1 has 200 steps


def swing_up(observation: torch.Tensor, noise: float) -> torch.Tensor:
    """Return the torque that swings up a pendulum: add energy until the rod is nearly upright, then balance the rod.

    The energy formula is for Gymnasium's rod (mass 1 kg, length 1 m, g = 10 m/s^2): an upright rod at rest has an
    energy of 5 J. ``noise`` is the standard deviation of the torque noise, in N m. Shapes: ``[*B, 3] -> [*B, 1]``; the
    torque is in N m.
    """
    cos, sin, speed = observation.unbind(-1)
    missing_energy = 5 - (speed.square() / 6 + 5 * cos)
    pump = 2 * torch.sign(speed) * torch.sign(missing_energy)
    balance = -10 * torch.atan2(sin, cos) - 2 * speed
    torque = torch.where(cos > 0.9, balance, pump)
    return (torque + noise * torch.randn_like(torque)).clamp(-2, 2).unsqueeze(-1)


def record(
    env_id: str | Environment,
    policy: TensorDictModuleBase | None,
    steps: int,
    *,
    noise: float = 0.0,
    epsilon: float = 0.0,
    seed: int = 0,
) -> TensorDictBase:
    """Record the transitions of a policy, one episode after another.

    Args:
        env_id: the environment or its Gymnasium id. Its observation space must be a one-dimensional ``Box``, or a
            ``Dict``, whose entries are joined to one vector. Its action space must be a bounded one-dimensional
            ``Box``, or ``Discrete``.
        policy: reads ``observation [D]`` in float32 and writes ``action [A]``, or the index of a discrete action. If
            None, actions are uniformly random.
            With ``env_id.stack`` above 1, the policy reads the last observations, ``[stack * D]``.
        steps: number of transitions; the last one is marked as truncated if it does not end an episode.
        noise: standard deviation of Gaussian noise that is added to the actions, as a multiple of half the action
            range. Actions with noise are clipped to the action bounds.
        epsilon: probability of a uniformly random discrete action instead of the policy's.
        seed: random seed of the initial states, the policy and the noise.

    Returns:
        Transitions in TorchRL's layout, batch size ``[steps]``: ``observation [steps, D]`` in float32, the executed
        ``action [steps, A]`` (``[steps]`` if it is discrete), and under ``next``: ``observation [steps, D]``,
        ``reward``, ``done``, ``terminated`` and ``truncated`` (``[steps, 1]`` each).

    Raises:
        RunError: if the environment cannot be made or recorded, or ``steps``, ``noise``, ``epsilon`` or ``seed`` is
            invalid.
    """
    import gymnasium

    if steps < 1:
        raise RunError(f"steps is {steps}, expected at least 1.")
    if not 0 <= noise < math.inf:
        raise RunError(f"noise is {noise}, expected a finite number of at least 0.")
    if not 0 <= epsilon <= 1:
        raise RunError(f"epsilon is {epsilon}, expected a probability between 0 and 1.")
    if seed < 0:
        raise RunError(f"seed is {seed}, expected at least 0.")
    env = make_env(env_id)
    others = {"observation": gymnasium.spaces.Dict, "action": gymnasium.spaces.Discrete}  # make_env joins a Dict
    for name, space in (("observation", env.observation_space), ("action", env.action_space)):
        is_vector = isinstance(space, gymnasium.spaces.Box) and len(space.shape) == 1
        if not is_vector and not isinstance(space, others[name]):
            found, also = f"{env_id} has {name} space {space}", others[name].__name__
            raise RunError(f"{found}, but only one-dimensional Box spaces, and {also}, can be recorded.")
    if any(spec.dtype == torch.uint8 for spec in env.observation_spec.values(True, True)):
        how = remedy("pass an Environment with observation=[...]", "use --observation")
        raise RunError(f"{env_id} has frames, which cannot be recorded; {how} to choose entries that are vectors.")
    discrete = isinstance(env.action_space, gymnasium.spaces.Discrete)
    if not discrete and not env.action_space.is_bounded():
        raise RunError(f"{env_id} has action space {env.action_space}, but only bounded actions can be recorded.")
    if (noise and discrete) or (epsilon and not discrete):
        kind, own, other = ("discrete", "epsilon", "noise") if discrete else ("continuous", "noise", "epsilon")
        raise RunError(f"{env_id} has {kind} actions, which {other} does not change; use {own}.")
    if policy is not None and epsilon:
        mask = MASK if holds_mask(env.observation_space) else None
        greedy = {"spec": env.action_spec, "eps_init": epsilon, "eps_end": epsilon, "action_mask_key": mask}
        policy = TensorDictSequential(policy, EGreedyModule(**greedy))
    if policy is not None and noise:
        low, high = env.action_spec.space.low, env.action_spec.space.high

        def disturb(action: torch.Tensor) -> torch.Tensor:
            return (action + noise * (high - low) / 2 * torch.randn_like(action)).clamp(low, high)

        policy = TensorDictSequential(policy, TensorDictModule(disturb, ["action"], ["action"]))
    transitions = _collect([(env, policy)], steps, seed, str(env_id))
    size = transitions["observation"].shape[-1] // Environment.of(env_id).stack
    for part in (transitions, transitions["next"]):  # single observations: the last one of each state
        part["observation"] = part["observation"][:, -size:]
    return transitions


def record_swing_up(steps: int = 30_000, seed: int = 0) -> TensorDictBase:
    """Record ``swing_up`` on Pendulum-v1: a third of the steps at each of the three noise levels."""
    controllers = [partial(swing_up, noise=noise) for noise in _NOISE_LEVELS]
    policies = [TensorDictModule(controller, ["observation"], ["action"]) for controller in controllers]
    return _collect([(make_env(DATASET_ENV), policy) for policy in policies], steps, seed, DATASET_ENV)


def record_default(*, overwrite: bool = False) -> bool:
    """Record the default dataset if it is missing or to be overwritten. Return whether it was recorded."""
    from minari.storage import get_dataset_path

    folder = get_dataset_path(DATASET_ID)
    if _has_episodes(folder) and not overwrite:
        return False
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):  # runs that start meanwhile wait for the dataset
        if _has_episodes(folder) and not overwrite:
            return False
        algorithm = f"energy pumping and PD balance with Gaussian noise of {_NOISE_LEVELS} N m"
        write_minari(DATASET_ID, record_swing_up(), DATASET_ENV, algorithm=algorithm, overwrite=True)
    return True


def _has_episodes(folder: Path) -> bool:
    """Whether a folder holds a whole Minari dataset: while Minari writes a dataset, its number of episodes is 0."""
    try:
        return json.loads((folder / "data" / "metadata.json").read_text())["total_episodes"] > 0
    except (OSError, ValueError, KeyError):
        return False


def _collect(
    runs: Sequence[tuple[EnvBase, TensorDictModuleBase | None]], steps: int, seed: int, desc: str
) -> TensorDictBase:
    """Run each policy in its environment for an equal share of ``steps``; return all transitions."""
    from tqdm import tqdm

    parts, share = [], steps // len(runs)
    progress_bar = tqdm(total=steps, desc=f"recording {desc}", unit="step", disable=None)
    random = set_exploration_type(ExplorationType.RANDOM)
    with own_random_state(seed, None), torch.no_grad(), random, progress_bar:
        for number, (env, policy) in enumerate(runs):
            env.set_seed(seed + number)
            state = env.reset()
            # keep this unused call: it draws random numbers, and without it the default dataset would change
            (policy or env.rand_action)(state.clone())
            for start in range(0, share, _BATCH):
                length = min(_BATCH, share - start)
                batch = env.rollout(length, policy, auto_reset=False, break_when_any_done=False, tensordict=state)
                state = env.maybe_reset(step_mdp(batch[-1]))
                parts.append(batch.select("observation", "action", MASK, "next", strict=False))
                progress_bar.update(length)
            last = parts[-1]["next"][-1:]  # mark the last step in this environment as truncated, unless it is terminal
            last["truncated"] |= ~last["terminated"]
            last["done"] |= last["truncated"]
            env.close()
    return torch.cat(parts)
