"""Evaluation of policies, with episodes in environments and with metrics on a dataset."""

from torchrl_bcq.evaluation.metrics import DatasetMetrics, EnvironmentMetrics
from torchrl_bcq.evaluation.rollouts import evaluate

__all__ = ["DatasetMetrics", "EnvironmentMetrics", "evaluate"]
