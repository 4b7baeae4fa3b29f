"""Targets move as TorchRL's updater moves them, bit for bit."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchrl.objectives import HardUpdate, SoftUpdate

from torchrl_bcq import BCQLoss, OfflineTrainer, make_bcq_modules, make_replay_buffer
from torchrl_bcq.trainers.targets import FastTargetNetUpdaterHook

from ..batch_norm import with_batch_norm
from ..conftest import ACTION_SPEC, OBSERVATION_SPEC

KEY = "target_qvalue_network_params.critics.1.module.0.weight"


def make_loss(updater=SoftUpdate, tau: float = 0.005, **settings):
    """A loss with its updater, whose weights differ from its targets; always the same."""
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
    """Lists the operations that PyTorch is asked for."""

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
def test_updates_equal_torchrls(delayed, tau):
    (loss, updater), (other, plain) = (make_loss(tau=tau, **delayed) for _ in range(2))
    before, hook = state(loss), FastTargetNetUpdaterHook(updater)
    for _ in range(5):
        hook()
        plain.step()
    torch.testing.assert_close(state(loss), state(other), rtol=0, atol=0)
    moved = {key for key, value in state(loss).items() if not torch.equal(value, before[key])}
    targets = {key for key in before if key.startswith("target_") and key.endswith(("weight", "bias"))}
    networks = {"delay_actor": "actor", "delay_qvalue": "qvalue"}
    delaying = tuple(f"target_{name}" for setting, name in networks.items() if setting not in delayed)
    assert moved == (set() if tau == 0 else {key for key in targets if key.startswith(delaying)})


def test_all_tensors_are_moved_in_one_call():
    _, updater = make_loss()
    with Calls() as calls:
        FastTargetNetUpdaterHook(updater)()
    assert [name for name in calls.names if name != "detach"] == ["_foreach_lerp_"]


def test_the_hook_returns_its_batch(make_batch):
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
def test_the_hook_finds_tensors_that_were_replaced(change):
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
def test_a_copy_has_its_own_targets(copy_it):
    loss, _ = make_loss()
    untouched, copied = state(loss), copy_it(loss)
    hook = FastTargetNetUpdaterHook(SoftUpdate(copied, tau=0.25))
    with torch.no_grad():
        for p in copied.parameters():
            p.add_(1)
    before = state(copied)
    hook()
    expected = before[KEY] + 0.25 * (before[KEY.removeprefix("target_")] - before[KEY])
    torch.testing.assert_close(state(copied)[KEY], expected)
    assert not torch.equal(expected, before[KEY])
    torch.testing.assert_close(state(loss), untouched, rtol=0, atol=0)


def test_a_hard_update_counts_its_steps():
    loss, updater = make_loss(HardUpdate)
    updater.value_network_update_interval = 2
    hook, moved = FastTargetNetUpdaterHook(updater), []
    for _ in range(4):
        before = state(loss)
        hook()
        moved.append(not torch.equal(loss.state_dict()[KEY], before[KEY]))
    assert moved == [False, False, True, False]


class Halfway(SoftUpdate):
    """Another rule for the update."""

    def _step(self, p_source, p_target):
        p_target.data.lerp_(p_source.data, 0.5)


def test_a_subclass_of_soft_update_keeps_its_rule():
    loss, updater = make_loss(Halfway)
    before = state(loss)
    FastTargetNetUpdaterHook(updater)()
    torch.testing.assert_close(loss.state_dict()[KEY], (before[KEY] + before[KEY.removeprefix("target_")]) / 2)


def test_an_updater_that_is_not_initialised_raises_torchrls_error():
    loss, updater = make_loss()
    before, updater.initialized = state(loss), False
    with pytest.raises(Exception, match=r"SoftUpdate must be initialized \(`SoftUpdate.init_\(\)`\) before calling"):
        FastTargetNetUpdaterHook(updater)()
    torch.testing.assert_close(state(loss), before, rtol=0, atol=0)


# what the updater leaves alone


def buffers(loss: BCQLoss) -> dict[str, torch.Tensor]:
    """Running statistics of the targets."""
    return {key: value for key, value in state(loss).items() if key.startswith("target_") and "layers.1." in key}


def is_statistic(key: str) -> bool:
    return key.endswith(("running_mean", "running_var", "num_batches_tracked"))


def test_batch_norm_statistics_of_targets_are_not_moved(make_batch):
    """A plain SoftUpdate of a copy moves the same tensors by the same amounts."""
    loss, batch = with_batch_norm(), make_batch(16)
    other = copy.deepcopy(loss)
    updater, plain = (SoftUpdate(each, tau=0.25) for each in (loss, other))
    for each in (loss, other):
        with torch.no_grad():
            for parameter in each.parameters():
                parameter.add_(1)
        torch.manual_seed(1)
        each.qvalue_loss(batch)  # moves the statistics of critics and target critics
    before, hook = buffers(loss), FastTargetNetUpdaterHook(updater)
    trained = {key.removeprefix("target_"): value for key, value in before.items()}
    for _ in range(3):
        hook()
        plain.step()
    torch.testing.assert_close(state(loss), state(other), rtol=0, atol=0)
    after = buffers(loss)
    assert {key for key in after if torch.equal(after[key], before[key])} == set(filter(is_statistic, after))
    assert any(is_statistic(key) and not torch.equal(state(loss)[key], trained[key]) for key in trained)


def test_a_trainer_moves_weights_and_not_statistics_of_batch_norm(make_batch):
    """Statistics of the targets are those of their own forward passes: one in each step."""
    torch.manual_seed(0)
    loss = with_batch_norm()
    buffer = make_replay_buffer(make_batch(50), batch_size=16, seed=0)
    before = state(loss)
    OfflineTrainer(
        loss, buffer, target_net_updater=SoftUpdate(loss, tau=0.005), total_steps=20, progress_bar=False, seed=0
    ).train()
    after = state(loss)
    assert all(value.isfinite().all() for value in after.values())
    critic = "qvalue_network_params.critics.0.module.layers.1."
    assert after[f"target_{critic}num_batches_tracked"] == 20
    assert after[f"{critic}num_batches_tracked"] == 40  # in the losses of critics and actor
    assert not torch.equal(after[f"target_{critic}weight"], before[f"target_{critic}weight"])
    assert not torch.equal(after[f"target_{critic}running_mean"], after[f"{critic}running_mean"])


@pytest.mark.parametrize("frozen", ["qvalue", "actor"])
def test_networks_that_were_frozen_before_the_updater_was_made_are_not_moved(frozen):
    losses = []
    for _ in range(2):
        torch.manual_seed(0)
        loss = BCQLoss(*make_bcq_modules(OBSERVATION_SPEC, ACTION_SPEC, hidden=(8,), vae_hidden=(8,)))
        getattr(loss, f"{frozen}_network").requires_grad_(False)
        losses.append((loss, SoftUpdate(loss, tau=0.25)))
        with torch.no_grad():
            for parameter in loss.parameters():
                parameter.add_(1)
    (loss, updater), (other, plain) = losses
    before, hook = state(loss), FastTargetNetUpdaterHook(updater)
    for _ in range(3):
        hook()
        plain.step()
    torch.testing.assert_close(state(loss), state(other), rtol=0, atol=0)
    moved = {key.split(".")[0] for key, value in state(loss).items() if not torch.equal(value, before[key])}
    assert moved == {"target_actor_network_params" if frozen == "qvalue" else "target_qvalue_network_params"}
