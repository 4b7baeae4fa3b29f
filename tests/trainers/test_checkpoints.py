"""Checkpoints: whole or not at all, the best one kept, and all that a run needs to go on."""

from __future__ import annotations

import errno
import math
import os
from pathlib import Path

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, StepLR
from torchrl.checkpoint import Checkpoint, CheckpointRotation
from torchrl.record.loggers import CSVLogger
from torchrl.trainers import EarlyStopping

from torchrl_bcq import BCQLoss, BCQOptimizationStepper, BCQTrainer, NetworkLRScheduler
from torchrl_bcq.trainers.best import KeepBest, best_checkpoint
from torchrl_bcq.trainers.checkpoints import LoggerState, make_checkpoint, tidy, tidy_rotation

from .conftest import Scripted, assert_same_run, logged, make_trainer, weights


class Value:
    """A component of a checkpoint."""

    def __init__(self, value: int = 0) -> None:
        self.value = value

    def state_dict(self) -> dict[str, int]:
        return {"value": self.value}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.value = state_dict["value"]


def save(path: Path, value: int) -> None:
    make_checkpoint(value=Value(value)).save(path)


def saved_value(path: Path) -> int:
    found = Value()
    make_checkpoint(value=found).load(path)
    return found.value


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- what a killed run leaves behind ---


def test_tidy_removes_half_written_and_half_removed_checkpoints(tmp_path):
    save(tmp_path / "run", 1)
    for name in (".run.stage-1", ".run.delete-2", ".run.archive-3", ".run.backup-4"):
        save(tmp_path / name, 2)
    (tmp_path / ".run.archive-5").touch()
    strangers = {".other.stage-1", ".run", "run.stage-1", ".run.old-1", ".run.v2.stage-1"}
    for name in strangers:
        (tmp_path / name).mkdir()
    tidy(tmp_path / "run")
    assert names(tmp_path) == {"run", *strangers}
    assert saved_value(tmp_path / "run") == 1


def test_tidy_gives_a_good_checkpoint_its_name_back(tmp_path):
    """Killed between the two renames of a replacement."""
    save(tmp_path / ".run.backup-1", 1)
    save(tmp_path / ".run.stage-2", 2)
    tidy(tmp_path / "run")
    assert names(tmp_path) == {"run"}
    assert saved_value(tmp_path / "run") == 1


@pytest.mark.parametrize("name", ["run[1]", "run*", "a.b-c"])
def test_tidy_takes_names_literally(tmp_path, name):
    save(tmp_path / f".{name}.backup-1", 1)
    (tmp_path / ".run1.stage-1").mkdir()
    tidy(tmp_path / name)
    assert names(tmp_path) == {name, ".run1.stage-1"}


def test_tidy_where_there_is_nothing_yet(tmp_path):
    tidy(tmp_path / "missing" / "run")
    tidy_rotation(tmp_path / "missing")
    assert names(tmp_path) == set()


@pytest.mark.parametrize("suffix", ["", ".torchrl"])  # a folder, an archive
def test_tidy_rotation_does_so_for_every_step(tmp_path, suffix):
    good, replaced = f"checkpoint-{10:012d}{suffix}", f"checkpoint-{20:012d}{suffix}"
    save(tmp_path / good, 10)
    save(tmp_path / f".{good}.backup-1", 9)
    save(tmp_path / f".{replaced}.backup-1", 20)
    save(tmp_path / f".checkpoint-{30:012d}{suffix}.stage-1", 30)
    save(tmp_path / f".checkpoint-{5:012d}{suffix}.delete-1", 5)
    save(tmp_path / f".best-{30:012d}{suffix}.stage-1", 30)
    tidy_rotation(tmp_path)
    assert names(tmp_path) == {good, replaced, f".best-{30:012d}{suffix}.stage-1"}
    assert (saved_value(tmp_path / good), saved_value(tmp_path / replaced)) == (10, 20)
    tidy_rotation(tmp_path, "best")
    assert names(tmp_path) == {good, replaced}


def test_a_trainer_tidies_before_it_loads_and_before_it_trains(make_batch, tmp_path):
    transitions, path = make_batch(50), tmp_path / "checkpoint"
    make_trainer(transitions, 10, save_trainer_file=path).train()
    path.rename(tmp_path / ".checkpoint.backup-1")
    second = make_trainer(transitions, 20, save_trainer_file=path).load_from_file(path)
    assert second.collected_frames == 10
    (tmp_path / ".checkpoint.stage-1").mkdir()
    second.train()
    assert names(tmp_path) == {"checkpoint"}

    rotation = CheckpointRotation(tmp_path / "rotation", keep_last=1, prefix="kept")
    (tmp_path / "rotation" / f".kept-{10:012d}.stage-1").mkdir(parents=True)
    make_trainer(transitions, 10, checkpoint_rotation=rotation).train()
    assert names(tmp_path / "rotation") == {f"kept-{10:012d}"}


# --- when it cannot be written ---


def fail_in_the_middle(monkeypatch) -> None:
    """The disk is full from the third file on."""
    real, calls = os.fsync, []

    def fsync(number: int) -> None:
        calls.append(number)
        if len(calls) >= 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(number)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("kind", ["file", "rotation"])
def test_a_full_disk_leaves_the_last_good_checkpoint(make_batch, tmp_path, monkeypatch, kind):
    transitions, folder = make_batch(50), tmp_path / "checkpoints"
    if kind == "file":
        settings, good = {"save_trainer_file": folder / "checkpoint"}, folder / "checkpoint"
    else:
        settings = {"checkpoint_rotation": CheckpointRotation(folder, keep_last=1)}
        good = folder / f"checkpoint-{10:012d}"
    first = make_trainer(transitions, 10, **settings)
    first.train()

    second = make_trainer(transitions, 20, **settings).load_from_file(good)
    with monkeypatch.context() as patch:
        fail_in_the_middle(patch)
        message = (
            f"the checkpoint after 20 gradient steps cannot be written .*No space left on device.* "
            f"The last good checkpoint is {good}. Mend that, then go on from there."
        )
        with pytest.raises(OSError, match=message):
            second.train()
    assert names(folder) == {good.name}
    third = make_trainer(transitions, 20, **settings).load_from_file(good)
    assert_same_run(third, first)
    third.train()  # the disk was mended
    assert third.last_checkpoint is not None
    assert Checkpoint.manifest(third.last_checkpoint)["components"].keys() == {*third.checkpoint.components}


def test_the_first_checkpoint_cannot_be_written(make_batch, tmp_path):
    (tmp_path / "file").touch()
    trainer = make_trainer(make_batch(50), 10, save_trainer_file=tmp_path / "file" / "checkpoint")
    message = "the checkpoint after 10 gradient steps cannot be written .*There is no checkpoint yet."
    with pytest.raises(OSError, match=message):
        trainer.train()


def test_no_state_gets_its_name_before_it_is_on_the_disk(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: events.append("flushed") or fsync(number))
    monkeypatch.setattr(os, "replace", lambda *args: events.append("named") or replace(*args))
    make_checkpoint(one=Value(1), two=Value(2)).save(tmp_path / "run")
    assert events == ["flushed", "flushed", "named"]


# --- the best one ---

SCORES = [0.5, 2.0, math.nan, 3.0, 1.0, 3.0, -1.0, math.inf]  # at steps 10, 20, ... 80


def train_and_keep(make_batch, folder: Path, scores, mode: str = "max", start: Path | None = None) -> BCQTrainer:
    trainer = make_trainer(make_batch(50), 10 * len(scores))
    Scripted(scores).register(trainer)
    KeepBest(folder, "score", mode).register(trainer)
    if start is not None:
        trainer.load_from_file(start)
    trainer.train()
    return trainer


@pytest.mark.parametrize(("mode", "step", "score"), [("max", 40, 3.0), ("min", 70, -1.0)])
def test_keeps_the_first_best_one_never_nan_nor_infinity(make_batch, tmp_path, mode, step, score):
    train_and_keep(make_batch, tmp_path, SCORES, mode)
    assert names(tmp_path) == {f"checkpoint-{step:012d}"}
    assert best_checkpoint(tmp_path) == KeepBest(tmp_path, "score", mode).rotation.best()
    metadata = Checkpoint.manifest(best_checkpoint(tmp_path))["metadata"]
    assert metadata == {"collected_frames": step, "optim_steps": step, "score": score, "best_of": ["score", mode]}
    assert KeepBest(tmp_path, "score", mode).score == score


def test_the_best_one_is_a_checkpoint_of_its_step(make_batch, tmp_path):
    """One can train on from it, and what follows is what followed."""
    torch.manual_seed(0)
    one = train_and_keep(make_batch, tmp_path / "one", [1.0, 0.0, 0.0])
    torch.manual_seed(0)
    two = train_and_keep(make_batch, tmp_path / "two", [1.0, 0.0, 0.0], start=best_checkpoint(tmp_path / "one"))
    assert_same_run(one, two)


def test_keeps_nothing_of_a_metric_that_never_came_or_was_not_finite(make_batch, tmp_path):
    train_and_keep(make_batch, tmp_path, [math.nan, None, math.inf])
    assert names(tmp_path) == set()
    assert best_checkpoint(tmp_path) is None
    assert best_checkpoint(tmp_path / "missing") is None


def test_a_metric_of_an_earlier_tick_is_not_taken_for_a_new_one(make_batch, tmp_path):
    """After the best one is gone, so that the old value would win again."""
    trainer, writes = make_trainer(make_batch(50), 30), []
    Scripted([1.0, None, None]).register(trainer)
    keep = KeepBest(tmp_path, "score")
    keep.register(trainer)
    keep.rotation.save = lambda *args, step, **kwargs: writes.append(step)
    trainer.train()
    assert writes == [10]


def test_goes_on_with_the_best_that_is_there(make_batch, tmp_path):
    """Another process knows the score from the folder: 1.5 does not beat 2, and 2.5 does."""
    torch.manual_seed(0)
    train_and_keep(make_batch, tmp_path, [1.0, 2.0])
    torch.manual_seed(0)
    start = best_checkpoint(tmp_path)
    train_and_keep(make_batch, tmp_path, [0.0, 0.0, 1.5], start=start)
    assert names(tmp_path) == {f"checkpoint-{20:012d}"}
    torch.manual_seed(0)
    train_and_keep(make_batch, tmp_path, [0.0, 0.0, 1.5, 2.5], start=start)
    assert names(tmp_path) == {f"checkpoint-{40:012d}"}


def test_a_better_one_from_before_the_best_is_found(make_batch, tmp_path):
    """A run goes on from before its best checkpoint, in another way, and is better at an earlier step."""
    train_and_keep(make_batch, tmp_path, [0.0, 0.0, 5.0])
    train_and_keep(make_batch, tmp_path, [0.0, 6.0])
    assert best_checkpoint(tmp_path).name == f"checkpoint-{20:012d}"


def test_keep_best_tidies_its_folder(make_batch, tmp_path):
    (tmp_path / f".checkpoint-{10:012d}.stage-1").mkdir()
    KeepBest(tmp_path).register(make_trainer(make_batch(50)))
    assert names(tmp_path) == set()


def test_the_best_one_cannot_be_written(make_batch, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="the checkpoint after 10 gradient steps cannot be written"):
        train_and_keep(make_batch, tmp_path / "file" / "best", [1.0])


def test_another_mode_is_refused(tmp_path):
    with pytest.raises(ValueError, match="mode is 'most', expected 'max' or 'min'"):
        KeepBest(tmp_path, mode="most")


# --- the logger ---


def test_what_was_logged_is_not_in_the_checkpoint(tmp_path):
    sizes = []
    for lines in (1, 5000):
        logger = CSVLogger(f"{lines:4}", log_dir=str(tmp_path))
        for i in range(lines):
            logger.log_scalar("x", 1.0, step=i)
        make_checkpoint(logger=LoggerState(logger)).save(tmp_path / "checkpoint")
        sizes.append(sum(file.stat().st_size for file in (tmp_path / "checkpoint").rglob("*") if file.is_file()))
    assert sizes[0] == sizes[1]


def test_a_trainers_checkpoint_does_not_grow_with_what_it_logs(make_batch, tmp_path):
    states = []
    for log_interval in (1, 20):
        logger = CSVLogger("log", log_dir=str(tmp_path))
        trainer = make_trainer(
            make_batch(50), 20, log_interval=log_interval, logger=logger, save_trainer_file=tmp_path / "checkpoint"
        )
        trainer.train()
        part = Checkpoint.manifest(tmp_path / "checkpoint")["components"]["logger"]["path"]
        states.append(torch.load(tmp_path / "checkpoint" / part / "state.pt", weights_only=True))
    assert states[0] == states[1]
    assert len(logger.experiment.scalars["loss_vae"]) == 1  # and 20 before


def test_counters_of_a_logger_are_in_the_checkpoint(tmp_path):
    first = CSVLogger("first", log_dir=str(tmp_path), video_format="pt")
    first.log_video("v", torch.zeros(1, 2, 3, 4, 4, dtype=torch.uint8))
    make_checkpoint(logger=LoggerState(first)).save(tmp_path / "checkpoint")
    second = CSVLogger("second", log_dir=str(tmp_path))
    make_checkpoint(logger=LoggerState(second)).load(tmp_path / "checkpoint")
    assert second.experiment.videos_counter == {"v": 1}


# --- going on ---

SCHEDULERS = {
    "vae": lambda optimizer: StepLR(optimizer, step_size=7, gamma=0.5),
    "qvalue": lambda optimizer: CosineAnnealingLR(optimizer, T_max=60),
    "actor": lambda optimizer: ExponentialLR(optimizer, gamma=0.9),
}


def scheduled(loss: BCQLoss) -> BCQOptimizationStepper:
    return BCQOptimizationStepper.adam(loss, vae_warmup_steps=5, freeze_vae_after=27, actor_update_interval=3)


@pytest.mark.parametrize("total", [3, 20, 25, 30, 40])  # in the warm-up; at a tick's end; between; frozen; frozen
def test_run_save_load_run_equals_run_run_with_all_schedules(make_batch, tmp_path, total):
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
    torch.manual_seed(1234)  # the break
    second = make("broken", 50)
    second.load_from_file(tmp_path / "checkpoint")
    second.train()

    assert_same_run(second, undisturbed)
    rates = {name: o.param_groups[0]["lr"] for name, o in second.optimization_stepper.optimizers.items()}
    # 27 steps of the VAE, 45 of the critics, 15 of the actor
    expected = {"vae": 1e-3 * 0.5**3, "qvalue": 5e-4 * (1 + math.cos(math.pi * 45 / 60)), "actor": 1e-3 * 0.9**15}
    assert rates == pytest.approx(expected)
    if total % 10 == 0:  # else a tick is logged in two parts
        assert logged(tmp_path / "broken") == logged(tmp_path / "undisturbed")
        assert len(logged(tmp_path / "broken")) == 8


def test_early_stopping_remembers_its_best_score(make_batch, tmp_path):
    """The best is of step 10; with a patience of 30 steps the run ends at step 40, a break at 20 or not."""
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


def test_early_stopping_finds_a_metric_that_was_logged_before_the_break(make_batch, tmp_path):
    """TorchRL's raises where there is none."""
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


def test_networks_alone_are_loaded_by_torchrls_checkpoint(make_batch, tmp_path):
    """With TorchRL's adapters, not with ours."""
    first = make_trainer(make_batch(50), 10, save_trainer_file=tmp_path / "checkpoint")
    first.train()
    second = make_trainer(make_batch(20), 10, seed=1)
    Checkpoint(loss_module=second.loss_module).load(tmp_path / "checkpoint")
    torch.testing.assert_close(weights(second), weights(first), rtol=0, atol=0)
