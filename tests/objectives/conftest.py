"""A loss with its target updater, and latents for its target."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.objectives import SoftUpdate

from torchrl_bcq import BCQLoss

LOSSES = ("vae", "qvalue", "actor")


@pytest.fixture
def loss(modules):
    loss = BCQLoss(*modules)
    SoftUpdate(loss, tau=0.005)
    return loss


@pytest.fixture
def latent():
    return torch.randn(6, 10, 4).clamp(-0.5, 0.5)


def target_values(loss: BCQLoss, batch: TensorDict, latent: torch.Tensor) -> torch.Tensor:
    return loss.qvalue_loss(batch.clone(), latent)[1]["target_value"]
