"""Agents trained together are what each is alone: weights, logs, checkpoints, random numbers, ends."""

from __future__ import annotations

import math

import pytest
import torch
from torchrl.checkpoint import CheckpointRotation
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.objectives import SoftUpdate
from torchrl.objectives.utils import ValueEstimators
from torchrl.record.loggers import CSVLogger
from torchrl.trainers import EarlyStopping

from torchrl_bcq import (
    BCQLoss,
    BCQOptimizationStepper,
    BCQPolicy,
    BCQTrainer,
    NetworkLRScheduler,
    make_bcq_modules,
    make_checkpoint,
    make_replay_buffer,
    train_together,
)

from ..conftest import ACTION_SPEC, OBSERVATION_SPEC
from .conftest import AfterStep, Scripted, logged, make_trainer, soft_update, weights

SEEDS = (0, 1, 2)


def assert_close_runs(one: BCQTrainer, other: BCQTrainer) -> None:
    """Weights, targets and optimizers agree to float32's rounding over some tens of steps at 1e-3."""
    torch.testing.assert_close(weights(one), weights(other), rtol=1e-4, atol=1e-5)
    for name, optimizer in one.optimization_stepper.optimizers.items():
        twin = other.optimization_stepper.optimizers[name].state_dict()
        torch.testing.assert_close(optimizer.state_dict(), twin, rtol=1e-3, atol=1e-5)
    assert one.metrics.keys() == other.metrics.keys()
    assert all(math.isclose(value, other.metrics[name], rel_tol=1e-4) for name, value in one.metrics.items())


def both_ways(make, seeds=SEEDS) -> tuple[list[BCQTrainer], list[BCQTrainer]]:
    """The agents that ``make`` makes of seeds, trained one by one and together."""
    alone = []
    for seed in seeds:
        trainer = make(seed)
        trainer.train()
        alone.append(trainer)
    together = [make(seed) for seed in seeds]
    train_together(together)
    return alone, together


def scheduled(loss: BCQLoss) -> BCQOptimizationStepper:
    return BCQOptimizationStepper.adam(loss, vae_warmup_steps=3, freeze_vae_after=20, actor_update_interval=2)


def delayed_by_nothing(transitions, seed: int) -> BCQTrainer:
    torch.manual_seed(seed)
    networks = make_bcq_modules(OBSERVATION_SPEC, ACTION_SPEC, hidden=(8,), vae_hidden=(8,))
    loss = BCQLoss(*networks, delay_actor=False, delay_qvalue=False, reduction="sum", loss_function="smooth_l1")
    buffer = make_replay_buffer(transitions, batch_size=16, seed=seed)
    return BCQTrainer(loss, buffer, target_net_updater=None, total_steps=25, seed=seed, progress_bar=False)


def without_actor(transitions, seed: int) -> BCQTrainer:
    torch.manual_seed(seed)
    vae, _, critics = make_bcq_modules(OBSERVATION_SPEC, ACTION_SPEC, hidden=(8,), vae_hidden=(8,), num_critics=3)
    loss = BCQLoss(vae, None, critics, lmbda=1.0, num_target_samples=3)
    loss.make_value_estimator(gamma=0.9)
    buffer = make_replay_buffer(transitions, batch_size=16, seed=seed)
    updater = SoftUpdate(loss, tau=0.1)
    return BCQTrainer(loss, buffer, target_net_updater=updater, total_steps=25, seed=seed, progress_bar=False)


@pytest.mark.parametrize(
    "make",
    [
        make_trainer,
        lambda data, seed: make_trainer(data, seed=seed, stepper=scheduled),
        lambda data, seed: make_trainer(data, seed=seed, clip_norm=0.1 * (1 + seed)),
        lambda data, seed: make_trainer(
            data, seed=seed, stepper=lambda loss: BCQOptimizationStepper.adam(loss, lr=10.0 ** -(2 + seed))
        ),
        lambda data, seed: make_trainer(data, seed=seed, precision="medium"),
        lambda data, seed: make_trainer(
            data, seed=seed, buffer=make_replay_buffer(data, batch_size=16, seed=seed, sampler="prioritized")
        ),
        delayed_by_nothing,
        without_actor,
    ],
    ids=["paper", "schedule", "clipped", "learning rates", "precision", "prioritised", "sum and Huber", "no actor"],
)
def test_each_agent_is_what_it_is_alone(make_batch, make):
    data = make_batch(100)
    alone, together = both_ways(lambda seed: make(data, seed=seed))
    for one, other in zip(alone, together, strict=True):
        assert_close_runs(one, other)
    assert not torch.equal(*(next(trainer.loss_module.parameters()) for trainer in together[:2]))


def test_agents_learn_in_bfloat16_if_asked_to(make_batch):
    """It rounds to 3 digits: after 25 steps of 1e-3 each, weights are near the float32 ones, and not the same."""
    data = make_batch(100)
    exact = [make_trainer(data, seed=seed) for seed in SEEDS]
    rounded = [make_trainer(data, seed=seed, precision="bf16-mixed") for seed in SEEDS]
    train_together(exact)
    train_together(rounded)
    for one, other in zip(exact, rounded, strict=True):
        torch.testing.assert_close(weights(one), weights(other), rtol=0.05, atol=0.01)
        assert not torch.equal(next(one.loss_module.parameters()), next(other.loss_module.parameters()))


def test_batches_may_have_dimensions_of_their_own(make_batch):
    """Slices of trajectories, for TD(lambda)."""
    slices = make_batch(40, 3)

    def make(seed: int) -> BCQTrainer:
        storage, generator = LazyTensorStorage(40), torch.Generator().manual_seed(seed)
        buffer = TensorDictReplayBuffer(storage=storage, batch_size=16, generator=generator)
        buffer.extend(slices)
        trainer = make_trainer(None, seed=seed, buffer=buffer)
        trainer.loss_module.make_value_estimator(ValueEstimators.TDLambda, lmbda=0.9)
        return trainer

    for one, other in zip(*both_ways(make), strict=True):
        assert_close_runs(one, other)


def test_logs_hooks_schedulers_and_checkpoints_are_each_agents_own(make_batch, tmp_path):
    data, steps = make_batch(100), {}

    def make(seed: int) -> BCQTrainer:
        folder = tmp_path / f"{len(steps)}-{seed}"
        trainer = make_trainer(
            data,
            seed=seed,
            logger=CSVLogger("log", log_dir=str(folder)),
            checkpoint_rotation=CheckpointRotation(folder / "checkpoints", keep_last=1),
        )
        optimizer = trainer.optimization_stepper.optimizers["vae"]
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        NetworkLRScheduler(scheduler, "vae", trainer.optimization_stepper).register(trainer)
        steps[folder.name] = []
        AfterStep(steps[folder.name].append).register(trainer)
        return trainer

    alone, together = both_ways(make)
    assert all(made == [*range(1, 26)] for made in steps.values())
    for k, (one, other) in enumerate(zip(alone, together, strict=True)):
        assert_close_runs(one, other)
        own, twin = (logged(tmp_path / f"{k + shift}-{k}" / "log") for shift in (0, len(SEEDS)))
        assert {name: len(lines) for name, lines in own.items()} == {name: len(lines) for name, lines in twin.items()}
        sizes = [sum(file.stat().st_size for file in trainer.last_checkpoint.rglob("*.pt")) for trainer in (one, other)]
        assert sizes[0] == sizes[1]  # and not that of all agents
        fresh = make_trainer(data, seed=9)
        make_checkpoint(loss_module=fresh.loss_module).load(other.last_checkpoint)
        torch.testing.assert_close(weights(fresh), weights(other), rtol=0, atol=0)


def test_a_checkpoint_made_together_goes_on_alone_and_the_other_way_round(make_batch, tmp_path):
    data = make_batch(100)

    def make(seed: int, steps: int) -> BCQTrainer:
        return make_trainer(data, steps, seed=seed, save_trainer_file=tmp_path / f"{seed}")

    undisturbed = []
    for seed in SEEDS:
        undisturbed.append(make_trainer(data, 40, seed=seed))
        undisturbed[-1].train()
    train_together([make(seed, 20) for seed in SEEDS])
    for seed in SEEDS:
        make(seed, 30).load_from_file(tmp_path / f"{seed}").train()
    again = [make(seed, 40) for seed in SEEDS]
    for seed, trainer in zip(SEEDS, again, strict=True):
        trainer.load_from_file(tmp_path / f"{seed}")
    train_together(again)
    for one, other in zip(undisturbed, again, strict=True):
        assert_close_runs(one, other)


def test_agents_end_one_by_one_and_own_their_weights_afterwards(make_batch):
    """The second stops early, the third makes fewer steps; then each goes its own way."""
    data = make_batch(100)

    def make(seed: int) -> BCQTrainer:
        trainer = make_trainer(data, total_steps=20 if seed == 2 else 60, seed=seed)
        if seed == 1:
            Scripted([3.0, 2.0, 1.0, 1.0, 1.0, 1.0]).register(trainer)
            EarlyStopping(monitor="score", patience=20, wait_for=0).register(trainer)
        return trainer

    alone, together = both_ways(make)
    assert [trainer.collected_frames for trainer in together] == [60, 30, 20]
    for one, other in zip(alone, together, strict=True):
        assert_close_runs(one, other)
    for trainer in together:
        assert all(p.untyped_storage().nbytes() == p.nbytes for p in trainer.loss_module.parameters())
        assert "_update" not in vars(trainer.optimization_stepper)
    before = weights(together[1])
    with torch.no_grad():
        for parameter in together[0].loss_module.parameters():
            parameter.add_(1)
    torch.testing.assert_close(weights(together[1]), before, rtol=0, atol=0)


def test_policies_act_with_what_is_learned_meanwhile(make_batch):
    data = make_batch(100)
    trainers, seen = [make_trainer(data, seed=seed) for seed in SEEDS[:2]], []
    loss = trainers[1].loss_module
    policy = BCQPolicy(loss.vae_network, loss.actor_network, loss.qvalue_network, num_action_samples=4)

    def look(step: int) -> None:
        state = torch.get_rng_state()
        seen.append(policy(data[:3].select("observation"))["action"])
        torch.set_rng_state(state)

    AfterStep(look).register(trainers[1])
    train_together(trainers)
    assert len(seen) == 25
    assert not torch.equal(seen[0], seen[-1])


def test_one_that_fails_does_not_disturb_the_others(make_batch):
    """Its rewards are not finite from the start; the others are what they are alone."""
    data, broken = make_batch(100), make_batch(100)
    alone = []
    for seed in (0, 2):
        alone.append(make_trainer(data, seed=seed))
        alone[-1].train()
    together = [make_trainer(broken if seed == 1 else data, seed=seed) for seed in SEEDS]
    together[1]._replay.replay_buffer.storage[:]["next", "reward"].fill_(torch.nan)
    with pytest.raises(RuntimeError, match=r"of 3 agents, \[1\] failed; the first one: qvalue_loss is nan in") as info:
        train_together(together)
    assert isinstance(info.value.__cause__, FloatingPointError)
    for one, other in zip(alone, together[::2], strict=True):
        assert_close_runs(one, other)


def test_an_interruption_leaves_all_agents_whole(make_batch):
    def interrupt(step: int) -> None:
        if step == 5:
            raise KeyboardInterrupt

    trainers = [make_trainer(make_batch(100), seed=seed) for seed in SEEDS]
    AfterStep(interrupt).register(trainers[1])
    with pytest.raises(KeyboardInterrupt):
        train_together(trainers)
    for trainer in trainers:
        assert "_update" not in vars(trainer.optimization_stepper)
        assert all(p.untyped_storage().nbytes() == p.nbytes for p in trainer.loss_module.parameters())


def test_the_global_random_state_is_left_alone(make_batch):
    trainers = [make_trainer(make_batch(100), seed=seed) for seed in SEEDS]
    before = torch.get_rng_state()
    train_together(trainers)
    assert torch.equal(torch.get_rng_state(), before)


def test_agents_without_seeds_draw_different_noise(make_batch):
    """Even if weights and rows are the same."""
    trainers = []
    for _ in range(2):
        trainers.append(make_trainer(make_batch(100), seed=0))
        trainers[-1].random_state = None
    train_together(trainers)
    one, other = (next(trainer.loss_module.parameters()) for trainer in trainers)
    assert not torch.equal(one, other)


def test_refusals(make_batch):
    data = make_batch(100)

    def agent(seed=1, **settings) -> BCQTrainer:
        return make_trainer(data, seed=seed, **settings)

    with pytest.raises(ValueError, match="there are no agents"):
        train_together([])
    with pytest.raises(ValueError, match=r"agents 0 and 1 differ in \{'precision': \(None, 'medium'\)\}"):
        train_together([agent(), agent(precision="medium")])
    slower = agent(stepper=lambda loss: BCQOptimizationStepper.adam(loss, actor_update_interval=2))
    with pytest.raises(ValueError, match="'actor_update_interval': \\(1, 2\\)"):
        train_together([agent(), slower])
    smaller = agent(buffer=make_replay_buffer(data, batch_size=8))
    with pytest.raises(ValueError, match="'batch_size': \\(16, 8\\)"):
        train_together([agent(), smaller])
    ahead = agent()
    ahead.train()
    with pytest.raises(ValueError, match="'steps': \\(0, 25\\)"):
        train_together([agent(), ahead])
    discounting = agent()
    discounting.loss_module.make_value_estimator(gamma=0.5)
    with pytest.raises(ValueError, match="'value_estimator'"):
        train_together([agent(), discounting])
    same = agent()
    with pytest.raises(ValueError, match="agent 1 has the same loss"):
        train_together([same, same])
    torch.manual_seed(0)
    larger = BCQLoss(*make_bcq_modules(OBSERVATION_SPEC, ACTION_SPEC, hidden=(9,), vae_hidden=(8,)))
    buffer = make_replay_buffer(data, batch_size=16, seed=0)
    other = BCQTrainer(larger, buffer, target_net_updater=soft_update(larger), total_steps=25, progress_bar=False)
    first = agent()
    with pytest.raises(ValueError, match="differ in structure"):
        train_together([first, other])
    assert "_update" not in vars(first.optimization_stepper)
