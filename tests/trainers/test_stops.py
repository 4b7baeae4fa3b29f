"""Stops that are requested, and interrupts: no step is lost, and training continues from the same step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.optim import SGD
from torchrl.checkpoint import Checkpoint
from torchrl.record.loggers import CSVLogger

from torchrl_bcq import BCQLoss, BCQTrainer, OfflineOptimizationStepper, make_replay_buffer

from .conftest import assert_same_run, logged, make_trainer, weights

# requests


def stop_after(trainer: BCQTrainer, step: int) -> None:
    """Request a stop from within the losses of a step, as a signal handler might."""
    actor_loss = trainer.loss_module.actor_loss

    def stopping(batch):
        if trainer._optim_count == step:
            trainer.request_stop("a test")
        return actor_loss(batch)

    trainer.loss_module.actor_loss = stopping


@pytest.mark.parametrize(  # steps 10 and 20 end a log interval, 20 the run
    ("step", "sampler"), [(1, "uniform"), (7, "without_replacement"), (10, "uniform"), (17, "uniform"), (20, "uniform")]
)
def test_a_stop_writes_a_checkpoint_of_its_step_and_the_run_can_be_resumed(make_batch, tmp_path, sampler, step):
    transitions = make_batch(100)

    def make(**settings) -> BCQTrainer:
        buffer = make_replay_buffer(transitions, batch_size=16, seed=0, sampler=sampler)
        return make_trainer(None, 20, buffer=buffer, **settings)

    undisturbed = make()
    undisturbed.train()

    first = make(save_trainer_file=tmp_path / "checkpoint")
    stop_after(first, step)
    first.train()
    assert first.optimization_stepper.steps == first._optim_count == first.collected_frames == step
    assert first.optimization_stepper.optimizers["vae"].state_dict()["state"][0]["step"] == step

    second = make()
    second.load_from_file(tmp_path / "checkpoint")
    assert second.optimization_stepper.steps == second._optim_count == second.collected_frames == step
    second.train()
    assert second.optimization_stepper.steps == second._optim_count == second.collected_frames == 20
    assert_same_run(second, undisturbed)


def test_a_stop_before_the_first_step_makes_none(make_batch, tmp_path):
    trainer = make_trainer(make_batch(50), save_trainer_file=tmp_path / "checkpoint")
    before = weights(trainer)
    trainer.request_stop("a test")
    trainer.train()
    assert trainer._optim_count == trainer.collected_frames == 0
    assert Checkpoint.is_checkpoint(tmp_path / "checkpoint")
    torch.testing.assert_close(weights(trainer), before, rtol=0, atol=0)


def test_a_stop_logs_means_of_complete_log_intervals_only(make_batch, tmp_path):
    """A stop in step 10 logs the means of 1 to 10; after one in step 17 those of 18 to 20 stand for 11 to 20."""
    transitions, settings = make_batch(50), {"save_trainer_file": tmp_path / "checkpoint"}
    make_trainer(transitions, 30, logger=CSVLogger("undisturbed", log_dir=str(tmp_path))).train()
    for step in (10, 17, None):
        trainer = make_trainer(transitions, 30, logger=CSVLogger("stopped", log_dir=str(tmp_path)), **settings)
        if trainer.last_checkpoint is not None:
            trainer.load_from_file(trainer.last_checkpoint)
        if step is not None:
            stop_after(trainer, step)
        trainer.train()
    whole, stopped = (logged(tmp_path / name)["loss_vae"] for name in ("undisturbed", "stopped"))
    assert [line.split(",")[0] for line in whole] == [line.split(",")[0] for line in stopped] == ["10", "20", "30"]
    assert whole[0] == stopped[0]
    assert whole[2] == stopped[2]


# interrupts

STEPS = 100


class CountingSGD(SGD):
    """Counts its steps."""

    count = 0

    def step(self, closure=None):
        self.count += 1
        return super().step(closure)


def counting(loss: BCQLoss) -> OfflineOptimizationStepper:
    params = {name: getattr(loss, f"{name}_network_params").parameters() for name in loss.network_names}
    return OfflineOptimizationStepper({name: CountingSGD(each, lr=1e-2) for name, each in params.items()})


def make(transitions, path: Path | None = None) -> BCQTrainer:
    buffer = make_replay_buffer(transitions, batch_size=16, seed=0, sampler="without_replacement")
    return make_trainer(None, STEPS, buffer=buffer, stepper=counting, log_interval=30, save_trainer_file=path)


def raise_once(condition):
    """A function that raises KeyboardInterrupt when the condition holds, once."""
    raised = []

    def call(*args) -> None:
        if not raised and condition():
            raised.append(True)
            raise KeyboardInterrupt

    return call


def in_a_loss(name: str, step: int):
    def plan(trainer: BCQTrainer) -> None:
        interrupt, loss = raise_once(lambda: trainer._optim_count == step), getattr(trainer.loss_module, name)
        setattr(trainer.loss_module, name, lambda batch: interrupt() or loss(batch))

    return plan


def in_a_hook(stage: str, step: int):
    def plan(trainer: BCQTrainer) -> None:
        trainer.register_op(stage, raise_once(lambda: trainer._optim_count == step))

    return plan


def in_the_checkpoint(trainer: BCQTrainer) -> None:
    """While the last one is written."""
    interrupt, save = raise_once(lambda: trainer.collected_frames == STEPS), trainer.checkpoint.save
    trainer.checkpoint.save = lambda *args, **kwargs: interrupt() or save(*args, **kwargs)


def train_twice(trainer: BCQTrainer) -> int:
    """Train, be interrupted, train on; returns the steps made until the interrupt."""
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    made = trainer.collected_frames
    trainer.train()
    return made


def assert_complete(trainer: BCQTrainer, path: Path) -> None:
    """All steps are made, and the checkpoint holds the state after them."""
    resumed = make(trainer._replay.replay_buffer[:].exclude("index")).load_from_file(path)
    for each in (trainer, resumed):
        assert each.collected_frames == each._optim_count == each.optimization_stepper.steps == STEPS
    assert_same_run(resumed, trainer)


@pytest.mark.parametrize("name", ["vae_loss", "qvalue_loss", "actor_loss"])
@pytest.mark.parametrize("step", [3, 70])
def test_a_step_that_is_interrupted_is_made_again(make_batch, tmp_path, name, step):
    trainer = make(make_batch(100), tmp_path / "checkpoint")
    in_a_loss(name, step)(trainer)
    assert train_twice(trainer) == step - 1
    assert_complete(trainer, tmp_path / "checkpoint")
    counts = [optimizer.count for optimizer in trainer.optimization_stepper.optimizers.values()]
    again = {"vae_loss": 0, "qvalue_loss": 1, "actor_loss": 2}[name]  # networks that had learned already
    assert counts == [STEPS + 1] * again + [STEPS] * (3 - again)


@pytest.mark.parametrize(
    "plan",
    {
        "after step 3": in_a_hook("post_optim", 3),
        "after step 70": in_a_hook("post_optim", 70),
        "after the last step of a log interval": in_a_hook("post_optim", 90),
        "after the last step": in_a_hook("post_optim", 100),
        "before a log interval": in_a_hook("pre_steps_log", 60),
        "in an evaluation": in_a_hook("post_steps_log", 60),
        "in the last evaluation": in_a_hook("post_steps_log", 100),
        "in the last checkpoint": in_the_checkpoint,
    }.items(),
    ids=lambda plan: plan[0],
)
def test_an_interrupt_between_steps_changes_nothing(make_batch, tmp_path, plan):
    transitions = make_batch(100)
    undisturbed = make(transitions)
    undisturbed.train()
    trainer = make(transitions, tmp_path / "checkpoint")
    plan[1](trainer)
    train_twice(trainer)
    assert_complete(trainer, tmp_path / "checkpoint")
    assert_same_run(trainer, undisturbed)
    assert [optimizer.count for optimizer in trainer.optimization_stepper.optimizers.values()] == [STEPS] * 3


def test_several_interrupts(make_batch, tmp_path):
    trainer = make(make_batch(100), tmp_path / "checkpoint")
    for step in (5, 6, 64):
        in_a_loss("qvalue_loss", step)(trainer)
    made = []
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        made.append(trainer.collected_frames)
    trainer.train()
    assert made == [4, 5, 63]
    assert_complete(trainer, tmp_path / "checkpoint")


def test_an_interrupted_run_is_resumed_from_a_checkpoint_of_its_own(make_batch, tmp_path):
    """``save_trainer`` after an interrupt, in another process ``load_from_file``."""
    transitions = make_batch(100)
    undisturbed = make(transitions)
    undisturbed.train()
    first = make(transitions, tmp_path / "checkpoint")
    in_a_hook("post_optim", 47)(first)
    with pytest.raises(KeyboardInterrupt):
        first.train()
    first.save_trainer(force_save=True)
    second = make(transitions, tmp_path / "checkpoint").load_from_file(tmp_path / "checkpoint")
    assert second.collected_frames == 47
    second.train()
    assert_same_run(second, undisturbed)


# training again after a stop


def test_training_again_after_a_stop_makes_the_remaining_steps(make_batch, tmp_path):
    """v09, y05: stopped in steps 7 and 47, the third call makes the last 53 of 100 steps."""
    transitions = make_batch(100)
    undisturbed = make(transitions)
    undisturbed.train()
    trainer = make(transitions, tmp_path / "checkpoint")
    made = []
    for step in (7, 47, 100):
        stop_after(trainer, step)
        trainer.train()
        made.append((trainer._optim_count, trainer._stop_reason))
    assert made == [(7, "a test"), (47, "a test"), (100, "a test")]
    assert_complete(trainer, tmp_path / "checkpoint")
    assert_same_run(trainer, undisturbed)
    assert not trainer.stop_requested


def test_an_error_ends_a_request_to_stop(make_batch):
    """A request to stop before an interrupt does not end the next call."""
    trainer = make(make_batch(100))
    trainer.register_op("post_optim", raise_once(lambda: trainer._optim_count == 5 and not trainer.request_stop("a")))
    assert train_twice(trainer) == 5
    assert trainer.collected_frames == STEPS
    assert trainer._stop_reason is None
