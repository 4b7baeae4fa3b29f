"""Training on a fixed dataset with TorchRL's ``Trainer``."""

from torchrl_bcq.trainers.average import WeightAverage
from torchrl_bcq.trainers.bcq import BCQOptimizationStepper, BCQTrainer
from torchrl_bcq.trainers.best import KeepBest
from torchrl_bcq.trainers.checkpoints import make_checkpoint
from torchrl_bcq.trainers.offline import OfflineTrainer
from torchrl_bcq.trainers.offline_collector import OfflineCollector
from torchrl_bcq.trainers.stepper import NetworkLRScheduler, OfflineOptimizationStepper, Schedule

__all__ = [
    "BCQOptimizationStepper",
    "BCQTrainer",
    "KeepBest",
    "NetworkLRScheduler",
    "OfflineCollector",
    "OfflineOptimizationStepper",
    "OfflineTrainer",
    "Schedule",
    "WeightAverage",
    "make_checkpoint",
]
