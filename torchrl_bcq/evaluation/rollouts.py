"""Runs episodes of a policy in environments and computes their returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.envs import EnvBase
from torchrl.envs.utils import step_mdp

from torchrl_bcq.actions import DiscreteActions
from torchrl_bcq.data.sources.dict_spaces import MASK
from torchrl_bcq.functional import discounted_sum

_STEPS = 1_000_000  # largest number of steps of an episode, if the environment has no time limit
_LARGE = 4096  # bytes of an observation; larger observations of earlier steps are not kept in memory
Policy = Callable[[TensorDictBase], TensorDictBase]
Value = Callable[[TensorDictBase], Tensor | None]


class _BrokenOff(Exception):
    """Raised when ``should_stop`` returns True, to end the rollout early."""


def evaluate(
    envs: EnvBase,
    policy: Policy | None,
    *,
    value: Value | None = None,
    gamma: float = 0.99,
    seed: int = 0,
    time_limit: int | None = None,
    reward: Callable[[Tensor], Tensor] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> TensorDict | None:
    """Run one episode in each environment and compute its return; then restore PyTorch's random state.

    The same seed gives the same initial states, so you can compare two policies, or two checkpoints of a run.

    Args:
        envs: environments of batch size ``[E]``, such as TorchRL's ``SerialEnv`` or ``ParallelEnv``.
        policy: policy that chooses the actions. If None, actions are uniformly random, among those that ``action_mask``
            allows.
        value: function that estimates the value of state-action pairs ``[E]``, such as ``loss.value``.
        gamma: discount factor of ``discounted_return``.
        seed: random seed of the environments and the policy.
        time_limit: number of steps. If an episode is longer, ``return`` and ``length`` leave out the later steps.
        reward: function that changes rewards ``[E, T]`` as in training, such as ``partial(change_reward, scale=0.1)``.
            The discounted return is the sum of the changed rewards, because ``value`` estimates this sum. ``return``
            is the sum of the environment's rewards.
        should_stop: function that is called before each step; if it returns True, the evaluation stops.

    Returns:
        TensorDict of batch size ``[E]``, with entries of shape ``[E]``: ``return`` (undiscounted), ``length`` in steps,
        ``discounted_return`` and, if ``value`` is given, the ``value_estimate`` of the first states and actions. If
        ``value`` is given, the discounted return also counts rewards after ``time_limit``, because the value estimate
        includes these rewards. Returns None if ``should_stop`` stopped the evaluation.

    Raises:
        ValueError: if ``envs`` has another number of batch dimensions than one.
    """

    if len(envs.batch_size) != 1:
        raise ValueError(
            f"envs has batch size {tuple(envs.batch_size)}, expected one dimension: the number of episodes, as in "
            "SerialEnv(10, make_env)."
        )

    def watch(*_: Any) -> None:
        if should_stop():
            raise _BrokenOff

    if policy is None and MASK in envs.observation_spec.keys():
        actions = DiscreteActions.of(envs.action_spec_unbatched)

        def choose(mask: Tensor) -> Tensor:
            return actions.from_index(torch.rand(mask.shape, device=mask.device).mul(mask).argmax(-1), mask.shape[-1])

        policy = TensorDictModule(choose, [MASK], ["action"])
    with own_random_state(seed, envs.device), in_eval_mode(policy), torch.no_grad():
        envs.set_seed(seed)
        limit = _STEPS if time_limit is None or value is not None else time_limit
        try:
            first, given, running = _run(envs, policy, limit, watch)
        except _BrokenOff:
            return None
        rewards = given * running
        discounted = discounted_sum(rewards if reward is None else reward(given) * running, gamma)
        counted, counted_steps = rewards[:, :time_limit].sum(1), running[:, :time_limit].sum(1)
        out = {"return": counted, "length": counted_steps, "discounted_return": discounted}
        estimate = None if value is None else value(first)
        return TensorDict(out if estimate is None else {**out, "value_estimate": estimate}, envs.batch_size)


def _run(
    envs: EnvBase, policy: Policy | None, limit: int, watch: Callable[..., None]
) -> tuple[TensorDictBase, Tensor, Tensor]:
    """Return the first step ``[E]``, all rewards ``[E, T]``, and True for each step up to the first done, ``[E, T]``.

    With large observations, the rollout is made step by step, and keeps no observations.
    """
    leaves = envs.observation_spec.values(True, True)
    size = sum(leaf.shape.numel() * leaf.dtype.itemsize for leaf in leaves) // max(1, envs.batch_size.numel())
    together = {"break_when_any_done": False, "break_when_all_done": True}
    watch()
    first = steps = envs.rollout(1 if size > _LARGE else limit, policy, watch, **together)
    rewards, dones = [steps["next", "reward"].squeeze(-1).double()], [steps["next", "done"].squeeze(-1)]
    ended = dones[0].any(1)
    while size > _LARGE and len(dones) < limit and not ended.all():
        watch()
        state = step_mdp(steps[:, -1]).set("_step", ~ended)  # as in a longer rollout: ended environments do not go on
        steps = envs.rollout(1, policy, auto_reset=False, tensordict=state, **together)
        rewards.append(steps["next", "reward"].squeeze(-1).double())
        dones.append(steps["next", "done"].squeeze(-1))
        ended |= dones[-1][:, 0]
    done = torch.cat(dones, 1).long()
    return first[:, 0], torch.cat(rewards, 1), done.cumsum(1) == done  # True up to the first done


def summarize(episodes: TensorDictBase, reference_scores: Sequence[float] | None = None) -> dict[str, float]:
    """Compute the metrics that ``EnvironmentMetrics`` logs from the result of ``evaluate``."""
    means = {name: float(values.cpu().double().mean()) for name, values in episodes.items()}
    metrics = {"return": means["return"]}
    if reference_scores is not None:
        random, expert = reference_scores
        metrics["normalized_score"] = 100 * (means["return"] - random) / (expert - random)
    metrics["return_std"] = float(episodes["return"].std(correction=0))
    metrics["episode_length"] = means["length"]
    pair = ("value_estimate", "discounted_return") if "value_estimate" in means else ()
    return metrics | {name: means[name] for name in pair}


@contextmanager
def own_random_state(seed: int, device: torch.device | None) -> Iterator[None]:
    """Seed PyTorch at the start of the ``with`` block, and restore its old random state at the end."""
    device = device or torch.device("cpu")
    others = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(others, device_type="cuda" if device.type == "cpu" else device.type):
        # torch.manual_seed would also seed the GPUs, whose states are not restored if the device is the CPU
        (torch.default_generator if device.type == "cpu" else torch).manual_seed(seed)
        yield


@contextmanager
def in_eval_mode(*parts: Any) -> Iterator[None]:
    """Set modules to evaluation mode in the ``with`` block, then restore the mode of each module."""
    modules = [module for part in parts if isinstance(part, nn.Module) for module in part.modules()]
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
