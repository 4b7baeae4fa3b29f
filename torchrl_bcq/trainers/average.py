"""Keeps a moving average of the weights. A policy can use it in place of the trained weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchrl.trainers import Trainer

from torchrl_bcq.objectives import OfflineLoss


class WeightAverage:
    """Averages the weights of all networks of an objective, exponentially over the gradient steps.

    After each gradient step, ``average = decay * average + (1 - decay) * weights``. The average starts with the weights
    after the first step. Target networks and buffers, such as BatchNorm statistics, are copied without averaging.
    Training itself does not use the average. Checkpoints of the trainer contain the average.

    Args:
        loss_module: objective whose networks are averaged. Move or convert it before you build the average.
        decay: at least 0 and below 1; ``1 / (1 - decay)`` is roughly the number of recent steps in the average.

    Raises:
        ValueError: if ``decay`` is out of range, or weights have fewer than 32 bits, which would round small changes
            of the average to nothing.

    Usage: ``average = WeightAverage(loss, decay=0.999)``, then ``average.register(trainer)``. ``average.loss_module``
        is a copy of the objective with the averaged weights: ``BCQPolicy(*average.loss_module.networks)``.

    Source: ``torch.optim.swa_utils.AveragedModel``.
    """

    def __init__(self, loss_module: OfflineLoss, *, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay is {decay}, expected at least 0 and below 1.")
        dtypes = {weights.dtype for weights in loss_module.parameters()}
        if short := [str(dtype) for dtype in dtypes if torch.finfo(dtype).bits < 32]:
            raise ValueError(f"the networks have {short[0]} weights, expected float32 or float64 for an average.")
        self._source = loss_module
        self._model, self._mix = AveragedModel(loss_module), get_ema_multi_avg_fn(decay)

    @property
    def loss_module(self) -> OfflineLoss:
        """A copy of the objective. Its networks have the averaged weights."""
        return cast("OfflineLoss", self._model.module)

    @torch.no_grad()
    def __call__(self) -> None:
        """Add the current weights to the average. Unlike ``update_parameters``, this does not wait for the GPU."""
        model, source = self._model, self._source
        average: list[torch.Tensor] = [*model.module.parameters()]
        weights: list[torch.Tensor] = [*source.parameters()]
        if model.n_averaged:
            self._mix(average, weights, torch.zeros(()))  # the number has no effect
        else:
            torch._foreach_copy_(average, weights)
        if buffers := [*source.buffers()]:
            torch._foreach_copy_([*model.module.buffers()], buffers)
        model.n_averaged += 1

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
