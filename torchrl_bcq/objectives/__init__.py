"""Objectives: the losses that training minimises."""

from torchrl_bcq.objectives.base import OfflineLoss
from torchrl_bcq.objectives.bcq import BCQLoss
from torchrl_bcq.objectives.cloning import CloningLoss
from torchrl_bcq.objectives.discrete import DiscreteLoss
from torchrl_bcq.objectives.discrete_bcq import DiscreteBCQLoss
from torchrl_bcq.objectives.discrete_cloning import DiscreteCloningLoss
from torchrl_bcq.objectives.fqe import DiscreteFQELoss, FQELoss
from torchrl_bcq.objectives.values import ValueLoss

__all__ = [
    "BCQLoss",
    "CloningLoss",
    "DiscreteBCQLoss",
    "DiscreteCloningLoss",
    "DiscreteFQELoss",
    "DiscreteLoss",
    "FQELoss",
    "OfflineLoss",
    "ValueLoss",
]
