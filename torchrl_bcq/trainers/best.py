"""The checkpoint of the best value of a metric."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from tensordict import TensorDictBase
from torchrl.checkpoint import Checkpoint, CheckpointRotation
from torchrl.trainers.trainers import TrainerHookBase

from torchrl_bcq.trainers.bcq import BCQTrainer
from torchrl_bcq.trainers.checkpoints import tidy_rotation


class KeepBest(TrainerHookBase):
    """Keeps the checkpoint of the best value of a metric so far, in a folder of its own.

    Args:
        directory: of a :class:`torchrl.checkpoint.CheckpointRotation`, ``KeepBest(...).rotation``; its ``best()`` is
            the one (a newer one may be there after a resume from before it).
        monitor: a metric that an earlier hook logs, such as ``"return"``.
        mode: ``"max"`` or ``"min"``.
        wait_for: gradient steps before it is looked at; a TD error is small as long as nothing is learned.

    ``KeepBest("run/best", "return").register(trainer)``, after the hook that logs the metric.

    Raises:
        ValueError: if ``mode`` is another.
    """

    def __init__(self, directory: str | Path, monitor: str = "return", mode: str = "max", *, wait_for: int = 0) -> None:
        if mode not in ("max", "min"):
            raise ValueError(f"mode is {mode!r}, expected 'max' or 'min'.")
        self.monitor = monitor
        self.mode = mode
        self.wait_for = wait_for
        self.rotation = CheckpointRotation(directory, keep_last=1, keep_best=(monitor, mode))
        self._trainer: BCQTrainer | None = None

    @property
    def score(self) -> float | None:
        """The best value so far, of the checkpoint that is there."""
        best = self.rotation.best()
        return None if best is None else Checkpoint.manifest(best)["metadata"].get(self.monitor)

    def __call__(self, tick: TensorDictBase | None = None) -> None:
        """Write a checkpoint, if the metric was logged just now and is better than ever."""
        trainer = self._trainer
        if trainer is None or trainer._last_log.get(self.monitor) != trainer.collected_frames:
            return
        if trainer.collected_frames < max(self.wait_for, 1):
            return
        value, best = trainer.metrics[self.monitor], self.score
        if not math.isfinite(value) or (
            best is not None and not (value > best if self.mode == "max" else value < best)
        ):
            return
        step = trainer.collected_frames
        metadata = {
            **trainer._checkpoint_manifest_metadata(),
            self.monitor: value,
            "best_of": [self.monitor, self.mode],
        }
        trainer.write_checkpoint(lambda: self.rotation.save(trainer.checkpoint, step=step, metadata=metadata))

    def register(self, trainer: BCQTrainer, name: str = "keep_best") -> None:
        """Register with a trainer."""
        tidy_rotation(self.rotation.directory)
        self._trainer = trainer
        trainer.register_op("setup", self)  # for what was measured there, after a stop
        trainer.register_op("post_steps_log", self)

    def state_dict(self) -> dict[str, Any]:
        """All that it knows is in the folder."""
        return {}

    def load_state_dict(self, state_dict: Any) -> None:
        """Nothing to restore."""


def best_checkpoint(directory: Path) -> Path | None:
    """The best checkpoint in the folder of a :class:`KeepBest`, if there is one."""
    newest = CheckpointRotation(directory, keep_last=1).latest()
    if newest is None:
        return None
    monitor, mode = Checkpoint.manifest(newest)["metadata"].get("best_of", ("", "max"))
    return CheckpointRotation(directory, keep_last=1, keep_best=(monitor, mode)).best() if monitor else newest
