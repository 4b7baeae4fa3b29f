"""The checkpoint of the best value of a metric."""

from __future__ import annotations

import math
from pathlib import Path

from tensordict import TensorDictBase
from torchrl.checkpoint import Checkpoint, CheckpointRotation
from torchrl.trainers.trainers import TrainerHookBase

from torchrl_bcq.trainers.checkpoints import tidy_rotation
from torchrl_bcq.trainers.offline import OfflineTrainer


class KeepBest(TrainerHookBase):
    """Keeps the checkpoint of the best value of a metric so far, in its own folder.

    Args:
        directory: of the :class:`torchrl.checkpoint.CheckpointRotation` ``KeepBest(...).rotation``, whose ``best()`` is
            the best checkpoint. After a resume from an earlier step, a newer one may be there too.
        monitor: a metric that an earlier hook logs, such as ``"return"``.
        mode: ``"max"`` or ``"min"``.
        wait_for: gradient steps before the metric counts; a TD error is small before anything is learned.

    ``KeepBest("run/best", "return").register(trainer)``, after the hook that logs the metric.

    Raises:
        ValueError: if ``mode`` is another.
    """

    def __init__(self, directory: str | Path, monitor: str = "return", mode: str = "max", *, wait_for: int = 0) -> None:
        self.monitor = monitor
        self.wait_for = wait_for
        self.rotation = CheckpointRotation(directory, keep_last=1, keep_best=(monitor, mode))
        self._trainer: OfflineTrainer | None = None

    def __call__(self, batch: TensorDictBase | None = None) -> None:
        """Write a checkpoint, if the metric was logged at this step and is the best so far."""
        trainer = self._trainer
        if trainer is None or trainer.logged_at(self.monitor) != trainer.collected_frames:
            return
        value, step = trainer.metrics[self.monitor], trainer.collected_frames
        if step < max(self.wait_for, 1) or not math.isfinite(value):
            return
        if (best := self.rotation.best()) is not None:
            score = Checkpoint.manifest(best)["metadata"][self.monitor]
            if value <= score if self.rotation.keep_best[1] == "max" else value >= score:
                return
        metadata = {**trainer._checkpoint_manifest_metadata(), self.monitor: value, "best_of": self.rotation.keep_best}
        trainer.write_checkpoint(lambda: self.rotation.save(trainer.checkpoint, step=step, metadata=metadata))

    def register(self, trainer: OfflineTrainer, name: str = "keep_best") -> None:
        """Register with a trainer."""
        tidy_rotation(self.rotation.directory)
        self._trainer = trainer
        trainer.register_op("setup", self)  # where metrics that a stop prevented are measured
        trainer.register_op("post_steps_log", self)


def best_checkpoint(directory: Path) -> Path | None:
    """The best checkpoint in the folder of a :class:`KeepBest`, if there is one."""
    newest = CheckpointRotation(directory, keep_last=1).latest()
    if newest is None:
        return None
    monitor, mode = Checkpoint.manifest(newest)["metadata"]["best_of"]
    return CheckpointRotation(directory, keep_last=1, keep_best=(monitor, mode)).best()
