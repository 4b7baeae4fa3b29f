"""Fitted Q evaluation: critics of a given policy, learned from a fixed dataset."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDictBase, unravel_key
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.data import TensorSpec

from torchrl_bcq.objectives.discrete import DiscreteValueLoss
from torchrl_bcq.objectives.values import ValueLoss
from torchrl_bcq.protocols import CriticEnsemble, DiscreteNetwork, check_initialized, check_not_recurrent, require

_METADATA = ("td_error", "pred_value", "target_value")


class _PolicyValueLoss(ValueLoss):
    """Learns the values of a policy, whose choices in each next state the batch holds."""

    policy_key: str  # entry of the policy's choices, which add_policy_actions writes

    def __init__(
        self,
        networks: Mapping[str, Any],
        *,
        value_range: tuple[float, float] | None,
        delay_qvalue: bool,
        **settings: Any,
    ) -> None:
        check_initialized("qvalue_network", networks["qvalue"])
        if value_range is not None and not value_range[0] <= value_range[1]:
            raise ValueError(f"value_range is {value_range}, expected (low, high) with low not above high.")
        delayed, metadata = (["qvalue"] if delay_qvalue else []), {"qvalue": _METADATA}
        super().__init__(networks, delayed=delayed, metadata=metadata, **settings)
        self.delay_qvalue = delay_qvalue
        self.value_range = value_range

    def qvalue_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the TD loss, summed over critics, and metadata."""
        batch = self.select_transitions(tensordict)
        with torch.no_grad(), self.target_autocast(), self.target_networks():
            target = self.td_target(batch, self.state_values(batch.get("next")))
            if self.value_range is not None:
                target = target.clamp(*self.value_range)
        return self.td_distance(self.values(batch), target, tensordict)

    def value(self, tensordict: TensorDictBase) -> Tensor:
        """Return the values of state-action pairs, the mean over critics, ``[*B]``."""
        return self.values(tensordict).mean(-1)

    @abstractmethod
    def values(self, tensordict: TensorDictBase) -> Tensor:
        """Return the values of state-action pairs by each critic, ``[*B, C]``."""

    @abstractmethod
    def state_values(self, states: TensorDictBase) -> Tensor:
        """Return the values of states by each critic, ``[*B, C]``: the expectations over the policy's actions."""

    def _choices(self, states: TensorDictBase) -> Tensor:
        if (choices := states.get(self.policy_key, None)) is None:
            raise ValueError(f"the states lack {self.policy_key!r}; add it with add_policy_actions or policy_actions.")
        return choices

    def _find_in_keys(self) -> list[NestedKey]:
        return [*super()._find_in_keys(), unravel_key(("next", self.policy_key))]


class FQELoss(_PolicyValueLoss):
    """Loss of fitted Q evaluation (FQE): critics learn the values of a policy from data of another policy.

    The batch holds actions of the policy in the next states, which ``add_policy_actions`` writes once for the whole
    dataset. So the policy is not called during training. Each critic bootstraps from its own target network, so that
    the critics differ and their spread can be measured.

    Args:
        qvalue_network: all critics in one module, such as that of ``make_fqe_modules``.
        action_key: entry of the action ``[*B, A]``, which the critics read.
        value_range: smallest and largest possible value, to which targets are clipped. In states that are far from the
            data, targets could otherwise grow without a limit. None does not clip, as in the paper.
        delay_qvalue: if True, add target critics. A target updater changes them.
        loss_function, reduction, use_prioritized_weights: as in ``BCQLoss``.

    Reads: observations and the action. Under ``"next"``, the loss reads the observations, the policy's actions
    ``policy_action [*B, n, A]``, and ``reward``, ``done`` and ``terminated`` of shape ``[*B, 1]``. The value of a state
    is the mean over the ``n`` actions. The target does not bootstrap if ``terminated`` is
    True. If the batch has ``steps_to_next_obs [*B, 1]``, the loss also reads this entry (see ``ValueLoss``). Writes the
    largest absolute TD error over critics to the input tensordict, as the priority ``td_error [*B]``. Set the discount
    factor with ``loss.make_value_estimator(gamma=0.99)``; for finite episodes, it may be 1.

    Returns: ``loss_qvalue``, summed over critics, and the detached metadata ``td_error [*B, C]``, ``pred_value [*B,
    C]`` and ``target_value [*B, C]`` (``[*B]`` for a single critic).

    To estimate the value of the policy, average ``loss.state_values(states)`` over initial states that hold the
    policy's actions, the result of ``policy_actions``.

    Raises:
        TypeError: at construction, if the network lacks a member of ``CriticEnsemble``.
        ValueError: if a setting is out of range. A call of the loss also raises this error if the batch lacks an entry
            or an entry has a wrong shape or dtype.

    Source: Le, Voloshin, Yue, "Batch Policy Learning under Constraints", arXiv:1903.08738, algorithm 3.
    """

    policy_key = "policy_action"

    def __init__(
        self,
        qvalue_network: CriticEnsemble,
        *,
        action_key: NestedKey = "action",
        value_range: tuple[float, float] | None = None,
        delay_qvalue: bool = True,
        loss_function: str = "l2",
        reduction: str | None = "mean",
        use_prioritized_weights: str | bool = "auto",
    ) -> None:
        """Build the loss from its critics."""
        require("qvalue_network", qvalue_network, CriticEnsemble)
        check_not_recurrent("qvalue_network", qvalue_network)
        super().__init__(
            {"qvalue": qvalue_network},
            value_range=value_range,
            delay_qvalue=delay_qvalue,
            action_key=action_key,
            value_key=qvalue_network.out_keys[-1],
            loss_function=loss_function,
            reduction=reduction,
            use_prioritized_weights=use_prioritized_weights,
        )

    def values(self, tensordict: TensorDictBase) -> Tensor:
        """Return the values of state-action pairs by each critic, ``[*B, C]``."""
        written = self.qvalue_network(tensordict.select(*self.qvalue_network.in_keys))
        return written.get(self.tensor_keys.state_action_value).to(self._like.dtype)

    def state_values(self, states: TensorDictBase) -> Tensor:
        """Return the values of states by each critic: the means over the policy's actions, ``[*B, C]``."""
        actions = self._choices(states)
        if actions.ndim != states.ndim + 2 or not actions.shape[-2]:
            raise ValueError(
                f"{self.policy_key!r} has shape {tuple(actions.shape)}, expected {(*states.shape, 'n', 'A')}: n "
                "actions for each state, at least one."
            )
        pairs = states.select(*self._observation_keys).unsqueeze(-1).expand(*states.shape, actions.shape[-2]).copy()
        return self.values(pairs.set(self.tensor_keys.action, actions)).mean(-2)


class DiscreteFQELoss(DiscreteValueLoss, _PolicyValueLoss):
    """Loss of fitted Q evaluation for discrete actions; each critic computes the values of all ``K`` actions.

    The batch holds the policy's probabilities of all actions in the next states, which ``add_policy_actions`` writes
    once for the whole dataset. The value of a state is the expectation over the actions.

    Args:
        qvalue_network: network with one output ``[*B, K]`` for each critic, such as that of ``make_fqe_modules``.
        action_space: as in ``DiscreteBCQLoss``.
        value_range, delay_qvalue, loss_function, reduction, use_prioritized_weights: as in
            ``FQELoss``.

    Reads and returns: the same as ``FQELoss``, but the policy's probabilities ``policy_probability [*B, K]`` in place
    of its actions. Masks are not read: the policy's probability of an action that is not available must be 0.

    Raises:
        TypeError, ValueError: in the same cases as ``FQELoss``, or if the action space is not known.

    Source: Le, Voloshin, Yue, "Batch Policy Learning under Constraints", arXiv:1903.08738, algorithm 3.
    """

    policy_key = "policy_probability"

    def __init__(
        self,
        qvalue_network: DiscreteNetwork,
        *,
        action_space: str | TensorSpec | None = None,
        value_range: tuple[float, float] | None = None,
        delay_qvalue: bool = True,
        loss_function: str = "l2",
        reduction: str | None = "mean",
        use_prioritized_weights: str | bool = "auto",
    ) -> None:
        """Build the loss from its network."""
        require("qvalue_network", qvalue_network, DiscreteNetwork)
        super().__init__(
            {"qvalue": qvalue_network},
            action_space=action_space,
            value_range=value_range,
            delay_qvalue=delay_qvalue,
            value_key=qvalue_network.out_keys[0],
            loss_function=loss_function,
            reduction=reduction,
            use_prioritized_weights=use_prioritized_weights,
        )

    def values(self, tensordict: TensorDictBase) -> Tensor:
        """Return the values of state-action pairs by each critic, ``[*B, C]``."""
        scores = self.scores(tensordict)
        index = self.action_index(tensordict, scores[0])
        return torch.cat([score.gather(-1, index) for score in scores], -1)

    def state_values(self, states: TensorDictBase) -> Tensor:
        """Return the values of states by each critic: the expectations over the policy's actions, ``[*B, C]``."""
        scores = torch.stack(self.scores(states), -2)  # [*B, C, K]
        probability = self._choices(states)
        if probability.shape != (*states.shape, scores.shape[-1]):
            raise ValueError(
                f"{self.policy_key!r} has shape {tuple(probability.shape)}, expected "
                f"{(*states.shape, scores.shape[-1])}: one probability for each action."
            )
        return (scores * probability.unsqueeze(-2)).sum(-1)

    def _other_state_keys(self) -> list[NestedKey]:
        return []  # no mask
