"""Targets move as TorchRL's updater moves them, bit by bit."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchrl.objectives import HardUpdate, SoftUpdate

from torchrl_bcq import BCQLoss, make_bcq_modules
from torchrl_bcq.trainers.targets import FastTargetNetUpdaterHook

from ..conftest import ACTION_SPEC, OBSERVATION_SPEC

KEY = "target_qvalue_network_params.critics.1.module.0.weight"


def make_loss(updater=SoftUpdate, tau: float = 0.005, **settings):
    """A loss with its updater, and weights that are not the targets' any more; always the same."""
    torch.manual_seed(0)
    loss = BCQLoss(*make_bcq_modules(OBSERVATION_SPEC, ACTION_SPEC, hidden=(8,), vae_hidden=(8,)), **settings)
    updater = updater(loss, tau=tau) if issubclass(updater, SoftUpdate) else updater(loss)
    with torch.no_grad():
        for p in loss.parameters():
            p.add_(torch.randn_like(p))
    return loss, updater


def state(loss: BCQLoss) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in loss.state_dict().items()}


class Calls(TorchDispatchMode):
    """Counts what PyTorch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("tau", [0.005, 0.3, 0.0])
@pytest.mark.parametrize(
    "delayed",
    [{}, {"delay_actor": False}, {"delay_qvalue": False}],
    ids=["both", "critics", "actor"],
)
def test_five_updates_are_those_of_torchrl(delayed, tau):
    (loss, updater), (twin, twins) = (make_loss(tau=tau, **delayed) for _ in range(2))
    before, hook = state(loss), FastTargetNetUpdaterHook(updater)
    for _ in range(5):
        hook()
        twins.step()
    torch.testing.assert_close(state(loss), state(twin), rtol=0, atol=0)
    moved = {key for key, value in state(loss).items() if not torch.equal(value, before[key])}
    targets = {key for key in before if key.startswith("target_") and key.endswith(("weight", "bias"))}
    networks = {"delay_actor": "actor", "delay_qvalue": "qvalue"}
    delaying = tuple(f"target_{name}" for setting, name in networks.items() if setting not in delayed)
    assert moved == (set() if tau == 0 else {key for key in targets if key.startswith(delaying)})


def test_an_update_is_the_papers_share_of_the_way():
    loss, updater = make_loss(tau=0.25)
    before = state(loss)
    FastTargetNetUpdaterHook(updater)()
    expected = 0.25 * before[KEY.removeprefix("target_")] + 0.75 * before[KEY]
    torch.testing.assert_close(loss.state_dict()[KEY], expected)


def test_all_tensors_are_moved_in_one_call():
    _, updater = make_loss()
    with Calls() as calls:
        FastTargetNetUpdaterHook(updater)()
    assert [name for name in calls.names if name != "detach"] == ["_foreach_lerp_"]


def test_it_is_a_hook_that_gives_back_what_it_is_given(make_batch):
    hook, batch = FastTargetNetUpdaterHook(make_loss()[1]), make_batch(2)
    assert hook(batch) is batch
    assert hook() is None


@pytest.mark.parametrize(
    "change",
    [
        lambda loss: loss.to(torch.float64),
        lambda loss: loss._apply(torch.clone),
        lambda loss: loss.load_state_dict(state(loss), assign=True),
    ],
    ids=["to", "moved", "assign"],
)
def test_it_follows_a_loss_to_another_place(change):
    loss, updater = make_loss(tau=0.25)
    hook = FastTargetNetUpdaterHook(updater)
    hook()
    change(loss)
    before = state(loss)
    hook()
    expected = before[KEY] + 0.25 * (before[KEY.removeprefix("target_")] - before[KEY])
    torch.testing.assert_close(loss.state_dict()[KEY], expected)
    assert not torch.equal(loss.state_dict()[KEY], before[KEY])


@pytest.mark.parametrize(
    "copy_it", [copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))], ids=["copy", "pickle"]
)
def test_the_targets_of_a_copy_are_its_own(copy_it):
    loss, _ = make_loss()
    untouched, twin = state(loss), copy_it(loss)
    hook = FastTargetNetUpdaterHook(SoftUpdate(twin, tau=0.25))
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(1)
    before = state(twin)
    hook()
    expected = before[KEY] + 0.25 * (before[KEY.removeprefix("target_")] - before[KEY])
    torch.testing.assert_close(state(twin)[KEY], expected)
    assert not torch.equal(expected, before[KEY])
    torch.testing.assert_close(state(loss), untouched, rtol=0, atol=0)


def test_a_hard_update_counts_as_it_does():
    loss, updater = make_loss(HardUpdate)
    updater.value_network_update_interval = 2
    hook, moved = FastTargetNetUpdaterHook(updater), []
    for _ in range(4):
        before = state(loss)
        hook()
        moved.append(not torch.equal(loss.state_dict()[KEY], before[KEY]))
    assert moved == [False, False, True, False]


class Halfway(SoftUpdate):
    """An updater of somebody's own."""

    def _step(self, p_source, p_target):
        p_target.data.lerp_(p_source.data, 0.5)


def test_a_subclass_does_what_it_does():
    loss, updater = make_loss(Halfway)
    before = state(loss)
    FastTargetNetUpdaterHook(updater)()
    torch.testing.assert_close(loss.state_dict()[KEY], (before[KEY] + before[KEY.removeprefix("target_")]) / 2)


def test_torchrls_error_where_an_updater_is_not_initialised():
    loss, updater = make_loss()
    before, updater.initialized = state(loss), False
    with pytest.raises(Exception, match=r"SoftUpdate must be initialized \(`SoftUpdate.init_\(\)`\) before calling"):
        FastTargetNetUpdaterHook(updater)()
    torch.testing.assert_close(state(loss), before, rtol=0, atol=0)
