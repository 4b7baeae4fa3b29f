"""Policies for discrete actions: the best action among those that are likely in the dataset, and cloning."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.data import TensorSpec

from torchrl_bcq.actions import DiscreteActions, check_mask, check_threshold
from torchrl_bcq.functional import available_logits, best_allowed, likely_actions
from torchrl_bcq.modules.acting import Policy, check_dtype, is_random, tensor_like
from torchrl_bcq.modules.dispatch import accepts_tensors
from torchrl_bcq.protocols import DiscreteNetwork, check_discrete_network, recurrent_layers, setting_of


class _DiscretePolicy(Policy, ABC):
    """Scores all actions of each state, and chooses one action or, with the probability ``epsilon``, a random one."""

    def __init__(
        self,
        network: DiscreteNetwork,
        epsilon: float,
        action_space: str | TensorSpec | None,
        action_mask_key: NestedKey | None,
    ) -> None:
        super().__init__(getattr(network, "observation_specs", None))
        if not 0 <= epsilon <= 1:
            raise ValueError(f"epsilon is {epsilon}, expected a probability between 0 and 1.")
        if found := recurrent_layers(network):
            raise ValueError(
                f"network has a recurrent layer ({found[0]}), whose memory the policy would lose; put this layer "
                f"before the policy: TensorDictSequential(layer, {type(self).__name__}(rest of the network))."
            )
        self.network = network
        self.epsilon = epsilon
        own_space = setting_of(network, "action_space")
        self.actions = DiscreteActions.of(own_space if action_space is None else action_space)
        self.mask_key = setting_of(network, "action_mask_key") if action_mask_key is None else action_mask_key
        self.in_keys = list(dict.fromkeys([*network.in_keys, *([] if self.mask_key is None else [self.mask_key])]))
        self.action_key = setting_of(network, "action_key", "action")

    @accepts_tensors
    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the chosen action of each state, ``[*B]``, ``[*B, 1]`` or ``[*B, K]``."""
        states, like = tensordict.select(*self.in_keys), tensor_like(self, default=torch.empty(0))
        for key in self.in_keys:
            check_dtype(key, states.get(key), like.dtype)
        mask = None if self.mask_key is None else states.get(self.mask_key)
        written = self.network(states)
        scores = [written.get(key) for key in self.network.out_keys]
        if mask is not None:
            check_mask(mask, scores[-1], str(self.mask_key), tensordict.get("done", None))
        index, outputs = self._choose(scores, mask)
        if self.epsilon > 0 and is_random():
            index = self._explore(index, scores[-1], mask)
        outputs = {**outputs, self.action_key: self.actions.from_index(index.squeeze(-1), scores[-1].shape[-1])}
        for key in self.out_keys:
            tensordict.set(key, outputs[key])
        return tensordict

    @abstractmethod
    def _choose(self, scores: list[Tensor], mask: Tensor | None) -> tuple[Tensor, dict[NestedKey, Tensor]]:
        """Return the index of the best action of each state, ``[*B, 1]``, and the other outputs."""

    def _explore(self, index: Tensor, scores: Tensor, mask: Tensor | None) -> Tensor:
        """Replace each index by that of a random available action, with the probability ``epsilon``."""
        drawn = available_logits(torch.rand_like(scores), mask).argmax(-1, keepdim=True)
        explores = torch.rand(index.shape, device=index.device) < self.epsilon
        return torch.where(explores, drawn, index)


class DiscreteBCQPolicy(_DiscretePolicy):
    """Policy of discrete BCQ: ``argmax_a Q(s, a)`` over the actions with ``p(a|s) / max_b p(b|s)`` above a threshold.

    The policy holds the given network, not a copy: while a loss trains it, the policy acts with the new weights.

    Args:
        network: network that writes the values and the logits of the behaviour policy, as in ``DiscreteBCQLoss``.
        unlikely_action_threshold: threshold of the ratio, which must be above it; normally that of the loss. 0 allows
            each action.
        epsilon: probability of a random available action, only under ``ExplorationType.RANDOM`` or without an
            exploration type. The author's code uses 0 for vectors and 0.001 for games.
        return_value: if True, also write ``chosen_action_value [*B, 1]``, the value of the best allowed action.
        return_candidates: if True, also write ``candidates [*B, K]``, booleans that tell which actions pass the
            threshold, their values ``action_value [*B, K]``, and ``imitation_probability [*B, K]``.
        action_space: ``"categorical"``, ``"one-hot"`` or the spec of one action; by default, ``network.action_space``.
        action_mask_key: entry of the available actions, booleans ``[*B, K]``; by default, ``network.action_mask_key``.
            An action that is not available is never chosen, also not at random.

    Raises:
        TypeError: if the network lacks a member of ``DiscreteNetwork``.
        ValueError: if a setting is out of range, or the action space is not known. A call of the policy also raises
            this error if an observation and the networks have different dtypes, or a mask has a wrong shape or dtype
            or, on the CPU, allows no action.

    Example:
        >>> from torchrl.envs import GymEnv
        >>> from torchrl_bcq.modules import DiscreteBCQPolicy, make_discrete_bcq_modules
        >>> env = GymEnv("CartPole-v1", categorical_action_encoding=True)
        >>> policy = DiscreteBCQPolicy(*make_discrete_bcq_modules(env.observation_spec, env.action_spec))
        >>> env.rollout(5, policy)["action"].shape
        torch.Size([5])
        >>> int(policy.act([0.0, 0.1, 0.0, -0.1])) in (0, 1)
        True

    Source: arXiv:1910.01708.
    """

    def __init__(
        self,
        network: DiscreteNetwork,
        *,
        unlikely_action_threshold: float = 0.3,
        epsilon: float = 0.0,
        return_value: bool = False,
        return_candidates: bool = False,
        action_space: str | TensorSpec | None = None,
        action_mask_key: NestedKey | None = None,
    ) -> None:
        """Build the policy from its network."""
        check_discrete_network("network", network, ("the values", "the logits"))
        check_threshold(unlikely_action_threshold)
        super().__init__(network, epsilon, action_space, action_mask_key)
        self.unlikely_action_threshold = unlikely_action_threshold
        self.set_outputs(value=return_value, candidates=return_candidates)

    def set_outputs(self, *, value: bool, candidates: bool) -> None:
        """Choose what the policy writes beside the action, as ``return_value`` and ``return_candidates`` do."""
        self.return_value, self.return_candidates = value, candidates
        of_candidates = ["candidates", "action_value", "imitation_probability"]
        more = [*(["chosen_action_value"] if value else []), *(of_candidates if candidates else [])]
        self.out_keys = [self.action_key, *more]

    def _choose(self, scores: list[Tensor], mask: Tensor | None) -> tuple[Tensor, dict[NestedKey, Tensor]]:
        value, logits = scores
        allowed = likely_actions(logits, self.unlikely_action_threshold, mask)
        index = best_allowed(value, allowed)
        outputs: dict[NestedKey, Tensor] = {}
        if self.return_value:
            outputs["chosen_action_value"] = value.gather(-1, index)
        if self.return_candidates:
            probability = available_logits(logits, mask).softmax(-1)
            outputs |= {"candidates": allowed, "action_value": value, "imitation_probability": probability}
        return index, outputs


class DiscreteCloningPolicy(_DiscretePolicy):
    """Policy of discrete behaviour cloning: the most likely available action.

    Args:
        network: network that writes the logits of the behaviour policy, as in ``DiscreteCloningLoss``.
        epsilon, action_space, action_mask_key: as in ``DiscreteBCQPolicy``.

    Raises:
        TypeError, ValueError: in the same cases as ``DiscreteBCQPolicy``.
    """

    def __init__(
        self,
        network: DiscreteNetwork,
        *,
        epsilon: float = 0.0,
        action_space: str | TensorSpec | None = None,
        action_mask_key: NestedKey | None = None,
    ) -> None:
        """Build the policy from its network."""
        check_discrete_network("network", network, ("the logits",))
        super().__init__(network, epsilon, action_space, action_mask_key)
        self.out_keys = [self.action_key]

    def _choose(self, scores: list[Tensor], mask: Tensor | None) -> tuple[Tensor, dict[NestedKey, Tensor]]:
        (logits,) = scores
        return available_logits(logits, mask).argmax(-1, keepdim=True), {}
