"""Objectives: the losses that training minimises."""

from torchrl_bcq.objectives.base import OfflineLoss
from torchrl_bcq.objectives.bcq import BCQLoss
from torchrl_bcq.objectives.cloning import CloningLoss
from torchrl_bcq.objectives.values import ValueLoss

__all__ = ["BCQLoss", "CloningLoss", "OfflineLoss", "ValueLoss"]
