"""The update of target networks in one pass over their tensors."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.objectives import SoftUpdate
from torchrl.trainers.trainers import TargetNetUpdaterHook


class FastTargetNetUpdaterHook(TargetNetUpdaterHook):
    """TorchRL's hook, which makes the same arithmetic of a :class:`torchrl.objectives.SoftUpdate` in one call.

    It moves the tensors that the updater itself has chosen: leaves that required gradients when it was built. An
    updater of another class is stepped as it is.
    """

    def __init__(self, target_params_updater: SoftUpdate) -> None:
        super().__init__(target_params_updater)
        self._pairs: tuple[list[Tensor], list[Tensor]] | None = None

    @torch.no_grad()
    def __call__(self, tensordict: TensorDictBase | None = None) -> TensorDictBase | None:
        """Move the targets."""
        updater = self.target_params_updater
        if type(updater) is not SoftUpdate or not updater.initialized:  # TorchRL's own step names the problem
            return super().__call__(tensordict)
        if self._pairs is None:
            self.find()
        targets, sources = self._pairs  # type: ignore[misc]
        torch._foreach_lerp_(targets, sources, 1 - updater.eps)
        return tensordict

    def find(self) -> None:
        """Look the tensors up in the loss, which may have been moved or loaded since."""
        updater = self.target_params_updater
        chosen = [key for key, is_moved in updater._distinct_and_params.items() if is_moved]
        targets = [getattr(updater.loss_module, key[0]).get(key[1:]) for key in chosen]
        sources = [getattr(updater.loss_module, key[0].removeprefix("target_")).get(key[1:]) for key in chosen]
        self._pairs = targets, sources
