"""Evaluation of policies, with episodes in environments and with metrics and estimates on a dataset."""

from torchrl_bcq.evaluation.estimate import Estimate as Estimate
from torchrl_bcq.evaluation.fqe import clone_probabilities as clone_probabilities, fit_fqe as fit_fqe
from torchrl_bcq.evaluation.fqe_metrics import FQEMetrics as FQEMetrics
from torchrl_bcq.evaluation.importance import ImportanceSampling as ImportanceSampling
from torchrl_bcq.evaluation.metrics import DatasetMetrics as DatasetMetrics, EnvironmentMetrics as EnvironmentMetrics
from torchrl_bcq.evaluation.policy_actions import (
    add_policy_actions as add_policy_actions,
    add_recorded_actions as add_recorded_actions,
    policy_actions as policy_actions,
)
from torchrl_bcq.evaluation.rollouts import evaluate as evaluate
from torchrl_bcq.evaluation.selection import OffPolicyEvaluation as OffPolicyEvaluation
