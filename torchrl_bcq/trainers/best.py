"""Keeps the checkpoint with the best value of a metric."""

from __future__ import annotations

import logging
import math
import shutil
from pathlib import Path

from tensordict import TensorDictBase
from torchrl.checkpoint import Checkpoint, CheckpointRotation
from torchrl.trainers.trainers import TrainerHookBase

from torchrl_bcq.trainers.checkpoints import tidy_rotation
from torchrl_bcq.trainers.offline import OfflineTrainer

_logger = logging.getLogger(__name__)


class KeepBest(TrainerHookBase):
    """Saves a checkpoint to its own folder whenever a metric reaches a new best value.

    Args:
        directory: folder of the checkpoints. The attribute ``rotation`` is the ``CheckpointRotation`` of this folder,
            and ``rotation.best()`` returns the best checkpoint. If a run goes back to an
            older checkpoint and resumes, the best checkpoint can come from the part that is now trained again.
        monitor: name of the metric, such as ``"return"``. The hook that logs the metric must be registered before this
            hook.
        mode: ``"max"`` if larger values are better, ``"min"`` if smaller values are better.
        wait_for: number of gradient steps at the start in which the metric is ignored. This helps, for example, with
            the TD error, because the TD error of untrained critics is misleadingly small.
        measured_as: description of how the metric is measured. If the best checkpoint has another description, its
            score cannot be compared, so the next checkpoint replaces it.

    Usage: ``KeepBest("run/best", "return").register(trainer)``, after the hook that logs the metric is registered.

    Raises:
        ValueError: if ``mode`` is neither ``"max"`` nor ``"min"``.
    """

    def __init__(
        self,
        directory: str | Path,
        monitor: str = "return",
        mode: str = "max",
        *,
        wait_for: int = 0,
        measured_as: str = "",
    ) -> None:
        self.monitor = monitor
        self.wait_for = wait_for
        self.measured_as = measured_as
        self.rotation = CheckpointRotation(directory, keep_last=1, keep_best=(monitor, mode))
        self._trainer: OfflineTrainer | None = None
        self._started_at = 0  # gradient steps before the current call of ``train``

    def __call__(self, batch: TensorDictBase | None = None) -> None:
        """Write a checkpoint if the metric was logged at this step and its value is the best so far."""
        trainer = self._trainer
        if trainer is None or trainer.logged_at(self.monitor) != trainer.collected_frames:
            return
        value, step = trainer.metrics[self.monitor], trainer.collected_frames
        if step < max(self.wait_for, 1) or not math.isfinite(value):
            return
        outdated = None
        if (best := self.rotation.best()) is not None:
            kept = Checkpoint.manifest(best)["metadata"]
            score = kept[self.monitor]
            if kept.get("measured_as", self.measured_as) != self.measured_as:
                if step == self._started_at:
                    return  # this value may have been measured before the resume
                outdated = best
            elif value <= score if self.rotation.keep_best[1] == "max" else value >= score:
                return
        metadata = {**trainer._checkpoint_manifest_metadata(), self.monitor: value, "best_of": self.rotation.keep_best}
        metadata["measured_as"] = self.measured_as

        def save() -> None:
            written = self.rotation.save(trainer.checkpoint, step=step, metadata=metadata)
            if outdated not in (None, written):
                _logger.warning("%s is now measured in another way, so %s is replaced.", self.monitor, outdated)
                shutil.rmtree(outdated, ignore_errors=True)  # the rotation has removed it if its score is lower

        trainer.write_checkpoint(save)

    def register(self, trainer: OfflineTrainer, name: str = "keep_best") -> None:
        """Register the hook with a trainer."""
        if not isinstance(trainer, OfflineTrainer):
            raise TypeError(f"KeepBest needs an OfflineTrainer, not a {type(trainer).__name__}.")
        tidy_rotation(self.rotation.directory)
        self._trainer = trainer
        # also check the metric at the start: an earlier run may have stopped before its last check
        trainer.register_op("setup", self._start)
        trainer.register_op("post_steps_log", self)

    def _start(self) -> None:
        self._started_at = 0 if self._trainer is None else self._trainer.collected_frames
        self()


def best_checkpoint(directory: Path) -> Path | None:
    """Return the best checkpoint in the folder of a ``KeepBest``, or None if the folder has no checkpoint."""
    newest = CheckpointRotation(directory, keep_last=1).latest()
    if newest is None:
        return None
    monitor, mode = Checkpoint.manifest(newest)["metadata"]["best_of"]
    return CheckpointRotation(directory, keep_last=1, keep_best=(monitor, mode)).best()
