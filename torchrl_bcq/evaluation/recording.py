"""Recording transitions of a policy in an environment."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type, step_mdp

from torchrl_bcq.data.writers import write_minari
from torchrl_bcq.errors import RunError
from torchrl_bcq.evaluation.environments import make_env

DATASET_ID = "torchrl-bcq/pendulum/swing-up-v0"  # the default dataset, in Minari's local store
DATASET_ENV = "Pendulum-v1"
_NOISE_LEVELS = (1.0, 4.0, 10.0)  # standard deviation of the torque, N m; the torque limit is 2
_BATCH = 200  # steps between two updates of the progress bar; an episode of Pendulum-v1


def swing_up(observation: torch.Tensor, noise: float) -> torch.Tensor:
    """Swing up a pendulum: pump energy until the pole is nearly upright, then balance it. ``[*B, 3] -> [*B, 1]``, N m.

    The energy is that of Gymnasium's rod (mass 1 kg, length 1 m, g = 10 m/s^2), relative to 5 J when upright.
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
    """Record the transitions of a policy, one episode after another.

    Args:
        env_id: Gymnasium id; observations and actions must be one-dimensional boxes, and actions bounded.
        policy: reads ``observation [D]`` in float32 and writes ``action [A]``; None draws uniform random actions.
        steps: number of transitions; the last episode is cut off there and marked as truncated.
        noise: standard deviation of Gaussian noise added to actions, in half-ranges of their bounds; the result is
            clipped to the bounds.
        seed: of the initial states, the policy and the noise.

    Returns:
        TorchRL's layout, batch size ``[steps]``: ``observation [steps, D]`` in float32, the executed
        ``action [steps, A]``, and under ``next``: ``observation``, ``reward``, ``done``, ``terminated``, ``truncated``
        (``[steps, 1]`` each).

    Raises:
        RunError: if the environment cannot be made or recorded, the policy does not fit it, or a number is invalid.
    """
    import gymnasium

    if steps < 1:
        raise RunError(f"steps is {steps}, expected at least 1.")
    if not 0 <= noise < math.inf:
        raise RunError(f"noise is {noise}, expected a number of half-ranges from 0.")
    if seed < 0:
        raise RunError(f"seed is {seed}, expected at least 0.")
    env = make_env(env_id)
    for name, space in (("observation", env.observation_space), ("action", env.action_space)):
        if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1:
            raise RunError(f"{env_id} has {name} space {space}; only boxes of one dimension can be recorded.")
    if not env.action_space.is_bounded():
        raise RunError(f"{env_id} has action space {env.action_space}; without bounds there is no range to draw from.")
    if policy is not None:
        _check_policy(policy, env, env_id)
    if policy is not None and noise:
        low, high = env.action_spec.space.low, env.action_spec.space.high

        def disturb(action: torch.Tensor) -> torch.Tensor:
            return (action + noise * (high - low) / 2 * torch.randn_like(action)).clamp(low, high)

        policy = TensorDictSequential(policy, TensorDictModule(disturb, ["action"], ["action"]))
    return _collect([(env, policy)], steps, seed, env_id)


def record_swing_up(steps: int = 30_000, seed: int = 0) -> TensorDictBase:
    """Record :func:`swing_up` on Pendulum-v1: ``[steps]``, a third at each noise level, from weak to strong."""
    controllers = [partial(swing_up, noise=noise) for noise in _NOISE_LEVELS]
    policies = [TensorDictModule(controller, ["observation"], ["action"]) for controller in controllers]
    return _collect([(make_env(DATASET_ENV), policy) for policy in policies], steps, seed, DATASET_ENV)


def record_default(*, overwrite: bool = False) -> bool:
    """Write :func:`record_swing_up` as Minari's ``DATASET_ID`` unless it exists; return whether it was recorded."""
    from minari.storage import get_dataset_path

    if get_dataset_path(DATASET_ID).exists() and not overwrite:
        return False
    algorithm = f"energy pumping and PD balance with Gaussian noise of {_NOISE_LEVELS} N m"
    write_minari(DATASET_ID, record_swing_up(), DATASET_ENV, algorithm=algorithm, overwrite=overwrite)
    return True


def _check_policy(policy: TensorDictModuleBase, env: EnvBase, env_id: str) -> None:
    """Try the policy on the environment's shapes."""
    try:
        with torch.random.fork_rng(devices=[]):
            action = policy(env.fake_tensordict().select("observation"))["action"]
    except RuntimeError as error:
        raise RunError(f"the policy does not fit the observations of {env_id}: {error}") from error
    if action.shape != env.action_spec.shape:
        raise RunError(f"the policy gives actions {[*action.shape]}, and {env_id} takes {[*env.action_spec.shape]}.")


def _collect(
    runs: Sequence[tuple[EnvBase, TensorDictModuleBase | None]], steps: int, seed: int, desc: str
) -> TensorDictBase:
    """Transitions of several environments and policies, one after another, the same number of each."""
    from tqdm import tqdm

    parts, share = [], steps // len(runs)
    progress_bar = tqdm(total=steps, desc=f"recording {desc}", unit="step", disable=None)
    random = set_exploration_type(ExplorationType.RANDOM)
    with torch.random.fork_rng(devices=[]), torch.no_grad(), random, progress_bar:
        torch.manual_seed(seed)
        for number, (env, policy) in enumerate(runs):
            env.set_seed(seed + number)
            state = env.reset()
            (policy or env.rand_action)(state.clone())  # a draw that is not used: the default dataset was made with it
            for start in range(0, share, _BATCH):
                length = min(_BATCH, share - start)
                batch = env.rollout(length, policy, auto_reset=False, break_when_any_done=False, tensordict=state)
                state = env.maybe_reset(step_mdp(batch[-1]))
                parts.append(batch.select("observation", "action", "next"))
                progress_bar.update(length)
            last = parts[-1]["next"][-1:]  # cuts the episode off unless it ends there
            last["truncated"] |= ~last["terminated"]
            last["done"] |= last["truncated"]
            env.close()
    return torch.cat(parts)
