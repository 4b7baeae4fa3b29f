"""The loss of discrete BCQ as one TorchRL objective."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import TensorSpec

from torchrl_bcq.actions import check_threshold
from torchrl_bcq.functional import best_allowed, likely_actions, logit_penalty
from torchrl_bcq.objectives.discrete import DiscreteValueLoss
from torchrl_bcq.protocols import DiscreteNetwork, check_discrete_network

_TERMS = ("loss_qvalue", "loss_imitation", "loss_penalty")


class DiscreteBCQLoss(DiscreteValueLoss):
    """Loss of discrete BCQ: double Q-learning over the actions that are likely in the dataset, and imitation.

    One network writes the values and the logits of the behaviour policy, and one optimizer trains the network.
    ``qvalue_loss`` is the sum of three terms, which ``forward`` returns one by one.

    Args:
        qvalue_network: network with two outputs ``[*B, K]``: first the values, then the logits of the behaviour policy.
            Pass the network of ``make_discrete_bcq_modules``, or any ``DiscreteNetwork``.
        action_space: ``"categorical"`` for indices ``[*B]`` or ``[*B, 1]``, ``"one-hot"`` for vectors ``[*B, K]``, or
            the spec of one action, such as ``env.action_spec``. By default, ``qvalue_network.action_space``.
        unlikely_action_threshold: the next action must have ``p(a|s) / max_b p(b|s)`` above this number. 0 allows each
            action, as in Q-learning; a number close to 1 allows only the most likely action, as in cloning.
        imitation_logits_penalty: weight of the mean squared logits.
        delay_qvalue: if True, add a target network, which evaluates the next action. A target updater changes it.
        loss_function: loss of the TD error: ``"smooth_l1"`` (Huber, threshold 1; paper), ``"l2"`` or ``"l1"``.
        reduction: reduction of each term over the batch: ``"mean"`` (or None), ``"sum"`` or ``"none"``.
        use_prioritized_weights: ``"auto"`` or True weights the rows by ``priority_weight`` if the batch has it.

    Reads: observations and the action. Under ``"next"``, the loss reads the observations, and ``reward``, ``done`` and
    ``terminated`` of shape ``[*B, 1]``. If the batch has ``steps_to_next_obs [*B, 1]``, the loss also reads this entry
    (see ``ValueLoss``). If the network has an ``action_mask_key``, or after ``loss.set_keys(action_mask=key)``, the
    loss reads booleans ``[*B, K]`` of both states: an action that is not available has probability 0 and is never the
    next action. The target does not bootstrap if ``terminated`` is True. Writes the absolute TD error to the input
    tensordict, as the priority ``td_error [*B]``. Set the discount factor with
    ``loss.make_value_estimator(gamma=0.99)``.

    Returns: ``loss_qvalue``, ``loss_imitation`` and ``loss_penalty`` (weighted), and detached metadata of each row: the
    absolute ``td_error [*B, 1]``, ``pred_value [*B, 1]``, ``target_value [*B]``, ``imitation_accuracy [*B]`` (1 if the
    dataset's action is the most likely one) and ``allowed_share [*B]``, the share of the actions that pass the
    threshold in the next state.

    Raises:
        TypeError: at construction, if the network lacks a member of ``DiscreteNetwork``.
        ValueError: if a setting is out of range or the action space is not known. A call of the loss also raises this
            error if the batch lacks an entry, an entry has a wrong shape or dtype, or, on the CPU, an action is out of
            range or not available.

    Example:
        >>> from torchrl.envs import GymEnv
        >>> from torchrl.objectives import SoftUpdate
        >>> from torchrl_bcq import DiscreteBCQLoss, make_discrete_bcq_modules
        >>> env = GymEnv("CartPole-v1")
        >>> loss = DiscreteBCQLoss(*make_discrete_bcq_modules(env.observation_spec, env.action_spec))
        >>> updater = SoftUpdate(loss, tau=0.005)  # or HardUpdate(loss, value_network_update_interval=7999)
        >>> [key for key in loss(env.rollout(100)).keys() if key.startswith("loss_")]
        ['loss_qvalue', 'loss_imitation', 'loss_penalty']

    Source: arXiv:1910.01708, with the settings of the author's code.
    """

    def __init__(
        self,
        qvalue_network: DiscreteNetwork,
        *,
        action_space: str | TensorSpec | None = None,
        unlikely_action_threshold: float = 0.3,
        imitation_logits_penalty: float = 0.01,
        delay_qvalue: bool = True,
        loss_function: str = "smooth_l1",
        reduction: str | None = "mean",
        use_prioritized_weights: str | bool = "auto",
    ) -> None:
        """Build the loss from its network."""
        check_discrete_network("qvalue_network", qvalue_network, ("the values", "the logits"))
        check_threshold(unlikely_action_threshold)
        if not imitation_logits_penalty >= 0:
            raise ValueError(f"imitation_logits_penalty is {imitation_logits_penalty}, expected 0 or more.")
        metadata = ("td_error", "pred_value", "target_value", "imitation_accuracy", "allowed_share")
        super().__init__(
            {"qvalue": qvalue_network},
            action_space=action_space,
            delayed=["qvalue"] if delay_qvalue else [],
            metadata={"qvalue": (*_TERMS[1:], *metadata)},
            value_key="state_action_value",
            loss_function=loss_function,
            reduction=reduction,
            use_prioritized_weights=use_prioritized_weights,
        )
        self.delay_qvalue = delay_qvalue
        self.unlikely_action_threshold = unlikely_action_threshold
        self.imitation_logits_penalty = imitation_logits_penalty

    def qvalue_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum of the three terms, the terms, and the metadata."""
        batch = self.select_transitions(tensordict)
        target, share = self._target_value(batch)
        value, logits = self.scores(batch)
        action, mask = self.action_index(batch, value), self.mask(batch, logits)
        td_loss, metadata = self.td_distance(value.gather(-1, action), target, tensordict)
        nll, is_best = self.imitation(logits, action, mask)
        penalty = self.imitation_logits_penalty * logit_penalty(logits)
        terms = (td_loss, self.reduce(nll, tensordict), self.reduce(penalty, tensordict))
        metadata |= {"imitation_accuracy": is_best, "allowed_share": share}
        return sum(terms[1:], terms[0]), {**dict(zip(_TERMS, terms, strict=True)), **metadata}

    def value(self, tensordict: TensorDictBase) -> Tensor:
        """Return the values of state-action pairs, ``[*B]``."""
        value = self.first_scores(tensordict)
        return value.gather(-1, self.action_index(tensordict, value)).squeeze(-1)

    @torch.no_grad()
    def _target_value(self, batch: TensorDictBase) -> tuple[Tensor, Tensor]:
        """Return the TD target, ``[*B, 1]``, and the share of actions that pass the threshold, ``[*B]``.

        The current network chooses the next action, and the target network evaluates the action (double DQN).
        """
        states = batch.get("next")
        with self.target_autocast():
            value, logits = self.scores(states)
            with self.target_networks():
                next_value = self.first_scores(states)
        mask = self.mask(states, logits, ended=states.get(self.tensor_keys.terminated))
        allowed = likely_actions(logits, self.unlikely_action_threshold, mask)
        target = self.td_target(batch, next_value.gather(-1, best_allowed(value, allowed)))
        return target, allowed.to(value.dtype).mean(-1)
