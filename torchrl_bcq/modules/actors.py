"""Networks that write one action within the action bounds for each state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import nn
from torchrl.data import TensorSpec

from torchrl_bcq.bounds import action_bounds
from torchrl_bcq.functional import perturb, squash_to_bounds
from torchrl_bcq.modules.acting import Policy
from torchrl_bcq.modules.dispatch import accepts_tensors


class DeterministicActor(Policy):
    """Deterministic policy: one action for each state. ``CloningLoss`` trains this policy.

    Args:
        network: network ``(*observations) -> [*B, A]`` with unbounded output. The actor maps this output to the action
            bounds with tanh.
        action_spec: bounded spec of one action, shape ``[A]``.
        observation_keys: observation entries that the network reads, in this order.
        action_key: key of the entry into which the actor writes the action.
        observation_specs: spec of one observation for each key; ``Policy.act`` uses them to check its input.

    Raises:
        ValueError: if the action spec is not a finite box of rank 1. A call raises this error if the network's output
            does not have the size of the action.

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
        observation_specs: Mapping[NestedKey, TensorSpec] | None = None,
    ) -> None:
        """Build the actor from its network."""
        super().__init__(observation_specs)
        self.in_keys = list(observation_keys)
        self.out_keys = [action_key]
        self.network = network
        self.low, self.high = map(nn.Buffer, action_bounds(action_spec))

    @accepts_tensors
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the action ``[*B, A]``."""
        logits = self.network(*map(tensordict.get, self.in_keys))
        if logits.shape[-1] != len(self.low):
            raise ValueError(
                f"network returns {logits.shape[-1]} features, but the action has {len(self.low)} dimensions; change "
                "the network's output size."
            )
        action = squash_to_bounds(logits.to(self.low.dtype), self.low, self.high)  # autocast may change the dtype
        return tensordict.set(self.out_keys[0], action)


class PerturbationActor(TensorDictModuleBase):
    """Changes an action by at most ``phi`` times half the action range, and keeps it within the bounds.

    Args:
        network: network ``(*observations, action [*B, A]) -> [*B, A]`` with unbounded output.
        action_spec: bounded spec of one action, shape ``[A]``.
        phi: largest change of each action dimension, as a fraction of half the dimension's range; 0 means no change.
        observation_keys: observation entries that the network reads before the action, in this order.
        action_key: key of the action entry. The actor reads and overwrites this entry.

    Raises:
        ValueError: if ``action_spec`` is not a finite box of rank 1, or ``phi`` is negative. A call raises this error
            if the network's output does not have the size of the action.

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
        """Build the actor from its network."""
        super().__init__()
        if not phi >= 0:
            raise ValueError(f"phi is {phi}, expected 0 or more.")
        self.in_keys = [*observation_keys, action_key]
        self.out_keys = [action_key]
        self.network = network
        self.phi = phi
        self.low, self.high = map(nn.Buffer, action_bounds(action_spec))

    @accepts_tensors
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Overwrite the action ``[*B, A]`` with the perturbed action."""
        *observations, action = map(tensordict.get, self.in_keys)
        logits = self.network(*observations, action)
        if not logits.shape[-1] == action.shape[-1] == len(self.low):
            raise ValueError(
                f"the actor's network returns {logits.shape[-1]} features, the action has {action.shape[-1]} "
                f"dimensions, and action_spec has {len(self.low)} dimensions; make all three sizes equal."
            )
        logits = logits.to(self.low.dtype)  # undoes a change of the dtype by autocast
        return tensordict.set(self.out_keys[0], perturb(action, logits, self.phi, self.low, self.high))
