"""One batch, three optimizers, in the paper's order."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import CudaGraphModule
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchrl.trainers import LRSchedulerHook
from torchrl.trainers.trainers import OptimizationStepper, Trainer

from torchrl_bcq.objectives import BCQLoss
from torchrl_bcq.trainers.distributed import DataParallel


class BCQOptimizationStepper(OptimizationStepper):
    """Steps the VAE, then the critics, then the actor, each on its own loss, within one batch.

    Gradients are clipped as the trainer says (``clip_norm``, ``clip_grad_norm``). The target networks are the
    business of the trainer's target updater.

    Args:
        vae_optimizer: of the VAE's parameters.
        qvalue_optimizer: of all critics' parameters.
        actor_optimizer: of the perturbation actor's parameters; None where the loss has no actor.
        vae_warmup_steps: gradient steps of the VAE alone, before critics and actor begin; the paper's is 0.
        freeze_vae_after: gradient steps after which the VAE stays as it is; the paper's never does.
        actor_update_interval: gradient steps of the critics for each of the actor; the paper's is 1.

    Raises:
        ValueError: if one of these numbers is out of its range, or the VAE would be frozen before its warm-up ends.

    Source: arXiv:1812.02900, algorithm 1.
    """

    def __init__(
        self,
        vae_optimizer: Optimizer,
        qvalue_optimizer: Optimizer,
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
                "None leaves the VAE learning."
            )
        self.optimizers = {"vae": vae_optimizer, "qvalue": qvalue_optimizer}
        if actor_optimizer is not None:
            self.optimizers["actor"] = actor_optimizer
        self.vae_warmup_steps = vae_warmup_steps
        self.freeze_vae_after = freeze_vae_after
        self.actor_update_interval = actor_update_interval
        self.steps = 0
        self.captured = False
        self.parallel: DataParallel | None = None  # the trainer's
        self._logs: dict[str, Tensor] = {}
        self._graphs: dict[tuple[Any, ...], CudaGraphModule] = {}

    @classmethod
    def adam(cls, loss: BCQLoss, lr: float = 1e-3, **schedule: Any) -> BCQOptimizationStepper:
        """The author's optimizers: Adam at 1e-3 for every network. ``schedule`` is of the constructor."""
        return cls(
            *(
                Adam(getattr(loss, f"{name}_network_params").parameters(), lr=lr, fused=True)
                for name in loss.network_names
            ),
            **schedule,
        )

    def is_due(self, name: str, step: int) -> bool:
        """Whether a network (``"vae"``, ``"qvalue"``, ``"actor"``) learns in gradient step ``step``, counted from 1."""
        if name == "vae":
            return self.freeze_vae_after is None or step <= self.freeze_vae_after
        after_warmup = step - self.vae_warmup_steps
        return after_warmup > 0 and (name != "actor" or after_warmup % self.actor_update_interval == 0)

    def step(self, trainer: Trainer, sub_batch: TensorDictBase) -> TensorDictBase:
        """Make one gradient step of each network that is due.

        Returns:
            Scalars to log: the three losses and the batch means of the losses' metadata. Of an actor that waits they
            are those of its last step; of a network in warm-up or frozen, NaN.
        """
        self.steps += 1
        if not self._logs:  # TorchRL's means need the same entries in every step
            unknown = next(trainer.loss_module.parameters()).new_full((), torch.nan)
            self._logs = dict.fromkeys(trainer.loss_module.out_keys, unknown)
        if self.steps - 1 == self.freeze_vae_after:
            vae = ["loss_vae", *trainer.loss_module.vae_network.loss_keys]
            self._logs |= {key: torch.full_like(self._logs[key], torch.nan) for key in vae}
        due = tuple(name for name in self.optimizers if self.is_due(name, self.steps))
        self._logs.update(
            self._replay(trainer, sub_batch, due) if self.captured else self._update(trainer, sub_batch, due)
        )
        return TensorDict(self._logs)

    def _update(self, trainer: Trainer, batch: TensorDictBase, due: tuple[str, ...]) -> dict[str, Tensor]:
        """One gradient step of each of these networks; what is to be logged of it."""
        logs = {}
        for name in due:
            loss, metadata = trainer.compute_loss(batch, method=f"{name}_loss")
            self.optimizers[name].zero_grad()
            loss.backward()
            self.step_optimizer(name, trainer)
            logs[f"loss_{name}"] = loss.detach()
            logs.update({key: value.mean() for key, value in metadata.items()})
        return logs

    def step_optimizer(self, name: str, trainer: Trainer) -> None:
        """Average the gradients of a network over processes, clip them as the trainer says, and follow them."""
        if self.parallel is not None:
            self.parallel.average_gradients(_parameters(self.optimizers[name]))
        self._clip(self.optimizers[name], trainer)
        self.optimizers[name].step()

    def capture(self) -> None:
        """From now on capture gradient steps into CUDA graphs, and replay them.

        There is one graph for each set of networks that learn in a step and for each size of a batch, captured in the
        second step of its kind.

        Raises:
            ValueError: if an optimizer cannot be captured.
        """
        for name, optimizer in self.optimizers.items():
            if "capturable" not in optimizer.defaults:
                raise ValueError(f"the optimizer of {name}, {type(optimizer).__name__}, cannot be captured; use Adam.")
        for group in [group for optimizer in self.optimizers.values() for group in optimizer.param_groups]:
            group["capturable"] = True
            # in a tensor, a scheduler's changes reach the graph; fused optimizers read float32
            rate = torch.as_tensor(group["lr"], dtype=torch.float32)
            group["lr"] = rate.to(group["params"][0].device, copy=True)
        self.captured = True
        self._graphs.clear()

    def _replay(self, trainer: Trainer, batch: TensorDictBase, due: tuple[str, ...]) -> dict[str, Tensor]:
        kind = (*due, batch.batch_size)
        if kind not in self._graphs:

            def update(batch: TensorDictBase) -> TensorDict:
                out = {"logs": self._update(trainer, batch, due)}
                if (priority := batch.get(priority_key, None)) is not None:  # the critics learn
                    out["priority"] = priority
                return TensorDict(out)

            self._graphs[kind] = CudaGraphModule(update, in_keys=[], out_keys=[])
        priority_key = trainer.loss_module.tensor_keys.priority
        out = self._graphs[kind](batch.exclude("index", priority_key))
        if (priority := out.get("priority", None)) is not None:
            batch.set(priority_key, priority)
        logs = dict(out.get("logs").items())
        trainer.remember_losses(logs)
        return logs

    @staticmethod
    def _clip(optimizer: Optimizer, trainer: Trainer) -> None:
        if trainer.clip_norm is None:
            return
        parameters = _parameters(optimizer)
        if trainer.clip_grad_norm:
            nn.utils.clip_grad_norm_(parameters, trainer.clip_norm)
        else:
            nn.utils.clip_grad_value_(parameters, trainer.clip_norm)

    def state_dict(self) -> dict[str, Any]:
        """The state of each optimizer, the number of gradient steps, and what is logged of those that wait.

        It is the same whether steps are captured or not.
        """
        optimizers = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
        if self.captured:
            for state in optimizers.values():
                for group in state["param_groups"]:
                    group["capturable"] = False
                    group.update({key: _number(group[key]) for key in ("lr", "initial_lr") if key in group})
        return {"steps": self.steps, "logs": dict(self._logs), **optimizers}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore all of that.

        Raises:
            ValueError: if the saved optimizers were of other kinds or networks.
        """
        saved = {
            name: set(state["param_groups"][0]) for name, state in state_dict.items() if name not in ("steps", "logs")
        }
        own = {name: set(optimizer.param_groups[0]) for name, optimizer in self.optimizers.items()}
        # torch takes the state of any optimizer, and fails within its next step
        differing = [name for name in {**own, **saved} if not own.get(name, set()) <= saved.get(name, set())]
        if differing or own.keys() != saved.keys():
            raise ValueError(
                f"the saved optimizers were of {[*saved]}, these are of {[*own]}, and others for "
                f"{differing or 'none of them'}; make them alike."
            )
        self.steps = state_dict["steps"]
        device = next(iter(self.optimizers["vae"].param_groups[0]["params"])).device
        self._logs = {name: value.to(device) for name, value in state_dict["logs"].items()}
        for name, optimizer in self.optimizers.items():
            kept = {k: v for k, v in optimizer.param_groups[0].items() if k == "capturable"}  # where its counter is
            groups = [{**group, **kept} for group in state_dict[name]["param_groups"]]
            optimizer.load_state_dict({**state_dict[name], "param_groups": groups})
        if self.captured:
            self.capture()


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


class NetworkLRScheduler(LRSchedulerHook):
    """TorchRL's hook for the scheduler of one network: it advances in the gradient steps in which that one learns.

    Args:
        scheduler: of that network's optimizer.
        name: ``"vae"``, ``"qvalue"`` or ``"actor"``.
        stepper: says when it learns.

    ``NetworkLRScheduler(scheduler, "vae", stepper).register(trainer)``.
    """

    def __init__(self, scheduler: LRScheduler, name: str, stepper: BCQOptimizationStepper) -> None:
        super().__init__(scheduler, interval="optim")
        self.name = name
        self.stepper = stepper

    def __call__(self, batch: TensorDictBase | None = None) -> TensorDictBase | None:
        """Advance, if the network has just learned."""
        return super().__call__(batch) if self.stepper.is_due(self.name, self.stepper.steps) else batch

    def state_dict(self) -> dict[str, Any]:
        """That of the scheduler, the same whether steps are captured or not."""
        state = super().state_dict()
        rates = {key: state["scheduler"].get(key) for key in ("base_lrs", "_last_lr")}
        plain = {key: [_number(rate) for rate in value] for key, value in rates.items() if value is not None}
        return {**state, "scheduler": {**state["scheduler"], **plain}}

    def register(self, trainer: Trainer, name: str | None = None) -> None:
        """Register with a trainer, and with its checkpoints."""
        super().register(trainer, name or f"{self.name}_lr_scheduler")


def _number(rate: float | Tensor) -> float:
    """A learning rate, which :meth:`BCQOptimizationStepper.capture` may have put into a tensor of float32."""
    return float(str(np.float32(rate.item()))) if isinstance(rate, Tensor) else rate
