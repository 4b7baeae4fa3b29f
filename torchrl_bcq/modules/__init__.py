"""Networks and policies."""

from torchrl_bcq.modules.acting import Policy as Policy
from torchrl_bcq.modules.actors import DeterministicActor as DeterministicActor, PerturbationActor as PerturbationActor
from torchrl_bcq.modules.behavior import ActionFlow as ActionFlow, ActionMixture as ActionMixture
from torchrl_bcq.modules.build import make_bcq_modules as make_bcq_modules, make_cloning_modules as make_cloning_modules
from torchrl_bcq.modules.discrete_build import (
    make_discrete_bcq_modules as make_discrete_bcq_modules,
    make_discrete_cloning_modules as make_discrete_cloning_modules,
)
from torchrl_bcq.modules.discrete_policy import (
    DiscreteBCQPolicy as DiscreteBCQPolicy,
    DiscreteCloningPolicy as DiscreteCloningPolicy,
)
from torchrl_bcq.modules.fqe_build import make_fqe_modules as make_fqe_modules
from torchrl_bcq.modules.history import History as History
from torchrl_bcq.modules.multi_head import MultiHeadNetwork as MultiHeadNetwork
from torchrl_bcq.modules.normalization import Normalization as Normalization, Standardize as Standardize
from torchrl_bcq.modules.policy import BCQPolicy as BCQPolicy, BehaviorCloningPolicy as BehaviorCloningPolicy
from torchrl_bcq.modules.q_ensemble import QEnsemble as QEnsemble
from torchrl_bcq.modules.vae import ActionVAE as ActionVAE
