"""What is learned, and how it acts."""

from torchrl_bcq.modules.build import make_bcq_modules
from torchrl_bcq.modules.normalization import Normalization, Standardize
from torchrl_bcq.modules.perturbation import PerturbationActor
from torchrl_bcq.modules.policy import BCQPolicy, BehaviorCloningPolicy
from torchrl_bcq.modules.q_ensemble import QEnsemble
from torchrl_bcq.modules.vae import ActionVAE

__all__ = [
    "ActionVAE",
    "BCQPolicy",
    "BehaviorCloningPolicy",
    "Normalization",
    "PerturbationActor",
    "QEnsemble",
    "Standardize",
    "make_bcq_modules",
]
