"""Evaluation of policies, with episodes in environments and with metrics and estimates on a dataset."""

from torchrl_bcq.evaluation.estimate import Estimate
from torchrl_bcq.evaluation.fqe import clone_probabilities, fit_fqe
from torchrl_bcq.evaluation.fqe_metrics import FQEMetrics
from torchrl_bcq.evaluation.importance import ImportanceSampling
from torchrl_bcq.evaluation.metrics import DatasetMetrics, EnvironmentMetrics
from torchrl_bcq.evaluation.policy_actions import add_policy_actions, add_recorded_actions, policy_actions
from torchrl_bcq.evaluation.rollouts import evaluate
from torchrl_bcq.evaluation.selection import OffPolicyEvaluation

__all__ = [
    "DatasetMetrics",
    "EnvironmentMetrics",
    "Estimate",
    "FQEMetrics",
    "ImportanceSampling",
    "OffPolicyEvaluation",
    "add_policy_actions",
    "add_recorded_actions",
    "clone_probabilities",
    "evaluate",
    "fit_fqe",
    "policy_actions",
]
