"""A network uses other weights in a context, and its own afterwards."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from tensordict import TensorDict, TensorDictParams
from tensordict.nn import TensorDictModule
from torch import nn

from torchrl_bcq.objectives.ownership import RunOn, find_slots


class Stacked(nn.Module):
    """Networks whose stacked weights are in one TensorDict, as in TorchRL's MultiAgentMLP."""

    def __init__(self, *networks: nn.Module) -> None:
        super().__init__()
        self.weights = TensorDict.from_modules(*networks, as_module=True)
        self.called = [networks[0]]  # a list: its own weights are not used

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.vmap(self.call, (None, 0))(x, self.weights).movedim(0, -1)

    def call(self, x: torch.Tensor, weights: TensorDict) -> torch.Tensor:
        with weights.to_module(self.called[0]):
            return self.called[0](x)


NETWORKS = {
    "linear": lambda: nn.Linear(3, 2),
    "nested": lambda: nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.Tanh()), nn.Linear(4, 2)),
    "buffers": lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval(),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 2)).eval(),
    "recurrent": lambda: nn.GRU(3, 2, batch_first=True),  # holds its weights also in a list
    "a layer under two names": lambda: nn.Sequential(layer := nn.Linear(3, 3), nn.Tanh(), layer),
    "stacked": lambda: Stacked(nn.Linear(3, 2), nn.Linear(3, 2)),
    "in a tensordict": lambda: TensorDictModule(nn.Linear(3, 2), in_keys=["x"], out_keys=["y"]),
}


def output(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
    out = network(x)
    return out[0] if isinstance(out, tuple) else out


def two_networks(name: str) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    network = NETWORKS[name]()
    other = deepcopy(network)
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):
            if tensor.is_floating_point():
                tensor.uniform_(0.1, 1)
    return network, other


def weights_of(network: nn.Module) -> TensorDictParams:
    return TensorDictParams(TensorDict.from_module(network), no_convert=True)


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_are_those_of_the_other_network(name):
    network, other = two_networks(name)
    x, before, held = torch.randn(5, 3), deepcopy(network.state_dict()), dict(network.named_parameters())
    own, expected = output(network, x), output(other, x)
    slots = find_slots(weights_of(other), network)
    assert not torch.allclose(own, expected)
    for _ in range(2):  # slots can be used again
        with RunOn(slots):
            torch.testing.assert_close(output(network, x), expected, rtol=0, atol=0)
        torch.testing.assert_close(output(network, x), own, rtol=0, atol=0)
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)
    assert all(parameter is held[key] for key, parameter in network.named_parameters())


@pytest.mark.parametrize("name", ["nested", "recurrent", "stacked"])
@pytest.mark.parametrize("detached", [False, True])
def test_gradients_reach_the_other_weights_unless_they_are_detached(name, detached):
    network, other = two_networks(name)
    x = torch.randn(5, 3, requires_grad=True)
    with RunOn(find_slots(weights_of(other), network), detached=detached):
        output(network, x).sum().backward()
    assert x.grad.any()
    assert all((parameter.grad is None) == detached for parameter in other.parameters())
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize("name", ["nested", "recurrent"])
def test_own_weights_return_after_an_error(name):
    network, other = two_networks(name)
    x = torch.randn(5, 3)
    own = output(network, x)
    with pytest.raises(KeyError), RunOn(find_slots(weights_of(other), network)):
        raise KeyError
    torch.testing.assert_close(output(network, x), own, rtol=0, atol=0)


def test_the_context_compiles_as_one_graph():
    network, other = two_networks("nested")
    slots, x = find_slots(weights_of(other), network), torch.randn(5, 3)

    @torch.compile(fullgraph=True, backend="eager")
    def both(x):
        with RunOn(slots):
            inside = network(x)
        return inside, network(x)

    own, expected = network(x), other(x)
    torch.testing.assert_close(both(x), (expected, own))
