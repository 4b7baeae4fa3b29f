"""Objectives: the losses that training minimises."""

from torchrl_bcq.objectives.base import OfflineLoss as OfflineLoss
from torchrl_bcq.objectives.bcq import BCQLoss as BCQLoss
from torchrl_bcq.objectives.cloning import CloningLoss as CloningLoss
from torchrl_bcq.objectives.discrete import DiscreteLoss as DiscreteLoss
from torchrl_bcq.objectives.discrete_bcq import DiscreteBCQLoss as DiscreteBCQLoss
from torchrl_bcq.objectives.discrete_cloning import DiscreteCloningLoss as DiscreteCloningLoss
from torchrl_bcq.objectives.fqe import DiscreteFQELoss as DiscreteFQELoss, FQELoss as FQELoss
from torchrl_bcq.objectives.values import ValueLoss as ValueLoss
