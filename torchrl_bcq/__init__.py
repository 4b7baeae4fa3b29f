"""Batch-Constrained deep Q-learning as a set of TorchRL components."""

from importlib.metadata import version

from torchrl_bcq.data import from_arrays, load_hdf5, load_minari, make_replay_buffer
from torchrl_bcq.modules import (
    ActionVAE,
    BCQPolicy,
    BehaviorCloningPolicy,
    PerturbationActor,
    QEnsemble,
    make_bcq_modules,
)
from torchrl_bcq.objectives import BCQLoss
from torchrl_bcq.protocols import CriticEnsemble, GenerativeModel
from torchrl_bcq.trainers import BCQOptimizationStepper, BCQTrainer, OfflineCollector

__version__ = version("torchrl-bcq")

__all__ = [
    "ActionVAE",
    "BCQLoss",
    "BCQOptimizationStepper",
    "BCQPolicy",
    "BCQTrainer",
    "BehaviorCloningPolicy",
    "CriticEnsemble",
    "GenerativeModel",
    "OfflineCollector",
    "PerturbationActor",
    "QEnsemble",
    "from_arrays",
    "load_hdf5",
    "load_minari",
    "make_bcq_modules",
    "make_replay_buffer",
]
