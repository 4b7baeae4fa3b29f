"""A loss whose critics have batch normalisation."""

from __future__ import annotations

import torch
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.objectives import SoftUpdate

from torchrl_bcq import BCQLoss, QEnsemble, make_bcq_modules

from .conftest import ACTION_SPEC, OBSERVATION_SPEC


class Normalized(nn.Module):
    """One hidden layer, normalised over the rows."""

    def __init__(self, outputs: int, norm: type[nn.Module] = nn.BatchNorm1d) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 8), norm(8), nn.ReLU(), nn.Linear(8, outputs))

    def forward(self, observation, action):
        return self.layers(torch.cat([observation, action], -1))


def with_batch_norm() -> BCQLoss:
    """A loss with a target updater."""
    vae, actor, _ = make_bcq_modules(OBSERVATION_SPEC, ACTION_SPEC, hidden=(8,), vae_hidden=(8,))
    keys = ["observation", "action"], ["state_action_value"]
    loss = BCQLoss(vae, actor, QEnsemble([TensorDictModule(Normalized(1), *keys) for _ in range(2)]))
    SoftUpdate(loss, tau=0.005)
    return loss
