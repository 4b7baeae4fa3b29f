"""The perturbation model: small, learned corrections of sampled actions."""

from __future__ import annotations

from collections.abc import Sequence

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import nn
from torchrl.data import TensorSpec

from torchrl_bcq.functional import perturb
from torchrl_bcq.modules.bounds import action_bounds


class PerturbationActor(TensorDictModuleBase):
    """Replaces an action by one at most ``phi`` half-ranges away from it, inside the action bounds.

    Args:
        network: ``(*observations, action [*B, A]) -> [*B, A]``, unbounded.
        action_spec: bounded spec of one action, shape ``[A]``.
        phi: largest move of each action dimension, as a fraction of half its range. 0 turns the actor off.
        observation_keys: entries given to the network before the action, in this order.
        action_key: entry that is read and overwritten.

    Raises:
        ValueError: if ``action_spec`` is not a finite box of rank 1, or ``phi`` is negative; when called, if the
            network's output does not fit the action.

    Source: arXiv:1812.02900, eq. 11 and appendix D.1.
    """

    def __init__(
        self,
        network: nn.Module,
        action_spec: TensorSpec,
        *,
        phi: float = 0.05,
        observation_keys: Sequence[NestedKey] = ("observation",),
        action_key: NestedKey = "action",
    ) -> None:
        super().__init__()
        if not phi >= 0:
            raise ValueError(f"phi is {phi}; it is a distance, 0 or more.")
        self.in_keys = [*observation_keys, action_key]
        self.out_keys = [action_key]
        self.network = network
        self.phi = phi
        low, high = action_bounds(action_spec)
        self.register_buffer("low", low)
        self.register_buffer("high", high)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Overwrite the action ``[*B, A]`` by the perturbed one."""
        inputs = [tensordict.get(key) for key in self.in_keys]
        action, logits = inputs[-1], self.network(*inputs)
        if not logits.shape[-1] == action.shape[-1] == len(self.low):
            raise ValueError(
                f"the actor's network gives {logits.shape[-1]} features for actions of {action.shape[-1]} dimensions, "
                f"of which action_spec has {len(self.low)}; all three must be equal."
            )
        logits = logits.to(self.low.dtype)  # from autocast's
        return tensordict.set(self.out_keys[0], perturb(action, logits, self.phi, self.low, self.high))
