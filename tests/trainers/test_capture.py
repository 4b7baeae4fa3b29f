"""Gradient steps in CUDA graphs: tests without a GPU, and one that needs it."""

from __future__ import annotations

from functools import partial
from unittest import mock

import pytest
import torch
from tensordict import TensorDictBase
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import CosineAnnealingLR, StepLR
from torch.utils._pytree import tree_map
from torchrl.objectives import SoftUpdate

from torchrl_bcq import (
    BCQLoss,
    BCQTrainer,
    NetworkLRScheduler,
    OfflineOptimizationStepper,
    make_bcq_modules,
    make_replay_buffer,
)

from ..conftest import ACTION_SPEC, OBSERVATION_SPEC, random_transitions
from .conftest import assert_same_run, make_trainer, prioritised_buffer, staged, weights

NAMES = ("vae", "qvalue", "actor")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="captures for real where there is a GPU")


class Replayed:
    """Stands for a captured graph: of the function's effects in Python only its results are kept."""

    def __init__(self, function, in_keys, out_keys) -> None:
        self.function = function

    def __call__(self, batch: TensorDictBase) -> TensorDictBase:
        with mock.patch.object(BCQTrainer, "remember_losses"):
            return self.function(batch.clone()).clone()


@pytest.fixture
def replayed(monkeypatch):
    monkeypatch.setattr("torchrl_bcq.trainers.stepper.CudaGraphModule", Replayed)


@pytest.fixture
def passed_through(monkeypatch):
    """tensordict's own class, which calls the function where there is no GPU; pytree's registry stays unchanged."""
    for registry in ("PYTREE_REGISTERED_TDS", "PYTREE_REGISTERED_LAZY_TDS"):
        monkeypatch.setattr(f"tensordict.nn.cudagraphs.{registry}", ())


def captured(**schedule):
    def stepper(loss: BCQLoss) -> OfflineOptimizationStepper:
        stepper = staged(loss, **schedule)
        stepper.capture()
        return stepper

    return stepper


def run(steps: int, stepper=None, **settings) -> BCQTrainer:
    """A trainer of the same transitions."""
    torch.manual_seed(0)
    return make_trainer(random_transitions(50), steps, stepper=stepper, **settings)


def with_rates(trainer: BCQTrainer) -> BCQTrainer:
    """The trainer with a scheduler for each network's learning rate."""
    for name, optimizer in trainer.optimization_stepper.optimizers.items():
        scheduler = StepLR(optimizer, 5, 0.3) if name == "actor" else CosineAnnealingLR(optimizer, 40)
        NetworkLRScheduler(scheduler, name, trainer.optimization_stepper).register(trainer)
    return trainer


def trained(trainer: BCQTrainer) -> BCQTrainer:
    """The trainer after training, before another one changes PyTorch's random state."""
    trainer.train()
    return trainer


def close(one, other) -> None:
    """Equal up to the rounding of a learning rate to float32: less than 1e-8 in 20 steps of 1e-3."""
    numbers = [tree_map(lambda leaf: 0 if isinstance(leaf, str) else leaf, each) for each in (one, other)]
    torch.testing.assert_close(*numbers, rtol=1e-5, atol=1e-8)


SCHEDULES = [  # with the sets of networks that learn in one step
    ({}, [NAMES]),
    (
        {"warm_up": 5, "freeze_after": 12, "actor_every": 3},
        [("vae",), ("vae", "qvalue"), NAMES, ("qvalue",), ("qvalue", "actor")],
    ),
]


# steps


@without_gpu
@pytest.mark.parametrize(("schedule", "sets"), SCHEDULES)
def test_without_a_gpu_steps_pass_through(passed_through, schedule, sets):
    def passing(loss):
        stepper = staged(loss, **schedule)
        stepper.captured = True  # the optimizers stay unchanged
        return stepper

    eager = run(20, partial(staged, **schedule))
    eager.train()
    trainer = run(20, passing)
    with pytest.warns(UserWarning, match="without CUDA device available"):
        trainer.train()
    assert_same_run(trainer, eager)
    assert trainer.metrics == pytest.approx(eager.metrics, rel=0, abs=0, nan_ok=True)
    assert set(trainer.optimization_stepper._graphs) == {(*names, torch.Size([16])) for names in sets}


@pytest.mark.parametrize(("schedule", "sets"), SCHEDULES)
def test_replayed_steps_equal_eager_ones(replayed, schedule, sets):
    """Scheduled learning rates reach a graph that was captured at the first rate."""
    steppers = (partial(staged, **schedule), captured(**schedule))
    eager, trainer = (trained(with_rates(run(20, stepper))) for stepper in steppers)
    close(weights(trainer), weights(eager))
    assert trainer.metrics == pytest.approx(eager.metrics, rel=1e-4, nan_ok=True)
    assert set(trainer.optimization_stepper._graphs) == {(*names, torch.Size([16])) for names in sets}


def test_each_batch_size_has_a_graph(replayed):
    trainer = run(1, captured())
    for size in (16, 4, 16):
        trainer.optimization_stepper.step(trainer, random_transitions(size))
    sizes = [size for *_, size in trainer.optimization_stepper._graphs]
    assert sizes == [torch.Size([16]), torch.Size([4])]


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning")  # in TorchRL, where none is written
@pytest.mark.parametrize("warm_up", [0, 3])
def test_priorities_are_returned_from_a_graph(replayed, warm_up):
    """While the VAE warms up alone, none are written."""
    trees = []
    for make in (staged, lambda loss, **schedule: captured(**schedule)(loss)):
        torch.manual_seed(0)
        buffer = prioritised_buffer(random_transitions(50))
        make_trainer(None, 20, buffer=buffer, stepper=partial(make, warm_up=warm_up)).train()
        trees.append([buffer.sampler._sum_tree[row] for row in range(50)])
    assert trees[1] == pytest.approx(trees[0], rel=1e-4)
    assert len(set(trees[0])) > 40


def test_replayed_losses_are_checked(replayed):
    torch.manual_seed(0)
    transitions = random_transitions(50)
    transitions["next", "reward"][:] = 1e38
    message = r"loss_qvalue is inf in gradient step 1, on the 16 rows [\d, ]+ \.\.\. of the replay buffer"
    with pytest.raises(FloatingPointError, match=message):
        make_trainer(transitions, stepper=captured()).train()


def test_losses_are_not_checked_during_a_capture():
    """They have no values yet."""
    trainer, losses = run(1), {"loss_vae": torch.tensor(1.0)}
    with mock.patch.multiple(torch.cuda, is_available=lambda: True, is_current_stream_capturing=lambda: True):
        trainer.remember_losses(losses)
    assert len(trainer._watch._losses) == 0
    trainer.remember_losses(losses)
    assert len(trainer._watch._losses) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("schedule", [schedule for schedule, _ in SCHEDULES])
def test_captured_steps_equal_eager_ones(schedule):
    runs = []
    for cudagraph in (False, True):
        torch.manual_seed(0)
        modules = make_bcq_modules(OBSERVATION_SPEC, ACTION_SPEC, hidden=(8,), vae_hidden=(8,), device="cuda")
        loss = BCQLoss(*modules)
        trainer = BCQTrainer(
            loss,
            make_replay_buffer(random_transitions(50), batch_size=16, seed=0, device="cuda"),
            target_net_updater=SoftUpdate(loss, tau=0.005),
            optimization_stepper=staged(loss, **schedule),
            total_steps=20,
            log_interval=10,
            cudagraph=cudagraph,
            progress_bar=False,
            seed=0,
        )
        with_rates(trainer).train()
        runs.append(trainer)
    close(weights(runs[1]), weights(runs[0]))
    assert runs[1].metrics == pytest.approx(runs[0].metrics, rel=1e-4, nan_ok=True)


# optimizers and checkpoints


def test_capture_stores_rates_in_tensors():
    """They are float32 for any default dtype: fused optimizers need that."""
    stepper = run(1).optimization_stepper
    torch.set_default_dtype(torch.float64)
    try:
        stepper.capture()
    finally:
        torch.set_default_dtype(torch.float32)
    assert stepper.captured
    for optimizer in stepper.optimizers.values():
        (group,) = optimizer.param_groups
        assert group["capturable"]
        torch.testing.assert_close(group["lr"], torch.tensor(1e-3), rtol=0, atol=0)


def test_a_scheduler_of_the_momentum_is_refused():
    trainer = make_trainer(random_transitions(50), 4, stepper=captured())
    stepper = trainer.optimization_stepper
    for momentum in (False, True):
        rates = {"max_lr": 0.1, "total_steps": 9, "cycle_momentum": momentum}
        scheduler = torch.optim.lr_scheduler.OneCycleLR(stepper.optimizers["vae"], **rates)
        hook = NetworkLRScheduler(scheduler, "vae", stepper)
        if momentum:
            with pytest.raises(ValueError, match="the scheduler of vae changes the momentum, which a CUDA graph would"):
                hook.register(trainer, "other")
        else:
            hook.register(trainer)


def test_an_optimizer_that_cannot_be_captured_is_refused_and_none_changed(modules):
    loss = BCQLoss(*modules)
    adam = OfflineOptimizationStepper.adam(loss).optimizers
    stepper = OfflineOptimizationStepper({**adam, "actor": SGD(loss.actor_network_params.parameters())})
    with pytest.raises(ValueError, match="the optimizer of actor is SGD, which CUDA graphs cannot capture; use Adam"):
        stepper.capture()
    assert not stepper.captured
    group = adam["vae"].param_groups[0]
    assert (group["lr"], group["capturable"]) == (1e-3, False)


def state(trainer: BCQTrainer) -> dict:
    """State of stepper and schedulers."""
    hooks = {name: part.state_dict() for name, part in trainer._modules.items() if name.endswith("scheduler")}
    return {"stepper": trainer.optimization_stepper.state_dict(), **hooks}


def kinds(value):
    if isinstance(value, dict):
        return {key: kinds(item) for key, item in value.items()}
    return [kinds(item) for item in value] if isinstance(value, (list, tuple)) else type(value)


@pytest.mark.parametrize("rates", [False, True])
def test_the_state_is_the_same_captured_or_not(replayed, rates):
    begin = with_rates if rates else lambda trainer: trainer
    eager, trainer = (trained(begin(run(20, stepper))) for stepper in (None, captured()))
    found, expected = state(trainer), state(eager)
    assert len(found) == (4 if rates else 1)
    assert kinds(found) == kinds(expected)
    close(found, expected)
    if not rates:
        optimizers = (each["stepper"]["optimizers"] for each in (found, expected))
        groups = [[states[name]["param_groups"] for name in NAMES] for states in optimizers]
        assert groups[0] == groups[1]


@pytest.mark.parametrize("then", ["eager", "captured"])
@pytest.mark.parametrize("first", ["eager", "captured"])
def test_a_run_is_resumed_captured_or_not(replayed, tmp_path, first, then):
    steppers = {"eager": None, "captured": captured()}
    undisturbed = with_rates(run(40))
    undisturbed.train()
    with_rates(run(20, steppers[first], save_trainer_file=tmp_path / "checkpoint")).train()
    trainer = with_rates(run(40, steppers[then], seed=9))
    trainer.load_from_file(tmp_path / "checkpoint")
    trainer.train()
    close(weights(trainer), weights(undisturbed))
    close(state(trainer), state(undisturbed))
    assert trainer.optimization_stepper.captured == (then == "captured")
    groups = [optimizer.param_groups[0] for optimizer in trainer.optimization_stepper.optimizers.values()]
    assert {group["capturable"] for group in groups} == {then == "captured"}
    assert {isinstance(group["lr"], torch.Tensor) for group in groups} == {then == "captured"}


def test_a_rate_is_restored_exactly(replayed):
    """The checkpoint holds the number before it was rounded to float32."""
    for rate in (3e-4, 0.1, 1.2345e-5):
        trainer = run(1, lambda loss, rate=rate: OfflineOptimizationStepper.adam(loss, lr=rate))
        trainer.optimization_stepper.capture()
        saved = trainer.optimization_stepper.state_dict()
        assert saved["optimizers"]["vae"]["param_groups"][0]["lr"] == rate
        trainer.optimization_stepper.load_state_dict(saved)
        again = trainer.optimization_stepper.state_dict()
        assert again["optimizers"]["vae"]["param_groups"] == saved["optimizers"]["vae"]["param_groups"]


def test_optimizers_that_are_capturable_stay_so(modules):
    """Also without a capture: the setting says on which device they count their steps."""
    loss = BCQLoss(*modules)
    SoftUpdate(loss, tau=0.005)
    own = OfflineOptimizationStepper(
        {name: Adam(getattr(loss, f"{name}_network_params").parameters(), capturable=True) for name in NAMES}
    )
    own.load_state_dict(OfflineOptimizationStepper.adam(loss).state_dict())
    assert [optimizer.param_groups[0]["capturable"] for optimizer in own.optimizers.values()] == [True] * 3
