"""Behaviour cloning of a deterministic network."""

from __future__ import annotations

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from torchrl_bcq.objectives.base import OfflineLoss


class CloningLoss(OfflineLoss):
    """Behaviour cloning: the mean squared error between a network's action and the dataset's.

    Args:
        actor_network: reads observations and writes the action, such as :class:`~torchrl_bcq.DeterministicActor`.
        reduction: ``"mean"`` (or None), ``"sum"`` or ``"none"`` over the batch.
        use_prioritized_weights: ``"auto"`` weighs each row by ``priority_weight`` if a batch holds it.

    Reads: observations and action ``[*B, A]``. Writes the squared error of each row, ``[*B]``, as the priority.

    Returns: ``loss_actor``.

    Raises:
        ValueError: at construction, if the network writes more than an action, or a setting is out of range; later, if
            a batch lacks an entry, or shapes or dtypes do not fit.

    >>> from torchrl.data import Bounded, Unbounded
    >>> from torchrl_bcq import CloningLoss, make_cloning_modules
    >>> (actor,) = make_cloning_modules(Unbounded((3,)), Bounded(-1, 1, (2,)))
    >>> CloningLoss(actor).out_keys
    ['loss_actor']

    Source: Pomerleau, "ALVINN", 1988; the baseline "BC" of arXiv:1812.02900.
    """

    def __init__(
        self,
        actor_network: TensorDictModuleBase,
        *,
        reduction: str | None = "mean",
        use_prioritized_weights: str | bool = "auto",
    ) -> None:
        if len(actor_network.out_keys) != 1:
            raise ValueError(f"actor_network writes {actor_network.out_keys}, expected the action alone.")
        super().__init__(
            {"actor": actor_network},
            action_key=actor_network.out_keys[0],
            reduction=reduction,
            use_prioritized_weights=use_prioritized_weights,
        )

    def actor_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared error, mean over action dimensions."""
        batch = self.select(tensordict)
        key = self.tensor_keys.action
        action = self.actor_network(batch.exclude(key)).get(key)
        if action.shape != batch.get(key).shape:
            found, expected = tuple(action.shape), tuple(batch.get(key).shape)
            raise ValueError(f"actor_network writes actions of shape {found}, the batch has {expected}.")
        error = (action - batch.get(key)).square().mean(-1)  # [*B, A] -> [*B]
        tensordict.set(self.tensor_keys.priority, error.detach())
        return self.reduce(error, tensordict), {}
