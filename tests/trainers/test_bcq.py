"""BCQTrainer: what it logs, when it stops, and that a break in the middle changes nothing."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from tensordict import TensorDict
from torchrl.checkpoint import Checkpoint, CheckpointError
from torchrl.data import LazyTensorStorage, PrioritizedSampler, TensorDictReplayBuffer
from torchrl.objectives import HardUpdate, SoftUpdate
from torchrl.record.loggers import CSVLogger

from torchrl_bcq import BCQLoss, BCQOptimizationStepper, BCQPolicy, BCQTrainer, make_bcq_modules, make_replay_buffer

from ..conftest import ACTION_SPEC, OBSERVATION_SPEC


def soft_update(loss: BCQLoss) -> SoftUpdate:
    return SoftUpdate(loss, tau=0.005)


def make_trainer(transitions, total_steps=25, seed=0, buffer=None, updater=soft_update, **settings) -> BCQTrainer:
    torch.manual_seed(seed)
    loss = BCQLoss(*make_bcq_modules(OBSERVATION_SPEC, ACTION_SPEC, hidden=(8,), vae_hidden=(8,)))
    buffer = buffer or make_replay_buffer(transitions, batch_size=16, seed=seed)
    settings = {"log_interval": 10, "progress_bar": False, "seed": seed, **settings}
    return BCQTrainer(loss, buffer, target_net_updater=updater(loss), total_steps=total_steps, **settings)


def weights(trainer: BCQTrainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.loss_module.state_dict().items()}


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
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sampler = PrioritizedSampler(len(transitions), alpha=1.0, beta=1.0)
    except RuntimeError as error:
        pytest.skip(f"TorchRL's compiled extension does not fit the installed torch: {error}")
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

    torch.testing.assert_close(weights(second), weights(undisturbed), rtol=0, atol=0)
    for name, optimizer in second.optimization_stepper.optimizers.items():
        twin = undisturbed.optimization_stepper.optimizers[name].state_dict()
        torch.testing.assert_close(optimizer.state_dict()["state"], twin["state"], rtol=0, atol=0)


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
    assert suffixes <= {".json", ".memmap"}  # nothing to unpickle


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
    assert all(f"loss_{name}:" in shown for name in ("vae", "qvalue", "actor"))
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
    message = r"not finite within gradient steps 1 to 10: \{.*'loss_qvalue': (inf|nan).*lower the learning rate"
    with pytest.raises(FloatingPointError, match=message):
        trainer.train()


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
