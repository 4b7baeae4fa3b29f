from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torchrl.objectives import SoftUpdate

from torchrl_bcq import BCQLoss, BCQOptimizationStepper


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

    return SimpleNamespace(compute_loss=compute_loss, **{"clip_norm": None, "clip_grad_norm": True, **settings})


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
