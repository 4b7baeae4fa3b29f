"""KeepBest: the checkpoints that it writes and keeps."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from torchrl.checkpoint import Checkpoint, CheckpointRotation

from torchrl_bcq import BCQTrainer, KeepBest
from torchrl_bcq.trainers.best import best_checkpoint

from .conftest import Scripted, assert_same_run, make_trainer

SCORES = [0.5, 2.0, math.nan, 3.0, 1.0, 3.0, -1.0, math.inf]  # at steps 10, 20, ... 80


def test_a_trainer_of_another_class_is_refused(tmp_path):
    with pytest.raises(TypeError, match="KeepBest needs an OfflineTrainer, not a object"):
        KeepBest(tmp_path).register(object())


def train_and_keep(make_batch, folder: Path, scores, mode: str = "max", start: Path | None = None) -> BCQTrainer:
    trainer = make_trainer(make_batch(50), 10 * len(scores))
    Scripted(scores).register(trainer)
    KeepBest(folder, "score", mode).register(trainer)
    if start is not None:
        trainer.load_from_file(start)
    trainer.train()
    return trainer


def steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder."""
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in folder.iterdir())


@pytest.mark.parametrize(("mode", "kept", "step", "score"), [("max", [40], 40, 3.0), ("min", [70], 70, -1.0)])
def test_keeps_the_best_of_finite_scores(make_batch, tmp_path, mode, kept, step, score):
    """Of equal scores the earlier one is the best."""
    train_and_keep(make_batch, tmp_path, SCORES, mode)
    assert steps(tmp_path) == kept
    assert best_checkpoint(tmp_path) == KeepBest(tmp_path, "score", mode).best()
    manifest = Checkpoint.manifest(best_checkpoint(tmp_path))
    assert manifest["metadata"] == {
        "collected_frames": step,
        "optim_steps": step,
        "score": score,
        "best_of": ["score", mode],
        "measured_as": "",
    }


@pytest.mark.parametrize(("scores", "kept"), [([1.0, 2.0, 1.5], 30), ([7.0, 2.0, 1.5], 20)])
def test_a_score_that_was_measured_in_another_way_is_replaced(make_batch, tmp_path, caplog, scores, kept):
    """First, scores 5 and 1 were measured. Then the best of the other scores is kept, whether it is above 5 or not."""
    torch.manual_seed(0)
    train_and_keep(make_batch, tmp_path, [5.0, 1.0])
    assert steps(tmp_path) == [10]
    torch.manual_seed(0)  # the same transitions
    trainer = make_trainer(make_batch(50), 40)
    Scripted([5.0, *scores]).register(trainer)
    KeepBest(tmp_path, "score", measured_as="in 20 episodes").register(trainer)
    trainer.load_from_file(best_checkpoint(tmp_path))
    trainer.train()
    assert steps(tmp_path) == [kept]
    assert Checkpoint.manifest(best_checkpoint(tmp_path))["metadata"]["score"] == max(scores)
    (message,) = [one for one in caplog.messages if "measured" in one]
    assert message.startswith("score is now measured in another way, so ")
    assert message.endswith("checkpoint-000000000010 is replaced.")


def test_a_run_can_be_resumed_from_the_best_checkpoint(make_batch, tmp_path):
    """It holds the state of its step: the resumed run equals the one that wrote it."""
    torch.manual_seed(0)
    one = train_and_keep(make_batch, tmp_path / "one", [1.0, 0.0, 0.0])
    torch.manual_seed(0)
    two = train_and_keep(make_batch, tmp_path / "two", [1.0, 0.0, 0.0], start=best_checkpoint(tmp_path / "one"))
    assert_same_run(one, two)


def test_keeps_nothing_where_the_metric_is_missing_or_not_finite(make_batch, tmp_path):
    train_and_keep(make_batch, tmp_path, [math.nan, None, math.inf])
    assert list(tmp_path.iterdir()) == []
    assert best_checkpoint(tmp_path) is None
    assert best_checkpoint(tmp_path / "missing") is None


def test_a_metric_of_an_earlier_log_interval_is_not_used_again(make_batch, tmp_path):
    trainer, writes = make_trainer(make_batch(50), 30), []
    Scripted([1.0, None, None]).register(trainer)
    keep = KeepBest(tmp_path, "score")
    keep.register(trainer)
    keep._replace = lambda checkpoint, step, metadata: writes.append(step)
    trainer.train()
    assert writes == [10]


def test_a_resumed_run_compares_with_the_best_checkpoint_in_the_folder(make_batch, tmp_path):
    """1.5 is not better than 2, and 2.5 is."""
    torch.manual_seed(0)
    train_and_keep(make_batch, tmp_path, [1.0, 2.0])
    start = best_checkpoint(tmp_path)
    for score, kept in ((1.5, [20]), (2.5, [30])):
        torch.manual_seed(0)
        train_and_keep(make_batch, tmp_path, [0.0, 0.0, score], start=start)
        assert steps(tmp_path) == kept


def test_a_better_checkpoint_of_an_earlier_step_replaces_the_best(make_batch, tmp_path):
    """A run that is resumed from before its best checkpoint may be better at an earlier step."""
    train_and_keep(make_batch, tmp_path, [0.0, 0.0, 5.0])
    train_and_keep(make_batch, tmp_path, [0.0, 6.0])
    assert best_checkpoint(tmp_path).name == f"checkpoint-{20:012d}"


@pytest.mark.parametrize("scores", [[0.0, 4.0], [0.0, 6.0]])
def test_a_run_that_goes_back_and_measures_in_another_way_keeps_one_checkpoint(make_batch, tmp_path, scores):
    """The outdated checkpoint is of a later step, and its score is lower or higher."""
    train_and_keep(make_batch, tmp_path, [0.0, 0.0, 5.0])
    trainer = make_trainer(make_batch(50), 20)
    Scripted(scores).register(trainer)
    KeepBest(tmp_path, "score", measured_as="in 20 episodes").register(trainer)
    trainer.train()
    assert steps(tmp_path) == [20]


def test_another_metric_replaces_the_best_checkpoint(make_batch, tmp_path):
    train_and_keep(make_batch, tmp_path, [0.0, 0.0, 5.0])
    trainer = make_trainer(make_batch(50), 20)
    Scripted([7.0, 8.0]).register(trainer)
    KeepBest(tmp_path, "score", "min").register(trainer)
    trainer.train()
    assert steps(tmp_path) == [10]
    assert Checkpoint.manifest(best_checkpoint(tmp_path))["metadata"]["best_of"] == ["score", "min"]


def test_a_run_that_was_killed_while_it_replaced_the_best_leaves_the_one_that_was_written_last(make_batch, tmp_path):
    for folder, scores in (("one", [0.0, 0.0, 5.0]), ("two", [0.0, 6.0])):
        train_and_keep(make_batch, tmp_path / folder, scores)
    (tmp_path / "two" / f"checkpoint-{20:012d}").rename(tmp_path / "one" / f"checkpoint-{20:012d}")
    assert steps(tmp_path / "one") == [20, 30]
    assert best_checkpoint(tmp_path / "one").name == f"checkpoint-{20:012d}"
    train_and_keep(make_batch, tmp_path / "one", [7.0])
    assert steps(tmp_path / "one") == [10]


def test_a_run_that_resumes_from_its_best_checkpoint_at_the_end_saves_one_of_its_own(make_batch, tmp_path):
    """It was killed between the best checkpoint of its last step and the one that the trainer saves."""
    torch.manual_seed(0)
    train_and_keep(make_batch, tmp_path / "best", [5.0])
    torch.manual_seed(0)
    rotation = CheckpointRotation(tmp_path / "own", keep_last=1)
    trainer = make_trainer(make_batch(50), 10, checkpoint_rotation=rotation, save_trainer_interval=100)
    trainer.load_from_file(best_checkpoint(tmp_path / "best"))
    trainer.train()
    assert rotation.latest().name.endswith("10")
    written = (rotation.latest() / "manifest.json").stat().st_mtime_ns
    (tmp_path / "link").symlink_to(tmp_path / "own")
    trainer.load_from_file(tmp_path / "link" / rotation.latest().name)
    trainer.train()
    assert (rotation.latest() / "manifest.json").stat().st_mtime_ns == written  # it is not written twice


def test_a_damaged_best_checkpoint_is_replaced_with_a_warning(make_batch, tmp_path, caplog):
    train_and_keep(make_batch, tmp_path, [5.0])
    (best_checkpoint(tmp_path) / "manifest.json").write_text("{")
    train_and_keep(make_batch, tmp_path, [1.0, 2.0])
    assert steps(tmp_path) == [20]
    (warning,) = caplog.messages
    assert re.fullmatch(r"the manifest.json of .*checkpoint-0*10 cannot be read, so the next best .*", warning)


def test_keep_best_tidies_its_folder(make_batch, tmp_path):
    (tmp_path / f".checkpoint-{10:012d}.stage-1").mkdir()
    KeepBest(tmp_path).register(make_trainer(make_batch(50)))
    assert list(tmp_path.iterdir()) == []


def test_the_best_one_cannot_be_written(make_batch, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="the checkpoint after 10 gradient steps cannot be written"):
        train_and_keep(make_batch, tmp_path / "file" / "best", [1.0])


def test_another_mode_is_refused(tmp_path):
    with pytest.raises(ValueError, match="mode is 'most', expected 'max' or 'min'"):
        KeepBest(tmp_path, mode="most")
