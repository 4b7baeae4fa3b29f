"""Stops a run early, and says which measurements of a metric can be compared."""

from __future__ import annotations

import json
import logging
from typing import Any

from omegaconf import DictConfig
from tensordict import TensorDictBase
from torchrl.trainers import EarlyStopping

from torchrl_bcq.runs.folder import Task
from torchrl_bcq.trainers import OfflineTrainer

_logger = logging.getLogger(__name__)


def measured_as(settings: DictConfig, task: Task | None) -> str:
    """Return a description of how a metric is measured: in the environment of ``task``, or without one.

    A resumed run may measure the metric in another way, so that its values cannot be compared with the earlier ones.
    """
    names = ("max_rows", "fqe_steps") if task is None else ("episodes",)
    facts = {name: settings.evaluation[name] for name in ("seed", *names)}
    of_env = () if task is None else ("env_id", "env_kwargs", "max_episode_steps", "reference_scores")
    facts |= {name: getattr(task, name) for name in of_env}
    return json.dumps(facts, sort_keys=True, default=str)


class StopEarly(EarlyStopping):
    """Stops also at a threshold; unlike TorchRL's hook, it only counts steps at which the metric was measured.

    ``measured_as`` describes how the metric is measured. If a resumed run measures it in another way, or monitors
    another metric, the hook forgets the earlier scores.
    """

    def __init__(self, threshold: float | None, measured_as: str, **settings: Any) -> None:
        super().__init__(**settings)
        self.threshold = threshold
        self._rule = f"{self.mode} {self.monitor} {measured_as}"
        self._counted = 0  # step of the last measurement

    def __call__(self, batch: TensorDictBase | None = None) -> None:
        """Compare the metric, if it was measured in this step, with its best value and with the threshold."""
        trainer, name = self._trainer, self.monitor
        step = 0 if trainer is None else trainer.collected_frames
        if step in (0, self._counted) or trainer._stop_training or trainer.logged_at(name) != step:
            return  # after a stop, the resumed run measures again
        self._counted = step
        super().__call__(batch)
        value, least = trainer.metrics[name], self.threshold
        if least is not None and step >= self.wait_for and (value >= least if self.mode == "max" else value <= least):
            trainer.request_stop(f"{name} is {value:.6g} and reached early_stopping.threshold {least:g}.")

    def register(self, trainer: OfflineTrainer, name: str = "early_stopping") -> None:
        """Register the hook with a trainer."""
        super().register(trainer, name)
        trainer.register_op("setup", self)  # a resumed run repeats a measurement that a stop cut off

    def state_dict(self) -> dict[str, Any]:
        """Return the best score, the step in which it was measured, and what was measured."""
        return {**super().state_dict(), "counted": self._counted, "rule": self._rule}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state, unless another metric was monitored, or it was measured in another way."""
        self._counted = state_dict["counted"]
        if state_dict.get("rule", self._rule) == self._rule:
            super().load_state_dict(state_dict)
        else:
            _logger.warning("early stopping begins anew, because %s is now measured in another way.", self.monitor)
