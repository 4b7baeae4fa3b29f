"""Fits networks that off-policy evaluation needs: critics of a policy, and probabilities of the recorded actions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.data import Binary, Composite, TensorSpec, Unbounded
from torchrl.objectives import SoftUpdate
from torchrl.objectives.utils import TargetNetUpdater

from torchrl_bcq.actions import DiscreteActions, number_of
from torchrl_bcq.data import make_replay_buffer
from torchrl_bcq.data.episodes import STEPS, episode_numbers
from torchrl_bcq.data.frame_stack import gather_frames
from torchrl_bcq.errors import DatasetError
from torchrl_bcq.evaluation.rollouts import own_random_state
from torchrl_bcq.functional import available_logits
from torchrl_bcq.modules import Normalization, make_discrete_cloning_modules, make_fqe_modules
from torchrl_bcq.objectives import DiscreteCloningLoss, DiscreteFQELoss, FQELoss, OfflineLoss
from torchrl_bcq.objectives.inputs import check_gamma
from torchrl_bcq.trainers import OfflineOptimizationStepper, OfflineTrainer

_MASK = "action_mask"
_CHUNK = 4096  # rows that a network reads at a time


def fit_fqe(
    transitions: TensorDictBase,
    action_spec: TensorSpec,
    *,
    gamma: float = 0.99,
    steps: int = 10_000,
    batch_size: int = 100,
    lr: float = 1e-3,
    tau: float = 0.05,
    num_critics: int = 3,
    hidden: Sequence[int] = (256, 256),
    observation_keys: Sequence[NestedKey] = ("observation",),
    device: torch.device | str | None = None,
    seed: int = 0,
    progress_bar: bool = False,
) -> FQELoss | DiscreteFQELoss:
    """Train critics of a policy on transitions that hold the policy's choices; return the loss with these critics.

    To get the values of states ``[E]`` by each critic, ``[E, C]``, add the policy's choices to the states:
    ``states.set(loss.policy_key, policy_actions(policy, states, action_spec))``. Then call
    ``loss.state_values(states)``.

    Observations are standardised. Each critic multiplies the output of its network by a typical size of the values: the
    root mean square of the rewards times ``1 / (1 - gamma)``, or times the length of the longest episode if this length
    is smaller. Targets are clipped to the range of the values that the rewards allow (``value_range``).

    Args:
        transitions: result of ``add_policy_actions`` or ``add_recorded_actions``, ``[N]``.
        action_spec: spec of one action.
        gamma: discount factor; 1 is possible if all episodes end.
        steps: number of gradient steps.
        batch_size: rows of a gradient step.
        lr: learning rate of Adam.
        tau: fraction by which each gradient step moves the target critics towards the critics.
        num_critics: number of critics, which differ in their initial weights.
        hidden: sizes of the hidden layers of each critic.
        observation_keys: entries that the critics read.
        device: any torch device. By default, the device of ``transitions``.
        seed: seed of the initial weights and of the batches. PyTorch's random state does not change.
        progress_bar: whether to show a progress bar.

    Raises:
        DatasetError, ValueError: if the transitions lack an entry or have defects, or a setting is out of range.

    Example:
        >>> from torchrl.envs import GymEnv
        >>> from torchrl_bcq import add_recorded_actions, fit_fqe
        >>> env = GymEnv("CartPole-v1")
        >>> data = add_recorded_actions(env.rollout(100, break_when_any_done=False), env.action_spec)
        >>> critics = fit_fqe(data, env.action_spec, steps=5)
        >>> critics.value(data[:7]).shape
        torch.Size([7])

    Source: Le, Voloshin, Yue, "Batch Policy Learning under Constraints", arXiv:1903.08738, algorithm 3.
    """
    check_gamma(gamma)
    device = torch.device(device or transitions.device or "cpu")
    settings: dict[str, Any] = {"steps": steps, "batch_size": batch_size, "lr": lr, "seed": seed, "device": device}
    scaling = _fit_scaling(transitions, observation_keys, _value_scale(transitions, gamma))
    specs = _specs(transitions, observation_keys)
    with own_random_state(seed, device):
        sizes: dict[str, Any] = {"num_critics": num_critics, "hidden": hidden, "dtype": _dtype_of(specs)}
        networks = make_fqe_modules(specs, action_spec, **sizes, normalization=scaling, device=device)
        kind: Any = FQELoss if number_of(action_spec) is None else DiscreteFQELoss
        loss = kind(*networks, value_range=value_range(transitions, gamma)).make_value_estimator(gamma=gamma)
        if (choices := transitions.get(key := ("next", loss.policy_key), None)) is None:
            raise DatasetError(f"the transitions lack {key}; add it with add_policy_actions or add_recorded_actions.")
        transitions = transitions.copy().set(key, choices.to(next(loss.parameters()).dtype))
        return _fit(loss, transitions, SoftUpdate(loss, tau=tau), progress_bar=progress_bar, **settings)


def clone_probabilities(
    transitions: TensorDictBase,
    rows: TensorDictBase,
    action_spec: TensorSpec,
    *,
    steps: int = 5_000,
    batch_size: int = 100,
    lr: float = 1e-3,
    hidden: Sequence[int] = (256, 256),
    observation_keys: Sequence[NestedKey] = ("observation",),
    device: torch.device | str | None = None,
    seed: int = 0,
    progress_bar: bool = False,
) -> Tensor:
    """Clone the policy that recorded ``transitions``, and return its probabilities of the actions of ``rows``, ``[M]``.

    Use them in place of logged probabilities, if there are none. If several policies recorded the data, the clone is
    their mixture. Action masks are read if the transitions have ``action_mask``.

    Args:
        transitions: recorded transitions with discrete actions, ``[N]``.
        rows: recorded transitions, ``[M]``, preferably of other episodes.
        action_spec, steps, batch_size, lr, hidden, observation_keys, device, seed, progress_bar: as in ``fit_fqe``.
    """
    device = torch.device(device or transitions.device or "cpu")
    settings: dict[str, Any] = {"steps": steps, "batch_size": batch_size, "lr": lr, "seed": seed, "device": device}
    specs = _specs(transitions, observation_keys)
    number = DiscreteActions.of(action_spec).number
    if has_mask := _MASK in transitions.keys():
        specs[_MASK] = Binary(number, dtype=torch.bool)
    with own_random_state(seed, device):
        scaling = _fit_scaling(transitions, observation_keys)
        (network,) = make_discrete_cloning_modules(
            specs, action_spec, hidden=hidden, normalization=scaling, device=device, dtype=_dtype_of(specs)
        )
        loss = _fit(DiscreteCloningLoss(network), transitions, None, progress_bar=progress_bar, **settings)

    def probability(part: TensorDictBase) -> Tensor:
        (logits,) = loss.scores(part)
        probabilities = available_logits(logits, part[_MASK] if has_mask else None).softmax(-1)
        chosen = probabilities.gather(-1, loss.action_index(part, logits)).squeeze(-1)
        return chosen.clamp_min(torch.finfo(chosen.dtype).tiny)  # division by 0 would give an infinite ratio

    return values_in_parts(loss, probability, rows)


@torch.no_grad()
def values_in_parts(module: nn.Module, function: Callable[[TensorDictBase], Tensor], rows: TensorDictBase) -> Tensor:
    """Evaluate a function of a module in parts of ``rows [N]``, on the device of the module."""
    device = next(module.parameters()).device
    parts = [function(gather_frames(part).to(device)) for part in rows.split(_CHUNK)]
    return torch.cat(parts).to(rows["action"].device)


def next_values(critics: FQELoss | DiscreteFQELoss, rows: TensorDictBase) -> Tensor:
    """Return the values of the next states by each critic, ``[N, C]``."""
    return values_in_parts(critics, lambda part: critics.state_values(part.get("next")), rows)


def _fit(
    loss: OfflineLoss,
    transitions: TensorDictBase,
    updater: TargetNetUpdater | None,
    *,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    device: torch.device,
    progress_bar: bool,
) -> Any:
    """Train a loss with Adam, and return it in evaluation mode."""
    rows = transitions.select(*loss.in_keys, STEPS, strict=False)
    OfflineTrainer(
        loss,
        make_replay_buffer(rows, batch_size=batch_size, device=device, seed=seed),
        target_net_updater=updater,
        optimization_stepper=OfflineOptimizationStepper.adam(loss, lr=lr),
        total_steps=steps,
        progress_bar=progress_bar,
    ).train()
    return loss.eval()


def _specs(transitions: TensorDictBase, observation_keys: Sequence[NestedKey]) -> Composite:
    leaves = {key: gather_frames(transitions[:1]).get(key) for key in observation_keys}
    return Composite({key: Unbounded(leaf.shape[1:], dtype=leaf.dtype) for key, leaf in leaves.items()})


def _dtype_of(specs: Composite) -> torch.dtype | None:
    """Return the dtype of the observations; None, the default, if all of them are frames of bytes."""
    return next((spec.dtype for spec in specs.values(True, True) if spec.dtype.is_floating_point), None)


def _fit_scaling(
    transitions: TensorDictBase, observation_keys: Sequence[NestedKey], value_scale: float = 1.0
) -> Normalization:
    """Standardise the observations, and multiply values by ``value_scale``."""
    fitted = Normalization.fit(transitions, observation_keys=observation_keys, scale_rewards=False)
    return Normalization(fitted.observations, value_scale)


def value_range(transitions: TensorDictBase, gamma: float) -> tuple[float, float]:
    """Return the smallest and the largest discounted return that the recorded rewards allow.

    For ``gamma < 1``, episodes may be infinitely long. For ``gamma = 1``, they are at most as long as the longest
    recorded episode. The range always contains 0, because all rewards after a terminal state are 0.
    """
    reward = transitions["next", "reward"].double()
    if gamma == 1:
        most = float(episode_numbers(transitions).bincount().max())
    else:  # a row of multi_step sums the rewards of several steps
        steps = transitions.get(STEPS, None)
        most = 1 / (1 - gamma ** (1 if steps is None else steps.double().reshape(reward.shape)))
    low, high = map(float, (reward * most).aminmax())
    return min(0.0, low), max(0.0, high)


def _value_scale(transitions: TensorDictBase, gamma: float) -> float:
    """Return the size of usual values, by which the critics multiply their output."""
    reward = transitions["next", "reward"].double().square().mean().sqrt().item()
    longest = float(episode_numbers(transitions).bincount().max())
    return reward * (longest if gamma == 1 else min(1 / (1 - gamma), longest)) or 1.0
