"""The loop: TorchRL's Trainer on a fixed dataset."""

from torchrl_bcq.trainers.bcq import BCQTrainer
from torchrl_bcq.trainers.best import KeepBest
from torchrl_bcq.trainers.checkpoints import make_checkpoint
from torchrl_bcq.trainers.metrics import DatasetMetrics, EnvironmentMetrics, evaluate
from torchrl_bcq.trainers.offline_collector import OfflineCollector
from torchrl_bcq.trainers.stepper import BCQOptimizationStepper, NetworkLRScheduler
from torchrl_bcq.trainers.together import train_together

__all__ = [
    "BCQOptimizationStepper",
    "BCQTrainer",
    "DatasetMetrics",
    "EnvironmentMetrics",
    "KeepBest",
    "NetworkLRScheduler",
    "OfflineCollector",
    "evaluate",
    "make_checkpoint",
    "train_together",
]
