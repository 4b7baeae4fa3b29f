"""Loss that trains a deterministic network by behaviour cloning."""

from __future__ import annotations

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from torchrl_bcq.objectives.base import OfflineLoss


class CloningLoss(OfflineLoss):
    """Behaviour cloning loss: the mean squared error between the network's action and the action in the dataset.

    Args:
        actor_network: network that reads observations and writes the action, such as ``DeterministicActor``.
        reduction: reduction of the loss over the batch: ``"mean"`` (or None), ``"sum"`` or ``"none"``.
        use_prioritized_weights: ``"auto"`` or True weights the rows by ``priority_weight`` if the batch has this entry;
            False ignores the entry. The reduction ``"mean"`` then is the weighted mean, ``sum(w * loss) / sum(w)``.

    Reads: observations and action ``[*B, A]``. Writes the squared error of each row, ``[*B]``, to the input tensordict
    as the priority.

    Returns: ``loss_actor``.

    Raises:
        ValueError: if the network does not write exactly one entry, or a setting is out of range. A call of the loss
            also raises this error if the batch lacks an entry or an entry has a wrong shape or dtype.

    Example:
        >>> from torchrl.envs import GymEnv
        >>> from torchrl_bcq import CloningLoss, make_cloning_modules
        >>> env = GymEnv("Pendulum-v1")
        >>> (actor,) = make_cloning_modules(env.observation_spec, env.action_spec)
        >>> list(CloningLoss(actor)(env.rollout(100)).keys())
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
        """Build the loss from its network."""
        if len(actor_network.out_keys) != 1:
            raise ValueError(f"actor_network writes {actor_network.out_keys}, expected one entry, the action.")
        super().__init__(
            {"actor": actor_network},
            action_key=actor_network.out_keys[0],
            reduction=reduction,
            use_prioritized_weights=use_prioritized_weights,
        )

    def actor_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the squared error, averaged over the action dimensions and reduced over the batch."""
        batch = self.select(tensordict)
        key = self.tensor_keys.action
        action = self.actor_network(batch.exclude(key)).get(key)
        if action.shape != batch.get(key).shape:
            found, expected = tuple(action.shape), tuple(batch.get(key).shape)
            raise ValueError(
                f"actor_network writes actions of shape {found}, but the batch has actions of shape {expected}; build "
                "the network for the actions of the dataset."
            )
        error = (action - batch.get(key)).square().mean(-1)  # [*B, A] -> [*B]
        tensordict.set(self.tensor_keys.priority, error.detach().float())  # the dtype of prioritized samplers
        return self.reduce(error, tensordict), {}
