"""BCQTrainer: what it logs, when it stops, and that a break in the middle changes nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from tensordict import TensorDict
from torchrl.checkpoint import Checkpoint, CheckpointError, CheckpointRotation
from torchrl.data import LazyTensorStorage, PrioritizedSampler, TensorDictReplayBuffer
from torchrl.objectives import HardUpdate
from torchrl.record.loggers import CSVLogger

from torchrl_bcq import BCQLoss, BCQOptimizationStepper, BCQPolicy, BCQTrainer, make_bcq_modules, make_replay_buffer

from ..conftest import ACTION_SPEC, OBSERVATION_SPEC, skip_without_extension
from .conftest import assert_same_run, logged, make_trainer, soft_update, weights


def test_takes_exactly_the_steps_asked_for(make_batch):
    trainer = make_trainer(make_batch(100))
    trainer.train()
    assert trainer._optim_count == trainer.collected_frames == 25
    steps = trainer.optimization_stepper.optimizers["actor"].state_dict()["state"][0]["step"]
    assert steps == 25


def test_targets_move_once_a_step(make_batch):
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


def hard_update(loss: BCQLoss) -> HardUpdate:
    return HardUpdate(loss, value_network_update_interval=15)


def prioritised_buffer(transitions: TensorDict, priority_key: str = "td_error") -> TensorDictReplayBuffer:
    skip_without_extension()
    sampler = PrioritizedSampler(len(transitions), alpha=1.0, beta=1.0)
    storage, generator = LazyTensorStorage(len(transitions)), torch.Generator().manual_seed(0)
    buffer = TensorDictReplayBuffer(
        storage=storage, sampler=sampler, batch_size=16, priority_key=priority_key, generator=generator
    )
    buffer.extend(transitions)
    return buffer


@pytest.mark.parametrize("kind", ["soft", "hard", "unseeded", "prioritised", "without_replacement", "weighted"])
def test_run_save_load_run_equals_run_run(make_batch, tmp_path, kind):
    """Slip 7: networks, targets, optimizers, sampler and random state; bitwise."""
    transitions = make_batch(200)

    def make(total_steps: int, seed: int = 0, **settings) -> BCQTrainer:
        if kind == "hard":
            settings["updater"] = hard_update
        if kind == "unseeded":
            settings["buffer"] = make_replay_buffer(transitions, batch_size=16)
        if kind == "prioritised":
            settings["buffer"] = prioritised_buffer(transitions)
        if kind == "without_replacement":  # the break is within the second round
            settings["buffer"] = make_replay_buffer(transitions, batch_size=16, seed=seed, sampler=kind)
        if kind == "weighted":
            weights = torch.arange(200) % 7
            settings["buffer"] = make_replay_buffer(transitions, batch_size=16, seed=seed, weights=weights)
        return make_trainer(transitions, total_steps, seed=seed, **settings)

    undisturbed = make(40)
    undisturbed.train()

    make(20, save_trainer_file=tmp_path / "checkpoint").train()
    torch.manual_seed(1234)  # the break
    second = make(40, seed=99)
    second.load_from_file(tmp_path / "checkpoint")
    assert second.collected_frames == 20
    second.train()

    assert_same_run(second, undisturbed)


def test_the_dataset_is_not_in_the_checkpoint(make_batch, tmp_path):
    sizes = []
    for rows in (50, 5000):
        make_trainer(make_batch(rows), 10, save_trainer_file=tmp_path / str(rows)).train()
        sizes.append(sum(file.stat().st_size for file in (tmp_path / str(rows)).rglob("*") if file.is_file()))
    assert sizes[1] - sizes[0] < 1000  # numbers in JSON differ in length; 5000 rows take 200 kB


@pytest.mark.parametrize("seeds", [(0, None), (None, 0)])
def test_resume_with_a_buffer_of_another_kind_is_refused(make_batch, tmp_path, seeds):
    transitions = make_batch(50)
    buffers = [make_replay_buffer(transitions, batch_size=16, seed=seed) for seed in seeds]
    make_trainer(None, 10, buffer=buffers[0], save_trainer_file=tmp_path / "checkpoint").train()
    was_made = "with" if seeds[1] is None else "without"
    with pytest.raises(
        CheckpointError, match=f"the checkpoint's replay buffer was made {was_made} a seed, this one was not"
    ):
        make_trainer(None, 20, buffer=buffers[1]).load_from_file(tmp_path / "checkpoint")


def test_checkpoint_serves_the_policy_alone(make_batch, tmp_path):
    trainer = make_trainer(make_batch(50), 10, save_trainer_file=tmp_path / "checkpoint")
    trainer.train()
    modules = make_bcq_modules(OBSERVATION_SPEC, ACTION_SPEC, hidden=(8,), vae_hidden=(8,))
    loss = BCQLoss(*modules)
    Checkpoint(loss_module=loss).load(tmp_path / "checkpoint")
    trained, states = trainer.loss_module, make_batch(5).select("observation")
    actions = []
    for parts in (modules, (trained.vae_network, trained.actor_network, trained.qvalue_network)):
        torch.manual_seed(0)
        actions.append(BCQPolicy(*parts)(states.clone())["action"])
    assert torch.equal(*actions)
    suffixes = {file.suffix for file in (tmp_path / "checkpoint").rglob("*") if file.is_file()}
    assert suffixes <= {".json", ".pt"}  # read with weights_only=True


def test_seed_decides_the_run(make_batch):
    transitions = make_batch(100)
    runs = []
    for seed in (3, 3, 4):
        runs.append(make_trainer(transitions, seed=seed))
        runs[-1].train()
    torch.testing.assert_close(weights(runs[0]), weights(runs[1]), rtol=0, atol=0)
    key = "actor_network_params.network.0.weight"
    assert not torch.equal(weights(runs[0])[key], weights(runs[2])[key])


def test_logs_the_means_of_each_tick(make_batch, tmp_path):
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


def test_progress_bar_counts_gradient_steps_and_goes_on(make_batch, tmp_path, capsys):
    transitions = make_batch(50)
    settings = {"progress_bar": True, "save_trainer_file": tmp_path / "checkpoint"}
    make_trainer(transitions, 20, **settings).train()
    shown = capsys.readouterr().err
    assert "20/20" in shown
    assert "steps/s" in shown
    assert all(f"loss_{name}=" in shown for name in ("vae", "qvalue", "actor"))
    assert "pred_value" not in shown  # logged, but not shown
    assert shown.endswith("\n")  # closed: what is printed next has a line of its own
    resumed = make_trainer(transitions, 30, progress_bar=True)
    resumed.load_from_file(tmp_path / "checkpoint")
    resumed.train()
    shown = capsys.readouterr().err
    assert "20/30" in shown
    assert "30/30" in shown
    assert "10/30" not in shown


def test_loss_that_is_not_finite_stops_the_run(make_batch):
    transitions = make_batch(50)
    transitions["next", "reward"][:] = 1e38
    trainer = make_trainer(transitions)
    message = "qvalue_loss is inf in gradient step 1, on the 16 rows .* lower the learning rate"
    with pytest.raises(FloatingPointError, match=message):
        trainer.train()


def stop_after(trainer: BCQTrainer, step: int) -> None:
    """Request a stop from within the losses of a step, as a signal handler might."""
    actor_loss = trainer.loss_module.actor_loss

    def stopping(batch):
        if trainer._optim_count == step:
            trainer.request_stop("a test")
        return actor_loss(batch)

    trainer.loss_module.actor_loss = stopping


@pytest.mark.parametrize(  # steps 10 and 20 end a tick, 20 the run
    ("step", "sampler"), [(1, "uniform"), (7, "without_replacement"), (10, "uniform"), (17, "uniform"), (20, "uniform")]
)
def test_a_stop_ends_with_a_checkpoint_of_that_very_step_and_the_run_goes_on_from_it(
    make_batch, tmp_path, sampler, step
):
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


def test_a_stop_logs_the_tick_that_it_completes_and_no_half_one(make_batch, tmp_path):
    """After a stop in step 10 and another in step 17 all means are there, and those of 11 to 20 without the first 7."""
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


def test_metrics_are_the_last_ones_and_nothing_is_kept_for_ever(make_batch):
    trainer = make_trainer(make_batch(50), 200)
    step, vae = trainer.optimization_stepper.step, []
    trainer.optimization_stepper.step = lambda *args: vae.append((logs := step(*args))["loss_vae"].item()) or logs
    assert trainer.metrics == {}
    trainer.train()
    assert set(trainer.metrics) == set(trainer.loss_module.out_keys)
    assert trainer.metrics["loss_vae"] == pytest.approx(sum(vae[190:]) / 10, rel=1e-5)
    assert {len(values) for values in trainer._log_dict.values()} == {1}


def test_metrics_are_known_again_after_a_resume(make_batch, tmp_path):
    transitions = make_batch(50)
    first = make_trainer(transitions, 20, save_trainer_file=tmp_path / "checkpoint")
    first.train()
    second = make_trainer(transitions, 30).load_from_file(tmp_path / "checkpoint")
    assert len(first.metrics) == 8
    assert second.metrics == first.metrics


def test_a_rotation_keeps_the_newest_and_the_last_checkpoint_is_the_newest(make_batch, tmp_path):
    rotation = CheckpointRotation(tmp_path / "checkpoints", keep_last=2)
    trainer = make_trainer(make_batch(50), 45, checkpoint_rotation=rotation, save_trainer_interval=9)
    assert trainer.last_checkpoint is None
    trainer.train()
    names = ["checkpoint-000000000040", "checkpoint-000000000045"]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == names
    assert trainer.last_checkpoint == tmp_path / "checkpoints" / names[1]
    assert Checkpoint.manifest(trainer.last_checkpoint)["metadata"]["optim_steps"] == 45


def test_the_last_checkpoint_is_none_without_a_place_or_a_file(make_batch, tmp_path):
    assert make_trainer(make_batch(50)).last_checkpoint is None
    trainer = make_trainer(make_batch(50), 10, save_trainer_file=tmp_path / "checkpoint")
    assert trainer.last_checkpoint is None
    trainer.train()
    assert trainer.last_checkpoint == tmp_path / "checkpoint"


def test_write_checkpoint_writes_finite_weights_only(make_batch):
    trainer, written = make_trainer(make_batch(50)), []
    trainer.write_checkpoint(lambda: written.append(1))
    key = "target_actor_network_params.network.0.bias"
    trainer.loss_module.state_dict()[key][0] = torch.inf
    with pytest.raises(FloatingPointError, match=f"1 of the weights are not finite .* 0 gradient steps, such as {key}"):
        trainer.write_checkpoint(lambda: written.append(2))
    assert written == [1]


def test_prioritised_replay_gets_the_td_error(make_batch):
    transitions = make_batch(50)
    transitions["next", "reward"][7] = 100.0  # the row with by far the largest error
    buffer = prioritised_buffer(transitions)
    make_trainer(None, 60, buffer=buffer).train()
    drawn = torch.cat([buffer.sample()["index"] for _ in range(50)])
    assert (drawn == 7).float().mean() > 0.3  # 1 in 50 if drawn uniformly


def test_priorities_that_would_go_nowhere_are_refused(make_batch):
    buffer = prioritised_buffer(make_batch(50), priority_key="urgency")
    with pytest.raises(ValueError, match="the loss writes priorities to 'td_error', the buffer reads 'urgency'"):
        make_trainer(None, buffer=buffer)


@pytest.mark.parametrize("setting", [{"num_epochs": 2}, {"optimizer": None}, {"batch_size": 7}, {"lr": 1e-3}])
def test_settings_without_effect_are_refused(make_batch, setting):
    with pytest.raises(TypeError, match=f"BCQTrainer has no use for {[*setting]}".replace("[", "\\[")):
        make_trainer(make_batch(50), **setting)


def test_settings_of_torchrls_trainer_pass_through(make_batch):
    trainer = make_trainer(make_batch(20), clip_norm=0.5)
    assert trainer.clip_norm == 0.5
    with pytest.raises(TypeError, match="clip_nrm"):
        make_trainer(make_batch(20), clip_nrm=0.5)


def test_modules_can_be_copied_after_training(make_batch):
    trainer = make_trainer(make_batch(50), 10)
    trainer.train()
    twin, batch = copy.deepcopy(trainer.loss_module), make_batch(4)
    latent = torch.zeros(4, 10, 4)
    torch.testing.assert_close(twin.qvalue_loss(batch, latent)[0], trainer.loss_module.qvalue_loss(batch, latent)[0])


def test_updater_of_another_loss_is_refused(make_batch):
    other = make_trainer(make_batch(20)).loss_module
    with pytest.raises(ValueError, match="target_net_updater was made for another loss"):
        make_trainer(make_batch(20), updater=lambda loss: soft_update(other))


def test_updater_is_needed_where_something_is_delayed_and_only_there(modules, make_batch):
    buffer, settings = make_replay_buffer(make_batch(50), batch_size=16), {"total_steps": 5, "progress_bar": False}
    with pytest.raises(ValueError, match="the loss has target networks; pass target_net_updater=SoftUpdate"):
        BCQTrainer(BCQLoss(*modules), buffer, target_net_updater=None, **settings)
    undelayed = BCQLoss(*modules, delay_actor=False, delay_qvalue=False)
    with pytest.raises(ValueError, match="the loss has no target networks .* pass target_net_updater=None"):
        BCQTrainer(undelayed, buffer, target_net_updater=soft_update(BCQLoss(*modules)), **settings)
    before = copy.deepcopy(undelayed.state_dict())
    BCQTrainer(undelayed, buffer, target_net_updater=None, **settings).train()
    key = "qvalue_network_params.critics.0.module.0.weight"
    assert not torch.equal(undelayed.state_dict()[key], before[key])


def test_a_network_without_an_optimizer_is_refused(modules, make_batch):
    """It would stay as it was, silently."""
    loss, buffer = BCQLoss(*modules), make_replay_buffer(make_batch(50), batch_size=16)
    adam = BCQOptimizationStepper.adam(loss).optimizers
    stepper = BCQOptimizationStepper(adam["vae"], adam["qvalue"])
    message = r"the loss trains \['vae', 'qvalue', 'actor'\], but optimization_stepper steps \['vae', 'qvalue'\]"
    with pytest.raises(ValueError, match=message):
        BCQTrainer(loss, buffer, target_net_updater=soft_update(loss), optimization_stepper=stepper, total_steps=5)
