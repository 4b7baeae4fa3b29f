"""A run that is interrupted and resumed equals the undisturbed run, bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, StepLR
from torchrl.checkpoint import Checkpoint, CheckpointError, CheckpointRotation
from torchrl.objectives import HardUpdate
from torchrl.record.loggers import CSVLogger
from torchrl.trainers import EarlyStopping

from torchrl_bcq import (
    BCQLoss,
    BCQPolicy,
    BCQTrainer,
    NetworkLRScheduler,
    OfflineOptimizationStepper,
    make_bcq_modules,
    make_replay_buffer,
)

from ..conftest import ACTION_SPEC, OBSERVATION_SPEC
from .conftest import Scripted, assert_same_run, logged, make_trainer, prioritised_buffer, staged


def hard_update(loss: BCQLoss) -> HardUpdate:
    return HardUpdate(loss, value_network_update_interval=15)


@pytest.mark.parametrize("kind", ["soft", "hard", "unseeded", "prioritised", "without_replacement", "weighted"])
def test_a_resumed_run_equals_the_undisturbed_one(make_batch, tmp_path, kind):
    """Networks, targets, optimizers, sampler and random state."""
    transitions = make_batch(200)

    def make(total_steps: int, seed: int = 0, **settings) -> BCQTrainer:
        if kind == "hard":
            settings["updater"] = hard_update
        if kind == "unseeded":
            settings["buffer"] = make_replay_buffer(transitions, batch_size=16)
        if kind == "prioritised":
            settings["buffer"] = prioritised_buffer(transitions)
        if kind == "without_replacement":  # resumed within the second round
            settings["buffer"] = make_replay_buffer(transitions, batch_size=16, seed=seed, sampler=kind)
        if kind == "weighted":
            weights = torch.arange(200) % 7
            settings["buffer"] = make_replay_buffer(transitions, batch_size=16, seed=seed, weights=weights)
        return make_trainer(transitions, total_steps, seed=seed, **settings)

    undisturbed = make(40)
    undisturbed.train()

    make(20, save_trainer_file=tmp_path / "checkpoint").train()
    torch.manual_seed(1234)  # a new process has another random state
    second = make(40, seed=99)
    second.load_from_file(tmp_path / "checkpoint")
    assert second.collected_frames == 20
    second.train()

    assert_same_run(second, undisturbed)


def test_metrics_are_restored(make_batch, tmp_path):
    transitions = make_batch(50)
    first = make_trainer(transitions, 20, save_trainer_file=tmp_path / "checkpoint")
    first.train()
    second = make_trainer(transitions, 30).load_from_file(tmp_path / "checkpoint")
    assert len(first.metrics) == 8
    assert second.metrics == first.metrics


def test_the_dataset_is_not_in_the_checkpoint(make_batch, tmp_path):
    sizes = []
    for rows in (50, 5000):
        make_trainer(make_batch(rows), 10, save_trainer_file=tmp_path / str(rows)).train()
        sizes.append(sum(file.stat().st_size for file in (tmp_path / str(rows)).rglob("*") if file.is_file()))
    assert sizes[1] - sizes[0] < 1000  # numbers in JSON differ in length; 5000 rows take 200 kB


@pytest.mark.parametrize("seeds", [(0, None), (None, 0)])
def test_a_buffer_of_another_kind_is_refused(make_batch, tmp_path, seeds):
    transitions = make_batch(50)
    buffers = [make_replay_buffer(transitions, batch_size=16, seed=seed) for seed in seeds]
    make_trainer(None, 10, buffer=buffers[0], save_trainer_file=tmp_path / "checkpoint").train()
    was_made = "with" if seeds[1] is None else "without"
    message = f"buffer was made {was_made} a seed, but this one with.* a seed; make it {was_made} a seed"
    with pytest.raises(CheckpointError, match=message):
        make_trainer(None, 20, buffer=buffers[1]).load_from_file(tmp_path / "checkpoint")


def test_a_policy_can_be_loaded_from_a_checkpoint(make_batch, tmp_path):
    trainer = make_trainer(make_batch(50), 10, save_trainer_file=tmp_path / "checkpoint")
    trainer.train()
    modules = make_bcq_modules(OBSERVATION_SPEC, ACTION_SPEC, hidden=(8,), vae_hidden=(8,))
    loss = BCQLoss(*modules)
    Checkpoint(loss_module=loss).load(tmp_path / "checkpoint")
    states, actions = make_batch(5).select("observation"), []
    for networks in (modules, trainer.loss_module.networks):
        torch.manual_seed(0)
        actions.append(BCQPolicy(*networks)(states.clone())["action"])
    assert torch.equal(*actions)
    suffixes = {file.suffix for file in (tmp_path / "checkpoint").rglob("*") if file.is_file()}
    assert suffixes <= {".json", ".pt"}  # read with weights_only=True


def test_a_rotation_keeps_the_newest_checkpoints(make_batch, tmp_path):
    rotation = CheckpointRotation(tmp_path / "checkpoints", keep_last=2)
    trainer = make_trainer(make_batch(50), 45, checkpoint_rotation=rotation, save_trainer_interval=9)
    assert trainer.last_checkpoint is None
    trainer.train()
    names = ["checkpoint-000000000040", "checkpoint-000000000045"]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == names
    assert trainer.last_checkpoint == tmp_path / "checkpoints" / names[1]
    assert Checkpoint.manifest(trainer.last_checkpoint)["metadata"]["optim_steps"] == 45


def test_the_last_checkpoint_is_none_before_one_is_written(make_batch, tmp_path):
    assert make_trainer(make_batch(50)).last_checkpoint is None
    trainer = make_trainer(make_batch(50), 10, save_trainer_file=tmp_path / "checkpoint")
    assert trainer.last_checkpoint is None
    trainer.train()
    assert trainer.last_checkpoint == tmp_path / "checkpoint"


def test_a_hook_writes_checkpoints_of_finite_weights_only(make_batch):
    trainer, written = make_trainer(make_batch(50), 30), []
    key = "target_actor_network_params.network.0.bias"

    def write(interval) -> None:
        if trainer.collected_frames == 20:
            trainer.loss_module.state_dict()[key][0] = torch.inf
        trainer.write_checkpoint(lambda: written.append(trainer.collected_frames))

    trainer.register_op("post_steps_log", write)
    with pytest.raises(
        FloatingPointError, match=rf"1 of \d+ weight tensors, such as {key}, have values that are not finite after 20"
    ):
        trainer.train()
    assert written == [10]


# schedules and hooks

SCHEDULERS = {
    "vae": lambda optimizer: StepLR(optimizer, step_size=7, gamma=0.5),
    "qvalue": lambda optimizer: CosineAnnealingLR(optimizer, T_max=60),
    "actor": lambda optimizer: ExponentialLR(optimizer, gamma=0.9),
}


def scheduled(loss: BCQLoss) -> OfflineOptimizationStepper:
    return staged(loss, warm_up=5, freeze_after=27, actor_every=3)


@pytest.mark.parametrize(
    "total", [3, 20, 25, 30, 40]
)  # in the warm-up; at the end of a log interval; between; frozen; frozen
def test_a_resumed_run_equals_the_undisturbed_one_with_all_schedules(make_batch, tmp_path, total):
    transitions = make_batch(200)

    def make(name: str, total_steps: int, seed: int = 0, **settings) -> BCQTrainer:
        logger = CSVLogger(name, log_dir=str(tmp_path))
        trainer = make_trainer(transitions, total_steps, stepper=scheduled, logger=logger, **settings)
        for network, optimizer in trainer.optimization_stepper.optimizers.items():
            scheduler = SCHEDULERS[network](optimizer)
            NetworkLRScheduler(scheduler, network, trainer.optimization_stepper).register(trainer)
        return trainer

    undisturbed = make("undisturbed", 50)
    undisturbed.train()

    make("broken", total, save_trainer_file=tmp_path / "checkpoint").train()
    torch.manual_seed(1234)  # a new process has another random state
    second = make("broken", 50)
    second.load_from_file(tmp_path / "checkpoint")
    second.train()

    assert_same_run(second, undisturbed)
    rates = {name: o.param_groups[0]["lr"] for name, o in second.optimization_stepper.optimizers.items()}
    # 27 steps of the VAE, 45 of the critics, 15 of the actor
    expected = {"vae": 1e-3 * 0.5**3, "qvalue": 5e-4 * (1 + math.cos(math.pi * 45 / 60)), "actor": 1e-3 * 0.9**15}
    assert rates == pytest.approx(expected)
    if total % 10 == 0:  # otherwise the logs of one interval are in two parts
        assert logged(tmp_path / "broken") == logged(tmp_path / "undisturbed")
        assert len(logged(tmp_path / "broken")) == 8


def test_early_stopping_remembers_its_best_score(make_batch, tmp_path):
    """The best is of step 10: with a patience of 30 steps the run ends at step 40, resumed at 20 or not."""
    transitions, ends = make_batch(50), []
    for parts in ([80], [20, 80]):
        for total in parts:
            trainer = make_trainer(transitions, total, save_trainer_file=tmp_path / str(parts))
            Scripted([9.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]).register(trainer)
            EarlyStopping(monitor="score", patience=30, wait_for=0).register(trainer)
            if trainer.last_checkpoint is not None:
                trainer.load_from_file(trainer.last_checkpoint)
            trainer.train()
        ends.append(trainer)
    assert [trainer.collected_frames for trainer in ends] == [40, 40]
    assert "did not improve for 30 frames" in ends[1]._stop_reason
    assert_same_run(*ends)
    assert Checkpoint.is_checkpoint(tmp_path / "[80]")


def test_early_stopping_finds_a_metric_that_was_logged_before_the_resume(make_batch, tmp_path):
    """TorchRL's EarlyStopping raises if there is none."""
    transitions = make_batch(50)
    for total, scores in ((10, [1.0]), (20, [1.0, None])):
        trainer = make_trainer(transitions, total, save_trainer_file=tmp_path / "checkpoint")
        Scripted(scores).register(trainer)
        stopping = EarlyStopping(monitor="score", wait_for=0)
        stopping.register(trainer)
        if trainer.last_checkpoint is not None:
            trainer.load_from_file(trainer.last_checkpoint)
        trainer.train()
    assert stopping.best_score == 1.0
