"""Evaluation of policies, with episodes in environments and with metrics on a dataset."""

from torchrl_bcq.evaluation.metrics import DatasetMetrics, EnvironmentMetrics
from torchrl_bcq.evaluation.policy_actions import add_policy_actions
from torchrl_bcq.evaluation.rollouts import evaluate

__all__ = ["DatasetMetrics", "EnvironmentMetrics", "add_policy_actions", "evaluate"]
