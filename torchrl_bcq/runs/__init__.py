"""Training runs: settings, folders, building, loading."""

from torchrl_bcq.runs.algorithms import Algorithm
from torchrl_bcq.runs.policy import load_policy

__all__ = ["Algorithm", "load_policy"]
