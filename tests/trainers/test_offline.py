"""OfflineTrainer: its steps, logs and settings."""

from __future__ import annotations

import copy

import pytest
import torch
from torchrl.record.loggers import CSVLogger

from torchrl_bcq import (
    BCQLoss,
    OfflineOptimizationStepper,
    OfflineTrainer,
    Schedule,
    make_replay_buffer,
)

from .conftest import make_trainer, prioritised_buffer, soft_update, weights

# steps


def test_takes_exactly_the_steps_asked_for(make_batch):
    trainer = make_trainer(make_batch(100))
    trainer.train()
    assert trainer._optim_count == trainer.collected_frames == 25
    steps = trainer.optimization_stepper.optimizers["actor"].state_dict()["state"][0]["step"]
    assert steps == 25


def test_targets_move_once_in_each_step(make_batch):
    """At a learning rate of 0 and from a distance of 1, 25 soft updates leave 0.995^25 of it."""
    trainer = make_trainer(make_batch(100))
    for optimizer in trainer.optimization_stepper.optimizers.values():
        optimizer.param_groups[0]["lr"] = 0.0
    key = "target_actor_network_params.network.0.bias"
    trainer.loss_module.state_dict()[key].add_(1)
    trainer.train()
    state = trainer.loss_module.state_dict()
    distance = state[key] - state[key.removeprefix("target_")]
    torch.testing.assert_close(distance, torch.full_like(distance, 0.995**25))


def test_seed_decides_the_run(make_batch):
    transitions = make_batch(100)
    runs = []
    for seed in (3, 3, 4):
        runs.append(make_trainer(transitions, seed=seed))
        runs[-1].train()
    torch.testing.assert_close(weights(runs[0]), weights(runs[1]), rtol=0, atol=0)
    key = "actor_network_params.network.0.weight"
    assert not torch.equal(weights(runs[0])[key], weights(runs[2])[key])


def test_modules_can_be_copied_after_training(make_batch):
    trainer = make_trainer(make_batch(50), 10)
    trainer.train()
    copied, batch = copy.deepcopy(trainer.loss_module), make_batch(4)
    latent = torch.zeros(4, 10, 4)
    torch.testing.assert_close(copied.qvalue_loss(batch, latent)[0], trainer.loss_module.qvalue_loss(batch, latent)[0])


def test_priorities_are_kept_in_steps_without_a_td_error(make_batch):
    """The critics learn in every second step. TorchRL would write the largest priority in the other steps."""
    transitions = make_batch(50)
    buffer, updated = prioritised_buffer(transitions), []

    def stepper(loss):
        learned = OfflineOptimizationStepper.adam(loss)
        learned.schedules["qvalue"] = Schedule(every=2)
        return learned

    trainer = make_trainer(transitions, total_steps=4, buffer=buffer, stepper=stepper)
    trainer.register_op("post_optim_log", lambda batch: updated.append("td_error" in batch.keys()))
    before = []
    trainer.register_op("post_optim", lambda: before.append(priorities(buffer)))
    after = []
    trainer.register_op("post_optim_log", lambda batch: after.append(priorities(buffer)))
    trainer.train()
    assert sorted(updated) == [False, False, True, True]
    assert [one != other for one, other in zip(before, after, strict=True)] == updated


def priorities(buffer) -> list[float]:
    return [buffer.sampler._sum_tree[row] for row in range(50)]


def test_prioritised_replay_gets_the_td_error(make_batch):
    transitions = make_batch(50)
    transitions["next", "reward"][7] = 100.0  # the row with by far the largest error
    buffer = prioritised_buffer(transitions)
    make_trainer(None, 60, buffer=buffer).train()
    drawn = torch.cat([buffer.sample()["index"] for _ in range(50)])
    assert (drawn == 7).float().mean() > 0.3  # 1 in 50 if drawn uniformly


# logs


def test_logs_the_means_of_each_log_interval(make_batch, tmp_path):
    trainer = make_trainer(make_batch(100), logger=CSVLogger("log", log_dir=str(tmp_path)))
    seen = []
    step = trainer.optimization_stepper.step
    trainer.optimization_stepper.step = lambda *args: seen.append(step(*args).clone()) or seen[-1].clone()
    trainer.train()
    for key in trainer.loss_module.out_keys:
        rows = [line.split(",") for line in (tmp_path / "log" / "scalars" / f"{key}.csv").read_text().splitlines()]
        assert [int(row[0]) for row in rows] == [10, 20, 25]
        means = [torch.stack([logs[key] for logs in seen[a:b]]).mean().item() for a, b in ((0, 10), (10, 20), (20, 25))]
        assert [float(row[1]) for row in rows] == pytest.approx(means, rel=1e-4)


def test_two_trainers_keep_their_logs_apart(make_batch, tmp_path):
    trainers = [make_trainer(make_batch(50), 10, logger=CSVLogger(name, log_dir=str(tmp_path))) for name in "ab"]
    for trainer, name in zip(trainers, "ab", strict=True):
        trainer.train()
        assert (tmp_path / name / "scalars" / "loss_vae.csv").read_text().startswith("10,")


def test_progress_bar_counts_gradient_steps_also_after_a_resume(make_batch, tmp_path, capsys):
    transitions = make_batch(50)
    settings = {"progress_bar": True, "save_trainer_file": tmp_path / "checkpoint"}
    make_trainer(transitions, 20, **settings).train()
    shown = capsys.readouterr().err
    assert "20/20" in shown
    assert "steps/s" in shown
    assert all(f"loss_{name}=" in shown for name in ("vae", "qvalue", "actor"))
    assert "pred_value" not in shown  # logged, but not shown
    assert shown.endswith("\n")  # closed: the next output begins on a new line
    resumed = make_trainer(transitions, 30, progress_bar=True)
    resumed.load_from_file(tmp_path / "checkpoint")
    resumed.train()
    shown = capsys.readouterr().err
    assert "20/30" in shown
    assert "30/30" in shown
    assert "10/30" not in shown


def test_metrics_are_the_last_values_and_earlier_ones_are_dropped(make_batch):
    trainer = make_trainer(make_batch(50), 200)
    step, vae = trainer.optimization_stepper.step, []
    trainer.optimization_stepper.step = lambda *args: vae.append((logs := step(*args))["loss_vae"].item()) or logs
    assert trainer.metrics == {}
    trainer.train()
    assert set(trainer.metrics) == set(trainer.loss_module.out_keys)
    assert trainer.metrics["loss_vae"] == pytest.approx(sum(vae[190:]) / 10, rel=1e-5)
    assert {len(values) for values in trainer._log_dict.values()} == {1}
    assert trainer.logged_at("loss_vae") == 200
    assert trainer.logged_at("return") is None


def test_a_loss_that_is_not_finite_stops_the_run(make_batch):
    transitions = make_batch(50)
    transitions["next", "reward"][:] = 1e38
    trainer = make_trainer(transitions)
    message = "qvalue_loss is inf in gradient step 1, on the 16 rows .* lower the learning rate"
    with pytest.raises(FloatingPointError, match=message):
        trainer.train()


# settings


def test_default_stepper_is_adam_in_the_losss_order(modules, make_batch):
    loss, buffer = BCQLoss(*modules), make_replay_buffer(make_batch(50), batch_size=16)
    trainer = OfflineTrainer(loss, buffer, target_net_updater=soft_update(loss), total_steps=5, progress_bar=False)
    stepper = trainer.optimization_stepper
    assert type(stepper) is OfflineOptimizationStepper
    assert list(stepper.optimizers) == ["vae", "qvalue", "actor"]
    assert {type(optimizer) for optimizer in stepper.optimizers.values()} == {torch.optim.Adam}
    assert {optimizer.defaults["lr"] for optimizer in stepper.optimizers.values()} == {1e-3}


def test_settings_of_torchrls_trainer(make_batch):
    trainer = make_trainer(make_batch(20), clip_norm=0.5, clip_grad_norm=False, save_trainer_interval=7)
    assert (trainer.clip_norm, trainer.clip_grad_norm, trainer.save_trainer_interval) == (0.5, False, 7)


@pytest.mark.parametrize("setting", ["num_epochs", "optimizer", "batch_size", "lr", "clip_nrm"])
def test_unknown_settings_are_refused(make_batch, setting):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{setting}'"):
        make_trainer(make_batch(50), **{setting: 2})


@pytest.mark.parametrize("numbers", [{"total_steps": 0}, {"log_interval": 0}])
def test_numbers_of_steps_below_one_are_refused(make_batch, numbers):
    with pytest.raises(ValueError, match="both must be at least 1"):
        make_trainer(make_batch(20), **numbers)
