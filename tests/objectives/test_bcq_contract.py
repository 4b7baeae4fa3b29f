"""BCQLoss behaves as TorchRL's losses do, and raises where they would be silent."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Bounded, Unbounded
from torchrl.modules import MLP
from torchrl.objectives import HardUpdate, SoftUpdate
from torchrl.objectives.utils import ValueEstimators

from torchrl_bcq import ActionVAE, BCQLoss, CloningLoss, PerturbationActor, QEnsemble, make_cloning_modules

from ..conftest import ACTION_SPEC
from .conftest import bcq_modules, target_values, with_updater

# as in TorchRL


def test_soft_and_hard_update_find_both_targets(modules):
    loss = BCQLoss(*modules)
    updater = SoftUpdate(loss, tau=0.25)
    for name in ("actor_network_params", "qvalue_network_params"):
        source, target = getattr(loss, name), getattr(loss, f"target_{name}")
        start = target.clone()
        source.data.apply_(lambda p: p.add_(1))
        updater.step()
        for key, p in target.items(True, True):
            if key not in ("low", "high"):
                torch.testing.assert_close(p.data, start[key].data + 0.25)
    hard = HardUpdate(loss, value_network_update_interval=1)
    source.data.apply_(lambda p: p.add_(1))
    for _ in range(2):
        hard.step()
    for key, p in target.items(True, True):
        assert torch.equal(p.data, source[key].data)


def test_targets_need_no_gradient_and_updaters_can_be_made_again(loss, make_batch):
    for _ in range(2):
        loss(make_batch(4))
        for name in ("actor", "qvalue"):
            targets = getattr(loss, f"target_{name}_network_params").values(True, True)
            assert not any(isinstance(p, torch.nn.Parameter) or p.requires_grad for p in targets)
        SoftUpdate(loss, tau=0.005)


def test_metadata_by_hand(loss, make_batch):
    batch = make_batch(5)
    out = loss(batch)
    error = out["pred_value"] - out["target_value"].unsqueeze(-1)
    torch.testing.assert_close(out["td_error"], error.abs())
    torch.testing.assert_close(out["loss_qvalue"], error.square().mean(0).sum())
    torch.testing.assert_close(out["loss_vae"], (out["vae_reconstruction"] + 0.5 * out["vae_kl"]).mean())
    torch.testing.assert_close(batch["td_error"], error.abs().amax(-1))
    assert not any(out[key].requires_grad for key in loss.out_keys if not key.startswith("loss_"))


def test_agents_of_a_row_share_its_importance_weight(modules, make_batch):
    """The batch has the size [6], its entries [6, agents, ...]."""
    batch, draw = make_batch(6, 2), torch.randn(6, 2, 4)
    loss = BCQLoss(*modules, reduction="none")
    rows = loss.vae_loss(batch, draw)[0]
    batch["next"].batch_size = batch.batch_size = [6]
    batch["priority_weight"] = weights = torch.arange(6.0)
    torch.testing.assert_close(loss.vae_loss(batch, draw)[0], rows * weights[:, None])
    loss.reduction = "mean"
    torch.testing.assert_close(loss.vae_loss(batch, draw)[0], (rows.mean(1) * weights).sum() / 15)


def test_the_modules_decide_the_keys_of_action_and_value(make_batch, latent, modules):
    vae, actor, critics = modules
    own_vae = ActionVAE(vae.encoder, vae.decoder, ACTION_SPEC, latent_dim=4, action_key=("do", "this"))
    own_actor = PerturbationActor(actor.network, ACTION_SPEC, action_key=("do", "this"))
    own_critics = QEnsemble(
        [TensorDictModule(c.module, in_keys=["observation", ("do", "this")], out_keys=["q"]) for c in critics.critics]
    )
    own, loss = BCQLoss(own_vae, own_actor, own_critics), BCQLoss(*modules)
    SoftUpdate(own, tau=0.005), SoftUpdate(loss, tau=0.005)
    batch = make_batch(6)
    renamed = batch.clone()
    renamed["do", "this"] = renamed.pop("action")
    for name, draw in (("vae", torch.zeros(6, 4)), ("qvalue", latent), ("actor", torch.zeros(6, 4))):
        expected = getattr(loss, f"{name}_loss")(batch, draw)
        torch.testing.assert_close(getattr(own, f"{name}_loss")(renamed, draw), expected)
    with pytest.raises(ValueError, match="cannot change the action key to 'a', because the networks use 'action'"):
        loss.set_keys(action="a")
    torch.testing.assert_close(loss.qvalue_loss(batch, latent)[0], own.qvalue_loss(renamed, latent)[0])


def test_an_action_without_its_last_dimension_is_refused(loss, make_batch):
    batch = make_batch(6)
    batch["action"] = batch["action"][:, 0]
    message = (
        r"action has shape \(6,\), and the batch has size \(6,\); an action of one number needs a last dimension of 1"
    )
    with pytest.raises(ValueError, match=message):
        loss.vae_loss(batch)


def test_gamma_belongs_to_the_value_estimator(loss, make_batch, latent):
    batch = make_batch(6)
    reward = batch["next", "reward"][:, 0]
    at_099 = target_values(loss, batch, latent) - reward
    loss.make_value_estimator(gamma=0.5)
    torch.testing.assert_close((target_values(loss, batch, latent) - reward) * 0.99, at_099 * 0.5)
    with pytest.raises(NotImplementedError, match="GAE"):
        loss.make_value_estimator(ValueEstimators.GAE)
    assert loss.make_value_estimator(ValueEstimators.TD0) is loss


def test_state_dict_of_other_networks_is_refused(modules, make_batch):
    """tensordict alone skips entries that do not fit; here the loss stays unchanged and an error is raised."""
    loss = BCQLoss(*modules)
    vae, actor, critics = copy.deepcopy(modules)
    actor.network.append(torch.nn.Linear(2, 2))
    before = {name: value.clone() for name, value in loss.state_dict().items() if isinstance(value, torch.Tensor)}
    deeper = BCQLoss(vae, actor, critics)
    with pytest.raises(
        RuntimeError, match=r"lacks 0 entries of this loss and has 4 other entries \(such as actor_.*5.bias\)"
    ):
        loss.load_state_dict(deeper.state_dict())
    with pytest.raises(
        RuntimeError, match=r"lacks 4 entries of this loss \(such as .*5.bias\) and has 0 other entries;"
    ):
        deeper.load_state_dict(loss.state_dict())
    state = loss.state_dict()
    state["qvalue_network_params.critics.0.module.0.weight"] = torch.zeros(8, 5)
    with pytest.raises(
        RuntimeError,
        match=r"has 1 entries whose shape differs .*0.weight: \[8, 5\] in the state_dict, \[16, 5\] in the loss\)",
    ):
        loss.load_state_dict(state)
    assert all(torch.equal(loss.state_dict()[name], value) for name, value in before.items())


# errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lmbda": 1.5}, "lmbda is 1.5"),
        ({"num_target_samples": 0}, "num_target_samples is 0"),
    ],
)
def test_settings_of_the_target_out_of_range(modules, settings, message):
    with pytest.raises(ValueError, match=message):
        BCQLoss(*modules, **settings)


def test_networks_in_the_wrong_order(modules):
    vae, actor, critics = modules
    with pytest.raises(TypeError, match="vae_network is a PerturbationActor, which lacks .*'training_loss', 'decode'"):
        BCQLoss(actor, vae, critics)
    with pytest.raises(TypeError, match="qvalue_network is a list, which lacks .*'first'.*protocols.CriticEnsemble"):
        BCQLoss(vae, actor, [critics])
    with pytest.raises(ValueError, match="actor_network reads .* must read and overwrite only the action 'action'"):
        BCQLoss(vae, vae, critics)
    blind = QEnsemble([TensorDictModule(torch.nn.Linear(3, 1), ["observation"], ["q"]) for _ in range(2)])
    with pytest.raises(ValueError, match="qvalue_network reads \\['observation'\\], but not the action 'action'"):
        BCQLoss(vae, actor, blind)


@pytest.mark.parametrize(
    "key", ["action", "observation", ("next", "terminated"), ("next", "reward"), ("next", "observation")]
)
def test_a_missing_entry_is_named(loss, make_batch, key):
    with pytest.raises(ValueError, match=f"the batch lacks {re.escape(str([key]))}; it holds"):
        loss.qvalue_loss(make_batch(4).exclude(key))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (("next", "reward"), torch.zeros(4), "but the action has shape"),
        (
            ("next", "reward"),
            torch.zeros(4, 1, dtype=torch.float64),
            "reward.* has dtype torch.float64, expected torch.float32",
        ),
        (("next", "reward"), torch.zeros(4, 2), "expected \\[\\*B, 1\\] for reward"),
        (("next", "terminated"), torch.zeros(4, 1), "terminated.* has dtype torch.float32, expected torch.bool"),
        (("next", "terminated"), torch.zeros(4, dtype=torch.bool), "terminated.* has shape \\(4,\\)"),
    ],
)
def test_an_entry_of_another_shape_or_dtype_is_named(loss, make_batch, key, value, message):
    batch = make_batch(4)
    batch[key] = value
    with pytest.raises(ValueError, match=message):
        loss(batch)


def test_shapes_that_would_broadcast_are_refused(loss, make_batch):
    batch = make_batch(4)
    batch.batch_size = batch["next"].batch_size = []
    batch["next", "reward"] = batch["next", "reward"][:1]
    with pytest.raises(ValueError, match="reward.* has shape \\(1, 1\\), but the action has shape \\(4, 2\\)"):
        loss.qvalue_loss(batch)
    batch["observation"] = batch["observation"][:1]
    with pytest.raises(ValueError, match="observation has shape \\(1, 3\\), but the action has shape \\(4, 2\\)"):
        loss.vae_loss(batch)


def test_vae_and_actor_losses_need_no_outcome(loss, make_batch):
    """A generative model can be trained on states and actions alone."""
    batch, draw = make_batch(6), torch.zeros(6, 4)
    alone = batch.select("observation", "action")
    for method in (loss.vae_loss, loss.actor_loss):
        torch.testing.assert_close(method(alone, draw)[0], method(batch, draw)[0])


def test_a_nested_key_of_importance_weights(modules, make_batch):
    batch = make_batch(6)
    weights = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, 3.0])
    loss = BCQLoss(*modules)
    expected = loss.vae_loss(batch.copy().set("priority_weight", weights), torch.zeros(6, 4))[0]
    loss.set_keys(priority_weight=("meta", "w"))
    found = loss.vae_loss(batch.copy().set(("meta", "w"), weights), torch.zeros(6, 4))[0]
    torch.testing.assert_close(found, expected)
    loss.vae_loss(batch)


def test_a_loss_without_parameters_is_refused():
    network = TensorDictModule(lambda x: x, ["observation"], ["action"])
    with pytest.raises(ValueError, match="no network of the loss has parameters"):
        CloningLoss(network)


def test_a_loss_inside_another_module_checks_its_state_dict():
    one, other = (nn.ModuleDict({"loss": with_updater(BCQLoss(*bcq_modules()))}) for _ in range(2))
    state = other.state_dict()
    one.load_state_dict(state)
    for name, value in one.state_dict().items():
        assert torch.equal(value, state[name])
    name = "loss.vae_network_params.encoder.0.weight"
    for changed, message in (
        ({key: value for key, value in state.items() if key != name}, "lacks 1 entries"),
        ({**state, "loss.vae_network_params.more": torch.zeros(1)}, "1 other entries"),
        ({**state, name: torch.zeros(1, 1)}, "has 1 entries whose shape differs"),
    ):
        with pytest.raises(RuntimeError, match=message):
            one.load_state_dict(changed)


def test_tensors_with_equal_last_dimensions():
    """TorchRL's dispatch takes the two features for a batch dimension."""
    (network,) = make_cloning_modules(Unbounded((2,)), Bounded(-1, 1, (2,)), hidden=[8])
    loss, observation, action = CloningLoss(network), torch.randn(5, 2), torch.rand(5, 2)
    expected = loss(TensorDict({"observation": observation, "action": action}, [5]))["loss_actor"]
    assert loss(observation=observation, action=action) == expected


def test_the_vae_refuses_inputs_with_the_names_of_its_outputs():
    with pytest.raises(ValueError, match=r"the VAE writes the entries .*; rename the inputs \['loc'\]"):
        ActionVAE(nn.Identity(), nn.Identity(), Bounded(-1, 1, (1,)), latent_dim=2, observation_keys=["loc"])


def test_the_vae_refuses_actions_of_another_size():
    """An encoder that ignores the action, and a decoder of two dimensions."""

    class Encoder(nn.Linear):
        def forward(self, observation, action):
            return super().forward(observation)

    vae = ActionVAE(Encoder(3, 4), MLP(in_features=5, out_features=2), Bounded(-1, 1, (2,)), latent_dim=2)
    batch = TensorDict({"observation": torch.zeros(6, 3), "action": torch.zeros(6, 1)}, [6])
    with pytest.raises(ValueError, match=r"the action has shape \[6, 1\], expected \[6, 2\]"):
        vae.training_loss(batch)
