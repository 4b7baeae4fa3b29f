"""BCQTrainer: the defaults of the paper, and networks that do not learn."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from torchrl_bcq import (
    ActionVAE,
    BCQLoss,
    BCQTrainer,
    OfflineOptimizationStepper,
    OfflineTrainer,
    Schedule,
    make_bcq_modules,
    make_replay_buffer,
)

from ..conftest import ACTION_SPEC, OBSERVATION_SPEC
from .conftest import assert_same_run, make_trainer, soft_update


def test_the_authors_optimizers(modules):
    stepper = OfflineOptimizationStepper.adam(BCQLoss(*modules))
    assert list(stepper.optimizers) == ["vae", "qvalue", "actor"]
    assert {type(optimizer) for optimizer in stepper.optimizers.values()} == {torch.optim.Adam}
    assert {optimizer.defaults["lr"] for optimizer in stepper.optimizers.values()} == {1e-3}
    counts = {name: sum(len(g["params"]) for g in o.param_groups) for name, o in stepper.optimizers.items()}
    assert counts == {"vae": 12, "qvalue": 12, "actor": 6}
    assert stepper.schedules == {"vae": Schedule(), "qvalue": Schedule(), "actor": Schedule()}


def test_the_trainer_of_bcq_is_the_offline_trainer(make_batch):
    transitions = make_batch(50)
    trainer, explicit = make_trainer(transitions), make_trainer(transitions, stepper=OfflineOptimizationStepper.adam)
    assert BCQTrainer.__init__ is OfflineTrainer.__init__  # the same arguments
    for each in (trainer, explicit):
        torch.manual_seed(0)
        each.train()
    assert_same_run(trainer, explicit)


# behaviour models that do not learn


class NearestNeighbour(nn.Module):
    """A behaviour model without parameters: the action of the nearest state in the dataset, and some noise."""

    observation_keys, action_key, latent_dim, latent_clip, loss_keys = ("observation",), "action", 2, 0.5, ()

    def __init__(self, transitions: TensorDict) -> None:
        super().__init__()
        self.register_buffer("states", transitions["observation"])
        self.register_buffer("actions", transitions["action"])

    def training_loss(self, tensordict, noise=None):
        return torch.zeros(tensordict.batch_size), {}

    def decode(self, tensordict, latent):
        nearest = torch.cdist(tensordict["observation"].reshape(-1, 3), self.states).argmin(1)
        action = self.actions[nearest].reshape(latent.shape) + 0.1 * latent
        return tensordict.set("action", action.clamp(ACTION_SPEC.space.low, ACTION_SPEC.space.high))


class Uniform(NearestNeighbour):
    """A behaviour model without parameters and buffers: any action in the bounds."""

    def __init__(self, transitions: TensorDict) -> None:
        nn.Module.__init__(self)

    def decode(self, tensordict, latent):
        low, high = ACTION_SPEC.space.low, ACTION_SPEC.space.high
        return tensordict.set("action", low + (high - low) * (latent + 0.5))


def frozen_vae(transitions: TensorDict) -> ActionVAE:
    return make_bcq_modules(OBSERVATION_SPEC, ACTION_SPEC, hidden=(8,), vae_hidden=(8,))[0].requires_grad_(False)


@pytest.mark.parametrize("make_model", [frozen_vae, NearestNeighbour, Uniform])
@pytest.mark.parametrize("trainer_class", [BCQTrainer, OfflineTrainer])
def test_actor_and_critics_learn_with_a_behaviour_model_that_does_not(make_batch, make_model, trainer_class):
    transitions = make_batch(50)
    _, actor, critics = make_bcq_modules(OBSERVATION_SPEC, ACTION_SPEC, hidden=(8,), vae_hidden=(8,))
    loss = BCQLoss(make_model(transitions), actor, critics)
    assert loss.network_names == ("vae", "qvalue", "actor")
    assert loss.trainable_names == ("qvalue", "actor")
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    buffer = make_replay_buffer(transitions, batch_size=16, seed=0)
    trainer = trainer_class(loss, buffer, target_net_updater=soft_update(loss), total_steps=20, progress_bar=False)
    assert list(trainer.optimization_stepper.optimizers) == ["qvalue", "actor"]
    trainer.train()
    changed = {name.split(".")[0] for name, value in loss.state_dict().items() if not torch.equal(value, before[name])}
    trained = {"qvalue_network_params", "actor_network_params"}
    assert changed == trained | {f"target_{name}" for name in trained}
    assert all(value.isfinite().all() for value in loss.state_dict().values())
    assert set(trainer.metrics) == {"loss_qvalue", "loss_actor", "td_error", "pred_value", "target_value"}


def test_an_optimizer_for_a_frozen_network_is_refused(make_batch):
    loss = BCQLoss(*make_bcq_modules(OBSERVATION_SPEC, ACTION_SPEC, hidden=(8,), vae_hidden=(8,)))
    stepper = OfflineOptimizationStepper.adam(loss)
    loss.vae_network.requires_grad_(False)
    buffer = make_replay_buffer(make_batch(50), batch_size=16)
    message = r"trains \['qvalue', 'actor'\], but optimization_stepper has optimizers for \['vae', 'qvalue', 'actor'\]"
    with pytest.raises(ValueError, match=message):
        BCQTrainer(loss, buffer, target_net_updater=soft_update(loss), optimization_stepper=stepper, total_steps=5)


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))])
def test_a_loss_with_a_model_without_parameters_is_copied(make_batch, make_copy):
    _, actor, critics = make_bcq_modules(OBSERVATION_SPEC, ACTION_SPEC, hidden=(8,), vae_hidden=(8,))
    loss, batch = BCQLoss(Uniform(make_batch(1)), actor, critics), make_batch(6)
    soft_update(loss)
    copied, latent = make_copy(loss), torch.rand(6, 10, 2) - 0.5
    torch.testing.assert_close(copied.qvalue_loss(batch, latent), loss.qvalue_loss(batch, latent), rtol=0, atol=0)
    loss.load_state_dict(copied.double().state_dict())


@pytest.mark.parametrize("frozen", ["qvalue", "actor"])
def test_frozen_critics_or_a_frozen_actor_are_left_out(make_batch, frozen):
    loss = BCQLoss(*make_bcq_modules(OBSERVATION_SPEC, ACTION_SPEC, hidden=(8,), vae_hidden=(8,)))
    getattr(loss, f"{frozen}_network").requires_grad_(False)
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    buffer = make_replay_buffer(make_batch(50), batch_size=16, seed=0)
    BCQTrainer(loss, buffer, target_net_updater=soft_update(loss), total_steps=5, progress_bar=False).train()
    changed = {name.split("_network")[0] for name, value in loss.state_dict().items() if not value.equal(before[name])}
    learned = "actor" if frozen == "qvalue" else "qvalue"
    assert changed == {"vae", learned, f"target_{learned}"}
