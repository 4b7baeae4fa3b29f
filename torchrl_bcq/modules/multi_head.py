"""Networks that score all discrete actions of a state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import nn
from torchrl.data import TensorSpec

from torchrl_bcq.modules.dispatch import accepts_tensors


class MultiHeadNetwork(TensorDictModuleBase):
    """Network with one output ``[*B, K]`` per head, such as the values and the logits of ``K`` discrete actions.

    Args:
        heads: network of each output, by the key of the output's entry, in the order that the loss expects: for BCQ,
            first the values, then the logits. A head gets the observations, or the trunk's output.
        action_space: spec of one action, or ``"categorical"`` or ``"one-hot"``; losses and policies read it.
        trunk: network ``(*observations) -> features`` that all heads share; None means that the heads share nothing.
        observation_keys: observation entries that the network reads, in this order.
        action_key: entry of the action, which losses read and policies write.
        action_mask_key: entry of the available actions, booleans ``[*B, K]``, which losses and policies read; None
            means that all actions are always available.
        observation_specs: spec of one observation for each key; ``Policy.act`` uses them to check its input.

    Raises:
        ValueError: if there is no head.

    Example:
        >>> import torch
        >>> from torchrl.modules import MLP
        >>> from torchrl_bcq import DiscreteBCQLoss, DiscreteBCQPolicy, MultiHeadNetwork
        >>> trunk = torch.nn.Sequential(torch.nn.Linear(3, 64), torch.nn.ReLU())
        >>> heads = {"action_value": torch.nn.Linear(64, 5), "imitation_logits": torch.nn.Linear(64, 5)}
        >>> network = MultiHeadNetwork(heads, "categorical", trunk=trunk)
        >>> loss, policy = DiscreteBCQLoss(network), DiscreteBCQPolicy(network)
        >>> policy(torch.zeros(7, 3)).shape
        torch.Size([7])
    """

    def __init__(
        self,
        heads: Mapping[NestedKey, nn.Module],
        action_space: str | TensorSpec,
        *,
        trunk: nn.Module | None = None,
        observation_keys: Sequence[NestedKey] = ("observation",),
        action_key: NestedKey = "action",
        action_mask_key: NestedKey | None = None,
        observation_specs: Mapping[NestedKey, TensorSpec] | None = None,
    ) -> None:
        """Build the network from its trunk and its heads."""
        super().__init__()
        if not heads:
            raise ValueError("heads is empty, expected a network for each output.")
        self.in_keys = list(observation_keys)
        self.out_keys = list(heads)
        self._head_keys = list(heads)  # select_out_keys changes out_keys
        self.trunk = trunk
        self.heads = nn.ModuleList(heads.values())
        self.action_space = action_space
        self.action_key = action_key
        self.action_mask_key = action_mask_key
        self.observation_specs = observation_specs

    @accepts_tensors
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write all outputs, each ``[*B, K]``."""
        return self._write(tensordict, self._head_keys)

    def first(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write only the first output, ``[*B, K]``. The target of ``DiscreteBCQLoss`` needs no other."""
        return self._write(tensordict, self.out_keys[:1])

    def _write(self, tensordict: TensorDictBase, keys: Sequence[NestedKey]) -> TensorDictBase:
        inputs = [tensordict.get(key) for key in self.in_keys]
        if self.trunk is not None:
            inputs = [self.trunk(*inputs)]
        for key in keys:
            tensordict.set(key, self.heads[self._head_keys.index(key)](*inputs))
        return tensordict
