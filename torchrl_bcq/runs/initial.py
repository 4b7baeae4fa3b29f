"""Starts a new run from the networks of another run: the setting ``init_from``."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from torchrl_bcq.errors import RunError
from torchrl_bcq.objectives import OfflineLoss
from torchrl_bcq.runs.folder import Task, Trained, find_checkpoint, load, read_metadata
from torchrl_bcq.runs.settings import FREE, flat

_logger = logging.getLogger(__name__)


def load_networks(loss: OfflineLoss, settings: DictConfig, task: Task) -> None:
    """Copy the weights of the run or checkpoint ``settings.init_from`` into the networks and the target networks.

    The buffers of the networks, such as the scales of a normalization, are copied too. The discount and other settings
    of the loss stay as they are.

    Raises:
        RunError: if there is no checkpoint, or if its algorithm, sizes or action bounds are not those of this run.
    """
    path = find_checkpoint(Path(settings.init_from))
    saved, then, step = read_metadata(path)
    if saved.algorithm != settings.algorithm:
        raise RunError(
            f"{path} is of algorithm {saved.algorithm}, not {settings.algorithm}; set another init_from or algorithm."
        )
    if then.stack != task.stack:
        raise RunError(f"{path} was trained with stack={then.stack}, not {task.stack}; set stack={then.stack}.")
    there, here = ((one.shapes, one.n_actions or len(one.action_low)) for one in (then, task))
    if there != here:
        what = "action dimensions" if task.n_actions is None else "discrete actions"
        raise RunError(
            f"{path} has states of the shapes {there[0]} and {there[1]} {what}, but the dataset has {here[0]} and "
            f"{here[1]}; set another init_from, or another dataset."
        )
    if (then.action_low, then.action_high) != (task.action_low, task.action_high):
        remedy = f"set 'action_low={then.action_low}' 'action_high={then.action_high}'".replace(", ", ",")
        found = f"{path} has actions from {then.action_low} to {then.action_high}"
        raise RunError(f"{found}, but this run has actions from {task.action_low} to {task.action_high}; {remedy}.")
    _copy_networks(load(path, device="cpu"), loss, _differing(saved, settings))
    _logger.info("the networks start with the weights of %s, after %s gradient steps", path, f"{step:,}")
    _report_settings(flat(saved), flat(settings))


def _report_settings(then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Log the settings that differ; log a warning if the networks may have learned from held-out episodes."""
    names = [name for name in now if name.split(".")[0] not in {*FREE, "init_from"} and then.get(name) != now[name]]
    if names:
        changes = "; ".join(f"{name} was {then.get(name)!r} and is now {now[name]!r}" for name in names)
        _logger.info("only the networks are copied, not the settings: %s", changes)
    if now["held_out"] and then["dataset"] == now["dataset"] and {"held_out", "seed"} & {*names}:
        same = f"to hold out the same episodes, set held_out={then['held_out']} seed={then['seed']}"
        _logger.warning(
            "the networks may have learned from episodes that this run holds out, so its held-out metrics may look too "
            "good; %s.",
            same if then["held_out"] else "the run of init_from held out none",
        )


def _differing(saved: DictConfig, settings: DictConfig) -> list[str]:
    """Return the settings of the saved run that differ and can decide the structure of a network."""
    then, now = flat(saved), flat(settings)
    names = [name for name in now if name.startswith("network.") or name == "normalize"]
    changed = [name for name in names if then[name] != now[name] and not isinstance(then[name], float)]
    return [f"{name}={json.dumps(then[name], separators=(',', ':'))}" for name in changed]


def _copy_networks(trained: Trained, loss: OfflineLoss, differing: list[str]) -> None:
    """Copy the networks and their targets. A target network that ``trained`` lacks becomes a copy of its network."""
    state, own = trained.loss.state_dict(), dict(loss.state_dict())
    online = tuple(f"{name}_network_params." for name in loss.network_names)
    names = [name for name in own if name.removeprefix("target_").startswith(online)]
    taken = {name: state.get(name, state.get(name.removeprefix("target_"))) for name in names}
    odd = [name for name, value in taken.items() if value is None or value.shape != own[name].shape]
    odd += [name for name in state if name.startswith(online) and name not in own]
    if odd:
        remedy = f"set {' '.join(differing)}" if differing else "set another init_from"
        raise RunError(f"{trained.path} has networks of another structure, such as {odd[0]}; {remedy}.")
    loss.load_state_dict({**own, **taken})
