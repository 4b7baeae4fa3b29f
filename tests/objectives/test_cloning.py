"""CloningLoss: numbers by hand, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import AdditiveGaussianModule

from torchrl_bcq import CloningLoss, DeterministicActor, OfflineTrainer, make_replay_buffer

from ..conftest import ACTION_SPEC, random_transitions


@pytest.fixture
def network() -> TensorDictModule:
    """Maps an observation ``x`` to the actions ``(x, 1 - x)``."""
    linear = nn.Linear(1, 2)
    linear.load_state_dict({"weight": torch.tensor([[1.0], [-1.0]]), "bias": torch.tensor([0.0, 1.0])})
    return TensorDictModule(linear, ["observation"], ["action"])


@pytest.fixture
def batch() -> TensorDict:
    """At 1 and 2 the network acts (1, 0) and (2, -1): mean squared errors of 1/2 and 4/2."""
    columns = {"observation": torch.tensor([[1.0], [2.0]]), "action": torch.tensor([[0.0, 0.0], [2.0, 1.0]])}
    return TensorDict(columns, [2])


@pytest.mark.parametrize(("reduction", "expected"), [("mean", 1.25), (None, 1.25), ("sum", 2.5), ("none", [0.5, 2.0])])
def test_value_and_priority_by_hand(network, batch, reduction, expected):
    value, metadata = CloningLoss(network, reduction=reduction).actor_loss(batch)
    assert value.tolist() == expected
    assert metadata == {}
    assert batch["td_error"].tolist() == [0.5, 2]


def test_the_priority_has_the_dtype_of_prioritized_samplers(network, batch):
    batch = batch.double()
    assert CloningLoss(network.double()).actor_loss(batch)[0].dtype == torch.float64
    assert batch["td_error"].dtype == torch.float32


def test_gradient_by_hand(network, batch):
    """Mean over 2 rows and 2 actions of ``2 * error * (x, 1)``: errors (1, 0) at 1 and (0, -2) at 2."""
    CloningLoss(network).actor_loss(batch)[0].backward()
    assert network.module.weight.grad.tolist() == [[0.5], [-2.0]]
    assert network.module.bias.grad.tolist() == [0.5, -1.0]


def test_weights_by_hand(network, batch):
    batch["priority_weight"] = torch.tensor([3.0, 1.0])
    assert CloningLoss(network).actor_loss(batch)[0].item() == (3 * 0.5 + 2) / 4
    assert CloningLoss(network, reduction="sum").actor_loss(batch)[0].item() == 3.5
    assert CloningLoss(network, use_prioritized_weights=False).actor_loss(batch)[0].item() == 1.25
    batch["priority_weight"] = torch.ones(2, 1)
    with pytest.raises(
        ValueError, match=r"priority_weight has shape \(2, 1\), expected \(2,\): one weight for each row"
    ):
        CloningLoss(network).actor_loss(batch)


def test_the_network_does_not_see_the_action(network, batch):
    """So a network that would pass an action on cannot clone it."""
    seen = []
    network.register_forward_pre_hook(lambda module, args: seen.append(set(args[0].keys())))
    CloningLoss(network).actor_loss(batch)
    assert seen == [{"observation"}]


def test_it_has_no_values_and_no_targets(network, batch):
    loss = CloningLoss(network)
    assert loss.value(batch) is None
    assert loss.delayed_names == ()
    assert loss.networks == (network,)
    assert loss.out_keys == ["loss_actor"]
    assert loss.in_keys == ["observation", "action"]


def test_networks_that_do_not_write_the_action_are_refused(network, batch):
    two = TensorDictModule(lambda x: (x, x), ["observation"], ["action", "other"])
    with pytest.raises(ValueError, match=r"actor_network writes \['action', 'other'\], expected one entry, the action"):
        CloningLoss(two)
    wide = TensorDictModule(nn.Linear(1, 3), ["observation"], ["action"])
    with pytest.raises(
        ValueError, match=r"writes actions of shape \(2, 3\), but the batch has actions of shape \(2, 2\)"
    ):
        CloningLoss(wide).actor_loss(batch)


def test_training_recovers_a_linear_policy():
    """The dataset acts by a rule that a linear network with bounds can express."""
    transitions = random_transitions(400)
    rule = torch.tensor([[0.5, -1.0, 0.2], [1.0, 0.3, -0.6]])
    middle, half = torch.tensor([0.0, 2.0]), torch.tensor([1.0, 2.0])
    transitions["action"] = middle + half * torch.tanh(transitions["observation"] @ rule.T)
    network = nn.Linear(3, 2)
    loss = CloningLoss(DeterministicActor(network, ACTION_SPEC))
    buffer = make_replay_buffer(transitions, batch_size=64, seed=0)
    trainer = OfflineTrainer(loss, buffer, target_net_updater=None, total_steps=1500, progress_bar=False, seed=0)
    trainer.optimization_stepper.optimizers["actor"].param_groups[0]["lr"] = 1e-2
    trainer.train()
    torch.testing.assert_close(network.weight.detach(), rule, rtol=0, atol=1e-3)
    torch.testing.assert_close(network.bias.detach(), torch.zeros(2), rtol=0, atol=1e-3)
    assert trainer.metrics.keys() == {"loss_actor"}


def test_the_mode_of_the_loss_is_that_of_its_network(batch):
    network = DeterministicActor(nn.Sequential(nn.Linear(1, 2), nn.Dropout(0.5)), ACTION_SPEC)
    loss = CloningLoss(network)
    for mode in (False, True):
        assert loss.train(mode).training == network.training == network.network[1].training == mode


@pytest.mark.parametrize("name", ["forward", "actor_loss"])
def test_the_noise_of_exploration_is_not_learned(batch, name):
    """As in TorchRL, a loss reads the network without its exploration module's noise."""
    actor = DeterministicActor(nn.Linear(1, 2), ACTION_SPEC)
    noise = AdditiveGaussianModule(ACTION_SPEC, sigma_init=1.0)
    noisy = TensorDictSequential(actor, noise, selected_out_keys=["action"])
    expected = CloningLoss(actor)(batch)["loss_actor"]
    with set_exploration_type(ExplorationType.RANDOM):
        loss = getattr(CloningLoss(noisy), name)(batch)
    assert (loss["loss_actor"] if name == "forward" else loss[0]) == expected


def test_batch_norm_with_a_time_dimension_is_refused():
    """With as many steps as features, BatchNorm would take the steps for channels."""
    layers = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    loss, batch = CloningLoss(DeterministicActor(layers, ACTION_SPEC)), random_transitions(64)
    loss(batch)
    with pytest.raises(ValueError, match=r"the batch has size \(8, 8\), but a network has BatchNorm, which needs"):
        loss(batch.reshape(8, 8))
