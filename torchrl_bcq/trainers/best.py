"""Keeps the checkpoint with the best value of a metric."""

from __future__ import annotations

import logging
import math
import os
import shutil
from pathlib import Path
from typing import Any

from tensordict import TensorDictBase
from torchrl.checkpoint import Checkpoint, CheckpointRotation
from torchrl.trainers.trainers import TrainerHookBase

from torchrl_bcq.trainers.checkpoints import damaged_checkpoints, tidy_rotation
from torchrl_bcq.trainers.offline import OfflineTrainer

_logger = logging.getLogger(__name__)


class KeepBest(TrainerHookBase):
    """Saves a checkpoint to its own folder whenever a metric reaches a new best value.

    Args:
        directory: folder of the checkpoint; it holds no other files. If a run goes back to an older checkpoint and
            resumes, the best checkpoint can come from the part that is now trained again.
        monitor: name of the metric, such as ``"return"``. The hook that logs the metric must be registered before this
            hook.
        mode: ``"max"`` if larger values are better, ``"min"`` if smaller values are better.
        wait_for: number of gradient steps at the start in which the metric is ignored. This helps, for example, with
            the TD error, because the TD error of untrained critics is misleadingly small.
        measured_as: description of how the metric is measured. If the best checkpoint has another description, metric
            or mode, its score cannot be compared, so the next checkpoint replaces it.

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
        if mode not in ("max", "min"):
            raise ValueError(f"mode is {mode!r}, expected 'max' or 'min'.")
        self.directory = Path(directory).expanduser()
        self.monitor = monitor
        self.mode = mode
        self.wait_for = wait_for
        self.measured_as = measured_as
        self._trainer: OfflineTrainer | None = None
        self._started_at = 0  # gradient steps before the current call of ``train``

    def best(self) -> Path | None:
        """Return the best checkpoint, or None if there is none yet."""
        return best_checkpoint(self.directory)

    def __call__(self, batch: TensorDictBase | None = None) -> None:
        """Write a checkpoint if the metric was logged at this step and its value is the best so far."""
        trainer = self._trainer
        if trainer is None or trainer.logged_at(self.monitor) != trainer.collected_frames:
            return
        value, step = trainer.metrics[self.monitor], trainer.collected_frames
        if step < max(self.wait_for, 1) or not math.isfinite(value):
            return
        if (best := self.best()) is not None:
            kept = Checkpoint.manifest(best)["metadata"]
            if not self._measures(kept):
                if step == self._started_at:
                    return  # this value may have been measured before the resume
                _logger.warning("%s is now measured in another way, so %s is replaced.", self.monitor, best)
            elif value <= kept[self.monitor] if self.mode == "max" else value >= kept[self.monitor]:
                return
        metadata = {**trainer._checkpoint_manifest_metadata(), self.monitor: value}
        metadata |= {"best_of": (self.monitor, self.mode), "measured_as": self.measured_as}
        trainer.write_checkpoint(lambda: self._replace(trainer.checkpoint, step, metadata))

    def register(self, trainer: OfflineTrainer, name: str = "keep_best") -> None:
        """Register the hook with a trainer."""
        if not isinstance(trainer, OfflineTrainer):
            raise TypeError(f"KeepBest needs an OfflineTrainer, not a {type(trainer).__name__}.")
        tidy_rotation(self.directory)
        self._trainer = trainer
        # also check the metric at the start: an earlier run may have stopped before its last check
        trainer.register_op("setup", self._start)
        trainer.register_op("post_steps_log", self)

    def _start(self) -> None:
        if damaged := damaged_checkpoints(self.directory):
            _logger.warning(
                "the manifest.json of %s cannot be read, so the next best checkpoint replaces it; to keep it, "
                "stop the run and restore this file.",
                self.directory / damaged[0],
            )
        self._started_at = 0 if self._trainer is None else self._trainer.collected_frames
        self()

    def _measures(self, kept: dict[str, Any]) -> bool:
        """Return whether the score in the metadata of a checkpoint can be compared with the values of this hook."""
        same = kept["best_of"] == [self.monitor, self.mode]
        return same and kept.get("measured_as", self.measured_as) == self.measured_as

    def _replace(self, checkpoint: Checkpoint, step: int, metadata: dict[str, Any]) -> None:
        """Write a checkpoint to the folder, then remove the earlier one."""
        written = self.directory / f"checkpoint-{step:012d}"
        self.directory.mkdir(parents=True, exist_ok=True)
        checkpoint.save(written, metadata=metadata, format="directory")
        with open(written / "manifest.json", "r+b") as file:
            os.fsync(file.fileno())  # before the earlier checkpoint is removed
        for path in set(self.directory.glob("checkpoint-" + "[0-9]" * 12)) - {written}:
            aside = path.replace(path.with_name(f".{path.name}.delete-{step}"))  # a name that tidy_rotation removes
            shutil.rmtree(aside, ignore_errors=True)


def best_checkpoint(directory: Path) -> Path | None:
    """Return the best checkpoint in the folder of a ``KeepBest``, or None if the folder has no checkpoint.

    A run that was killed may leave two checkpoints. The one that was written last is the best.
    """
    found = CheckpointRotation(directory, keep_last=1).checkpoints()
    return max(found, key=lambda path: Checkpoint.manifest(path)["created_at"], default=None)
