"""Checkpoints: written atomically, the best one kept, and complete enough to resume."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torchrl.checkpoint import Checkpoint, CheckpointRotation
from torchrl.record.loggers import CSVLogger

from torchrl_bcq import OfflineOptimizationStepper
from torchrl_bcq.trainers.checkpoints import LoggerState, make_checkpoint, tidy, tidy_rotation

from .conftest import assert_same_run, make_trainer, weights


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


# leftovers of a killed run


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


def test_tidy_renames_the_backup_of_a_good_checkpoint(tmp_path):
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


# errors of writing


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
            f"The last good checkpoint is {good}. Fix the cause of this error, then resume from that checkpoint."
        )
        with pytest.raises(OSError, match=message):
            second.train()
    assert names(folder) == {good.name}
    third = make_trainer(transitions, 20, **settings).load_from_file(good)
    assert_same_run(third, first)
    third.train()  # the disk has room again
    assert third.last_checkpoint is not None
    assert Checkpoint.manifest(third.last_checkpoint)["components"].keys() == {*third.checkpoint.components}


def test_the_first_checkpoint_cannot_be_written(make_batch, tmp_path):
    (tmp_path / "file").touch()
    trainer = make_trainer(make_batch(50), 10, save_trainer_file=tmp_path / "file" / "checkpoint")
    message = "the checkpoint after 10 gradient steps cannot be written .*There is no checkpoint yet."
    with pytest.raises(OSError, match=message):
        trainer.train()


def test_state_is_flushed_before_the_checkpoint_is_renamed(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: events.append("flushed") or fsync(number))
    monkeypatch.setattr(os, "replace", lambda *args: events.append("named") or replace(*args))
    make_checkpoint(one=Value(1), two=Value(2)).save(tmp_path / "run")
    assert events == ["flushed", "flushed", "named"]


# the logger


def test_loading_leaves_the_half_written_checkpoint_of_another_process(make_batch, tmp_path):
    path, transitions = tmp_path / "checkpoint", make_batch(50)
    make_trainer(transitions, save_trainer_file=path).train()
    (stage := tmp_path / ".checkpoint.stage-1").mkdir()
    make_trainer(transitions).load_from_file(path)
    assert stage.is_dir()


def test_numbers_of_numpy_are_restored(make_batch, tmp_path):
    def stepper(loss):
        return OfflineOptimizationStepper.adam(loss, lr=np.logspace(-4, -3, 3)[1])

    make_trainer(make_batch(50), stepper=stepper, save_trainer_file=tmp_path / "checkpoint").train()
    state = torch.load(next(tmp_path.rglob("*stepper*/state.pt")), weights_only=True)
    assert state["optimizers"]["vae"]["param_groups"][0]["lr"] == pytest.approx(10**-3.5)


def test_a_state_that_could_not_be_loaded_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"the state of Value holds objects of \['pathlib.*which a checkpoint cannot"):
        save(tmp_path / "checkpoint", Path("x"))
    assert not (tmp_path / "checkpoint").exists()


def test_logged_values_are_not_in_the_checkpoint(tmp_path):
    sizes = []
    for lines in (1, 5000):
        logger = CSVLogger(f"{lines:4}", log_dir=str(tmp_path))
        for i in range(lines):
            logger.log_scalar("x", 1.0, step=i)
        make_checkpoint(logger=LoggerState(logger)).save(tmp_path / "checkpoint")
        sizes.append(sum(file.stat().st_size for file in (tmp_path / "checkpoint").rglob("*") if file.is_file()))
    assert sizes[0] == sizes[1]


def test_a_trainers_checkpoint_does_not_grow_with_its_log(make_batch, tmp_path):
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


def test_networks_alone_are_loaded_by_torchrls_checkpoint(make_batch, tmp_path):
    """With TorchRL's adapters."""
    first = make_trainer(make_batch(50), 10, save_trainer_file=tmp_path / "checkpoint")
    first.train()
    second = make_trainer(make_batch(20), 10, seed=1)
    Checkpoint(loss_module=second.loss_module).load(tmp_path / "checkpoint")
    torch.testing.assert_close(weights(second), weights(first), rtol=0, atol=0)
