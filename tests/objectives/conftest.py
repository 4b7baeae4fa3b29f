"""Objectives with small networks and their target updaters."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.objectives import SoftUpdate

from torchrl_bcq import BCQLoss, CloningLoss, OfflineLoss, make_bcq_modules, make_cloning_modules

from ..conftest import ACTION_SPEC, OBSERVATION_SPEC
from ..own_objective import OwnLoss, make_own_modules

LOSSES = ("vae", "qvalue", "actor")


def bcq_modules() -> tuple:
    return make_bcq_modules(OBSERVATION_SPEC, ACTION_SPEC, hidden=(8,), vae_hidden=(8,))


OBJECTIVES = {  # each makes a loss of new networks
    "bcq": lambda: BCQLoss(*bcq_modules()),
    "bcq without an actor": lambda: BCQLoss(*(None if i == 1 else network for i, network in enumerate(bcq_modules()))),
    "cloning": lambda: CloningLoss(*make_cloning_modules(OBSERVATION_SPEC, ACTION_SPEC, hidden=(8,))),
    "own": lambda: OwnLoss(*make_own_modules(OBSERVATION_SPEC, ACTION_SPEC)),
}


def with_updater(loss: OfflineLoss) -> OfflineLoss:
    """TorchRL warns of targets without an updater."""
    if loss.delayed_names:
        SoftUpdate(loss, tau=0.005)
    return loss


def make_loss(name: str) -> OfflineLoss:
    return with_updater(OBJECTIVES[name]())


def evaluate(loss: OfflineLoss, batch: TensorDict) -> dict[str, torch.Tensor]:
    """Losses and metadata, always from the same noise."""
    torch.manual_seed(1)
    return {name: value.detach() for name, value in loss(batch.clone()).items()}


@pytest.fixture
def loss(modules):
    return with_updater(BCQLoss(*modules))


@pytest.fixture
def latent():
    return torch.randn(6, 10, 4).clamp(-0.5, 0.5)


def target_values(loss: BCQLoss, batch: TensorDict, latent: torch.Tensor) -> torch.Tensor:
    return loss.qvalue_loss(batch.clone(), latent)[1]["target_value"]
