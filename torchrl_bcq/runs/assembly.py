"""Builds the trainer of a run, with its data, metrics and hooks, from the settings of the run."""

from __future__ import annotations

import logging
import math
import random
import re
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.checkpoint import CheckpointRotation
from torchrl.data import TensorDictReplayBuffer

from torchrl_bcq.data import episode_weights, make_replay_buffer, multi_step, return_weights, split_episodes
from torchrl_bcq.data.episodes import episode_numbers, group_numbers
from torchrl_bcq.errors import RunError
from torchrl_bcq.evaluation import DatasetMetrics, EnvironmentMetrics, FQEMetrics
from torchrl_bcq.evaluation.environments import make_envs, steps_to_compare, time_limit
from torchrl_bcq.functional import change_reward
from torchrl_bcq.runs import processes
from torchrl_bcq.runs.algorithms import algorithms_of, find_algorithm
from torchrl_bcq.runs.build import make_average, make_objective, make_run_policy
from torchrl_bcq.runs.folder import BEST, CHECKPOINTS, Task, choose_device
from torchrl_bcq.runs.loggers import make_loggers
from torchrl_bcq.runs.optimizers import make_scheduler_hooks, make_stepper
from torchrl_bcq.runs.settings import default_settings, flat, to_plain
from torchrl_bcq.runs.stopping import StopEarly, measured_as
from torchrl_bcq.trainers import KeepBest, OfflineTrainer
from torchrl_bcq.trainers.execution import PRECISIONS

_logger = logging.getLogger(__name__)
_FROM_ONE = ("steps", "batch_size", "stack", "n_step", "log_interval", "evaluation.episodes", "evaluation.max_rows",
             "evaluation.fqe_steps", "evaluation.max_episode_steps", "checkpoint.keep")  # fmt: skip
_SEEDS = ("seed", "evaluation.seed", "policy.seed")
_RANGES: list[tuple[str, Callable[[Any], bool], str]] = [
    *((name, lambda value: value >= 1, "at least 1") for name in _FROM_ONE),
    *((name, lambda value: 0 <= value < 2**32, f"a number from 0 to {2**32 - 1}") for name in _SEEDS),
    *((f"loss.{name}", lambda value: 0 <= value <= 1, "a number between 0 and 1") for name in ("gamma", "tau")),
    ("held_out", lambda value: 0 <= value < 1, "a fraction of the episodes or groups, at least 0 and below 1"),
    ("loss.reduction", lambda value: value != "none", "mean or sum, because a gradient step needs one number"),
    (
        "threads",
        lambda value: value == "auto" or (isinstance(value, int) and value >= 1),
        "auto, a number of at least 1, or null for PyTorch's default",
    ),
    ("average_decay", lambda value: 0 <= value < 1, "at least 0 and below 1, or null for no average"),
    ("reward.shift", math.isfinite, "a finite number"),
    ("reward.scale", lambda value: 0 < value < math.inf, "a positive number"),
    ("reward.clip", lambda value: value > 0, "a positive number, or null for no clipping"),
    ("optim.clip_norm", lambda value: value > 0, "more than 0, or null for no clipping"),
    ("precision", lambda value: value in PRECISIONS, f"null or one of {[*PRECISIONS]}"),
]
CHANGED = "values, TD errors and discounted returns are of the changed rewards, but return is the environment's"


def assemble(settings: DictConfig, transitions: TensorDictBase, task: Task) -> OfflineTrainer:
    """Build the trainer of a run and its hooks; ``transitions [N]`` and ``task`` come from ``open_dataset``."""
    plain: Any = OmegaConf.to_container(settings, resolve=True)
    out, device = Path(settings.out), choose_device(settings.device)
    learned, weights = split(settings, transitions), _row_weights(settings, transitions)
    if learned is not None and processes.is_first():
        _report_split(transitions, learned)
    transitions = change_rewards(settings, transitions)
    buffer, held_out = _make_buffer(settings, transitions, learned, weights, device)
    random.seed(settings.seed)
    torch.manual_seed(settings.seed)
    loss, updater = make_objective(
        settings,
        task.observation_spec,
        task.action_spec,
        normalization=settings.normalize,
        transitions=transitions[learned] if settings.normalize and learned is not None else transitions,
        device=device,
    )
    stepper = make_stepper(loss, **plain["optim"])
    schedules = make_scheduler_hooks(stepper, **plain["optim"])
    trainer = OfflineTrainer(
        loss,
        buffer,
        target_net_updater=updater,
        optimization_stepper=stepper,
        total_steps=settings.steps,
        logger=make_loggers(settings.logger if processes.is_first() else (), out, plain["logger_kwargs"]),
        progress_bar=sys.stderr.isatty() if settings.progress_bar is None else settings.progress_bar,
        clip_norm=settings.optim.clip_norm,
        **{name: settings[name] for name in ("log_interval", "seed", "compile", "precision", "cudagraph")},
        checkpoint_rotation=CheckpointRotation(out / CHECKPOINTS, keep_last=settings.checkpoint.keep),
        checkpoint_metadata=lambda trainer: {"config": to_plain(settings), "task": asdict(task)},
        save_trainer_interval=settings.checkpoint.interval - 1,  # TorchRL saves after one step more than this number
        data_parallel=processes.several(),
    )
    with ExitStack() as after_failure:
        if trainer.logger is not None:
            after_failure.callback(trainer.logger.close)  # otherwise a service would continue this run in the next one
        for hook in schedules:
            hook.register(trainer)
        if processes.is_first():
            _add_metrics(trainer, settings, task, transitions, held_out)
        after_failure.pop_all()
    return trainer


def split(settings: DictConfig, transitions: TensorDictBase) -> Tensor | None:
    """Return a mask ``[N]`` of the training rows, or None if the run holds out no episodes."""
    return split_episodes(transitions, settings.held_out, seed=settings.seed)[0] if settings.held_out else None


def _report_split(transitions: TensorDictBase, learned: Tensor) -> None:
    """Log how many episodes, and how many groups, are held out."""
    kinds = {"episodes": episode_numbers(transitions), "groups": group_numbers(transitions)}
    episodes, *groups = (
        f"{len(numbers[~learned].unique())} of {len(numbers.unique())} {what}"
        for what, numbers in kinds.items()
        if numbers is not None
    )
    shown = f"{episodes} ({groups[0]})" if groups else episodes
    _logger.info("held_out: %s are used for metrics and not for training", shown)


def change_rewards(settings: DictConfig, transitions: TensorDictBase) -> TensorDictBase:
    """Return the transitions with the rewards that ``settings.reward`` describes."""
    reward = transitions["next", "reward"]
    changed = change_reward(reward, **settings.reward)
    return transitions if torch.equal(changed, reward) else transitions.copy().set(("next", "reward"), changed)


def reward_formula(settings: DictConfig) -> str | None:
    """Return the formula of the changed rewards as text, or None if the rewards do not change."""
    shift, scale, clip = (settings.reward[name] for name in ("shift", "scale", "clip"))
    if (shift, scale, clip) == (0, 1, None):
        return None
    formula = f"(reward + {shift:g}) * {scale:g}"
    return formula if clip is None else f"clip({formula}, {-clip:g}, {clip:g})"


def _row_weights(settings: DictConfig, transitions: TensorDictBase) -> Tensor | None:
    """Return the weights ``[N]`` with which rows are drawn, or None if all rows are equally likely."""
    kinds: dict[str | None, Callable] = {None: lambda rows: None, "episode": episode_weights, "return": return_weights}
    if settings.weights not in kinds:
        raise RunError(f"weights is {settings.weights!r}, expected null or one of {[kind for kind in kinds if kind]}.")
    return kinds[settings.weights](transitions)


def _make_buffer(
    settings: DictConfig,
    transitions: TensorDictBase,
    learned: Tensor | None,
    weights: Tensor | None,
    device: torch.device,
) -> tuple[TensorDictReplayBuffer, TensorDictBase | None]:
    """Return a replay buffer that draws the training rows, and the held-out rows (None if there are none)."""
    held_out = None
    if learned is not None:
        held_out = transitions[~learned]
        if settings.sampler == "uniform":  # held-out rows get weight 0, so no data is copied
            weights = learned if weights is None else weights * learned
        else:
            transitions, weights = transitions[learned], None if weights is None else weights[learned]
    if settings.n_step > 1:
        if "gamma" not in settings.loss:
            raise RunError(f"n_step is {settings.n_step}, but {settings.algorithm} has no discount; use n_step=1.")
        transitions = multi_step(transitions, settings.n_step, gamma=settings.loss.gamma)
    drawing = {"sampler": settings.sampler, "weights": weights, "seed": processes.own_seed(settings.seed)}
    return make_replay_buffer(transitions, batch_size=settings.batch_size, device=device, **drawing), held_out


def _add_metrics(
    trainer: OfflineTrainer,
    settings: DictConfig,
    task: Task,
    transitions: TensorDictBase,
    held_out: TensorDictBase | None,
) -> None:
    """Add the hooks for evaluation, the best checkpoint and early stopping, in this order."""
    loss, evaluation = trainer.loss_module, settings.evaluation
    average = make_average(settings, loss)
    if average is not None:
        average.register(trainer)
        loss = average.loss_module
    policy = make_run_policy(settings, loss.networks)
    shared: dict[str, Any] = {"interval": evaluation.interval, "seed": evaluation.seed}
    rows = transitions if held_out is None else held_out
    is_held_out = {"held_out": held_out is not None, "max_rows": evaluation.max_rows}
    metrics = DatasetMetrics(loss, policy, rows, **is_held_out, **shared)
    known, in_env = [*metrics.names, *loss.out_keys], []
    if task.env is not None:
        discount = {"gamma": settings.loss.gamma} if "gamma" in settings.loss else {}
        limit = time_limit(task.env)
        steps = steps_to_compare(limit, **discount) if discount else None
        envs = make_envs(task.env, evaluation.episodes, choose_device(settings.device), max_steps=steps)
        shared |= {"value": loss.value, "reference_scores": task.reference_scores, **discount}
        shared |= {"time_limit": limit, "reward": partial(change_reward, **settings.reward)}
        EnvironmentMetrics(envs, policy, **shared).register(trainer)
        in_env = ["return", "return_std", "episode_length"]
        in_env += ["value_estimate", "discounted_return"] if loss.has_values else []
        in_env += ["normalized_score"] if task.reference_scores else []
        known += in_env
    metrics.register(trainer)
    checkpoint, stopping = settings.checkpoint, settings.early_stopping
    monitor = checkpoint.monitor
    if not {monitor, stopping.monitor}.isdisjoint(FQEMetrics.names):
        FQEMetrics(transitions, policy, task.action_spec, **_fqe_settings(settings, task)).register(trainer)
        known += FQEMetrics.names
    if monitor == "auto":
        monitor = None if task.env_id is None else "return"
    for section, name in (("checkpoint", monitor), ("early_stopping", stopping.monitor)):
        if name is not None and name not in known:
            choices = [*dict.fromkeys([*known, *FQEMetrics.names])]
            raise RunError(f"{section}.monitor is {name!r}, expected one of {choices} in this run.")
    if monitor is not None:
        best = Path(settings.out) / BEST
        mode = _mode(checkpoint.mode, monitor)
        where = task if monitor in in_env else None
        kept = {"wait_for": checkpoint.wait_for, "measured_as": measured_as(settings, where)}
        KeepBest(best, monitor, mode, **kept).register(trainer)
    if stopping.threshold is not None and stopping.monitor is None:
        raise RunError("early_stopping.threshold needs a metric; set early_stopping.monitor, such as to return.")
    if stopping.monitor is not None:
        rule = {**stopping, "mode": _mode(stopping.mode, stopping.monitor)}
        where = task if stopping.monitor in in_env else None
        StopEarly(measured_as=measured_as(settings, where), **rule).register(trainer)


def _mode(mode: str, monitor: str) -> str:
    """Return ``mode``; in place of ``auto``, ``min`` for errors, losses and distances, and ``max`` for the others."""
    if mode != "auto":
        return mode
    return "min" if re.search("error|loss|distance|negative|reconstruction|_kl$|_std$", monitor) else "max"


def _fqe_settings(settings: DictConfig, task: Task) -> dict[str, Any]:
    """Return the arguments of ``FQEMetrics``: the episodes that the run holds out, or a part of its own."""
    return {
        "interval": settings.evaluation.interval,
        "fqe_steps": settings.evaluation.fqe_steps,
        "gamma": settings.loss.get("gamma", 0.99),
        "seed": settings.seed,
        "device": choose_device(settings.device),
        "observation_keys": list(task.shapes),
        **({"held_out": settings.held_out} if settings.held_out else {}),
    }


def check_numbers(settings: DictConfig) -> None:
    """Raise a RunError if ``settings`` contain an invalid number, precision or baseline."""
    for name, fits, expected in _RANGES:
        if (value := OmegaConf.select(settings, name)) is not None and not fits(value):
            raise RunError(f"{name} is {value!r}, expected {expected}.")
    for name, sizes in settings.network.items():
        if OmegaConf.is_list(sizes) and any(OmegaConf.is_list(size) or size < 1 for size in sizes):
            raise RunError(f"network.{name} is {list(sizes)}, expected sizes of at least 1.")
    every = settings.log_interval
    for section in ("evaluation", "checkpoint"):
        if (interval := settings[section].interval) < 1 or interval % every:
            found = f"{section}.interval is {interval}, not a positive multiple of log_interval {every}"
            raise RunError(f"{found}; change one of them.")
    discrete = find_algorithm(settings.algorithm).discrete
    if settings.baseline is not None and find_algorithm(settings.baseline).discrete != discrete:
        found = f"baseline is {settings.baseline!r}, which does not fit the actions of {settings.algorithm}"
        raise RunError(f"{found}; choose one of {[*algorithms_of(discrete)]}.")
    own, defaults = flat(settings), flat(default_settings(settings.algorithm))
    for name, (other, value) in find_algorithm(settings.algorithm).requires.items():
        if own[name] != defaults[name] and own[other] != value:
            found = f"this run has {other}={own[other]}"
            raise RunError(f"{name} has an effect only with {other}={value}, but {found}; leave {name} out.")
