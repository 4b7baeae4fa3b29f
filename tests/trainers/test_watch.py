"""Losses and weights that are not finite: the message, and the batch that is written."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from torchrl.checkpoint import Checkpoint, CheckpointRotation
from torchrl.data import ListStorage, TensorDictReplayBuffer

from torchrl_bcq import BCQTrainer, make_replay_buffer
from torchrl_bcq.trainers.watch import LossWatch, check_parameters

from ..conftest import skip_without_extension
from .conftest import AfterStep, drawn_rows, make_trainer


def break_loss(trainer: BCQTrainer, name: str, call: int) -> None:
    """Make one call of a loss, counted from 1, return NaN."""
    loss, calls = getattr(trainer.loss_module, name), []

    def broken(batch):
        calls.append(1)
        value, metadata = loss(batch)
        return (value * torch.nan if len(calls) == call else value), metadata

    setattr(trainer.loss_module, name, broken)


@pytest.mark.parametrize("kind", ["file", "rotation"])
@pytest.mark.parametrize(("name", "call"), [("vae_loss", 11), ("qvalue_loss", 13), ("actor_loss", 20)])
def test_names_the_step_the_loss_the_rows_and_the_last_good_checkpoint(make_batch, tmp_path, kind, name, call):
    transitions, folder = make_batch(50), tmp_path / "run"
    if kind == "file":
        settings, good = {"save_trainer_file": folder / "checkpoint"}, folder / "checkpoint"
    else:
        good = folder / "checkpoints" / f"checkpoint-{10:012d}"
        settings = {"checkpoint_rotation": CheckpointRotation(folder / "checkpoints", keep_last=2)}
    trainer = make_trainer(transitions, 30, save_trainer_interval=9, **settings)
    rows = drawn_rows(trainer)
    break_loss(trainer, name, call)
    with pytest.raises(FloatingPointError) as caught:
        trainer.train()

    (at,) = folder.glob("not-finite-*")
    assert at.name == f"not-finite-{call}.pt"
    shown = ", ".join(map(str, rows[call - 1][:10]))
    assert str(caught.value) == (
        f"{name} is nan in gradient step {call}, on the 16 rows {shown} ... of the replay buffer; to inspect them, "
        f"call torch.load({str(at)!r}). The last good checkpoint is {good}. "
        "If the dataset has finite values only, lower the learning rate, set clip_norm, or scale the rewards."
    )
    kept = torch.load(at, weights_only=True)
    assert kept["index"].tolist() == rows[call - 1]
    expected = transitions[torch.tensor(rows[call - 1])]
    torch.testing.assert_close(kept, {**expected.to_dict(), "index": kept["index"]}, rtol=0, atol=0)
    assert not list(folder.rglob(".*"))

    assert Checkpoint.manifest(good)["components"]
    second = make_trainer(transitions, 20).load_from_file(good)
    assert second.collected_frames == 10
    assert all(value.isfinite().all() for value in second.loss_module.state_dict().values())
    second.train()


def test_one_bad_row_of_the_dataset_is_found(make_batch, tmp_path):
    """Row 7's reward overflows when it is squared; the step is the first that drew it."""
    transitions = make_batch(200)
    transitions["next", "reward"][7] = 1e38
    trainer = make_trainer(transitions, 100, log_interval=50, save_trainer_file=tmp_path / "checkpoint")
    rows = drawn_rows(trainer)
    with pytest.raises(FloatingPointError, match="There is no checkpoint yet") as caught:
        trainer.train()
    first = next(step for step, drawn in enumerate(rows, 1) if 7 in drawn)
    assert 1 < first < 50
    assert f"qvalue_loss is inf in gradient step {first}, on the 16 rows" in str(caught.value)
    kept = torch.load(tmp_path / f"not-finite-{first}.pt", weights_only=True)
    assert kept["index"][kept["next"]["reward"].squeeze(1) == 1e38].unique().tolist() == [7]


def test_steps_before_a_resume_are_counted(make_batch, tmp_path):
    transitions, settings = make_batch(50), {"save_trainer_file": tmp_path / "checkpoint"}
    make_trainer(transitions, 15, **settings).train()
    second = make_trainer(transitions, 40, **settings).load_from_file(tmp_path / "checkpoint")
    break_loss(second, "qvalue_loss", 8)
    with pytest.raises(FloatingPointError, match="qvalue_loss is nan in gradient step 23,"):
        second.train()


@pytest.mark.parametrize("sampler", ["without_replacement", "prioritized"])
def test_rows_of_other_samplers(make_batch, sampler):
    """A NaN priority makes the prioritised sampler fail; the message names the loss nevertheless."""
    transitions = make_batch(40)
    transitions["next", "reward"][7] = 1e38
    if sampler == "prioritized":
        skip_without_extension()
    buffer = make_replay_buffer(transitions, batch_size=16, seed=0, sampler=sampler)
    trainer = make_trainer(None, 100, buffer=buffer, log_interval=100)
    rows = drawn_rows(trainer)
    with pytest.raises(FloatingPointError) as caught:
        trainer.train()
    first = next(step for step, drawn in enumerate(rows, 1) if 7 in drawn)
    assert f"qvalue_loss is inf in gradient step {first}, on the {len(rows[first - 1])} rows" in str(caught.value)


def test_a_sampler_that_fails_after_a_bad_loss_does_not_hide_it(make_batch):
    trainer = make_trainer(make_batch(50))
    break_loss(trainer, "vae_loss", 3)
    sample, calls = trainer._replay.sample, []

    def fail(interval):
        calls.append(1)
        if len(calls) == 5:
            raise OverflowError("Range exceeds valid bounds")
        return sample(interval)

    trainer._replay.sample = fail
    with pytest.raises(FloatingPointError, match="vae_loss is nan in gradient step 3, on the 16 rows"):
        trainer.train()


def test_rows_of_a_list_are_written(make_batch, tmp_path):
    buffer = TensorDictReplayBuffer(storage=ListStorage(50), batch_size=16)
    buffer.extend(make_batch(50))
    trainer = make_trainer(None, buffer=buffer, save_trainer_file=tmp_path / "checkpoint")
    break_loss(trainer, "vae_loss", 3)
    with pytest.raises(FloatingPointError, match="vae_loss is nan in gradient step 3, on the 16 rows"):
        trainer.train()
    assert torch.load(tmp_path / "not-finite-3.pt", weights_only=True)["action"].shape == (16, 2)


def test_a_metric_with_several_numbers_is_left_out(make_batch, tmp_path):
    trainer = make_trainer(make_batch(50), save_trainer_file=tmp_path / "checkpoint")
    trainer.register_op("post_steps_log", lambda _: {"histogram": torch.zeros(3), "score": torch.ones(1)})
    trainer.train()
    assert trainer.metrics["score"] == 1
    assert "histogram" not in trainer.metrics


def test_without_a_folder_nothing_is_written(make_batch, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = make_trainer(make_batch(50))
    break_loss(trainer, "vae_loss", 3)
    message = r"vae_loss is nan in gradient step 3, .* \.\.\. of the replay buffer\. There is no checkpoint yet\."
    with pytest.raises(FloatingPointError, match=message):
        trainer.train()
    assert list(tmp_path.iterdir()) == []


def test_the_loss_is_named_also_if_the_batch_cannot_be_written(make_batch, tmp_path):
    (tmp_path / "file").touch()
    trainer = make_trainer(make_batch(50), save_trainer_file=tmp_path / "file" / "checkpoint")
    break_loss(trainer, "vae_loss", 3)
    message = r"nan in gradient step 3, on the 16 rows .* \(the rows could not be written to .*/file/not-finite-3.pt: "
    with pytest.raises(FloatingPointError, match=message):
        trainer.train()


def test_a_batch_of_an_earlier_attempt_is_replaced(make_batch, tmp_path):
    for seed in (1, 2):
        trainer = make_trainer(make_batch(50), seed=seed, save_trainer_file=tmp_path / "checkpoint")
        rows = drawn_rows(trainer)
        break_loss(trainer, "vae_loss", 3)
        with pytest.raises(FloatingPointError):
            trainer.train()
    assert torch.load(tmp_path / "not-finite-3.pt", weights_only=True)["index"].tolist() == rows[2]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_make_no_checkpoint(make_batch, tmp_path, value):
    """A target critic that is broken after the last loss was seen."""
    trainer = make_trainer(make_batch(50), 20, save_trainer_file=tmp_path / "checkpoint", save_trainer_interval=9)
    key = "target_qvalue_network_params.critics.1.module.0.bias"

    def break_weight(step: int) -> None:
        if step == 20:
            trainer.loss_module.state_dict()[key][3] = value

    AfterStep(break_weight).register(trainer)
    message = (
        rf"1 of \d+ weight tensors, such as {key}, have values that are not finite after 20 gradient steps\. "
        f"The last good checkpoint is {tmp_path / 'checkpoint'}. If the dataset has finite values only, lower"
    )
    with pytest.raises(FloatingPointError, match=message):
        trainer.train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    second = make_trainer(make_batch(50), 20)
    Checkpoint(loss_module=second.loss_module).load(tmp_path / "checkpoint")
    check_parameters(second.loss_module, 10, "")  # of step 10, and finite


def test_of_several_losses_the_first_is_named():
    watch = LossWatch(replay_buffer=None)
    watch.begin(40)
    one, nan, inf = torch.tensor(1.0), torch.tensor(torch.nan), torch.tensor(torch.inf)
    for losses in ({"vae_loss": one}, {"loss_vae": one, "td_error": nan, "loss_actor": inf}, {"vae_loss": nan}):
        watch.next_step(TensorDict())
        watch.add(losses)
    assert watch.find() == 2
    message = "loss_actor is inf in gradient step 42, on rows whose numbers the replay buffer does not return. No "
    assert watch.describe(2, Path("nowhere"), "No checkpoint.").startswith(message)
    watch.begin(43)
    assert watch.find() is None


@pytest.fixture
def waits(monkeypatch) -> Counter:
    """Counts the calls that wait for an asynchronous device."""
    calls: Counter[str] = Counter()
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "numpy"):
        real = getattr(torch.Tensor, name)

        def counting(self, *args, _name=name, _real=real, **kwargs):
            calls[_name] += self.is_floating_point() or self.dtype is torch.bool
            return _real(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counting)
    return calls


def test_all_losses_are_checked_with_one_wait(waits):
    watch = LossWatch(replay_buffer=None)
    for _ in range(1000):
        watch.next_step(TensorDict())
        watch.add({"vae_loss": torch.tensor(1.0), "qvalue_loss": torch.tensor(2.0)})
    assert watch.find() is None
    assert waits == {"__bool__": 1}


@pytest.mark.parametrize("log_interval", [1, 10, 40])
def test_training_waits_twice_in_a_log_interval(make_batch, waits, log_interval):
    """For the check, and for the means that are logged."""
    trainer = make_trainer(make_batch(50), 40, log_interval=log_interval)
    waits.clear()
    trainer.train()
    intervals = 40 // log_interval
    assert +waits == {"__bool__": intervals, "tolist": intervals}
