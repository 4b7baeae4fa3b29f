"""Gradient steps of several networks on one batch, each with its own optimizer and schedule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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

from torchrl_bcq.objectives import OfflineLoss
from torchrl_bcq.trainers.distributed import Processes

_ALONE = Processes()


@dataclass(frozen=True)
class Schedule:
    """When a network learns, in gradient steps of the trainer.

    Args:
        start_after: steps before it begins.
        stop_after: step after which it stays as it is; None never stops.
        every: it learns in each step of this many.

    Raises:
        ValueError: if a number is out of range, or the network would never learn.
    """

    start_after: int = 0
    stop_after: int | None = None
    every: int = 1

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.start_after < 0 or self.every < 1:
            found = f"start_after is {self.start_after} and every {self.every}"
            raise ValueError(f"{found}; expected 0 or more, and 1 or more.")
        if self.stop_after is not None and self.stop_after < self.start_after + self.every:
            raise ValueError(
                f"stop_after is {self.stop_after}, but the first step is {self.start_after + self.every} "
                f"(start_after {self.start_after}, every {self.every}); the network would never learn."
            )

    def is_due(self, step: int) -> bool:
        """Whether the network learns in gradient step ``step``, counted from 1."""
        since, ended = step - self.start_after, self.stop_after is not None and step > self.stop_after
        return since > 0 and since % self.every == 0 and not ended


class OfflineOptimizationStepper(OptimizationStepper):
    """Steps each network of an :class:`~torchrl_bcq.OfflineLoss` on its own loss, in order, within one batch.

    Gradients are clipped as the trainer says (``clip_norm``, ``clip_grad_norm``). Target networks are moved by the
    trainer's target updater.

    Args:
        optimizers: an optimizer for each network, in the order of the steps.
        schedules: when a network learns; one without an entry learns in every step.

    Raises:
        ValueError: if there is no optimizer, or a schedule is for a network without one.
    """

    def __init__(self, optimizers: Mapping[str, Optimizer], *, schedules: Mapping[str, Schedule] | None = None) -> None:
        if not optimizers:
            raise ValueError("optimizers is empty, expected one for each network that has parameters to train.")
        if unknown := [name for name in schedules or {} if name not in optimizers]:
            raise ValueError(f"schedules has {unknown}, but optimizers are for {[*optimizers]}.")
        self.optimizers = dict(optimizers)
        self.schedules = {name: (schedules or {}).get(name, Schedule()) for name in optimizers}
        self.steps = 0
        self.captured = False
        self._logs: dict[str, Tensor] = {}
        self._graphs: dict[tuple[Any, ...], CudaGraphModule] = {}

    @classmethod
    def adam(cls, loss: OfflineLoss, lr: float = 1e-3, **settings: Any) -> Any:
        """Adam for each network that has parameters to train. ``settings`` are of the constructor."""
        return cls(make_adam(loss, lr), **settings)

    def is_due(self, name: str, step: int) -> bool:
        """Whether a network learns in gradient step ``step``, counted from 1."""
        return self.schedules[name].is_due(step)

    def step(self, trainer: Trainer, sub_batch: TensorDictBase) -> TensorDictBase:
        """Make one gradient step of each network that is due.

        Returns:
            Scalars to log: the losses and the batch means of their metadata. Those of a network that waits are of its
            last step; those of a network that has not begun, or has ended, are NaN.
        """
        step, loss = self.steps + 1, trainer.loss_module
        if not self._logs:  # TorchRL's means need the same entries in every step
            unknown = next(loss.parameters()).new_full((), torch.nan)
            self._logs = dict.fromkeys(loss.out_keys, unknown)
        for name, schedule in self.schedules.items():
            if step - 1 == schedule.stop_after:
                keys = (f"loss_{name}", *loss.metadata_keys[name])
                self._logs |= {key: torch.full_like(self._logs[key], torch.nan) for key in keys}
        due = tuple(name for name in self.optimizers if self.is_due(name, step))
        update = self._replay if self.captured else self._update
        self._logs.update(update(trainer, sub_batch, due))
        self.steps = step
        return TensorDict(self._logs)

    def _update(self, trainer: Any, batch: TensorDictBase, due: tuple[str, ...]) -> dict[str, Tensor]:
        """One gradient step of each of these networks; returns the scalars to log."""
        logs, processes = {}, getattr(trainer, "processes", _ALONE)  # TorchRL's own trainer has none
        for name in due:
            loss, metadata = trainer.compute_loss(batch, method=f"{name}_loss")
            optimizer = self.optimizers[name]
            optimizer.zero_grad()
            loss.backward()
            processes.average_gradients(_parameters(optimizer))
            if trainer.clip_norm is not None:
                clip = nn.utils.clip_grad_norm_ if trainer.clip_grad_norm else nn.utils.clip_grad_value_
                clip(_parameters(optimizer), trainer.clip_norm)
            optimizer.step()
            logs[f"loss_{name}"] = loss.detach()
            logs.update({key: value.mean() for key, value in metadata.items()})
        return logs

    def capture(self) -> None:
        """Capture gradient steps into CUDA graphs from now on, and replay them.

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

    def _replay(self, trainer: Any, batch: TensorDictBase, due: tuple[str, ...]) -> dict[str, Tensor]:
        kind = (*due, batch.batch_size)
        priority_key = trainer.loss_module.tensor_keys.priority
        if kind not in self._graphs:

            def update(batch: TensorDictBase) -> TensorDict:
                out = {"logs": self._update(trainer, batch, due)}
                if (priority := batch.get(priority_key, None)) is not None:
                    out["priority"] = priority
                return TensorDict(out)

            self._graphs[kind] = CudaGraphModule(update, in_keys=[], out_keys=[])
        out = self._graphs[kind](batch.exclude("index", priority_key))
        if (priority := out.get("priority", None)) is not None:
            batch.set(priority_key, priority)
        logs = dict(out.get("logs").items())
        trainer.remember_losses(logs)
        return logs

    def state_dict(self) -> dict[str, Any]:
        """Optimizers, number of gradient steps, and scalars logged last: the same whether steps are captured or not."""
        optimizers = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
        if self.captured:
            for state in optimizers.values():
                for group in state["param_groups"]:
                    group["capturable"] = False
                    group.update({key: _number(group[key]) for key in ("lr", "initial_lr") if key in group})
        return {"steps": self.steps, "logs": dict(self._logs), "optimizers": optimizers}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state; raises a ValueError if the saved optimizers are of other kinds or networks."""
        given = state_dict["optimizers"]
        saved = {name: set(state["param_groups"][0]) for name, state in given.items()}
        own = {name: set(optimizer.param_groups[0]) for name, optimizer in self.optimizers.items()}
        # torch takes the state of any optimizer, and fails within its next step
        differing = [name for name in {**own, **saved} if not own.get(name, set()) <= saved.get(name, set())]
        if differing or own.keys() != saved.keys():
            raise ValueError(
                f"the saved optimizers are of {[*saved]}, these are of {[*own]}, and of another kind for "
                f"{differing or 'none of them'}; make them alike."
            )
        self.steps = state_dict["steps"]
        device = _parameters(next(iter(self.optimizers.values())))[0].device
        self._logs = {name: value.to(device) for name, value in state_dict["logs"].items()}
        for name, optimizer in self.optimizers.items():
            kept = {k: v for k, v in optimizer.param_groups[0].items() if k == "capturable"}  # where its counter is
            groups = [{**group, **kept} for group in given[name]["param_groups"]]
            optimizer.load_state_dict({**given[name], "param_groups": groups})
        if self.captured:
            self.capture()


def make_adam(loss: OfflineLoss, lr: float = 1e-3) -> dict[str, Optimizer]:
    """Adam for each network that has parameters to train, in the loss's order."""
    names = loss.trainable_names
    return {name: Adam(getattr(loss, f"{name}_network_params").parameters(), lr=lr, fused=True) for name in names}


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


class NetworkLRScheduler(LRSchedulerHook):
    """TorchRL's hook for the scheduler of one network: it advances in the gradient steps in which that one learns.

    Args:
        scheduler: of that network's optimizer.
        name: of the network.
        stepper: knows when it learns.

    ``NetworkLRScheduler(scheduler, "critic", stepper).register(trainer)``.
    """

    def __init__(self, scheduler: LRScheduler, name: str, stepper: OfflineOptimizationStepper) -> None:
        super().__init__(scheduler, interval="optim")
        self.name = name
        self.stepper = stepper

    def __call__(self, batch: TensorDictBase | None = None) -> TensorDictBase | None:
        """Advance, if the network has just learned."""
        return super().__call__(batch) if self.stepper.is_due(self.name, self.stepper.steps) else batch

    def state_dict(self) -> dict[str, Any]:
        """State of the scheduler, the same whether steps are captured or not."""
        state = super().state_dict()
        rates = {key: state["scheduler"].get(key) for key in ("base_lrs", "_last_lr")}
        plain = {key: [_number(rate) for rate in value] for key, value in rates.items() if value is not None}
        return {**state, "scheduler": {**state["scheduler"], **plain}}

    def register(self, trainer: Trainer, name: str | None = None) -> None:
        """Register with a trainer, and with its checkpoints."""
        super().register(trainer, name or f"{self.name}_lr_scheduler")


def _number(rate: float | Tensor) -> float:
    """A learning rate, which may be in a float32 tensor of :meth:`OfflineOptimizationStepper.capture`."""
    return float(str(np.float32(rate.item()))) if isinstance(rate, Tensor) else rate
