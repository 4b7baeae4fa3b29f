from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torchrl.objectives import SoftUpdate

from torchrl_bcq import BCQLoss, BCQOptimizationStepper, NetworkLRScheduler

from .conftest import make_trainer


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


def test_the_papers_order_and_the_actor_sees_the_new_critic(loss, make_batch):
    calls = []
    before = loss.qvalue_network_params["critics", "0", "module", "0", "weight"].detach().clone()
    BCQOptimizationStepper.adam(loss).step(trainer_of(loss, calls), make_batch(16))
    assert [method for method, _ in calls] == ["vae_loss", "qvalue_loss", "actor_loss"]
    assert torch.equal(calls[1][1], before)
    assert not torch.equal(calls[2][1], before)


def test_each_optimizer_moves_its_own_network(loss, make_batch):
    rates = {"vae": 0.0, "qvalue": 1e-3, "actor": 0.0}
    optimizers = [
        torch.optim.SGD(getattr(loss, f"{name}_network_params").parameters(), lr=rate) for name, rate in rates.items()
    ]
    before = {name: p.detach().clone() for name, p in loss.named_parameters()}
    BCQOptimizationStepper(*optimizers).step(trainer_of(loss), make_batch(16))
    moved = {name.split(".")[0] for name, p in loss.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"qvalue_network_params"}


def test_author_optimizers(loss):
    stepper = BCQOptimizationStepper.adam(loss)
    assert {type(optimizer) for optimizer in stepper.optimizers.values()} == {torch.optim.Adam}
    assert {optimizer.defaults["lr"] for optimizer in stepper.optimizers.values()} == {1e-3}
    counts = {name: sum(len(g["params"]) for g in o.param_groups) for name, o in stepper.optimizers.items()}
    assert counts == {"vae": 12, "qvalue": 12, "actor": 6}


@pytest.mark.parametrize("by_norm", [True, False])
def test_clipping_as_the_trainer_says(loss, make_batch, by_norm):
    """With plain SGD at rate 1 the step is the gradient: its norm, or its largest entry, is the clip."""
    optimizers = [
        torch.optim.SGD(getattr(loss, f"{name}_network_params").parameters(), lr=1.0)
        for name in ("vae", "qvalue", "actor")
    ]
    before = {name: p.detach().clone() for name, p in loss.named_parameters()}
    trainer = trainer_of(loss, clip_norm=1e-3, clip_grad_norm=by_norm)
    BCQOptimizationStepper(*optimizers).step(trainer, make_batch(64))
    for network in ("vae", "qvalue", "actor"):
        steps = [(p - before[name]).flatten() for name, p in loss.named_parameters() if name.startswith(network)]
        step = torch.cat(steps)
        size = step.norm() if by_norm else step.abs().max()
        assert size.item() == pytest.approx(1e-3, rel=1e-2)


def test_logs_are_detached_scalars(loss, make_batch):
    logs = BCQOptimizationStepper.adam(loss).step(trainer_of(loss), make_batch(16))
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
    ({"vae_warmup_steps": 4}, range(1, 11), range(5, 11), range(5, 11)),
    ({"freeze_vae_after": 3}, [1, 2, 3], range(1, 11), range(1, 11)),
    ({"actor_update_interval": 3}, range(1, 11), range(1, 11), [3, 6, 9]),
    (
        {"vae_warmup_steps": 2, "freeze_vae_after": 2, "actor_update_interval": 4},
        [1, 2],
        [3, 4, 5, 6, 7, 8, 9, 10],
        [6, 10],  # the 4th and the 8th step of the critics
    ),
    ({"vae_warmup_steps": 10, "freeze_vae_after": 10}, range(1, 11), [], []),
]


@pytest.mark.parametrize(("schedule", "vae", "qvalue", "actor"), SCHEDULES)
def test_each_network_changes_when_it_is_due_and_only_then(loss, make_batch, schedule, vae, qvalue, actor):
    stepper = BCQOptimizationStepper.adam(loss, **schedule)
    expected = {"vae": [*vae], "qvalue": [*qvalue], "actor": [*actor]}
    due = {name: [step for step in range(1, 11) if stepper.is_due(name, step)] for name in expected}
    assert due == expected
    assert steps_that_change(loss, make_batch, stepper, 10) == expected


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"vae_warmup_steps": -1}, "vae_warmup_steps is -1 and actor_update_interval 1; expected 0 or more, and 1 or"),
        ({"actor_update_interval": 0}, "vae_warmup_steps is 0 and actor_update_interval 0; expected 0 or more"),
        ({"freeze_vae_after": 0}, "freeze_vae_after is 0, expected at least 1 and vae_warmup_steps=0"),
        ({"vae_warmup_steps": 5, "freeze_vae_after": 4}, "freeze_vae_after is 4, expected .* vae_warmup_steps=5; None"),
    ],
)
def test_numbers_out_of_range_are_refused(loss, schedule, message):
    with pytest.raises(ValueError, match=message):
        BCQOptimizationStepper.adam(loss, **schedule)


VAE_KEYS = {"loss_vae", "vae_reconstruction", "vae_kl"}
CRITIC_KEYS = {"loss_qvalue", "td_error", "pred_value", "target_value"}


def test_what_did_not_learn_is_logged_as_nan_and_a_waiting_actor_as_it_was(loss, make_batch):
    """Warm-up of 2 steps, VAE frozen after 4, actor at steps 4 and 6."""
    stepper = BCQOptimizationStepper.adam(loss, vae_warmup_steps=2, freeze_vae_after=4, actor_update_interval=2)
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


def test_changing_the_logs_as_torchrls_means_do_changes_nothing(loss, make_batch):
    stepper = BCQOptimizationStepper.adam(loss, actor_update_interval=2)
    second = [stepper.step(trainer_of(loss), make_batch(16)) for _ in range(2)][1]
    actor = second["loss_actor"].item()
    second.set("loss_actor", torch.tensor(5.0))
    assert stepper.step(trainer_of(loss), make_batch(16))["loss_actor"].item() == actor


def test_a_tick_in_which_the_warm_up_ends_logs_no_half_means(make_batch):
    def stepper(loss):
        return BCQOptimizationStepper.adam(loss, vae_warmup_steps=15)

    known = []
    for total in (10, 20, 30):
        trainer = make_trainer(make_batch(50), total, stepper=stepper)
        trainer.train()
        known.append(set(trainer.metrics))
    assert known == [VAE_KEYS, VAE_KEYS, {*trainer.loss_module.out_keys}]


def test_goes_on_after_a_break_with_its_count_and_its_logs(loss, make_batch):
    first = BCQOptimizationStepper.adam(loss, actor_update_interval=4)
    for _ in range(5):
        logs = first.step(trainer_of(loss), make_batch(16))
    second = BCQOptimizationStepper.adam(loss, actor_update_interval=4)
    second.load_state_dict(first.state_dict())
    assert second.steps == 5
    assert second.step(trainer_of(loss), make_batch(16))["loss_actor"] == logs["loss_actor"]
    assert steps_that_change(loss, make_batch, second, 3)["actor"] == [2]  # step 8


def sgd(loss, **settings):
    return BCQOptimizationStepper(
        *(
            torch.optim.SGD(getattr(loss, f"{name}_network_params").parameters(), lr=0.1, **settings)
            for name in ("vae", "qvalue", "actor")
        )
    )


def test_other_optimizers_are_refused(loss, make_batch):
    """torch takes their state without a word, and fails within the next step."""
    stepper = sgd(loss)
    stepper.step(trainer_of(loss), make_batch(16))
    adam = BCQOptimizationStepper.adam(loss)
    names = r"\['vae', 'qvalue', 'actor'\]"
    message = f"the saved optimizers were of {names}, these are of {names}, and others for {names}; make them alike"
    with pytest.raises(ValueError, match=message):
        adam.load_state_dict(stepper.state_dict())
    sgd(loss).load_state_dict(stepper.state_dict())


def test_optimizers_of_other_networks_are_refused(loss, modules):
    adam = BCQOptimizationStepper.adam(loss)
    optimizers = adam.optimizers
    without = BCQOptimizationStepper(optimizers["vae"], optimizers["qvalue"])
    message = r"were of \['vae', 'qvalue', 'actor'\], these are of \['vae', 'qvalue'\], and others for"
    with pytest.raises(ValueError, match=message):
        without.load_state_dict(adam.state_dict())
    with pytest.raises(ValueError, match=r"were of \['vae', 'qvalue'\], these are of \['vae', 'qvalue', 'actor'\]"):
        adam.load_state_dict(without.state_dict())


def test_a_scheduler_advances_only_in_the_steps_in_which_its_network_learns(make_batch):
    """StepLR halves the rate every 2 steps: 4, 7 and 2 steps of VAE, critics and actor give 2, 3 and 1 halvings."""

    def stepper(loss):
        return BCQOptimizationStepper.adam(loss, vae_warmup_steps=3, freeze_vae_after=4, actor_update_interval=3)

    trainer = make_trainer(make_batch(50), 10, stepper=stepper)
    optimizers = trainer.optimization_stepper.optimizers
    for name, optimizer in optimizers.items():
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
        NetworkLRScheduler(scheduler, name, trainer.optimization_stepper).register(trainer)
    trainer.train()
    rates = {name: optimizer.param_groups[0]["lr"] for name, optimizer in optimizers.items()}
    assert rates == {"vae": 1e-3 / 4, "qvalue": 1e-3 / 8, "actor": 1e-3 / 2}
    assert {f"trainer_module.{name}_lr_scheduler" for name in rates} <= {*trainer.checkpoint.components}
