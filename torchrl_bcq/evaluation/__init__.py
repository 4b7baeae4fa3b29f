"""Evaluation of policies: episodes in environments, and metrics on data."""

from torchrl_bcq.evaluation.metrics import DatasetMetrics, EnvironmentMetrics
from torchrl_bcq.evaluation.rollouts import evaluate

__all__ = ["DatasetMetrics", "EnvironmentMetrics", "evaluate"]
