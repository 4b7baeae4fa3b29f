"""One batch, three optimizers, in the paper's order."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import nn
from torch.optim import Adam, Optimizer
from torchrl.trainers.trainers import OptimizationStepper, Trainer

from torchrl_bcq.objectives import BCQLoss


class BCQOptimizationStepper(OptimizationStepper):
    """Steps the VAE, then the critics, then the actor, each on its own loss, within one batch.

    Gradients are clipped as the trainer says (``clip_norm``, ``clip_grad_norm``). The target networks are the
    business of the trainer's target updater.

    Args:
        vae_optimizer: of the VAE's parameters.
        qvalue_optimizer: of all critics' parameters.
        actor_optimizer: of the perturbation actor's parameters; None where the loss has no actor.

    Source: arXiv:1812.02900, algorithm 1.
    """

    def __init__(
        self, vae_optimizer: Optimizer, qvalue_optimizer: Optimizer, actor_optimizer: Optimizer | None = None
    ) -> None:
        self.optimizers = {"vae": vae_optimizer, "qvalue": qvalue_optimizer}
        if actor_optimizer is not None:
            self.optimizers["actor"] = actor_optimizer

    @classmethod
    def adam(cls, loss: BCQLoss, lr: float = 1e-3) -> BCQOptimizationStepper:
        """The author's optimizers: Adam at 1e-3 for every network."""
        return cls(
            *(
                Adam(getattr(loss, f"{name}_network_params").parameters(), lr=lr, fused=True)
                for name in loss.network_names
            )
        )

    def step(self, trainer: Trainer, sub_batch: TensorDictBase) -> TensorDictBase:
        """Make one gradient step of each network.

        Returns:
            Scalars to log: the three losses and the batch means of the losses' metadata.
        """
        logs: dict[str, torch.Tensor] = {}
        for name, optimizer in self.optimizers.items():
            loss, metadata = trainer.compute_loss(sub_batch, method=f"{name}_loss")
            optimizer.zero_grad()
            loss.backward()
            self._clip(optimizer, trainer)
            optimizer.step()
            logs[f"loss_{name}"] = loss.detach()
            logs.update({key: value.mean() for key, value in metadata.items()})
        return TensorDict(logs)

    @staticmethod
    def _clip(optimizer: Optimizer, trainer: Trainer) -> None:
        if trainer.clip_norm is None:
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if trainer.clip_grad_norm:
            nn.utils.clip_grad_norm_(parameters, trainer.clip_norm)
        else:
            nn.utils.clip_grad_value_(parameters, trainer.clip_norm)

    def state_dict(self) -> dict[str, Any]:
        """The state of each optimizer."""
        return {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore each optimizer."""
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state_dict[name])
