"""Hydra configs in TorchRL's own config groups; importing this registers them, beside TorchRL's.

``import torchrl_bcq`` does not import this room, nor Hydra.
"""

try:
    from hydra.core.config_store import ConfigStore
except ImportError as error:
    raise ImportError("torchrl_bcq.conf needs Hydra: pip install hydra-core.") from error

from torchrl_bcq.conf.data import (
    BCQReplayBufferConfig,
    D4RLDatasetConfig,
    HDF5DatasetConfig,
    MemmapDatasetConfig,
    MinariDatasetConfig,
    NPZDatasetConfig,
    TableDatasetConfig,
)
from torchrl_bcq.conf.modules import (
    ActionVAEConfig,
    BCQModulesConfig,
    BCQPolicyConfig,
    PerturbationActorConfig,
    QEnsembleConfig,
)
from torchrl_bcq.conf.objectives import BCQLossConfig, BCQSoftUpdateConfig
from torchrl_bcq.conf.root import BCQ
from torchrl_bcq.conf.trainers import BCQOptimizationStepperConfig, BCQTrainerConfig

__all__ = [
    "ActionVAEConfig",
    "BCQLossConfig",
    "BCQModulesConfig",
    "BCQOptimizationStepperConfig",
    "BCQPolicyConfig",
    "BCQReplayBufferConfig",
    "BCQSoftUpdateConfig",
    "BCQTrainerConfig",
    "D4RLDatasetConfig",
    "HDF5DatasetConfig",
    "MemmapDatasetConfig",
    "MinariDatasetConfig",
    "NPZDatasetConfig",
    "PerturbationActorConfig",
    "QEnsembleConfig",
    "TableDatasetConfig",
]

for _group, _name, _node in (
    ("model", "action_vae", ActionVAEConfig),
    ("model", "perturbation_actor", PerturbationActorConfig),
    ("model", "q_ensemble", QEnsembleConfig),
    ("model", "bcq_modules", BCQModulesConfig),
    ("model", "bcq_policy", BCQPolicyConfig),
    ("loss", "bcq", BCQLossConfig),
    ("target_net_updater", "bcq", BCQSoftUpdateConfig),
    ("dataset", "hdf5", HDF5DatasetConfig),  # TorchRL has no such group
    ("dataset", "npz", NPZDatasetConfig),
    ("dataset", "table", TableDatasetConfig),
    ("dataset", "minari", MinariDatasetConfig),
    ("dataset", "d4rl", D4RLDatasetConfig),
    ("dataset", "memmap", MemmapDatasetConfig),
    ("replay_buffer", "bcq", BCQReplayBufferConfig),
    ("hook", "bcq_optimization", BCQOptimizationStepperConfig),
    ("trainer", "bcq", BCQTrainerConfig),
):
    ConfigStore.instance().store(group=_group, name=_name, node=_node, provider="torchrl_bcq")
ConfigStore.instance().store(name="bcq", node=BCQ, provider="torchrl_bcq")
