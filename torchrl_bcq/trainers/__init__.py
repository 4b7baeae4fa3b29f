"""The loop: TorchRL's Trainer on a fixed dataset."""

from torchrl_bcq.trainers.bcq import BCQTrainer
from torchrl_bcq.trainers.offline_collector import OfflineCollector
from torchrl_bcq.trainers.stepper import BCQOptimizationStepper

__all__ = ["BCQOptimizationStepper", "BCQTrainer", "OfflineCollector"]
