"""Steps of several networks: order, optimizers, schedules, clipping, logs and state."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torchrl.objectives import SoftUpdate

from torchrl_bcq import BCQLoss, NetworkLRScheduler, OfflineOptimizationStepper, Schedule

from .conftest import make_trainer, staged


@pytest.fixture
def loss(modules):
    loss = BCQLoss(*modules)
    SoftUpdate(loss, tau=0.005)
    return loss


def trainer_of(loss, calls=None, **settings):
    def compute_loss(batch, method):
        if calls is not None:
            calls.append((method, loss.qvalue_network_params["critics", "0", "module", "0", "weight"].detach().clone()))
        return getattr(loss, method)(batch)

    settings = {"clip_norm": None, "clip_grad_norm": True, **settings}
    return SimpleNamespace(loss_module=loss, compute_loss=compute_loss, **settings)


def test_networks_learn_in_order_and_the_actor_uses_the_new_critic(loss, make_batch):
    calls = []
    before = loss.qvalue_network_params["critics", "0", "module", "0", "weight"].detach().clone()
    OfflineOptimizationStepper.adam(loss).step(trainer_of(loss, calls), make_batch(16))
    assert [method for method, _ in calls] == ["vae_loss", "qvalue_loss", "actor_loss"]
    assert torch.equal(calls[1][1], before)
    assert not torch.equal(calls[2][1], before)


def test_each_optimizer_moves_its_own_network(loss, make_batch):
    rates = {"vae": 0.0, "qvalue": 1e-3, "actor": 0.0}
    optimizers = {
        name: torch.optim.SGD(getattr(loss, f"{name}_network_params").parameters(), lr=rate)
        for name, rate in rates.items()
    }
    before = {name: p.detach().clone() for name, p in loss.named_parameters()}
    OfflineOptimizationStepper(optimizers).step(trainer_of(loss), make_batch(16))
    moved = {name.split(".")[0] for name, p in loss.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"qvalue_network_params"}


@pytest.mark.parametrize("by_norm", [True, False])
def test_gradients_are_clipped_by_norm_or_by_value(loss, make_batch, by_norm):
    """With SGD at rate 1 the step is the gradient: its norm, or its largest entry, is the clip."""
    optimizers = {
        name: torch.optim.SGD(getattr(loss, f"{name}_network_params").parameters(), lr=1.0)
        for name in ("vae", "qvalue", "actor")
    }
    before = {name: p.detach().clone() for name, p in loss.named_parameters()}
    trainer = trainer_of(loss, clip_norm=1e-3, clip_grad_norm=by_norm)
    OfflineOptimizationStepper(optimizers).step(trainer, make_batch(64))
    for network in ("vae", "qvalue", "actor"):
        steps = [(p - before[name]).flatten() for name, p in loss.named_parameters() if name.startswith(network)]
        step = torch.cat(steps)
        size = step.norm() if by_norm else step.abs().max()
        assert size.item() == pytest.approx(1e-3, rel=1e-2)


def test_metadata_may_be_booleans_and_integers(loss, make_batch):
    trainer = trainer_of(loss)
    compute = trainer.compute_loss

    def with_counts(batch, method):
        value, metadata = compute(batch, method)
        return value, {**metadata, "vae_kl": torch.tensor([True, False, False, False])}

    trainer.compute_loss = with_counts
    assert OfflineOptimizationStepper.adam(loss).step(trainer, make_batch(4))["vae_kl"] == 0.25


def test_logs_are_detached_scalars(loss, make_batch):
    logs = OfflineOptimizationStepper.adam(loss).step(trainer_of(loss), make_batch(16))
    assert set(logs.keys()) == set(loss.out_keys)
    assert all(value.shape == () and not value.requires_grad for value in logs.values())


def steps_that_change(loss, make_batch, stepper, steps: int) -> dict[str, list[int]]:
    """Gradient steps in which each network changed at all, counted from 1."""
    changed = {name: [] for name in ("vae", "qvalue", "actor")}
    for step in range(1, steps + 1):
        before = {name: p.detach().clone() for name, p in loss.named_parameters()}
        stepper.step(trainer_of(loss), make_batch(16))
        moved = {name.split("_")[0] for name, p in loss.named_parameters() if not torch.equal(p, before[name])}
        for network in moved:
            changed[network].append(step)
    return changed


SCHEDULES = [  # settings, and the steps of 10 in which VAE, critics and actor learn
    ({}, range(1, 11), range(1, 11), range(1, 11)),
    ({"warm_up": 4}, range(1, 11), range(5, 11), range(5, 11)),
    ({"freeze_after": 3}, [1, 2, 3], range(1, 11), range(1, 11)),
    ({"actor_every": 3}, range(1, 11), range(1, 11), [3, 6, 9]),
    (
        {"warm_up": 2, "freeze_after": 2, "actor_every": 4},
        [1, 2],
        [3, 4, 5, 6, 7, 8, 9, 10],
        [6, 10],  # the 4th and the 8th step of the critics
    ),
    ({"warm_up": 10, "freeze_after": 10}, range(1, 11), [], []),
]


@pytest.mark.parametrize(("schedule", "vae", "qvalue", "actor"), SCHEDULES)
def test_each_network_changes_when_it_is_due_and_only_then(loss, make_batch, schedule, vae, qvalue, actor):
    stepper = staged(loss, **schedule)
    expected = {"vae": [*vae], "qvalue": [*qvalue], "actor": [*actor]}
    due = {name: [step for step in range(1, 11) if stepper.is_due(name, step)] for name in expected}
    assert due == expected
    assert steps_that_change(loss, make_batch, stepper, 10) == expected


VAE_KEYS = {"loss_vae", "vae_reconstruction", "vae_kl"}
CRITIC_KEYS = {"loss_qvalue", "td_error", "pred_value", "target_value"}


def test_logs_are_nan_before_a_network_begins_and_after_it_ends(loss, make_batch):
    """Warm-up of 2 steps, VAE frozen after 4, actor in steps 4 and 6; in 5 and 7 its last loss is logged."""
    stepper = staged(loss, warm_up=2, freeze_after=4, actor_every=2)
    logs = [stepper.step(trainer_of(loss), make_batch(16)).to_dict() for _ in range(7)]
    known = [{key for key, value in each.items() if not value.isnan()} for each in logs]
    assert [set(each) for each in logs] == [set(loss.out_keys)] * 7
    assert known[:2] == [VAE_KEYS] * 2
    assert known[2] == VAE_KEYS | CRITIC_KEYS
    assert known[3] == VAE_KEYS | CRITIC_KEYS | {"loss_actor"}
    assert known[4:] == [CRITIC_KEYS | {"loss_actor"}] * 3
    actor = [each["loss_actor"].item() for each in logs]
    assert actor[4] == actor[3] != actor[5] == actor[6]
    assert len({each["loss_qvalue"].item() for each in logs[2:]}) == 5


def test_the_logs_can_be_changed_in_place(loss, make_batch):
    stepper = staged(loss, actor_every=2)
    second = [stepper.step(trainer_of(loss), make_batch(16)) for _ in range(2)][1]
    actor = second["loss_actor"].item()
    second.set("loss_actor", torch.tensor(5.0))
    assert stepper.step(trainer_of(loss), make_batch(16))["loss_actor"].item() == actor


def test_a_log_interval_in_which_the_warm_up_ends_logs_no_means_of_critics(make_batch):
    def stepper(loss):
        return staged(loss, warm_up=15)

    known = []
    for total in (10, 20, 30):
        trainer = make_trainer(make_batch(50), total, stepper=stepper)
        trainer.train()
        known.append(set(trainer.metrics))
    assert known == [VAE_KEYS, VAE_KEYS, {*trainer.loss_module.out_keys}]


def test_state_holds_the_count_and_the_logs(loss, make_batch):
    first = staged(loss, actor_every=4)
    for _ in range(5):
        logs = first.step(trainer_of(loss), make_batch(16))
    second = staged(loss, actor_every=4)
    second.load_state_dict(first.state_dict())
    assert second.steps == 5
    assert second.step(trainer_of(loss), make_batch(16))["loss_actor"] == logs["loss_actor"]
    assert steps_that_change(loss, make_batch, second, 3)["actor"] == [2]  # step 8


def sgd(loss, **settings):
    params = {name: getattr(loss, f"{name}_network_params").parameters() for name in loss.network_names}
    return OfflineOptimizationStepper(
        {name: torch.optim.SGD(each, lr=0.1) for name, each in params.items()}, **settings
    )


def test_other_optimizers_are_refused(loss, make_batch):
    """torch accepts their state, and fails within the next step."""
    stepper = sgd(loss)
    stepper.step(trainer_of(loss), make_batch(16))
    adam = OfflineOptimizationStepper.adam(loss)
    message = r"the saved run has the optimizers {'vae': 'SGD', .*}, this run {'vae': 'Adam', .*}; use the networks and"
    with pytest.raises(ValueError, match=message):
        adam.load_state_dict(stepper.state_dict())
    sgd(loss).load_state_dict(stepper.state_dict())


@pytest.mark.parametrize("other", [torch.optim.AdamW, torch.optim.RAdam, torch.optim.Adamax])
def test_optimizers_with_the_same_settings_as_adam_are_refused(loss, other):
    """Their state has the names of Adam's state, or some of them, but another meaning."""
    params = {name: getattr(loss, f"{name}_network_params").parameters() for name in loss.network_names}
    stepper = OfflineOptimizationStepper({name: other(each) for name, each in params.items()})
    with pytest.raises(ValueError, match=f"'vae': 'Adam'.*'vae': '{other.__name__}'"):
        stepper.load_state_dict(OfflineOptimizationStepper.adam(loss).state_dict())


def test_optimizers_of_other_networks_are_refused(loss, modules):
    adam = OfflineOptimizationStepper.adam(loss)
    without = OfflineOptimizationStepper({name: adam.optimizers[name] for name in ("vae", "qvalue")})
    message = "the saved run has the optimizers {.*'actor': 'Adam'}, this run {'vae': 'Adam', 'qvalue': 'Adam'};"
    with pytest.raises(ValueError, match=message):
        without.load_state_dict(adam.state_dict())
    with pytest.raises(
        ValueError,
        match="the saved run has the optimizers {'vae': 'Adam', 'qvalue': 'Adam'}, this run {.*'actor': 'Adam'};",
    ):
        adam.load_state_dict(without.state_dict())


def test_a_scheduler_advances_only_in_the_steps_in_which_its_network_learns(make_batch):
    """StepLR halves the rate every 2 steps: 4, 7 and 2 steps of VAE, critics and actor give 2, 3 and 1 halvings."""

    def stepper(loss):
        return staged(loss, warm_up=3, freeze_after=4, actor_every=3)

    trainer = make_trainer(make_batch(50), 10, stepper=stepper)
    optimizers = trainer.optimization_stepper.optimizers
    for name, optimizer in optimizers.items():
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
        NetworkLRScheduler(scheduler, name, trainer.optimization_stepper).register(trainer)
    trainer.train()
    rates = {name: optimizer.param_groups[0]["lr"] for name, optimizer in optimizers.items()}
    assert rates == {"vae": 1e-3 / 4, "qvalue": 1e-3 / 8, "actor": 1e-3 / 2}
    assert {f"trainer_module.{name}_lr_scheduler" for name in rates} <= {*trainer.checkpoint.components}


# schedules


@pytest.mark.parametrize(
    ("schedule", "due"),
    [
        (Schedule(), [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        (Schedule(start_after=4), [5, 6, 7, 8, 9, 10]),
        (Schedule(stop_after=3), [1, 2, 3]),
        (Schedule(every=3), [3, 6, 9]),
        (Schedule(start_after=2, every=3), [5, 8]),
        (Schedule(start_after=2, stop_after=8, every=3), [5, 8]),
        (Schedule(start_after=2, stop_after=7, every=3), [5]),
        (Schedule(start_after=4, stop_after=5), [5]),
        (Schedule(start_after=10), []),
    ],
)
def test_a_schedule_is_due(schedule, due):
    assert [step for step in range(1, 11) if schedule.is_due(step)] == due


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (
            {"start_after": -1},
            "start_after is -1 and every 1; start_after must be at least 0, and every must be at least 1",
        ),
        ({"every": 0}, "start_after is 0 and every 0; start_after must be at least 0, and every must be at least 1"),
        (
            {"stop_after": 0},
            "stop_after is 0, but the network's first step is 1 .* it would never learn; increase stop_after",
        ),
        (
            {"start_after": 5, "stop_after": 5},
            r"stop_after is 5, but the network's first step is 6 \(start_after 5, every 1\)",
        ),
        ({"stop_after": 6, "start_after": 4, "every": 3}, r"first step is 7 \(start_after 4, every 3\)"),
    ],
)
def test_schedules_that_never_let_a_network_learn_are_refused(numbers, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**numbers)


def test_a_stepper_follows_its_schedules(loss, make_batch):
    schedules = {"qvalue": Schedule(start_after=1, stop_after=4), "actor": Schedule(every=2)}
    stepper = sgd(loss, schedules=schedules)
    assert stepper.schedules == {"vae": Schedule(), **schedules}
    expected = {"vae": [1, 2, 3, 4, 5, 6], "qvalue": [2, 3, 4], "actor": [2, 4, 6]}
    assert steps_that_change(loss, make_batch, stepper, 6) == expected


def test_the_mapping_decides_the_order(loss, make_batch):
    optimizers, calls = sgd(loss).optimizers, []
    stepper = OfflineOptimizationStepper({name: optimizers[name] for name in ("actor", "vae", "qvalue")})
    stepper.step(trainer_of(loss, calls), make_batch(16))
    assert [method for method, _ in calls] == ["actor_loss", "vae_loss", "qvalue_loss"]


def test_steppers_without_optimizers_and_schedules_of_other_networks_are_refused(loss):
    with pytest.raises(ValueError, match="optimizers is empty, expected one for each network that has parameters"):
        OfflineOptimizationStepper({})
    message = r"schedules has \['vea'\], but the optimizers are for \['vae', 'qvalue', 'actor'\]"
    with pytest.raises(ValueError, match=message):
        sgd(loss, schedules={"vea": Schedule()})


@pytest.mark.parametrize("trained", [("qvalue", "actor"), ("vae", "qvalue")])
def test_adam_leaves_frozen_networks_out(loss, make_batch, trained):
    """Their losses are not evaluated, and their metadata are NaN."""
    for name in {"vae", "qvalue", "actor"} - {*trained}:
        getattr(loss, f"{name}_network").requires_grad_(False)
    stepper, calls = OfflineOptimizationStepper.adam(loss, lr=1e-2), []
    assert tuple(stepper.optimizers) == trained
    logs = stepper.step(trainer_of(loss, calls), make_batch(16))
    assert [method for method, _ in calls] == [f"{name}_loss" for name in trained]
    keys = {"vae": VAE_KEYS, "qvalue": CRITIC_KEYS, "actor": {"loss_actor"}}
    known = {key for key, value in logs.items() if not value.isnan()}
    assert known == set().union(*(keys[name] for name in trained))
    assert stepper.optimizers["qvalue"].defaults["lr"] == 1e-2
