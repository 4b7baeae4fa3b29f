"""The trainer of a run with all its parts and hooks, from the settings."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDictBase
from torch import Tensor
from torch.optim import Optimizer, lr_scheduler
from torchrl.checkpoint import CheckpointRotation
from torchrl.data import TensorDictReplayBuffer
from torchrl.objectives import SoftUpdate
from torchrl.trainers import EarlyStopping

from torchrl_bcq.cli import processes
from torchrl_bcq.cli.errors import RunError
from torchrl_bcq.cli.loggers import make_loggers
from torchrl_bcq.cli.run import BEST, CHECKPOINTS, Task, choose_device, make_envs, make_loss, make_networks
from torchrl_bcq.data import episode_weights, make_replay_buffer, multi_step, return_weights, split_episodes
from torchrl_bcq.modules import BCQPolicy, Normalization
from torchrl_bcq.objectives import BCQLoss
from torchrl_bcq.trainers import BCQOptimizationStepper, BCQTrainer, NetworkLRScheduler
from torchrl_bcq.trainers.best import KeepBest
from torchrl_bcq.trainers.execution import PRECISIONS
from torchrl_bcq.trainers.metrics import DatasetMetrics, EnvironmentMetrics

_FUSED = ("Adam", "AdamW")  # one kernel for all parameters, as BCQOptimizationStepper.adam
_UNFIT = ("LBFGS", "SparseAdam", "ReduceLROnPlateau")  # they need a closure, sparse gradients, a metric in each step
_FROM_ONE = (
    "steps", "batch_size", "threads", "n_step", "log_interval", "evaluation.episodes", "evaluation.max_rows",
    "checkpoint.keep",
)  # fmt: skip


class _EarlyStopping(EarlyStopping):
    """TorchRL's, but it waits while its metric was not logged yet, as in a warm-up."""

    def __call__(self, batch: TensorDictBase | None = None) -> None:
        if self._trainer is not None and self.monitor in self._trainer.metrics:
            super().__call__(batch)


def build(config: DictConfig, transitions: TensorDictBase, task: Task) -> BCQTrainer:
    """Put the trainer of a run together, with its hooks."""
    out, device = Path(config.out), choose_device(config.device)
    learned = split(config, transitions)
    buffer, held_out = _make_buffer(config, transitions, learned, device)
    fitted_to = transitions if learned is None else transitions[learned]
    normalization = Normalization.fit(fitted_to) if config.normalize else None
    random.seed(config.seed)  # the trainer seeds NumPy and PyTorch, the latter again after the networks are made
    torch.manual_seed(config.seed)
    networks = make_networks(config, task, normalization, device)
    loss = make_loss(config, networks)
    stepper = make_stepper(config, loss)
    loggers = config.logger if processes.is_first() else ()
    described = {"config": OmegaConf.to_container(config, resolve=True), "task": asdict(task)}
    described["versions"] = {"torchrl_bcq": version("torchrl-bcq"), "python": sys.version.split()[0]}
    trainer = BCQTrainer(
        loss,
        buffer,
        target_net_updater=SoftUpdate(loss, tau=config.loss.tau),
        total_steps=config.steps,
        optimization_stepper=stepper,
        log_interval=config.log_interval,
        logger=make_loggers(loggers, out, OmegaConf.to_container(config.logger_kwargs)),  # type: ignore[arg-type]
        progress_bar=sys.stderr.isatty() if config.progress_bar is None else config.progress_bar,
        seed=config.seed,
        clip_norm=config.optim.clip_norm,
        compile=config.compile,
        precision=config.precision,
        cudagraph=config.cudagraph,
        checkpoint_rotation=CheckpointRotation(out / CHECKPOINTS, keep_last=config.checkpoint.keep),
        checkpoint_metadata=lambda trainer: described,
        save_trainer_interval=config.checkpoint.interval - 1,  # TorchRL saves once more than that has passed
        data_parallel=processes.several(),
    )
    for name in loss.network_names:
        if (scheduler := _make_scheduler(config, stepper.optimizers[name], name)) is not None:
            NetworkLRScheduler(scheduler, name, stepper).register(trainer)
    if processes.is_first():
        _add_metrics(trainer, config, task, transitions if held_out is None else held_out, held_out is not None)
    return trainer


def split(config: DictConfig, transitions: TensorDictBase) -> Tensor | None:
    """Mask ``[N]`` of the rows that are learned from; None where no episode is held out."""
    return split_episodes(transitions, config.held_out, seed=config.seed)[0] if config.held_out else None


def _make_buffer(
    config: DictConfig, transitions: TensorDictBase, learned: Tensor | None, device: torch.device
) -> tuple[TensorDictReplayBuffer, TensorDictBase | None]:
    """The replay buffer of the rows that are learned from, and the others, if any."""
    kinds: dict[str | None, Callable] = {None: lambda rows: None, "episode": episode_weights, "return": return_weights}
    if config.weights not in kinds:
        raise RunError(f"weights is {config.weights!r}, expected null or one of {[kind for kind in kinds if kind]}.")
    weights, held_out = kinds[config.weights](transitions), None
    if learned is not None:
        held_out = transitions[~learned]
        if config.sampler == "uniform" and config.n_step == 1:  # without a copy of what may be larger than memory
            weights = learned if weights is None else weights * learned
        else:
            transitions, weights = transitions[learned], None if weights is None else weights[learned]
    if config.n_step > 1:
        transitions = multi_step(transitions, config.n_step, gamma=config.loss.gamma)
    settings = {"batch_size": config.batch_size, "sampler": config.sampler}
    seed = processes.own_seed(config.seed)
    return make_replay_buffer(transitions, device=device, weights=weights, seed=seed, **settings), held_out


def make_stepper(config: DictConfig, loss: BCQLoss) -> BCQOptimizationStepper:
    """The optimizers of the settings, one of each network."""
    optim = config.optim
    optimizers = {}
    for name in loss.network_names:
        kind = optim[name].optimizer or optim.optimizer
        lr = optim.lr if optim[name].lr is None else optim[name].lr
        fused = {"fused": True} if kind in _FUSED else {}
        common = optim.kwargs if kind == optim.optimizer else {}  # another kind takes others
        arguments = {"lr": lr, **fused, **common, **optim[name].kwargs}
        parameters = getattr(loss, f"{name}_network_params").parameters()
        optimizers[f"{name}_optimizer"] = _call(torch.optim, kind, Optimizer, f"optim.{name}", parameters, arguments)
    return BCQOptimizationStepper(
        **optimizers,
        vae_warmup_steps=optim.vae_warmup_steps,
        freeze_vae_after=optim.freeze_vae_after,
        actor_update_interval=optim.actor_update_interval,
    )


def _make_scheduler(config: DictConfig, optimizer: Optimizer, name: str) -> lr_scheduler.LRScheduler | None:
    own, common = config.optim[name], config.optim
    kind = own.scheduler or common.scheduler
    if kind is None:
        return None
    arguments = {**(common.scheduler_kwargs if kind == common.scheduler else {}), **own.scheduler_kwargs}
    return _call(lr_scheduler, kind, lr_scheduler.LRScheduler, f"optim.{name}.scheduler", optimizer, arguments)


def _call(module: Any, kind: str, base: Any, setting: str, first: Any, arguments: Mapping[str, Any]) -> Any:
    """Make one of PyTorch's classes by its name."""
    made = getattr(module, kind, None)
    kinds = {name: value for name, value in vars(module).items() if isinstance(value, type) and value is not base}
    known = sorted(k for k, value in kinds.items() if issubclass(value, base) and k[0] != "_" and k not in _UNFIT)
    if made is None or kind not in known:
        raise RunError(f"{setting} is {kind!r}, expected one of {module.__name__}: {known}.")
    try:
        return made(
            first, **{key: tuple(value) if OmegaConf.is_list(value) else value for key, value in arguments.items()}
        )
    except (TypeError, ValueError) as error:
        raise RunError(f"{setting} cannot be made: {kind} with {dict(arguments)}: {error}") from error


def _add_metrics(
    trainer: BCQTrainer, config: DictConfig, task: Task, transitions: TensorDictBase, held_out: bool
) -> None:
    """Evaluation, the best checkpoint and early stopping, in this order."""
    loss, settings = trainer.loss_module, config.evaluation
    networks = (loss.vae_network, loss.actor_network, loss.qvalue_network)
    policy = BCQPolicy(*networks, num_action_samples=config.policy.num_action_samples)
    known = []
    if task.env_id is not None:
        metrics = EnvironmentMetrics(
            make_envs(task, settings.episodes, choose_device(config.device)),
            policy,
            interval=settings.interval,
            critics=loss.qvalue_network,
            gamma=config.loss.gamma,
            seed=settings.seed,
            reference_scores=task.references,
        )
        metrics.register(trainer)
        known += ["return", "return_std", "episode_length", "value_estimate", "discounted_return"]
        known += ["normalized_score"] if task.references else []
    DatasetMetrics(
        loss,
        policy,
        transitions,
        interval=settings.interval,
        held_out=held_out,
        max_rows=settings.max_rows,
        seed=settings.seed,
    ).register(trainer)
    known += ["action_distance", "initial_value", *(["held_out_td_error", "held_out_vae_loss"] if held_out else [])]
    known += loss.out_keys
    monitor = config.checkpoint.monitor
    if monitor == "auto":
        monitor = "return" if task.env_id is not None else None
    if monitor is not None:
        _check_monitor("checkpoint", monitor, known)
        waited = config.checkpoint.wait_for
        KeepBest(Path(config.out) / BEST, monitor, config.checkpoint.mode, wait_for=waited).register(trainer)
    if config.early_stopping.monitor is not None:
        _check_monitor("early_stopping", config.early_stopping.monitor, known)
        _EarlyStopping(**config.early_stopping).register(trainer)


def _check_monitor(section: str, monitor: str, known: list[str]) -> None:
    if monitor not in known:
        raise RunError(f"{section}.monitor is {monitor!r}, but this run measures {known} only.")


def check_numbers(config: DictConfig) -> None:
    """Refuse, before anything is read, numbers with which a run would fail or learn nothing, and precisions unheard of.

    Raises:
        RunError: naming the first one.
    """
    for name in _FROM_ONE:
        if (value := OmegaConf.select(config, name)) is not None and value < 1:
            raise RunError(f"{name} is {value}, expected at least 1.")
    for name in ("hidden", "vae_hidden"):
        if any(size < 1 for size in config.network[name]):
            raise RunError(f"network.{name} is {list(config.network[name])}, expected sizes of at least 1.")
    for name in ("gamma", "tau"):
        if not 0 <= config.loss[name] <= 1:
            raise RunError(f"loss.{name} is {config.loss[name]}, expected a number between 0 and 1.")
    if config.optim.clip_norm is not None and not config.optim.clip_norm > 0:
        raise RunError(f"optim.clip_norm is {config.optim.clip_norm}, expected more than 0; null does not clip.")
    if config.precision is not None and config.precision not in PRECISIONS:
        raise RunError(f"precision is {config.precision!r}, expected null or one of {[*PRECISIONS]}.")
    for section in ("evaluation", "checkpoint"):
        interval = config[section].interval
        if interval < 1 or interval % config.log_interval:
            raise RunError(
                f"{section}.interval is {interval}, no multiple of log_interval {config.log_interval}; change one of "
                "them."
            )
