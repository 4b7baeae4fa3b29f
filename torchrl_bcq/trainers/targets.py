"""The update of target networks, in one pass over all of their tensors."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torchrl.objectives import SoftUpdate
from torchrl.trainers.trainers import TargetNetUpdaterHook


class FastTargetNetUpdaterHook(TargetNetUpdaterHook):
    """TorchRL's hook, which for a :class:`torchrl.objectives.SoftUpdate` does the same arithmetic in one call.

    Args:
        target_params_updater: any updater of a :class:`~torchrl_bcq.BCQLoss`; another than ``SoftUpdate`` is stepped
            as it is.
    """

    @torch.no_grad()
    def __call__(self, tensordict: TensorDictBase | None = None) -> TensorDictBase | None:
        """Move the targets."""
        updater = self.target_params_updater
        if type(updater) is not SoftUpdate or not updater.initialized:  # TorchRL's own step says what is wrong
            return super().__call__(tensordict)
        targets, sources = updater.loss_module.target_tensors
        torch._foreach_lerp_(targets, sources, 1 - updater.eps)
        return tensordict
