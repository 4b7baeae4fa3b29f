"""Hydra configs for TorchRL's config groups. The import of this package adds these configs to the configs of TorchRL.

For each config, Hydra calls one function or class. Each setting of the config is an argument of this function or class
and has the same name, type and default. Write a nested key as a list, such as ``action_key: [agent, action]``, and a
dtype as a string, such as ``float32``. ``import torchrl_bcq`` imports neither this package nor Hydra.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    from hydra.core.config_store import ConfigStore
except ImportError as error:
    raise ImportError("torchrl_bcq.conf needs Hydra: pip install hydra-core.") from error

import torch
from hydra.utils import get_method
from torchrl.trainers.algorithms.configs.common import ConfigBase, _normalize_hydra_key, _normalize_hydra_keys
from torchrl.trainers.algorithms.configs.data import ReplayBufferBaseConfig
from torchrl.trainers.algorithms.configs.hooks import HookConfig
from torchrl.trainers.algorithms.configs.modules import NetworkConfig
from torchrl.trainers.algorithms.configs.objectives import LossConfig, TargetNetUpdaterConfig
from torchrl.trainers.algorithms.configs.trainers import TrainerConfig

from torchrl_bcq import data, modules
from torchrl_bcq.runs.algorithms import ALGORITHMS, Algorithm
from torchrl_bcq.runs.build import make_loss, make_networks, make_policy, make_trainer, make_updater
from torchrl_bcq.runs.optimizers import make_optimizer, make_stepper, optim_settings
from torchrl_bcq.runs.signatures import Settings, fields_of, make_section, settings_of
from torchrl_bcq.trainers import OfflineTrainer

# each part (loss, networks, ...) has a config group. These values insert the chosen configs into the trainer. Select a
# root config by compose("bcq"), or by "- bcq" in the defaults list of a file
_WIRING = {
    "env": "${oc.select:env}",  # null if no env is chosen
    "dataset": "${oc.select:dataset}",
    "replay_buffer": "${replay_buffer}",
    "networks": "${networks}",
    "loss_module": "${loss}",
    "target_net_updater": "${oc.select:target_net_updater}",
    "optimization_stepper": "${optimization_stepper}",
    "logger": "${oc.select:logger}",
}


def call(function: str, **arguments: Any) -> Any:
    """Convert keys and dtypes in ``arguments``, then import ``function`` by its path and call it.

    In arguments named ``*_key`` or ``*_keys``, a list becomes a nested key. In the argument ``dtype``, a string becomes
    a ``torch.dtype``.
    """
    for name, value in arguments.items():
        if name.endswith("_keys"):
            arguments[name] = _normalize_hydra_keys(value)
        elif name.endswith("_key"):
            arguments[name] = _normalize_hydra_key(value)
        elif name == "dtype" and isinstance(value, str):
            arguments[name] = getattr(torch, value.removeprefix("torch."))
    return get_method(function)(**arguments)


def _store(group: str | None, name: str, function: Callable, base: type, **fields: Any) -> None:
    """Register a Hydra config that calls ``function``; ``fields`` are additional settings of this config."""
    settings = {**fields_of(function), **fields}
    target = f"{function.__module__}.{function.__qualname__}"
    if any(argument.endswith(("_key", "_keys")) or argument == "dtype" for argument in settings):
        settings["function"], target = (str, target), f"{__name__}.{call.__name__}"
    settings = {"_convert_": (str, "all"), **settings, "_target_": (str, target)}
    node = make_section(function.__name__, settings, base)
    ConfigStore.instance().store(group=group, name=name, node=node, provider="torchrl_bcq")


def _store_algorithm(name: str, record: Algorithm) -> None:
    """Register configs of an algorithm's networks, loss and trainer, and a root config that combines them."""
    algorithm: Settings = {"algorithm": (str, name)}
    networks = {**fields_of(record.make_modules), **fields_of(make_networks), **algorithm}
    _store("model", f"{name}_modules", make_networks, NetworkConfig, **networks)
    _store("model", f"{name}_policy", make_policy, NetworkConfig, **fields_of(record.policy), **algorithm)
    estimator = settings_of(record.loss.make_value_estimator)
    _store("loss", name, make_loss, LossConfig, **fields_of(record.loss), **estimator, **algorithm)
    if record.make_updater is not None:
        settings = {**settings_of(record.make_updater), **algorithm}
        _store("target_net_updater", name, make_updater, TargetNetUpdaterConfig, **settings)
    trained = [argument.removesuffix("_network") for argument in record.loss.network_arguments()]
    _store("hook", f"{name}_optimization", make_stepper, HookConfig, **optim_settings(trained, make_optimizer))
    settings = {**fields_of(OfflineTrainer), **fields_of(make_trainer), **algorithm}
    # Hydra must not build the parts: make_trainer builds them after it has set the seed
    own = {"_recursive_": (bool, False), "_convert_": (str, "none")}
    _store("trainer", name, make_trainer, TrainerConfig, **settings, **own)
    defaults = [
        {"env": None},  # optional; choose one with the override env=gym
        {"dataset": None},
        {"replay_buffer": "bcq"},
        {"model@networks": f"{name}_modules"},
        {"loss": name},
        {"target_net_updater": name if record.make_updater else None},
        {"hook@optimization_stepper": f"{name}_optimization"},
        {"logger": None},
        {"trainer": name},
        {"model@policy": f"{name}_policy"},
        "_self_",
    ]
    ConfigStore.instance().store(name=name, node={"defaults": defaults, "trainer": _WIRING}, provider="torchrl_bcq")


for _name in ("hdf5", "npz", "table", "minari", "d4rl", "memmap"):
    _store("dataset", _name, getattr(data, f"load_{_name}"), ConfigBase)
_store("model", "action_vae", modules.ActionVAE, NetworkConfig)
_store("model", "perturbation_actor", modules.PerturbationActor, NetworkConfig)
_store("model", "q_ensemble", modules.QEnsemble, NetworkConfig)
_store("model", "deterministic_actor", modules.DeterministicActor, NetworkConfig)
_store("replay_buffer", "bcq", data.make_replay_buffer, ReplayBufferBaseConfig)
for _name, _record in ALGORITHMS.items():
    _store_algorithm(_name, _record)
