"""Batch-Constrained deep Q-learning as a set of TorchRL components."""

from importlib.metadata import version

from torchrl_bcq.data import (
    DatasetError,
    WeightedSampler,
    describe,
    episode_weights,
    from_arrays,
    from_rollouts,
    load_d4rl,
    load_hdf5,
    load_memmap,
    load_minari,
    load_npz,
    load_table,
    load_transitions,
    make_replay_buffer,
    multi_step,
    return_weights,
    split_episodes,
)
from torchrl_bcq.modules import (
    ActionVAE,
    BCQPolicy,
    BehaviorCloningPolicy,
    Normalization,
    PerturbationActor,
    QEnsemble,
    Standardize,
    make_bcq_modules,
)
from torchrl_bcq.objectives import BCQLoss
from torchrl_bcq.protocols import CriticEnsemble, GenerativeModel
from torchrl_bcq.trainers import (
    BCQOptimizationStepper,
    BCQTrainer,
    DatasetMetrics,
    EnvironmentMetrics,
    KeepBest,
    NetworkLRScheduler,
    OfflineCollector,
    evaluate,
    make_checkpoint,
)

__version__ = version("torchrl-bcq")

__all__ = [
    "ActionVAE",
    "BCQLoss",
    "BCQOptimizationStepper",
    "BCQPolicy",
    "BCQTrainer",
    "BehaviorCloningPolicy",
    "CriticEnsemble",
    "DatasetError",
    "DatasetMetrics",
    "EnvironmentMetrics",
    "GenerativeModel",
    "KeepBest",
    "NetworkLRScheduler",
    "Normalization",
    "OfflineCollector",
    "PerturbationActor",
    "QEnsemble",
    "Standardize",
    "WeightedSampler",
    "describe",
    "episode_weights",
    "evaluate",
    "from_arrays",
    "from_rollouts",
    "load_d4rl",
    "load_hdf5",
    "load_memmap",
    "load_minari",
    "load_npz",
    "load_table",
    "load_transitions",
    "make_bcq_modules",
    "make_checkpoint",
    "make_replay_buffer",
    "multi_step",
    "return_weights",
    "split_episodes",
]
