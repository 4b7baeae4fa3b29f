"""A layer under several names: within a network, and in several networks of one objective."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tensordict.nn import TensorDictModule
from torch import nn

from torchrl_bcq import (
    ActionVAE,
    BCQLoss,
    CloningLoss,
    DeterministicActor,
    OfflineLoss,
    PerturbationActor,
    QEnsemble,
)

from ..conftest import ACTION_SPEC, random_transitions
from .conftest import bcq_modules, with_updater


class TwoNames(nn.Module):
    """Uses one layer under two names."""

    def __init__(self, trunk: nn.Linear, inputs: int, out_features: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.same = trunk
        self.head = nn.Linear(trunk.out_features + inputs, out_features)

    def forward(self, observation, *action):
        return self.head(torch.cat([self.same(self.trunk(observation)).tanh(), *action], -1))


def shared_loss() -> BCQLoss:
    """Both critics and the actor share one layer, under two names in each."""
    trunk = nn.Linear(3, 3)
    keys = ["observation", "action"], ["state_action_value"]
    critics = QEnsemble([TensorDictModule(TwoNames(trunk, 2, 1), *keys) for _ in range(2)])
    return with_updater(BCQLoss(bcq_modules()[0], PerturbationActor(TwoNames(trunk, 2, 2), ACTION_SPEC), critics))


def trunks(loss: OfflineLoss) -> list[nn.Linear]:
    networks = [loss.actor_network.network, *(critic.module for critic in loss.qvalue_network.critics)]
    return [layer for network in networks for layer in (network.trunk, network.same)]


def gradients(loss: BCQLoss, *names: str) -> dict[str, torch.Tensor]:
    """Of actor and critics, after these losses on the same batch and noise."""
    loss.zero_grad()
    for name in names:
        getattr(loss, f"{name}_loss")(*batch_and_noise(name, loss))[0].backward()
    networks = nn.ModuleList([loss.actor_network, loss.qvalue_network])
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in networks.named_parameters()}


def batch_and_noise(name: str, loss: BCQLoss):
    torch.manual_seed(1)
    dtype = next(loss.parameters()).dtype
    batch = random_transitions(6, dtype=dtype)
    return batch, torch.randn(6, *([10] if name == "qvalue" else []), 4, dtype=dtype)


def loaded(loss: BCQLoss, **settings) -> BCQLoss:
    loss.load_state_dict({name: value.clone() for name, value in loss.state_dict().items()}, **settings)
    return loss


CHANGES = {
    "none": lambda loss: loss,
    "deepcopy": copy.deepcopy,
    "pickle": lambda loss: pickle.loads(pickle.dumps(loss)),
    "to": lambda loss: loss.to(torch.float64).to(torch.float32),
    "moved": lambda loss: loss._apply(torch.clone),
    "load_state_dict": loaded,
    "load_state_dict(assign=True)": lambda loss: loaded(loss, assign=True),
    "copy of a copy": lambda loss: copy.deepcopy(pickle.loads(pickle.dumps(loss))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_shared_layer_is_one_layer_and_gets_the_gradients_of_all_losses(change):
    """The gradient of two losses is the sum of each one's, computed before the change."""
    loss = shared_loss()
    of_critics, of_actor = gradients(loss, "qvalue"), gradients(loss, "actor")
    assert of_critics["0.network.trunk.weight"].any()
    assert of_actor["0.network.trunk.weight"].any()
    loss = CHANGES[change](loss)
    assert len({id(layer) for layer in trunks(loss)}) == 1
    assert len({id(layer.weight) for layer in trunks(loss)}) == 1
    held = [loss.actor_network_params["network"], *(loss.qvalue_network_params["critics", i, "module"] for i in "01")]
    for params in held:
        assert params["trunk", "weight"] is params["same", "weight"] is trunks(loss)[0].weight
    both = gradients(loss, "qvalue", "actor")
    for name, gradient in both.items():
        torch.testing.assert_close(gradient, of_critics[name] + of_actor[name], rtol=1e-5, atol=1e-7)


def test_values_and_gradients_of_a_layer_under_two_names(make_batch):
    """A network that applies the matrix W twice: the loss and its gradient equal those of explicit products."""
    network = TwoNames(nn.Linear(3, 3), 0, 2)
    loss, batch = CloningLoss(DeterministicActor(network, ACTION_SPEC)), make_batch(5)
    loss.actor_loss(batch)[0].backward()
    weight, bias, head = (
        p.detach().clone().requires_grad_() for p in (*network.trunk.parameters(), network.head.weight)
    )
    x = batch["observation"]
    logits = torch.tanh((x @ weight.T + bias) @ weight.T + bias) @ head.T + network.head.bias.detach()
    action = torch.tensor([0.0, 2.0]) + torch.tensor([1.0, 2.0]) * torch.tanh(logits)  # centre and half-range
    expected = (action - batch["action"]).square().mean()
    expected.backward()
    torch.testing.assert_close(loss.actor_loss(batch)[0], expected)
    torch.testing.assert_close(network.trunk.weight.grad, weight.grad)
    torch.testing.assert_close(network.trunk.bias.grad, bias.grad)
    assert len(list(loss.parameters())) == 4


def test_targets_of_a_shared_layer_are_used():
    """A change of the target's copies changes the target; a change of the trained layer does not."""
    loss = shared_loss()
    batch, latent = batch_and_noise("qvalue", loss)

    def target() -> torch.Tensor:
        return loss.qvalue_loss(batch, latent)[1]["target_value"]

    before = target()
    with torch.no_grad():
        trunks(loss)[0].weight.add_(1)
    torch.testing.assert_close(target(), before, rtol=0, atol=0)
    critics = loss.target_qvalue_network_params["critics"]
    for params in (loss.target_actor_network_params["network"], critics["0", "module"], critics["1", "module"]):
        for name in ("trunk", "same"):
            params[name, "bias"].data.add_(1)
    assert (target() != before).all()


@pytest.mark.parametrize("settings", [{}, {"delay_actor": False}, {"delay_qvalue": False}])
def test_networks_without_a_target_keep_a_shared_layer_in_the_target(settings):
    """The VAE shares a layer with actor and critics. In the target, it decodes with the current weights."""
    torch.manual_seed(0)
    trunk, keys = nn.Linear(3, 3), (["observation", "action"], ["state_action_value"])
    vae = ActionVAE(TwoNames(trunk, 2, 8), TwoNames(trunk, 4, 2), ACTION_SPEC, latent_dim=4)
    actor = PerturbationActor(TwoNames(trunk, 2, 2), ACTION_SPEC, phi=0.5)
    critics = QEnsemble([TensorDictModule(TwoNames(trunk, 2, 1), *keys) for _ in range(2)])
    loss = with_updater(BCQLoss(vae, actor, critics, **settings))
    _, target_actor, target_critics = copy.deepcopy((vae, actor, critics))
    with torch.no_grad():
        for weight in loss.parameters():
            weight.add_(torch.randn_like(weight))
        batch, latent = batch_and_noise("qvalue", loss)
        candidates = batch["next"].select("observation").unsqueeze(-1).expand(6, 10).copy()
        candidates = vae.decode(candidates, latent)
        candidates = (actor if settings.get("delay_actor") is False else target_actor)(candidates)
        values = (critics if settings.get("delay_qvalue") is False else target_critics)(candidates)
        values = values["state_action_value"]
        best = (0.75 * values.amin(-1) + 0.25 * values.amax(-1)).amax(1)
    going_on = ~batch["next", "terminated"].squeeze(-1)
    expected = batch["next", "reward"].squeeze(-1) + 0.99 * best * going_on
    torch.testing.assert_close(loss.qvalue_loss(batch, latent)[1]["target_value"], expected)
