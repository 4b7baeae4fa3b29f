"""Training runs: their settings and folders, and how they are built, trained and loaded."""

from torchrl_bcq.runs.algorithms import Algorithm as Algorithm
from torchrl_bcq.runs.policy import load_policy as load_policy
