"""Training on a fixed dataset with TorchRL's ``Trainer``."""

from torchrl_bcq.trainers.average import WeightAverage as WeightAverage
from torchrl_bcq.trainers.bcq import BCQTrainer as BCQTrainer
from torchrl_bcq.trainers.best import KeepBest as KeepBest
from torchrl_bcq.trainers.checkpoints import make_checkpoint as make_checkpoint
from torchrl_bcq.trainers.offline import OfflineTrainer as OfflineTrainer
from torchrl_bcq.trainers.offline_collector import OfflineCollector as OfflineCollector
from torchrl_bcq.trainers.stepper import (
    NetworkLRScheduler as NetworkLRScheduler,
    OfflineOptimizationStepper as OfflineOptimizationStepper,
    Schedule as Schedule,
)
