"""A trainer small enough to run hundreds of times, and what two runs are compared by."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torchrl.objectives import SoftUpdate
from torchrl.trainers.trainers import TrainerHookBase

from torchrl_bcq import BCQLoss, BCQTrainer, make_bcq_modules, make_replay_buffer

from ..conftest import ACTION_SPEC, OBSERVATION_SPEC


def soft_update(loss: BCQLoss) -> SoftUpdate:
    return SoftUpdate(loss, tau=0.005)


def make_trainer(
    transitions, total_steps=25, seed=0, buffer=None, updater=soft_update, stepper=None, **settings
) -> BCQTrainer:
    """Ticks of 10 steps; ``stepper`` is made from the loss."""
    torch.manual_seed(seed)
    loss = BCQLoss(*make_bcq_modules(OBSERVATION_SPEC, ACTION_SPEC, hidden=(8,), vae_hidden=(8,)))
    buffer = buffer or make_replay_buffer(transitions, batch_size=16, seed=seed)
    settings = {"log_interval": 10, "progress_bar": False, "seed": seed, **settings}
    if stepper is not None:
        settings["optimization_stepper"] = stepper(loss)
    return BCQTrainer(loss, buffer, target_net_updater=updater(loss), total_steps=total_steps, **settings)


def weights(trainer: BCQTrainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.loss_module.state_dict().items()}


def assert_same_run(one: BCQTrainer, other: BCQTrainer) -> None:
    """Weights, targets and optimizers are the same, bit by bit."""
    torch.testing.assert_close(weights(one), weights(other), rtol=0, atol=0)
    for name, optimizer in one.optimization_stepper.optimizers.items():
        twin = other.optimization_stepper.optimizers[name].state_dict()
        torch.testing.assert_close(optimizer.state_dict(), twin, rtol=0, atol=0)


def logged(folder: Path) -> dict[str, list[str]]:
    """Lines of each file that a CSVLogger has written."""
    return {file.stem: file.read_text().splitlines() for file in sorted((folder / "scalars").iterdir())}


class AfterStep(TrainerHookBase):
    """Calls a function with the number of gradient steps made, after each of them."""

    def __init__(self, call) -> None:
        self.call = call

    def register(self, trainer: BCQTrainer, name: str = "after_step") -> None:
        trainer.register_op("post_optim", lambda: self.call(trainer._optim_count))


class Scripted(TrainerHookBase):
    """Logs a metric that is given for each tick; None logs nothing."""

    def __init__(self, values: Iterable[float | None], ticks: int = 10, name: str = "score") -> None:
        self.values = list(values)
        self.ticks = ticks
        self.name = name

    def __call__(self, tick) -> dict[str, float] | None:
        value = self.values[self.trainer.collected_frames // self.ticks - 1]
        return None if value is None else {self.name: value}

    def register(self, trainer: BCQTrainer, name: str = "scripted") -> None:
        self.trainer = trainer
        trainer.register_op("post_steps_log", self)
