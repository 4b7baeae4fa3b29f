"""The choices of a policy in the states of a dataset, for off-policy evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.data import TensorSpec

from torchrl_bcq.actions import DiscreteActions, number_of
from torchrl_bcq.data.episodes import check_single_steps, episode_numbers
from torchrl_bcq.evaluation.rollouts import in_eval_mode, own_random_state
from torchrl_bcq.modules import Policy

ACTIONS, PROBABILITIES = "policy_action", "policy_probability"


def add_policy_actions(
    transitions: TensorDictBase, policy: TensorDictModuleBase, action_spec: TensorSpec, **settings: Any
) -> TensorDictBase:
    """Add the policy's actions or probabilities in the next states, which ``FQELoss`` and ``DiscreteFQELoss`` read.

    Args:
        transitions: dataset of batch size ``[N]``. Its entries are not copied.
        policy, action_spec, settings: as in ``policy_actions``.

    Returns:
        Transitions with one more entry: ``("next", "policy_action") [N, n, A]``, or for discrete actions ``("next",
        "policy_probability") [N, K]``.

    Raises:
        ValueError: in the same cases as ``policy_actions``.

    Example:
        >>> from torchrl.envs import GymEnv
        >>> from torchrl_bcq import add_policy_actions, make_cloning_modules
        >>> env = GymEnv("Pendulum-v1")
        >>> (policy,) = make_cloning_modules(env.observation_spec, env.action_spec)
        >>> data = add_policy_actions(env.rollout(100), policy, env.action_spec)
        >>> data["next", "policy_action"].shape
        torch.Size([100, 1, 1])
    """
    name, action_spec = (
        ACTIONS if number_of(action_spec) is None else PROBABILITIES,
        like_data(action_spec, transitions),
    )
    ended = transitions["next", "terminated"]
    states = transitions["next"].copy().set("done", ended)  # a mask may exclude all actions only in a terminal state
    choices = policy_actions(policy, states, action_spec, **settings)
    # nothing reads them, and a mask without any available action gives NaN
    filled = choices.masked_fill(ended.reshape(-1, *[1] * (choices.ndim - 1)), 0)
    return transitions.copy().set(("next", name), filled)


def add_recorded_actions(
    transitions: TensorDictBase,
    action_spec: TensorSpec,
    *,
    observation_keys: Sequence[NestedKey] = ("observation",),
    seed: int = 0,
) -> TensorDictBase:
    """Add the recorded actions of the next states, in the form of ``add_policy_actions``.

    With them, fitted Q evaluation estimates the values of the policy that recorded the dataset. The last row of an
    episode that was cut off has no next action. It gets the action of a row whose state is nearest to its next state,
    drawn at random among rows with the same state. If it were left out, terminal states would be too frequent. With
    frames (bytes), it is left out.

    Args:
        transitions: dataset of batch size ``[N]``, with the entry ``episode`` or ``("next", "done")``.
        action_spec: spec of one action.
        observation_keys: entries of the state.
        seed: seed of the draws.

    Raises:
        DatasetError: if the episodes are not known (see ``episode_numbers``), or a row spans several steps.
    """
    check_single_steps(transitions)
    episode = episode_numbers(transitions)
    goes_on = torch.zeros_like(episode, dtype=torch.bool)
    goes_on[:-1] = episode[1:] == episode[:-1]
    name, recorded = recorded_actions(transitions, action_spec)
    following = recorded.roll(-1, 0)  # not read in a terminal state
    labelled = transitions.copy().set("episode", episode)  # ends of episodes may be left out below
    labelled.set(("next", name), following)
    known = goes_on | transitions["next", "terminated"].squeeze(-1)
    if any(transitions.get(key).dtype == torch.uint8 for key in observation_keys):
        return labelled[known]
    if not known.all():
        following[~known] = recorded[_similar_rows(transitions, ~known, observation_keys, seed)]
    return labelled


def _similar_rows(transitions: TensorDictBase, asked: Tensor, keys: Sequence[NestedKey], seed: int) -> Tensor:
    """For each row in ``asked``, return the number of a row whose state is nearest to the next state."""
    from scipy.spatial import cKDTree

    states, after = join_entries(transitions, keys), join_entries(transitions["next"][asked], keys)
    scale = scale_of(states)
    different, number = np.unique(states / scale, axis=0, return_inverse=True)
    _, nearest = cKDTree(different).query(after / scale)
    number = number.ravel()  # NumPy 2.0.0 returns [N, 1]
    rows, counts = np.argsort(number, kind="stable"), np.bincount(number)
    drawn = (counts[nearest] * np.random.default_rng(seed).random(len(nearest))).astype(int)
    return torch.as_tensor(rows[(counts.cumsum() - counts)[nearest] + drawn], device=asked.device)


def join_entries(rows: TensorDictBase, keys: Sequence[NestedKey]) -> np.ndarray:
    """Return the entries of each row in one vector of float64, ``[N, D]``."""
    return torch.cat([rows.get(key).flatten(1) for key in keys], -1).double().cpu().numpy()


def scale_of(states: np.ndarray) -> np.ndarray:
    """Return the standard deviation of each column, or 1 if a column is constant up to rounding. ``[N, D] -> [D]``."""
    scale = states.std(0)
    return np.where(scale <= np.finfo(np.float32).eps * np.abs(states.mean(0)), 1.0, scale)


def like_data(action_spec: TensorSpec, transitions: TensorDictBase) -> TensorSpec:
    """Return the spec with the dtype of the recorded actions, if they are continuous."""
    return action_spec.to(transitions["action"].dtype) if number_of(action_spec) is None else action_spec


def recorded_actions(transitions: TensorDictBase, action_spec: TensorSpec) -> tuple[str, Tensor]:
    """Return the recorded actions as choices of a policy, ``[N, 1, A]`` or ``[N, K]``, and the name of their entry."""
    number, action = number_of(action_spec), transitions["action"]
    if number is None:
        return ACTIONS, action.unsqueeze(1)
    index = DiscreteActions.of(action_spec).to_index(action, transitions.batch_size, number)
    return PROBABILITIES, torch.zeros(len(transitions), number, device=action.device).scatter_(1, index, 1.0)


def policy_actions(
    policy: TensorDictModuleBase,
    states: TensorDictBase,
    action_spec: TensorSpec,
    *,
    num_samples: int = 1,
    batch_size: int = 4096,
    seed: int = 0,
    progress_bar: bool | None = None,
) -> Tensor:
    """Return a policy's actions in each state, ``[N, n, A]``, or for discrete actions its probabilities, ``[N, K]``.

    If a discrete policy has a method ``get_dist``, as ``ProbabilisticActor`` has, the result is the exact probabilities
    of this distribution, whatever TorchRL's exploration type is. So such a policy is evaluated as a stochastic policy.
    For other discrete policies, the result is the frequencies of ``num_samples`` actions in each state.

    Args:
        policy: any TensorDict policy. It acts in evaluation mode and under TorchRL's current exploration type.
        states: observations that the policy reads, ``[N]``.
        action_spec: spec of one action.
        num_samples: number of actions in each state; 1 is enough for a deterministic policy. TorchRL's
            ``ProbabilisticActor`` is deterministic unless the exploration type is ``RANDOM``.
        batch_size: number of states in one call of the policy.
        seed: random seed of the policy's samples. PyTorch's random state does not change.
        progress_bar: whether to show a progress bar; None shows it only on a terminal.

    Raises:
        ValueError: if ``num_samples`` is below 1, or the policy writes actions that do not fit ``action_spec``.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}, expected at least 1.")
    if not hasattr(policy, "in_keys"):
        raise TypeError(f"the policy is a {type(policy).__name__}; wrap it in a TensorDictModule.")
    first = next(policy.parameters(), None) if isinstance(policy, nn.Module) else None
    device = torch.device("cpu") if first is None else first.device
    home = next(iter(states.values(True, True))).device  # a TensorDict without a device may hold tensors of a GPU
    parts: Any = range(0, len(states), batch_size)
    if progress_bar is not False and find_spec("tqdm"):
        from tqdm import tqdm

        parts = tqdm(parts, desc="actions of the policy", unit="batch", disable=None if progress_bar is None else False)
    found = []
    with own_random_state(seed, device), in_eval_mode(policy), torch.no_grad():
        for start in parts:
            rows = states[start : start + batch_size].select(*policy.in_keys, "done", strict=False).to(device)
            found.append(_choices(policy, rows, action_spec, num_samples).to(home))
    return torch.cat(found)


def has_probabilities(policy: Any, action_spec: TensorSpec) -> bool:
    """Whether a discrete policy gives its probabilities, which ``policy_actions`` then uses."""
    return number_of(action_spec) is not None and hasattr(policy, "get_dist")


def _choices(policy: Any, states: TensorDictBase, action_spec: TensorSpec, num_samples: int) -> Tensor:
    number = number_of(action_spec)
    if number is not None and has_probabilities(policy, action_spec):
        found = policy.get_dist(states.copy()).probs
        return _check(found, (len(states), number), "probabilities").to(torch.get_default_dtype())
    key = policy.out_keys[0] if isinstance(policy, Policy) else getattr(policy, "action_key", "action")
    if key not in policy.out_keys:
        raise ValueError(f"the policy writes {[*policy.out_keys]}, but not {key!r}; rename its output to {key!r}.")
    drawn = [policy(states.copy()).get(key) for _ in range(num_samples)]
    if number is None:
        shape = (len(states), *action_spec.shape)
        return torch.stack([_check(action, shape, "actions").to(action_spec.dtype) for action in drawn], 1)
    kind = DiscreteActions.of(action_spec)
    frequency = torch.zeros(len(states), number, device=states.device)
    for action in drawn:
        index = kind.to_index(action, states.batch_size, number)
        frequency.scatter_add_(1, index, frequency.new_full(index.shape, 1 / num_samples))
    return frequency


def _check(given: Tensor, shape: tuple[int, ...], what: str) -> Tensor:
    if given.shape != shape:
        raise ValueError(
            f"the policy gives {what} of shape {tuple(given.shape)}, expected {shape}, as "
            "action_spec says; pass the spec of one action of this policy."
        )
    return given
