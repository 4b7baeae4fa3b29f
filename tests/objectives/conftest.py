"""Objectives with small networks and their target updaters."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Binary, Categorical, Composite, OneHot
from torchrl.objectives import SoftUpdate

from torchrl_bcq import (
    BCQLoss,
    CloningLoss,
    DiscreteBCQLoss,
    DiscreteCloningLoss,
    DiscreteFQELoss,
    FQELoss,
    OfflineLoss,
    make_bcq_modules,
    make_cloning_modules,
    make_discrete_bcq_modules,
    make_discrete_cloning_modules,
    make_fqe_modules,
)

from ..conftest import ACTION_SPEC, OBSERVATION_SPEC, random_transitions
from ..own_objective import OwnLoss, make_own_modules

LOSSES = ("vae", "qvalue", "actor")
NUM_ACTIONS = 5
MASKED = Composite(observation=OBSERVATION_SPEC, available=Binary(NUM_ACTIONS, dtype=torch.bool))


def bcq_modules() -> tuple:
    return make_bcq_modules(OBSERVATION_SPEC, ACTION_SPEC, hidden=(8,), vae_hidden=(8,))


def discrete_modules(make=make_discrete_bcq_modules, kind: type = Categorical, key="choice", masked=False) -> tuple:
    keys = {"action_key": key, "action_mask_key": "available"}
    return make(MASKED if masked else OBSERVATION_SPEC, kind(NUM_ACTIONS), hidden=(8,), **keys)


OBJECTIVES = {  # each makes a loss of new networks
    "bcq": lambda: BCQLoss(*bcq_modules()),
    "bcq without an actor": lambda: BCQLoss(*(None if i == 1 else network for i, network in enumerate(bcq_modules()))),
    "cloning": lambda: CloningLoss(*make_cloning_modules(OBSERVATION_SPEC, ACTION_SPEC, hidden=(8,))),
    "discrete bcq": lambda: DiscreteBCQLoss(*discrete_modules()),
    "discrete bcq, one-hot": lambda: DiscreteBCQLoss(*discrete_modules(kind=OneHot, key="one_hot")),
    "discrete bcq, masked": lambda: DiscreteBCQLoss(*discrete_modules(masked=True)),
    "fqe": lambda: FQELoss(*make_fqe_modules(OBSERVATION_SPEC, ACTION_SPEC, hidden=(8,))),
    "discrete fqe": lambda: DiscreteFQELoss(*discrete_modules(make_fqe_modules)),
    "discrete cloning": lambda: DiscreteCloningLoss(*discrete_modules(make_discrete_cloning_modules)),
    "own": lambda: OwnLoss(*make_own_modules(OBSERVATION_SPEC, ACTION_SPEC)),
}


def with_updater(loss: OfflineLoss) -> OfflineLoss:
    """TorchRL warns of targets without an updater."""
    if loss.delayed_names:
        SoftUpdate(loss, tau=0.005)
    return loss


DELAYED = ("bcq", "fqe", "discrete fqe", "discrete bcq", "discrete bcq, one-hot", "discrete bcq, masked", "own")


@pytest.fixture
def make_batch() -> Callable[..., TensorDict]:
    """Transitions with an action of each kind, and masks in which the taken action is available."""

    def make(*batch: int, dtype: torch.dtype = torch.float32) -> TensorDict:
        transitions = random_transitions(*batch, dtype=dtype)
        choice = torch.randint(NUM_ACTIONS, batch)
        transitions["choice"] = choice
        transitions["one_hot"] = torch.nn.functional.one_hot(choice, NUM_ACTIONS)
        transitions["available"] = transitions["one_hot"].bool() | (torch.rand(*batch, NUM_ACTIONS) < 0.5)
        transitions["next", "available"] = torch.rand(*batch, NUM_ACTIONS) < 0.5
        transitions["next", "available"][..., 0] = True
        transitions["next", "policy_action"] = random_transitions(*batch, 3, dtype=dtype)["action"]  # three per state
        transitions["next", "policy_probability"] = torch.randn(*batch, NUM_ACTIONS, dtype=dtype).softmax(-1)
        return transitions

    return make


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
