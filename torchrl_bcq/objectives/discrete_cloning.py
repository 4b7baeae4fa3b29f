"""Loss that trains a network by behaviour cloning of discrete actions."""

from __future__ import annotations

from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import TensorSpec

from torchrl_bcq.objectives.discrete import DiscreteLoss
from torchrl_bcq.protocols import DiscreteNetwork, check_discrete_network


class DiscreteCloningLoss(DiscreteLoss):
    """Behaviour cloning of discrete actions: the cross-entropy between the network's logits and the dataset's actions.

    Args:
        actor_network: network that writes logits ``[*B, K]``: that of ``make_discrete_cloning_modules``, or any
            ``DiscreteNetwork`` with one output.
        action_space: as in ``DiscreteBCQLoss``.
        reduction: reduction of the loss over the batch: ``"mean"`` (or None), ``"sum"`` or ``"none"``.
        use_prioritized_weights: ``"auto"`` or True weights the rows by ``priority_weight`` if the batch has this entry;
            False ignores the entry. The reduction ``"mean"`` then is the weighted mean, ``sum(w * loss) / sum(w)``.

    Reads: observations and action. If the network has an ``action_mask_key``, or after
    ``loss.set_keys(action_mask=key)``, the loss reads booleans ``[*B, K]``: an action that is not available has
    probability 0. Writes the cross-entropy of each row, ``[*B]``, to the input tensordict as the priority.

    Returns: ``loss_actor`` and ``imitation_accuracy [*B]``, 1 if the dataset's action is the most likely one.

    Raises:
        TypeError, ValueError: in the same cases as ``DiscreteBCQLoss``.

    Example:
        >>> from torchrl.envs import GymEnv
        >>> from torchrl_bcq import DiscreteCloningLoss, make_discrete_cloning_modules
        >>> env = GymEnv("CartPole-v1")
        >>> (actor,) = make_discrete_cloning_modules(env.observation_spec, env.action_spec)
        >>> list(DiscreteCloningLoss(actor)(env.rollout(100)).keys())
        ['loss_actor', 'imitation_accuracy']

    Source: the baseline "Behavioral Cloning" of arXiv:1910.01708.
    """

    def __init__(
        self,
        actor_network: DiscreteNetwork,
        *,
        action_space: str | TensorSpec | None = None,
        reduction: str | None = "mean",
        use_prioritized_weights: str | bool = "auto",
    ) -> None:
        """Build the loss from its network."""
        check_discrete_network("actor_network", actor_network, ("the logits",))
        super().__init__(
            {"actor": actor_network},
            action_space=action_space,
            metadata={"actor": ("imitation_accuracy",)},
            reduction=reduction,
            use_prioritized_weights=use_prioritized_weights,
        )

    def actor_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the cross-entropy, reduced over the batch, and the accuracy of each row."""
        batch = self.select(tensordict)
        (logits,) = self.scores(batch)
        nll, is_best = self.imitation(logits, self.action_index(batch, logits), self.mask(batch, logits))
        tensordict.set(self.tensor_keys.priority, nll.detach().float())  # the dtype of prioritized samplers
        return self.reduce(nll, tensordict), {"imitation_accuracy": is_best}
