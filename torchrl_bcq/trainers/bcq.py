"""The trainer and the stepper with the names and the settings of the paper."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from torchrl_bcq.objectives import OfflineLoss
from torchrl_bcq.trainers.offline import OfflineTrainer
from torchrl_bcq.trainers.stepper import OfflineOptimizationStepper, Schedule, make_adam


class BCQOptimizationStepper(OfflineOptimizationStepper):
    """Steps the VAE, then the critics, then the actor, each on its own loss, within one batch.

    Args:
        vae_optimizer: of the VAE's parameters; None if it is frozen or has none.
        qvalue_optimizer: of all critics' parameters; None if they are frozen.
        actor_optimizer: of the perturbation actor's parameters; None if it is frozen, or the loss has none.
        vae_warmup_steps: gradient steps of the VAE alone, before critics and actor begin; the paper's is 0.
        freeze_vae_after: gradient steps after which the VAE stays as it is; the paper's never does.
        actor_update_interval: gradient steps of the critics for each of the actor; the paper's is 1.

    Raises:
        ValueError: if a number is out of range, or the VAE would be frozen before its warm-up ends.

    Source: arXiv:1812.02900, algorithm 1.
    """

    def __init__(
        self,
        vae_optimizer: Optimizer | None,
        qvalue_optimizer: Optimizer | None,
        actor_optimizer: Optimizer | None = None,
        *,
        vae_warmup_steps: int = 0,
        freeze_vae_after: int | None = None,
        actor_update_interval: int = 1,
    ) -> None:
        if vae_warmup_steps < 0 or actor_update_interval < 1:
            raise ValueError(
                f"vae_warmup_steps is {vae_warmup_steps} and actor_update_interval {actor_update_interval}; expected "
                "0 or more, and 1 or more."
            )
        if freeze_vae_after is not None and freeze_vae_after < max(vae_warmup_steps, 1):
            raise ValueError(
                f"freeze_vae_after is {freeze_vae_after}, expected at least 1 and vae_warmup_steps={vae_warmup_steps}; "
                "None lets the VAE learn to the end."
            )
        given = {"vae": vae_optimizer, "qvalue": qvalue_optimizer, "actor": actor_optimizer}
        schedules = {
            "vae": Schedule(stop_after=freeze_vae_after),
            "qvalue": Schedule(start_after=vae_warmup_steps),
            "actor": Schedule(start_after=vae_warmup_steps, every=actor_update_interval),
        }
        optimizers = {name: optimizer for name, optimizer in given.items() if optimizer is not None}
        super().__init__(optimizers, schedules={name: schedules[name] for name in optimizers})

    @classmethod
    def adam(cls, loss: OfflineLoss, lr: float = 1e-3, **settings: Any) -> BCQOptimizationStepper:
        """The author's optimizers: Adam at 1e-3 for every network. ``settings`` are of the constructor."""
        made = make_adam(loss, lr)
        return cls(made.get("vae"), made.get("qvalue"), made.get("actor"), **settings)


class BCQTrainer(OfflineTrainer):
    """The :class:`OfflineTrainer` with the author's optimizers, :class:`BCQOptimizationStepper`, by default."""

    default_stepper = BCQOptimizationStepper
