"""Networks that write one action for each state, inside the action bounds."""

from __future__ import annotations

from collections.abc import Sequence

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import nn
from torchrl.data import TensorSpec

from torchrl_bcq.bounds import action_bounds
from torchrl_bcq.functional import perturb, squash_to_bounds
from torchrl_bcq.modules.dispatch import accepts_tensors


class DeterministicActor(TensorDictModuleBase):
    """One action for each state; both the network that :class:`~torchrl_bcq.CloningLoss` trains and the policy.

    Args:
        network: ``(*observations) -> [*B, A]``, unbounded; tanh maps its output onto the action bounds.
        action_spec: bounded spec of one action, shape ``[A]``.
        observation_keys: entries given to the network, in this order.
        action_key: entry that is written.

    Raises:
        ValueError: if ``action_spec`` is not a finite box of rank 1; when called, if the network's output does not fit
            the action.

    Example:
        >>> import torch
        >>> from torchrl.data import Bounded
        >>> from torchrl.modules import MLP
        >>> from torchrl_bcq.modules import DeterministicActor
        >>> actor = DeterministicActor(MLP(in_features=3, out_features=1, num_cells=[64]), Bounded(-2, 2, (1,)))
        >>> actor(observation=torch.zeros(5, 3)).shape
        torch.Size([5, 1])
    """

    def __init__(
        self,
        network: nn.Module,
        action_spec: TensorSpec,
        *,
        observation_keys: Sequence[NestedKey] = ("observation",),
        action_key: NestedKey = "action",
    ) -> None:
        super().__init__()
        self.in_keys = list(observation_keys)
        self.out_keys = [action_key]
        self.network = network
        self.low, self.high = map(nn.Buffer, action_bounds(action_spec))

    @accepts_tensors
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the action ``[*B, A]``."""
        logits = self.network(*map(tensordict.get, self.in_keys))
        if logits.shape[-1] != len(self.low):
            raise ValueError(f"network gives {logits.shape[-1]} features, expected the action's {len(self.low)}.")
        action = squash_to_bounds(logits.to(self.low.dtype), self.low, self.high)  # casts back from autocast's dtype
        return tensordict.set(self.out_keys[0], action)


class PerturbationActor(TensorDictModuleBase):
    """Moves an action by at most ``phi`` half-ranges, inside the action bounds.

    Args:
        network: ``(*observations, action [*B, A]) -> [*B, A]``, unbounded.
        action_spec: bounded spec of one action, shape ``[A]``.
        phi: largest move of each action dimension, as a fraction of half its range; 0 leaves actions unchanged.
        observation_keys: entries given to the network before the action, in this order.
        action_key: entry that is read and overwritten.

    Raises:
        ValueError: if ``action_spec`` is not a finite box of rank 1, or ``phi`` is negative; when called, if the
            network's output does not fit the action.

    Example:
        >>> import torch
        >>> from torchrl.data import Bounded
        >>> from torchrl.modules import MLP
        >>> from torchrl_bcq.modules import PerturbationActor
        >>> network = MLP(in_features=3 + 1, out_features=1, num_cells=[64])
        >>> actor = PerturbationActor(network, Bounded(-2, 2, (1,)), phi=0.05)
        >>> moved = actor(observation=torch.zeros(5, 3), action=torch.ones(5, 1))
        >>> bool(((moved - 1).abs() <= 0.05 * 2).all())
        True

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
        self.low, self.high = map(nn.Buffer, action_bounds(action_spec))

    @accepts_tensors
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Overwrite the action ``[*B, A]`` with the perturbed one."""
        *observations, action = map(tensordict.get, self.in_keys)
        logits = self.network(*observations, action)
        if not logits.shape[-1] == action.shape[-1] == len(self.low):
            raise ValueError(
                f"the actor's network gives {logits.shape[-1]} features, the action has {action.shape[-1]} dimensions, "
                f"and action_spec has {len(self.low)}; all three must be equal."
            )
        logits = logits.to(self.low.dtype)  # casts back from autocast's dtype
        return tensordict.set(self.out_keys[0], perturb(action, logits, self.phi, self.low, self.high))
