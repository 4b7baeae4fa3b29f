"""Updates all tensors of the target networks in one call."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.objectives import SoftUpdate
from torchrl.trainers.trainers import TargetNetUpdaterHook


class FastTargetNetUpdaterHook(TargetNetUpdaterHook):
    """TorchRL's ``TargetNetUpdaterHook``, but faster for ``SoftUpdate``: one call updates all tensors.

    The result is the same as with TorchRL's hook. The hook updates the tensors that ``SoftUpdate`` selected: the leaf
    tensors that required gradients when the updater was built. For an updater of another class, the hook calls the
    updater's own ``step``.
    """

    def __init__(self, target_params_updater: SoftUpdate) -> None:
        super().__init__(target_params_updater)
        self._pairs: tuple[list[Tensor], list[Tensor]] | None = None

    @torch.no_grad()
    def __call__(self, tensordict: TensorDictBase | None = None) -> TensorDictBase | None:
        """Update the target networks."""
        updater = self.target_params_updater
        if type(updater) is not SoftUpdate or not updater.initialized:  # if uninitialized, super() raises an error
            return super().__call__(tensordict)
        if self._pairs is None:
            self.find()
        targets, sources = self._pairs  # type: ignore[misc]
        torch._foreach_lerp_(targets, sources, 1 - updater.eps)
        return tensordict

    def find(self) -> None:
        """Find the tensors to update. Call this method again after the loss was loaded or moved to a device."""
        updater = self.target_params_updater
        chosen = [key for key, is_moved in updater._distinct_and_params.items() if is_moved]
        targets = [getattr(updater.loss_module, key[0]).get(key[1:]) for key in chosen]
        sources = [getattr(updater.loss_module, key[0].removeprefix("target_")).get(key[1:]) for key in chosen]
        self._pairs = targets, sources
