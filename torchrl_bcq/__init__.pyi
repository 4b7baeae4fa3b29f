"""What ``import torchrl_bcq`` offers."""

from . import (
    data as data,
)
from . import (
    functional as functional,
)
from . import (
    modules as modules,
)
from . import (
    objectives as objectives,
)
from . import (
    protocols as protocols,
)
from . import (
    trainers as trainers,
)
from .data import (
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
from .modules import (
    ActionVAE,
    BCQPolicy,
    BehaviorCloningPolicy,
    Normalization,
    PerturbationActor,
    QEnsemble,
    Standardize,
    make_bcq_modules,
)
from .objectives import BCQLoss
from .protocols import CriticEnsemble, GenerativeModel
from .trainers import (
    BCQOptimizationStepper,
    BCQTrainer,
    DatasetMetrics,
    EnvironmentMetrics,
    KeepBest,
    NetworkLRScheduler,
    OfflineCollector,
    evaluate,
    make_checkpoint,
    train_together,
)

__version__: str

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
    "train_together",
]
