"""The trainer and the optimization stepper of BCQ, with the settings of the paper."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from torchrl_bcq.objectives import OfflineLoss
from torchrl_bcq.trainers.offline import OfflineTrainer
from torchrl_bcq.trainers.stepper import OfflineOptimizationStepper, Schedule, make_adam


class BCQOptimizationStepper(OfflineOptimizationStepper):
    """For each batch, makes one gradient step of the VAE, then one of the critics, then one of the actor.

    Args:
        vae_optimizer: optimizer of the VAE's parameters; None if the VAE is frozen or has no parameters.
        qvalue_optimizer: optimizer of all critics' parameters; None if the critics are frozen.
        actor_optimizer: optimizer of the perturbation actor's parameters; None if the actor is frozen, or the loss has
            no actor.
        vae_warmup_steps: number of gradient steps at the start in which only the VAE learns; 0 in the paper.
        freeze_vae_after: number of gradient steps after which the VAE is frozen; None, as in the paper, never freezes
            the VAE.
        actor_update_interval: number of critic steps for each actor step; 1 in the paper.

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
                f"vae_warmup_steps is {vae_warmup_steps} and actor_update_interval {actor_update_interval}; "
                "vae_warmup_steps must be at least 0 and actor_update_interval at least 1."
            )
        if freeze_vae_after is not None and freeze_vae_after < max(vae_warmup_steps, 1):
            raise ValueError(
                f"freeze_vae_after is {freeze_vae_after}, but must be at least 1 and at least vae_warmup_steps "
                f"({vae_warmup_steps}); None never freezes the VAE."
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
        """Make a stepper with one Adam optimizer per network; ``settings`` are the stepper's other arguments."""
        made = make_adam(loss, lr)
        return cls(made.get("vae"), made.get("qvalue"), made.get("actor"), **settings)


class BCQTrainer(OfflineTrainer):
    """The ``OfflineTrainer`` for BCQ; its default stepper is ``BCQOptimizationStepper.adam(loss)``.

    Example:
        >>> import numpy as np
        >>> from torchrl.data import Bounded, Unbounded
        >>> from torchrl.objectives import SoftUpdate
        >>> from torchrl_bcq import BCQLoss, BCQTrainer, from_arrays, make_bcq_modules, make_replay_buffer
        >>> draw = np.random.default_rng(0).uniform
        >>> flags = {"terminated": np.arange(90) % 30 == 29, "truncated": np.zeros(90)}
        >>> data = from_arrays(draw(size=(90, 3)), draw(size=(90, 1)), draw(size=90), **flags)
        >>> loss = BCQLoss(*make_bcq_modules(Unbounded((3,)), Bounded(-1, 1, (1,)), hidden=[8], vae_hidden=[8]))
        >>> buffer, updater = make_replay_buffer(data, batch_size=10), SoftUpdate(loss, tau=0.005)
        >>> trainer = BCQTrainer(loss, buffer, target_net_updater=updater, total_steps=20, progress_bar=False)
        >>> trainer.train()
        >>> sorted(trainer.metrics)[:3]
        ['loss_actor', 'loss_qvalue', 'loss_vae']
    """

    default_stepper = BCQOptimizationStepper
