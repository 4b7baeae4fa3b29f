"""Gradient steps of several networks on one batch; each network has its own optimizer and schedule."""

from __future__ import annotations

import warnings
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

from torchrl_bcq.errors import remedy
from torchrl_bcq.objectives import OfflineLoss
from torchrl_bcq.trainers.distributed import Processes

_ALONE = Processes()


@dataclass(frozen=True)
class Schedule:
    """Decides in which gradient steps of the trainer a network learns.

    Args:
        start_after: number of gradient steps before the network begins to learn.
        stop_after: number of the gradient step after which the network stops learning; None means that the network
            never stops learning.
        every: the network learns in every ``every``-th gradient step after ``start_after``.

    Raises:
        ValueError: if a number is out of range, or the network would never learn.
    """

    start_after: int = 0
    stop_after: int | None = None
    every: int = 1

    def __post_init__(self) -> None:
        """Raise a ValueError if a number is out of range, or if the network would never learn."""
        if self.start_after < 0 or self.every < 1:
            found = f"start_after is {self.start_after} and every {self.every}"
            raise ValueError(f"{found}; start_after must be at least 0, and every must be at least 1.")
        if self.stop_after is not None and self.stop_after < self.start_after + self.every:
            raise ValueError(
                f"stop_after is {self.stop_after}, but the network's first step is {self.start_after + self.every} "
                f"(start_after {self.start_after}, every {self.every}), so it would never learn; increase stop_after."
            )

    def is_due(self, step: int) -> bool:
        """Return whether the network learns in gradient step ``step``. The first step is 1."""
        since, ended = step - self.start_after, self.stop_after is not None and step > self.stop_after
        return since > 0 and since % self.every == 0 and not ended


class OfflineOptimizationStepper(OptimizationStepper):
    """For each batch, makes one gradient step of each network of an ``OfflineLoss``, one after another.

    Each network learns from its own loss. The trainer's arguments ``clip_norm`` and ``clip_grad_norm`` decide how
    gradients are clipped. The trainer's target updater updates the target networks.

    Args:
        optimizers: mapping from each network's name to its optimizer, in the order in which the networks learn.
        schedules: mapping from network names to ``Schedule``; a network without a schedule learns in every step.

    Raises:
        ValueError: if there is no optimizer, or a schedule is for a network that has no optimizer.
    """

    def __init__(self, optimizers: Mapping[str, Optimizer], *, schedules: Mapping[str, Schedule] | None = None) -> None:
        if not optimizers:
            raise ValueError("optimizers is empty, expected one for each network that has parameters to train.")
        if unknown := [name for name in schedules or {} if name not in optimizers]:
            raise ValueError(f"schedules has {unknown}, but the optimizers are for {[*optimizers]}; correct the names.")
        self.optimizers = dict(optimizers)
        self.schedules = {name: (schedules or {}).get(name, Schedule()) for name in optimizers}
        self.steps = 0
        self.captured = False
        self._logs: dict[str, Tensor] = {}
        self._graphs: dict[tuple[Any, ...], CudaGraphModule] = {}

    @classmethod
    def adam(
        cls, loss: OfflineLoss, lr: float = 1e-3, *, schedules: Mapping[str, Schedule] | None = None
    ) -> OfflineOptimizationStepper:
        """Make a stepper with one Adam optimizer for each network of the loss's ``trainable_names``."""
        networks = {name: getattr(loss, f"{name}_network_params") for name in loss.trainable_names}
        optimizers = {name: Adam(each.parameters(), lr=lr, fused=True) for name, each in networks.items()}
        return cls(optimizers, schedules=schedules)

    def is_due(self, name: str, step: int) -> bool:
        """Return whether the network with this name learns in gradient step ``step``. The first step is 1."""
        return self.schedules[name].is_due(step)

    def step(self, trainer: Trainer, sub_batch: TensorDictBase) -> TensorDictBase:
        """Update, one after another, the networks that learn in this gradient step.

        Returns:
            Scalars to log: the losses, and the batch means of the metadata that the losses return. If a network does
            not learn in this step, its scalars are those of the last step in which it learned. The scalars of a network
            are NaN before the network's first step and after ``stop_after``.
        """
        step, loss = self.steps + 1, trainer.loss_module
        if not self._logs:  # begin with NaN: TorchRL's averages need the same entries in each step
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
        """Make one gradient step of each network in ``due`` and return the scalars to log."""
        logs, processes = {}, getattr(trainer, "processes", _ALONE)  # TorchRL's own Trainer lacks this attribute
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
            logs.update({key: value.detach().to(loss.dtype).mean() for key, value in metadata.items()})
        return logs

    def capture(self) -> None:
        """From now on, capture gradient steps into CUDA graphs and replay these graphs.

        There is one graph for all steps in which the same networks learn from batches of the same size. The second
        step with the same networks and batch size captures the graph.

        Raises:
            ValueError: if an optimizer does not support capture.
        """
        for name, optimizer in self.optimizers.items():
            if "capturable" not in optimizer.defaults:
                found = f"the optimizer of {name} is {type(optimizer).__name__}"
                raise ValueError(f"{found}, which CUDA graphs cannot capture; use Adam.")
        for group in [group for optimizer in self.optimizers.values() for group in optimizer.param_groups]:
            group["capturable"] = True
            # make lr a float32 tensor: a CUDA graph would not see a change of a Python number
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

            with warnings.catch_warnings():  # tensordict removes its classes from pytree's registry; no result changes
                warnings.filterwarnings("ignore", "Tensordict is registered in PyTree", UserWarning)
                self._graphs[kind] = CudaGraphModule(update, in_keys=[], out_keys=[])
        out = self._graphs[kind](batch.exclude("index", priority_key))
        if (priority := out.get("priority", None)) is not None:
            batch.set(priority_key, priority)
        logs = dict(out.get("logs").items())
        trainer.remember_losses(logs)
        return logs

    def state_dict(self) -> dict[str, Any]:
        """Return optimizer states, step count and last scalars. CUDA graphs do not change the format."""
        optimizers = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
        if self.captured:
            for state in optimizers.values():
                for group in state["param_groups"]:
                    group["capturable"] = False
                    group.update({key: _number(group[key]) for key in ("lr", "initial_lr") if key in group})
        return {"steps": self.steps, "logs": dict(self._logs), "optimizers": optimizers, "classes": self._classes}

    @property
    def _classes(self) -> dict[str, str]:
        return {name: type(optimizer).__name__ for name, optimizer in self.optimizers.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state; raise a ValueError if networks or optimizer classes differ from the saved ones."""
        given, saved = state_dict["optimizers"], state_dict["classes"]
        if saved != self._classes:  # PyTorch would load the state of another class without an error
            raise ValueError(
                f"the saved run has the optimizers {saved}, this run {self._classes}; use the networks and optimizers "
                "of the saved run."
            )
        self.steps = state_dict["steps"]
        device = _parameters(next(iter(self.optimizers.values())))[0].device
        self._logs = {name: value.to(device) for name, value in state_dict["logs"].items()}
        for name, optimizer in self.optimizers.items():
            # keep capturable, because this flag decides the device of the optimizer's step counter
            kept = {k: v for k, v in optimizer.param_groups[0].items() if k == "capturable"}
            groups = [{**group, **kept} for group in given[name]["param_groups"]]
            optimizer.load_state_dict({**given[name], "param_groups": groups})
        if self.captured:
            self.capture()


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


class NetworkLRScheduler(LRSchedulerHook):
    """TorchRL's ``LRSchedulerHook`` for one network; the scheduler steps only when the network learns.

    Args:
        scheduler: learning-rate scheduler of the network's optimizer.
        name: name of the network, one of the loss's ``trainable_names``.
        stepper: the trainer's stepper, which holds the network's schedule.

    Usage: ``NetworkLRScheduler(scheduler, name, stepper).register(trainer)``.
    """

    def __init__(self, scheduler: LRScheduler, name: str, stepper: OfflineOptimizationStepper) -> None:
        super().__init__(scheduler, interval="optim")
        self.name = name
        self.stepper = stepper

    def __call__(self, batch: TensorDictBase | None = None) -> TensorDictBase | None:
        """Step the scheduler if the network has learned in the current gradient step."""
        return super().__call__(batch) if self.stepper.is_due(self.name, self.stepper.steps) else batch

    def state_dict(self) -> dict[str, Any]:
        """Return the scheduler's state; learning rates that are tensors become floats."""
        state = super().state_dict()
        rates = {key: state["scheduler"].get(key) for key in ("base_lrs", "_last_lr")}
        plain = {key: [_number(rate) for rate in value] for key, value in rates.items() if value is not None}
        return {**state, "scheduler": {**state["scheduler"], **plain}}

    def register(self, trainer: Trainer, name: str | None = None) -> None:
        """Register the hook with a trainer, and add its state to the trainer's checkpoints.

        Raises:
            ValueError: if gradient steps are captured and the scheduler changes the momentum.
        """
        if self.stepper.captured and getattr(self.scheduler, "cycle_momentum", False):
            found = f"the scheduler of {self.name} changes the momentum, which a CUDA graph would not notice"
            command = f"set optim.{self.name}.scheduler_kwargs.cycle_momentum=false"
            raise ValueError(f"{found}; {remedy('set cycle_momentum=False', command)}.")
        super().register(trainer, name or f"{self.name}_lr_scheduler")


def _number(rate: float | Tensor) -> float:
    """Return a learning rate as a float. After ``capture``, the rate is a float32 tensor."""
    return float(str(np.float32(rate.item()))) if isinstance(rate, Tensor) else rate
