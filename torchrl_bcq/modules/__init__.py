"""Networks and policies."""

from torchrl_bcq.modules.acting import Policy
from torchrl_bcq.modules.actors import DeterministicActor, PerturbationActor
from torchrl_bcq.modules.behavior import ActionFlow, ActionMixture
from torchrl_bcq.modules.build import make_bcq_modules, make_cloning_modules
from torchrl_bcq.modules.discrete_build import make_discrete_bcq_modules, make_discrete_cloning_modules
from torchrl_bcq.modules.discrete_policy import DiscreteBCQPolicy, DiscreteCloningPolicy
from torchrl_bcq.modules.fqe_build import make_fqe_modules
from torchrl_bcq.modules.history import History
from torchrl_bcq.modules.multi_head import MultiHeadNetwork
from torchrl_bcq.modules.normalization import Normalization, Standardize
from torchrl_bcq.modules.policy import BCQPolicy, BehaviorCloningPolicy
from torchrl_bcq.modules.q_ensemble import QEnsemble
from torchrl_bcq.modules.vae import ActionVAE

__all__ = [
    "ActionFlow",
    "ActionMixture",
    "ActionVAE",
    "BCQPolicy",
    "BehaviorCloningPolicy",
    "DeterministicActor",
    "DiscreteBCQPolicy",
    "DiscreteCloningPolicy",
    "History",
    "MultiHeadNetwork",
    "Normalization",
    "PerturbationActor",
    "Policy",
    "QEnsemble",
    "Standardize",
    "make_bcq_modules",
    "make_cloning_modules",
    "make_discrete_bcq_modules",
    "make_discrete_cloning_modules",
    "make_fqe_modules",
]
