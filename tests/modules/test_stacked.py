from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torchrl.data import Bounded

from torchrl_bcq import ActionVAE, Normalization, make_bcq_modules
from torchrl_bcq.modules.stacked import StackedLinear, stack_networks

from ..conftest import ACTION_SPEC, OBSERVATION_SPEC

AGENTS = 3


@pytest.fixture(params=[False, True])
def agents(request, make_batch):
    """Networks of three agents, in float64, with and without layers that scale."""
    normalization = Normalization.fit(make_batch(50, dtype=torch.float64)) if request.param else None
    spec = Bounded(ACTION_SPEC.space.low.double(), ACTION_SPEC.space.high.double(), dtype=torch.float64)
    sizes = {"hidden": (8, 6), "vae_hidden": (7,), "num_critics": 2, "dtype": torch.float64}
    return [
        make_bcq_modules(OBSERVATION_SPEC.to(torch.float64), spec, normalization=normalization, **sizes)
        for _ in range(AGENTS)
    ]


@pytest.mark.parametrize("rows", [(5,), (5, 4)])
def test_each_part_is_what_its_own_networks_give(agents, make_batch, rows):
    batch = make_batch(AGENTS, *rows, dtype=torch.float64)
    latent = torch.randn(AGENTS, *rows, 4, dtype=torch.float64)
    vae, actor, critics = (stack_networks(networks) for networks in zip(*agents, strict=True))
    decoded = vae.decode(batch.clone(), latent)["action"]
    perturbed = actor(batch.clone())["action"]
    values, first = critics(batch.clone())["state_action_value"], critics.first(batch.clone())["state_action_value"]
    assert critics._batched
    for k, (own_vae, own_actor, own_critics) in enumerate(agents):
        torch.testing.assert_close(decoded[k], own_vae.decode(batch[k].clone(), latent[k])["action"])
        torch.testing.assert_close(perturbed[k], own_actor(batch[k].clone())["action"])
        torch.testing.assert_close(values[k], own_critics(batch[k].clone())["state_action_value"])
        torch.testing.assert_close(first[k], own_critics.first(batch[k].clone())["state_action_value"])


def test_gradients_reach_each_agents_part_alone(agents, make_batch):
    batch = make_batch(AGENTS, 5, dtype=torch.float64)
    critics = stack_networks([networks[2] for networks in agents])
    critics(batch)["state_action_value"][1].sum().backward()
    for parameter in critics.parameters():
        assert parameter.grad[1].any()
        assert not parameter.grad[[0, 2]].any()


@pytest.mark.parametrize("bias", [True, False])
def test_stacked_linear_is_each_layer_on_its_part(bias):
    layers = [nn.Linear(4, 2, bias=bias, dtype=torch.float64) for _ in range(AGENTS)]
    x = torch.randn(AGENTS, 5, 3, 4, dtype=torch.float64)
    expected = torch.stack([layer(part) for layer, part in zip(layers, x, strict=True)])
    torch.testing.assert_close(StackedLinear(layers)(x), expected)


def test_the_networks_stay_as_they_are(agents):
    before = [copy.deepcopy(network.state_dict()) for networks in agents for network in networks]
    stacked = stack_networks([networks[0] for networks in agents])
    with torch.no_grad():
        for tensor in stacked.double().parameters():
            tensor.add_(1)
    stacked.to(torch.float32)
    for network, state in zip((n for networks in agents for n in networks), before, strict=True):
        torch.testing.assert_close(dict(network.state_dict()), dict(state), rtol=0, atol=0)


def test_refuses_what_cannot_be_stacked():
    with pytest.raises(ValueError, match="differ in structure"):
        stack_networks([nn.Sequential(nn.Linear(2, 3)), nn.Sequential(nn.Linear(2, 4))])
    with pytest.raises(ValueError, match=r"a LayerNorm has parameters \['weight', 'bias'\]"):
        stack_networks([nn.Sequential(nn.LayerNorm(3)) for _ in range(2)])

    def vae(high: float) -> ActionVAE:
        return ActionVAE(nn.Linear(5, 4), nn.Linear(5, 2), Bounded(-1, high, (2,)), latent_dim=2)

    with pytest.raises(ValueError, match="high of ActionVAE differs"):
        stack_networks([vae(1.0), vae(2.0)])
