"""Each network's optimizer, learning-rate scheduler and schedule are those of the settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, StepLR

from torchrl_bcq.errors import RunError
from torchrl_bcq.objectives import BCQLoss
from torchrl_bcq.runs.optimizers import make_optimizer, make_scheduler_hooks, make_stepper, optim_settings
from torchrl_bcq.runs.settings import compose
from torchrl_bcq.trainers.stepper import Schedule


@pytest.fixture
def loss(modules) -> BCQLoss:
    return BCQLoss(*modules)


def optim(*overrides: str) -> dict[str, Any]:
    """The section ``optim`` with these overrides."""
    (settings,) = compose([f"optim.{word}" for word in overrides])
    return OmegaConf.to_container(settings.optim)


def test_optimizers_are_the_papers(loss):
    optimizers = make_stepper(loss, **optim()).optimizers
    assert list(optimizers) == ["vae", "qvalue", "actor"]
    for name, optimizer in optimizers.items():
        assert type(optimizer) is Adam
        assert optimizer.defaults["fused"]
        assert {**optimizer.defaults, "fused": None} == Adam([torch.zeros(1)]).defaults
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in getattr(loss, f"{name}_network_params").parameters()}


def test_each_network_may_have_its_own_optimizer(loss):
    common = ["optimizer=AdamW", "lr=0.01", "kwargs={betas: [0.5, 0.75], eps: 1e-3}"]
    own = ["vae.optimizer=SGD", "vae.kwargs.momentum=0.5", "qvalue.lr=0", "actor.kwargs.eps=0.5"]
    made = make_stepper(loss, **optim(*common, *own)).optimizers  # common arguments are not those of the SGD
    assert {name: type(optimizer) for name, optimizer in made.items()} == {"vae": SGD, "qvalue": AdamW, "actor": AdamW}
    assert [made[name].defaults["lr"] for name in ("vae", "qvalue", "actor")] == [0.01, 0.0, 0.01]
    assert (made["vae"].defaults["momentum"], made["vae"].defaults["fused"]) == (0.5, None)
    assert (made["qvalue"].defaults["betas"], made["qvalue"].defaults["eps"]) == ((0.5, 0.75), 1e-3)
    assert (made["actor"].defaults["betas"], made["actor"].defaults["eps"]) == ((0.5, 0.75), 0.5)


def test_each_network_may_have_its_own_schedule(loss):
    plain = make_stepper(loss, **optim()).schedules
    assert plain == dict.fromkeys(("vae", "qvalue", "actor"), Schedule())
    own = ["vae.stop_after=7", "qvalue.start_after=3", "actor.start_after=3", "actor.every=4"]
    assert make_stepper(loss, **optim(*own)).schedules == {
        "vae": Schedule(stop_after=7),
        "qvalue": Schedule(start_after=3),
        "actor": Schedule(start_after=3, every=4),
    }


def test_each_network_may_have_its_own_scheduler(loss):
    def schedulers(*overrides):
        settings = optim(*overrides)
        stepper = make_stepper(loss, **settings)
        hooks = make_scheduler_hooks(stepper, **settings)
        assert all(hook.scheduler.optimizer is stepper.optimizers[hook.name] for hook in hooks)
        return {hook.name: hook.scheduler for hook in hooks}

    common = ["scheduler=CosineAnnealingLR", "scheduler_kwargs.T_max=50"]
    own = ["actor.scheduler=StepLR", "actor.scheduler_kwargs={step_size: 5, gamma: 0.5}"]
    assert schedulers() == {}
    made = schedulers(*common, "vae.scheduler_kwargs.eta_min=0.0005")
    assert {name: (type(one), one.T_max, one.eta_min) for name, one in made.items()} == {
        "vae": (CosineAnnealingLR, 50, 0.0005),
        "qvalue": (CosineAnnealingLR, 50, 0),
        "actor": (CosineAnnealingLR, 50, 0),
    }
    assert {name: type(one) for name, one in schedulers(*common, *own).items()} == {
        "vae": CosineAnnealingLR,
        "qvalue": CosineAnnealingLR,
        "actor": StepLR,
    }
    ((name, one),) = schedulers(*own).items()
    assert (name, type(one), one.step_size, one.gamma) == ("actor", StepLR, 5, 0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("optimizer=Adm", "'Adm' (optim.optimizer or optim.vae.optimizer) does not exist; torch.optim has ['ASGD', "),
        ("qvalue.optimizer=Adm", "the optimizer 'Adm' (optim.optimizer or optim.qvalue.optimizer) does not exist; "),
        ("optimizer=Optimizer", "does not exist; torch.optim has "),
        ("optimizer=LBFGS", "does not exist; torch.optim has "),
        ("optimizer=SparseAdam", "does not exist; torch.optim has "),
        ("optimizer=lr_scheduler", "does not exist; torch.optim has "),
        (
            "kwargs.betta=1",
            "the optimizer of vae cannot be made: Adam rejects the arguments {'lr': 0.001, 'betta': 1}",
        ),
        ("lr=-1", "Invalid learning rate: -1.0"),
        ("actor.kwargs.betas=[2,0]", "the optimizer of actor cannot be made: Adam rejects the arguments "),
        ("actor.every=0", "optim.actor: start_after is 0 and every 0; start_after must be at least 0, and every"),
        ("vae.stop_after=0", "optim.vae: stop_after is 0, but the network's first step is 1 "),
        ("scheduler=Step", "the scheduler 'Step' (optim.scheduler or optim.vae.scheduler) does not exist; "),
        ("scheduler=ReduceLROnPlateau", "does not exist; torch.optim.lr_scheduler has "),
        ("scheduler=LRScheduler", "does not exist; torch.optim.lr_scheduler has "),
        ("scheduler=StepLR", "the scheduler of vae cannot be made: StepLR rejects the arguments {}: "),
        ("actor.scheduler=LinearLR actor.scheduler_kwargs.x=1", "the scheduler of actor cannot be made: "),
    ],
)
def test_settings_that_are_refused(loss, settings, message):
    settings = optim(*settings.split())
    with pytest.raises(RunError) as error:
        make_scheduler_hooks(make_stepper(loss, **settings), **settings)
    assert message in str(error.value)


OFFERED = ["ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop"]


@pytest.mark.parametrize("name", [*OFFERED, "SGD"])
def test_the_optimizers_that_are_offered_work(name):
    parameter = torch.nn.Parameter(torch.ones(3, 3))
    optimizer = make_optimizer("critic", [parameter], optimizer=name)
    parameter.square().sum().backward()
    optimizer.step()
    optimizer.step()
    assert not torch.equal(parameter, torch.ones(3, 3))
    with pytest.raises(RunError, match=f"'{name}'"):
        make_optimizer("critic", [parameter], optimizer="none")


def test_settings_have_the_names_of_the_networks():
    settings = optim_settings(["critic"], make_optimizer)
    assert settings["optimizer"] == (str, "Adam")
    assert list(settings) == ["optimizer", "lr", "kwargs", "critic"]
    assert settings["critic"] == {
        "optimizer": (str | None, None),
        "lr": (float | None, None),
        "kwargs": (dict[str, Any], {}),
        "start_after": (int, 0),
        "stop_after": (int | None, None),
        "every": (int, 1),
    }


@pytest.mark.parametrize("argument", ["foreach", "differentiable"])
def test_arguments_that_exclude_fused_replace_it(loss, argument):
    (made, *_) = make_stepper(loss, **optim(f"kwargs.{argument}=true")).optimizers.values()
    assert (made.defaults[argument], made.defaults["fused"]) == (True, None)


def test_arguments_that_exclude_each_other_are_refused(loss):
    with pytest.raises(RunError, match="the optimizer of vae cannot be made: Adam rejects the arguments"):
        make_stepper(loss, **optim("kwargs.fused=true", "kwargs.foreach=true"))
