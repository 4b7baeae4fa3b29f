"""Makes optimizers, learning-rate schedulers and ``Schedule`` objects from settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch.optim import Optimizer, lr_scheduler

from torchrl_bcq.errors import RunError
from torchrl_bcq.objectives import OfflineLoss
from torchrl_bcq.runs.signatures import Settings, settings_of, taken_by
from torchrl_bcq.trainers.stepper import NetworkLRScheduler, OfflineOptimizationStepper, Schedule

_FUSED = ("Adam", "AdamW")  # these classes get fused=True: one kernel updates all parameters
# unsupported: these classes need a closure, sparse gradients, or a metric
_UNFIT = ("LBFGS", "SparseAdam", "ReduceLROnPlateau")
_EMPTY: Mapping[str, Any] = MappingProxyType({})


def make_optimizer(
    name: str, parameters: Any, *, optimizer: str = "Adam", lr: float = 1e-3, kwargs: Mapping[str, Any] = _EMPTY
) -> Optimizer:
    """Make the optimizer of a network; ``optimizer`` is the name of a class in ``torch.optim``."""
    fused = {"fused": True} if optimizer in _FUSED and not {"foreach", "differentiable"} & {*kwargs} else {}
    return _call(torch.optim, optimizer, Optimizer, (name, "optimizer"), parameters, {"lr": lr, **fused, **kwargs})


def make_scheduler(
    name: str, optimizer: Optimizer, *, scheduler: str | None = None, scheduler_kwargs: Mapping[str, Any] = _EMPTY
) -> lr_scheduler.LRScheduler | None:
    """Make a learning-rate scheduler of the class named ``scheduler``; return None if no class is named."""
    if scheduler is None and scheduler_kwargs:
        found = f"optim.scheduler_kwargs or optim.{name}.scheduler_kwargs is set, but there is no scheduler"
        raise RunError(f"{found}; set optim.scheduler or optim.{name}.scheduler, too.")
    if scheduler is None:
        return None
    base = lr_scheduler.LRScheduler
    return _call(lr_scheduler, scheduler, base, (name, "scheduler"), optimizer, scheduler_kwargs)


def optim_settings(networks: Sequence[str], *calls: Callable) -> Settings:
    """Return the defaults of the section ``optim``: settings of all networks, then of each network."""
    common: Settings = {name: setting for call in calls for name, setting in settings_of(call).items()}
    own: Settings = {
        name: (kind, {}) if isinstance(default, Mapping) else (kind | None, None)
        for name, (kind, default) in common.items()
    }
    return {**common, **{network: {**own, **settings_of(Schedule)} for network in networks}}


def make_stepper(loss: OfflineLoss, **optim: Any) -> OfflineOptimizationStepper:
    """Make an optimizer and a schedule for each network that has parameters to train.

    ``optim`` holds arguments of ``make_optimizer`` for all networks. If ``optim`` has an entry with the name of a
    network, the entry holds arguments of ``make_optimizer`` and ``Schedule`` for this network.
    """
    optimizers, schedules = {}, {}
    unset = (None, {}, *(default for _, default in settings_of(Schedule).values()))
    for name, own in optim.items():
        changed = [key for key, value in own.items() if value not in unset] if isinstance(own, Mapping) else []
        if changed and f"{name}_network" in loss.network_arguments() and name not in loss.trainable_names:
            raise RunError(f"optim.{name}.{changed[0]} has no effect, because {name} does not learn; leave it out.")
    for name in loss.trainable_names:
        settings = _of_network(optim, name)
        parameters = getattr(loss, f"{name}_network_params").parameters()
        optimizers[name] = make_optimizer(name, parameters, **taken_by(make_optimizer, settings))
        try:
            schedules[name] = Schedule(**taken_by(Schedule, settings))
        except ValueError as error:
            raise RunError(f"optim.{name}: {error}") from error
    return OfflineOptimizationStepper(optimizers, schedules=schedules)


def make_scheduler_hooks(stepper: OfflineOptimizationStepper, **optim: Any) -> list[NetworkLRScheduler]:
    """Make a hook for each network that has a learning-rate scheduler."""
    made = {
        name: make_scheduler(name, optimizer, **taken_by(make_scheduler, _of_network(optim, name)))
        for name, optimizer in stepper.optimizers.items()
    }
    return [NetworkLRScheduler(scheduler, name, stepper) for name, scheduler in made.items() if scheduler is not None]


def _of_network(optim: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the settings of a network; a common setting is used where the network has no setting."""
    own = {key: value for key, value in optim.get(name, {}).items() if value is not None}
    settings = {**optim, **own}
    for kind, kwargs in (("optimizer", "kwargs"), ("scheduler", "scheduler_kwargs")):
        same = settings.get(kind) == optim.get(kind)  # the common arguments are only for the common class
        settings[kwargs] = {**(optim.get(kwargs, {}) if same else {}), **own.get(kwargs, {})}
    return settings


def _call(module: Any, kind: str, base: Any, setting: tuple[str, str], first: Any, arguments: Mapping[str, Any]) -> Any:
    """Make an instance of the PyTorch class ``kind``; ``setting`` names the network and the setting."""
    network, role = setting
    kinds = {name: value for name, value in vars(module).items() if isinstance(value, type) and value is not base}
    known = sorted(k for k, value in kinds.items() if issubclass(value, base) and k[0] != "_" and k not in _UNFIT)
    if kind not in known:
        where = f"optim.{role} or optim.{network}.{role}"
        raise RunError(f"the {role} {kind!r} ({where}) does not exist; {module.__name__} has {known}.")
    try:
        return kinds[kind](first, **{k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()})
    except (TypeError, ValueError, RuntimeError) as error:
        given = {name: value for name, value in arguments.items() if name != "fused"}
        found = f"{kind} rejects the arguments {given}: {error}"
        raise RunError(f"the {role} of {network} cannot be made: {found}") from error
