"""Parts that do not fit together are refused when a trainer is made."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch.optim import Adam
from torchrl.data import (
    PrioritizedSampler,
    ReplayBuffer,
    ReplayBufferEnsemble,
    TensorDictReplayBuffer,
    TensorStorage,
)
from torchrl.trainers.trainers import DefaultOptimizationStepper

from torchrl_bcq import (
    BCQLoss,
    OfflineOptimizationStepper,
    OfflineTrainer,
    make_bcq_modules,
    make_replay_buffer,
)
from torchrl_bcq.trainers.checks import check_buffer, check_stepper

from ..conftest import ACTION_SPEC, OBSERVATION_SPEC, random_transitions, skip_without_extension
from .conftest import make_trainer, prioritised_buffer, soft_update

NAMES = ("vae", "qvalue", "actor")


def test_a_buffer_that_reads_other_priorities_is_refused(make_batch):
    buffer = prioritised_buffer(make_batch(50), priority_key="urgency")
    message = "priorities to 'td_error', but the buffer reads them from 'urgency'; make .* with priority_key='td_error'"
    with pytest.raises(ValueError, match=message):
        make_trainer(None, buffer=buffer)


def test_an_updater_of_another_loss_is_refused(make_batch):
    other = make_trainer(make_batch(20)).loss_module
    with pytest.raises(ValueError, match="target_net_updater was made for another loss"):
        make_trainer(make_batch(20), updater=lambda loss: soft_update(other))


def test_an_updater_is_needed_if_and_only_if_the_loss_has_targets(modules, make_batch):
    buffer, settings = make_replay_buffer(make_batch(50), batch_size=16), {"total_steps": 5, "progress_bar": False}
    message = r"the loss has target networks for \['qvalue', 'actor'\]; pass target_net_updater=SoftUpdate"
    with pytest.raises(ValueError, match=message):
        OfflineTrainer(BCQLoss(*modules), buffer, target_net_updater=None, **settings)
    undelayed = BCQLoss(*modules, delay_actor=False, delay_qvalue=False)
    with pytest.raises(ValueError, match="the loss has no target networks; pass target_net_updater=None"):
        OfflineTrainer(undelayed, buffer, target_net_updater=soft_update(BCQLoss(*modules)), **settings)
    before = copy.deepcopy(undelayed.state_dict())
    OfflineTrainer(undelayed, buffer, target_net_updater=None, **settings).train()
    key = "qvalue_network_params.critics.0.module.0.weight"
    assert not torch.equal(undelayed.state_dict()[key], before[key])


def test_a_network_without_an_optimizer_is_refused(modules, make_batch):
    """It would stay as it was, silently."""
    loss, buffer = BCQLoss(*modules), make_replay_buffer(make_batch(50), batch_size=16)
    adam = OfflineOptimizationStepper.adam(loss).optimizers
    stepper = OfflineOptimizationStepper({"vae": adam["vae"], "qvalue": adam["qvalue"]})
    message = (
        r"the loss trains \['vae', 'qvalue', 'actor'\], but optimization_stepper has optimizers for \['vae', 'qvalue'\]"
    )
    with pytest.raises(ValueError, match=message):
        OfflineTrainer(loss, buffer, target_net_updater=soft_update(loss), optimization_stepper=stepper, total_steps=5)


def test_optimizers_of_other_networks_are_refused(modules, make_batch):
    """These networks would stay as they are, silently."""
    loss, other = BCQLoss(*modules), BCQLoss(*make_bcq_modules(OBSERVATION_SPEC, ACTION_SPEC))
    vae, actor, critics = (Adam(network.parameters()) for network in modules)
    swapped = OfflineOptimizationStepper({"vae": vae, "qvalue": actor, "actor": critics})
    for stepper in (swapped, OfflineOptimizationStepper.adam(other)):
        with pytest.raises(ValueError, match=r"the optimizer of '\w+' has no parameter of \w+_network"):
            check_stepper(loss, stepper, captured=False, parallel=False)
    correct = OfflineOptimizationStepper({"vae": vae, "qvalue": critics, "actor": actor})
    check_stepper(loss, correct, captured=False, parallel=False)


def test_a_buffer_without_priorities_from_batches_is_refused(modules, make_batch):
    skip_without_extension()
    buffer = ReplayBuffer(storage=TensorStorage(make_batch(50)), sampler=PrioritizedSampler(50, 0.7, 0.5))
    with pytest.raises(ValueError, match="a ReplayBuffer does not update priorities from batches; use a TensorDict"):
        check_buffer(BCQLoss(*modules), buffer)


def test_an_ensemble_of_buffers_is_refused(make_batch):
    buffers = (make_replay_buffer(make_batch(50), batch_size=16) for _ in range(2))
    with pytest.raises(
        ValueError, match="checkpoints cannot hold a ReplayBufferEnsemble; put all transitions into one"
    ):
        make_trainer(None, buffer=ReplayBufferEnsemble(*buffers, batch_size=16))


def test_a_buffer_that_prefetches_is_warned_of(make_batch):
    """Its threads draw ahead, in an order that no checkpoint holds."""
    storage = TensorStorage(make_batch(50))
    plain = TensorDictReplayBuffer(storage=storage, batch_size=16)
    make_trainer(None, buffer=plain)  # warns of nothing
    ahead = TensorDictReplayBuffer(storage=storage, batch_size=16, prefetch=2)
    with pytest.warns(
        UserWarning, match="replay_buffer prefetches batches in threads.* Make the buffer with prefetch=None"
    ):
        make_trainer(None, buffer=ahead)


def test_a_trainer_that_cannot_capture_is_refused(modules):
    message = "CUDA graphs need a GPU, but the loss is on cpu; move it to a GPU, or set cudagraph=False"
    with pytest.raises(ValueError, match=message):
        make_trainer(random_transitions(50), cudagraph=True)
    on_cuda = SimpleNamespace(
        parameters=lambda: iter([SimpleNamespace(device=torch.device("cuda"))]), trainable_names=NAMES, reduction="mean"
    )
    message = "cudagraph=True needs an OfflineOptimizationStepper, not a DefaultOptimizationStepper"
    with pytest.raises(ValueError, match=message):
        check_stepper(on_cuda, DefaultOptimizationStepper(), captured=True, parallel=False)
    loss = BCQLoss(*modules)
    for name in NAMES:
        setattr(on_cuda, f"{name}_network_params", getattr(loss, f"{name}_network_params"))
    stepper = OfflineOptimizationStepper.adam(loss)
    check_stepper(on_cuda, stepper, captured=True, parallel=False)
    with pytest.raises(ValueError, match="several processes cannot train with CUDA graphs; set data_parallel=False"):
        check_stepper(on_cuda, stepper, captured=True, parallel=True)
    on_cuda.reduction = "sum"
    with pytest.raises(ValueError, match="so the loss cannot be a sum; use reduction='mean'"):
        check_stepper(on_cuda, stepper, captured=False, parallel=True)


def test_a_loss_that_is_not_one_number_is_refused(make_batch):
    loss = BCQLoss(*make_bcq_modules(OBSERVATION_SPEC, ACTION_SPEC, hidden=(8,), vae_hidden=(8,)), reduction="none")
    with pytest.raises(ValueError, match="the loss has reduction='none', but a gradient step needs one number"):
        OfflineTrainer(loss, make_replay_buffer(make_batch(50)), target_net_updater=soft_update(loss), total_steps=1)
