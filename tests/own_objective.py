"""An objective as a user would write it, and its networks; several tests train it."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from torchrl_bcq import ValueLoss, make_bcq_modules, make_cloning_modules


class OwnLoss(ValueLoss):
    """Clones a policy and learns its values: a target critic bootstraps at the cloned policy's next action."""

    def __init__(
        self, policy_network: TensorDictModuleBase, critic_network: TensorDictModuleBase, *, new: float = 1.0
    ) -> None:
        super().__init__(
            {"policy": policy_network, "critic": critic_network},
            delayed=["critic"],
            metadata={"critic": ("td_error", "pred_value", "target_value")},
            action_key=policy_network.out_keys[0],
            value_key=critic_network.out_keys[-1],
        )
        self.new = new

    def policy_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """``new`` times the squared distance from the dataset's action."""
        batch, key = self.select(tensordict), self.tensor_keys.action
        cloned = self.policy_network(batch.exclude(key)).get(key)
        return self.reduce(self.new * (cloned - batch.get(key)).square().sum(-1), tensordict), {}

    def critic_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared TD error of the cloned policy's value."""
        batch = self.select_transitions(tensordict)
        with torch.no_grad(), self.target_autocast(), self.target_networks():
            next_value = self.value(self.policy_network(batch.get("next").select(*self.policy_network.in_keys)))
        target = self.td_target(batch, next_value.unsqueeze(-1))
        return self.td_distance(self.value(batch).unsqueeze(-1), target, tensordict)

    def value(self, tensordict: TensorDictBase) -> Tensor:
        """The critic's value: ``[*B]``."""
        written = self.critic_network(tensordict.select(*self.critic_network.in_keys))
        return written.get(self.tensor_keys.state_action_value).squeeze(-1)


def make_own_modules(observation_spec, action_spec, *, width: int = 8, normalization=None, device=None) -> tuple:
    """A policy and one critic, with one hidden layer each."""
    settings = {"hidden": (width,), "normalization": normalization, "device": device}
    (policy,) = make_cloning_modules(observation_spec, action_spec, **settings)
    *_, critic = make_bcq_modules(observation_spec, action_spec, num_critics=1, **settings)
    return policy, critic
