"""Gradient steps do not wait for a GPU and copy nothing to it; tested without one."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from tensordict import TensorDict
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchrl.objectives import SoftUpdate

from torchrl_bcq import BCQLoss, OfflineOptimizationStepper, make_bcq_modules
from torchrl_bcq.trainers.targets import FastTargetNetUpdaterHook

from ..conftest import ACTION_SPEC, OBSERVATION_SPEC, random_transitions
from .conftest import make_trainer

NAMES = ("vae", "qvalue", "actor")
VALUES = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2"}  # item(), float(), if tensor: ...


class Waits(TorchDispatchMode):
    """Lists operations that read a value from a device, or copy from one device to another."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out, name = function(*args, **(kwargs or {})), function.overloadpacket.__name__
        devices = {leaf.device.type for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)}
        if (name in VALUES and self.device in devices) or len(devices) > 1:
            self.found.append(name)
        return out


# on the CPU: a whole log interval


def waits_in_an_interval(steps: int, planted=None, **settings) -> list[str]:
    torch.manual_seed(0)
    trainer = make_trainer(random_transitions(50), steps, log_interval=steps, **settings)
    if planted is not None:
        actor_loss = trainer.loss_module.actor_loss
        trainer.loss_module.actor_loss = lambda batch: planted(actor_loss(batch))
    with Waits("cpu") as waits:
        trainer.train()
    return waits.found


@pytest.mark.parametrize("settings", [{}, {"clip_norm": 0.1}, {"clip_norm": 0.1, "clip_grad_norm": False}], ids=str)
def test_waits_in_a_log_interval_do_not_depend_on_its_steps(settings):
    """There are a few at its end, which check losses and weights."""
    few, many = waits_in_an_interval(5, **settings), waits_in_an_interval(20, **settings)
    assert few == many
    assert 0 < len(few) < 5


@pytest.mark.parametrize(
    "planted",
    [
        lambda out: (out[0], {"value": torch.tensor(out[0].item())}),
        lambda out: (out[0] if out[0] > 0 else 2 * out[0], out[1]),
        lambda out: (out[0] + len(out[0].isnan().nonzero()), out[1]),
    ],
    ids=["item", "if", "nonzero"],
)
def test_waits_are_found(planted):
    few, many = waits_in_an_interval(5, planted), waits_in_an_interval(20, planted)
    assert len(many) == len(few) + 15


# on a fake GPU: tensors have shapes, dtypes and devices, but no values


@pytest.fixture
def fake():
    try:
        with FakeTensorMode() as mode:
            torch.empty(1, device="cuda")
    except (AssertionError, RuntimeError) as error:
        pytest.skip(f"this PyTorch has no tensors that only seem to be on a GPU: {error}")
    return mode


def update(fake: FakeTensorMode, change=lambda loss, batch: None, captured=False, clip=None, **keys) -> list[str]:
    """Two steps of all networks and their targets; returns the operations that waited.

    Gradients are set to one, because PyTorch's backward pass starts a thread for each device; its fused optimizers
    need a device, too.
    """
    modules, batch = (
        make_bcq_modules(OBSERVATION_SPEC, ACTION_SPEC, hidden=(8,), vae_hidden=(8,)),
        random_transitions(6),
    )
    batch.update(keys)
    with fake, mock.patch.object(torch.Tensor, "is_set_to", return_value=False):  # asked by the updater
        for module in modules:
            module._apply(lambda tensor: fake.from_tensor(tensor).detach().to("cuda"))
        loss = BCQLoss(*modules)
        targets = FastTargetNetUpdaterHook(SoftUpdate(loss, tau=0.005))
        batch = batch.apply(lambda tensor: fake.from_tensor(tensor).to("cuda"))
        params = {name: getattr(loss, f"{name}_network_params").parameters() for name in NAMES}
        stepper = OfflineOptimizationStepper({name: torch.optim.Adam(each) for name, each in params.items()})
        if captured:
            stepper.capture()
        change(loss, batch)

        def backward(self) -> None:
            for p in loss.parameters():
                p.grad = torch.ones_like(p)

        def compute_loss(batch: TensorDict, method: str):
            return getattr(loss, method)(batch)

        trainer = SimpleNamespace(loss_module=loss, compute_loss=compute_loss, clip_norm=clip, clip_grad_norm=True)
        with mock.patch.object(torch.Tensor, "backward", backward), Waits("cuda") as waits:
            for _ in range(2):
                logs = stepper._update(trainer, batch, NAMES)
                targets()
    assert {value.device.type for value in [*logs.values(), batch["td_error"], *loss.state_dict().values()]} == {"cuda"}
    return waits.found


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("settings", [{}, {"clip": 0.1}, {"priority_weight": torch.ones(6)}], ids=str)
def test_an_update_stays_on_the_device(fake, settings, captured):
    assert update(fake, captured=captured, **settings) == []


def on_the_cpu(loss, batch):
    batch["next", "reward"] = torch.zeros(6, 1)


def moved_there(loss, batch):
    loss.qvalue_loss = lambda td, own=loss.qvalue_loss: (own(td)[0] * torch.ones(()).to("cuda"), {})


def read(loss, batch):
    loss.qvalue_loss = lambda td, own=loss.qvalue_loss: (own(td)[0], {"value": torch.tensor(own(td)[0].item())})


def test_copies_and_reads_are_found(fake):
    with pytest.raises(RuntimeError, match="cpu,? (and )?cuda"):
        update(fake, on_the_cpu)
    with pytest.raises(DataDependentOutputException, match="_local_scalar_dense"):
        update(fake, read)
    assert update(fake, moved_there) == ["_to_copy"] * 2
