"""A trainer small enough to run hundreds of times, and comparisons of two runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from tensordict import TensorDict
from torchrl.checkpoint import Checkpoint
from torchrl.data import LazyTensorStorage, PrioritizedSampler, TensorDictReplayBuffer
from torchrl.objectives import SoftUpdate
from torchrl.trainers.trainers import TrainerHookBase

from torchrl_bcq import (
    BCQLoss,
    BCQTrainer,
    OfflineOptimizationStepper,
    OfflineTrainer,
    Schedule,
    make_bcq_modules,
    make_replay_buffer,
)

from ..conftest import ACTION_SPEC, OBSERVATION_SPEC, skip_without_extension


def soft_update(loss: BCQLoss) -> SoftUpdate:
    return SoftUpdate(loss, tau=0.005)


def make_trainer(
    transitions, total_steps=25, seed=0, buffer=None, updater=soft_update, stepper=None, **settings
) -> BCQTrainer:
    """Log intervals of 10 steps; ``stepper`` is made from the loss."""
    torch.manual_seed(seed)
    loss = BCQLoss(*make_bcq_modules(OBSERVATION_SPEC, ACTION_SPEC, hidden=(8,), vae_hidden=(8,)))
    buffer = buffer or make_replay_buffer(transitions, batch_size=16, seed=seed)
    settings = {"log_interval": 10, "progress_bar": False, "seed": seed, **settings}
    if stepper is not None:
        settings["optimization_stepper"] = stepper(loss)
    return BCQTrainer(loss, buffer, target_net_updater=updater(loss), total_steps=total_steps, **settings)


def staged(
    loss: BCQLoss, warm_up: int = 0, freeze_after: int | None = None, actor_every: int = 1
) -> OfflineOptimizationStepper:
    """Adam. Only the VAE learns in the first ``warm_up`` steps; it stops learning after step ``freeze_after``."""
    schedules = {
        "vae": Schedule(stop_after=freeze_after),
        "qvalue": Schedule(start_after=warm_up),
        "actor": Schedule(start_after=warm_up, every=actor_every),
    }
    return OfflineOptimizationStepper.adam(loss, schedules=schedules)


def prioritised_buffer(transitions: TensorDict, priority_key: str = "td_error") -> TensorDictReplayBuffer:
    skip_without_extension()
    sampler = PrioritizedSampler(len(transitions), alpha=1.0, beta=1.0)
    storage, generator = LazyTensorStorage(len(transitions)), torch.Generator().manual_seed(0)
    buffer = TensorDictReplayBuffer(
        storage=storage, sampler=sampler, batch_size=16, priority_key=priority_key, generator=generator
    )
    buffer.extend(transitions)
    return buffer


def weights(trainer: OfflineTrainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.loss_module.state_dict().items()}


def assert_same_run(one: OfflineTrainer, other: OfflineTrainer) -> None:
    """Weights, targets and optimizers are the same, bit for bit."""
    torch.testing.assert_close(weights(one), weights(other), rtol=0, atol=0)
    states = (trainer.optimization_stepper.state_dict()["optimizers"] for trainer in (one, other))
    torch.testing.assert_close(*states, rtol=0, atol=0)


def logged(folder: Path) -> dict[str, list[str]]:
    """Lines of each file that a CSVLogger has written."""
    return {file.stem: file.read_text().splitlines() for file in sorted((folder / "scalars").iterdir())}


def random_state(path: Path) -> dict:
    """The random states in a checkpoint."""
    part = Checkpoint.manifest(path)["components"]["trainer_module.random_state"]["path"]
    return torch.load(path / part / "state.pt", weights_only=True)


def drawn_rows(trainer: OfflineTrainer) -> list[list[int]]:
    """A list to which each step adds the rows that it draws."""
    rows, sample = [], trainer._replay.replay_buffer.sample
    trainer._replay.replay_buffer.sample = lambda *args, **kwargs: (
        rows.append((batch := sample(*args, **kwargs))["index"].tolist()) or batch
    )
    return rows


class AfterStep(TrainerHookBase):
    """Calls a function with the number of gradient steps made, after each of them."""

    def __init__(self, call: Callable[[int], object]) -> None:
        self.call = call

    def register(self, trainer: OfflineTrainer, name: str = "after_step") -> None:
        trainer.register_op("post_optim", lambda: self.call(trainer._optim_count))


class Scripted(TrainerHookBase):
    """Logs a given value of a metric after each log interval; None logs nothing."""

    def __init__(self, values: Iterable[float | None], log_interval: int = 10, name: str = "score") -> None:
        self.values = list(values)
        self.log_interval = log_interval
        self.name = name

    def __call__(self, interval) -> dict[str, float] | None:
        value = self.values[self.trainer.collected_frames // self.log_interval - 1]
        return None if value is None else {self.name: value}

    def register(self, trainer: OfflineTrainer, name: str = "scripted") -> None:
        self.trainer = trainer
        trainer.register_op("post_steps_log", self)
