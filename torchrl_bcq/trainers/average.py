"""Keeps a moving average of the weights. A policy can use it in place of the trained weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchrl.trainers import Trainer

from torchrl_bcq.objectives import OfflineLoss


class WeightAverage:
    """Averages the weights of all networks of an objective, exponentially over the gradient steps.

    After each gradient step, ``average = decay * average + (1 - decay) * weights``. The average starts with the weights
    after the first step. Buffers, such as BatchNorm statistics, are copied without averaging. Training itself does not
    use the average. Checkpoints of the trainer contain the average.

    Args:
        loss_module: objective whose networks are averaged. Move or convert it before you build the average.
        decay: at least 0 and below 1; ``1 / (1 - decay)`` is roughly the number of recent steps in the average.

    Raises:
        ValueError: if ``decay`` is out of range.

    Usage: ``average = WeightAverage(loss, decay=0.999)``, then ``average.register(trainer)``; a policy that uses
        ``average.networks`` acts with the averaged weights: ``BCQPolicy(*average.networks)``.

    Source: ``torch.optim.swa_utils.AveragedModel``.
    """

    def __init__(self, loss_module: OfflineLoss, *, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay is {decay}, expected at least 0 and below 1.")
        self._source = nn.ModuleList([network for network in loss_module.networks if network is not None])
        self._is_used = [network is not None for network in loss_module.networks]
        self._model = AveragedModel(self._source, multi_avg_fn=get_ema_multi_avg_fn(decay))

    @property
    def networks(self) -> tuple[Any, ...]:
        """The networks with the averaged weights, in the order of ``loss_module.networks``."""
        averaged = iter(self._model.module.children())
        return tuple(next(averaged) if is_used else None for is_used in self._is_used)

    def __call__(self) -> None:
        """Add the current weights to the average."""
        self._model.update_parameters(self._source)

    def register(self, trainer: Trainer, name: str = "average") -> None:
        """Update the average after each gradient step of the trainer, and save it in checkpoints."""
        trainer.register_op("setup", self._begin)
        trainer.register_op("post_optim", self)
        trainer.register_module(name, self)

    def _begin(self) -> None:
        """Copy the weights before the first step, in case they were loaded after the average was built."""
        if not self._model.n_averaged:
            self._model.module.load_state_dict(self._source.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Return the averaged weights."""
        return self._model.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the averaged weights."""
        self._model.load_state_dict(state_dict)
