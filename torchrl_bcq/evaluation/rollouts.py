"""Episodes of a policy in environments, and their returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torchrl.envs import EnvBase

from torchrl_bcq.functional import discounted_sum

_STEPS = 1_000_000  # of an episode at most, if the environment has no limit
Policy = Callable[[TensorDictBase], TensorDictBase]
Value = Callable[[TensorDictBase], Tensor | None]


class _BrokenOff(Exception):
    """Leaves a rollout."""


def evaluate(
    envs: EnvBase,
    policy: Policy | None,
    *,
    value: Value | None = None,
    gamma: float = 0.99,
    seed: int = 0,
    should_stop: Callable[[], bool] = lambda: False,
) -> TensorDict | None:
    """Run one episode in each of ``E`` environments; PyTorch's random state is restored afterwards.

    The same seed gives the same initial states, so that policies, and stages of a run, can be compared.

    Args:
        envs: batch size ``[E]``, such as TorchRL's ``SerialEnv`` or ``ParallelEnv``.
        policy: acts; None acts uniformly at random.
        value: estimates the value of state-action pairs ``[E]``, such as ``loss.value``.
        gamma: discount of the return that is compared with the estimate.
        seed: of environments and policy.
        should_stop: called before each step; if true, the episodes are broken off.

    Returns:
        Batch size ``[E]``, each entry ``[E]``: ``return`` (undiscounted), ``length`` in steps, ``discounted_return``,
        and, with ``value``, the ``value_estimate`` of the first states and actions. None if it was broken off.
    """

    def watch(*_: Any) -> None:
        if should_stop():
            raise _BrokenOff

    with own_random_state(seed, envs.device), in_eval_mode(policy), torch.no_grad():
        envs.set_seed(seed)
        try:
            steps = envs.rollout(_STEPS, policy, watch, break_when_any_done=False, break_when_all_done=True)  # [E, T]
        except _BrokenOff:
            return None
        done = steps["next", "done"].squeeze(-1).long()
        running = done.cumsum(1) == done  # up to the first end; an environment idles from there until all have ended
        rewards = steps["next", "reward"].squeeze(-1).double() * running
        discounted = discounted_sum(rewards, gamma)
        out = {"return": rewards.sum(1), "length": running.sum(1), "discounted_return": discounted}
        estimate = None if value is None else value(steps[:, 0])
        return TensorDict(out if estimate is None else {**out, "value_estimate": estimate}, envs.batch_size)


def summarize(episodes: TensorDictBase, reference_scores: Sequence[float] | None = None) -> dict[str, float]:
    """Means over the episodes of :func:`evaluate`, with the names of :class:`EnvironmentMetrics`."""
    means = {name: float(values.double().mean()) for name, values in episodes.items()}
    metrics = {"return": means["return"]}
    if reference_scores is not None:
        random, expert = reference_scores
        metrics["normalized_score"] = 100 * (means["return"] - random) / (expert - random)
    metrics["return_std"] = float(episodes["return"].std(correction=0))
    metrics["episode_length"] = means["length"]
    return metrics | {name: means[name] for name in ("value_estimate", "discounted_return") if name in means}


@contextmanager
def own_random_state(seed: int, device: torch.device | None) -> Iterator[None]:
    """Seed PyTorch within the block and restore its random state, so that training draws the same numbers."""
    device = device or torch.device("cpu")
    others = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(others, device_type="cuda" if device.type == "cpu" else device.type):
        torch.manual_seed(seed)
        yield


@contextmanager
def in_eval_mode(*parts: Any) -> Iterator[None]:
    """Put modules into evaluation mode, without dropout, and those that were training back afterwards."""
    modules = [module for part in parts if isinstance(part, nn.Module) for module in part.modules()]
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
