"""Losses follow weights that are swapped through the whole objective: ``with weights.to_module(loss)``."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tensordict import TensorDict

from torchrl_bcq import OfflineLoss

from .conftest import DELAYED, OBJECTIVES, evaluate, make_loss


def swapped_weights(loss: OfflineLoss, keys: Callable[[str], bool] = lambda name: True) -> TensorDict:
    """Weights, targets among them, that differ from the loss's own where ``keys`` says so."""

    def change(key, value: torch.Tensor) -> torch.Tensor:
        name = ".".join(key) if isinstance(key, tuple) else key
        is_weight = name.endswith(("weight", "bias")) and keys(name)
        return value.detach() + 0.3 * torch.randn_like(value) if is_weight else value.detach()

    return TensorDict.from_module(loss).named_apply(change, nested_keys=True)


def loaded(name: str, weights: TensorDict) -> OfflineLoss:
    """Another loss, into which these weights are loaded."""
    other = make_loss(name)
    given = {".".join(k) if isinstance(k, tuple) else k: v for k, v in weights.items(True, True)}
    other.load_state_dict({key: given[key] for key in other.state_dict()})
    return other


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_follow_weights_that_are_swapped_through_the_objective(make_batch, name):
    loss, batch = make_loss(name), make_batch(6)
    before, weights = evaluate(loss, batch), swapped_weights(loss)
    own = {key: value.clone() for key, value in loss.state_dict().items()}
    expected = evaluate(loaded(name, weights), batch)
    with weights.to_module(loss):
        found = evaluate(loss, batch)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert not any(torch.equal(found[f"loss_{each}"], before[f"loss_{each}"]) for each in loss.network_names)
    torch.testing.assert_close(evaluate(loss, batch), before, rtol=0, atol=0)
    torch.testing.assert_close(dict(loss.state_dict()), own, rtol=0, atol=0)


@pytest.mark.parametrize("name", DELAYED)
def test_targets_that_are_swapped_are_followed(make_batch, name):
    loss, batch = make_loss(name), make_batch(6)
    before, weights = evaluate(loss, batch), swapped_weights(loss, lambda key: key.startswith("target_"))
    with weights.to_module(loss):
        found = evaluate(loss, batch)
    torch.testing.assert_close(found, evaluate(loaded(name, weights), batch), rtol=0, atol=0)
    differing = {key for key in before if not torch.equal(found[key], before[key])}
    assert differing == {
        "target_value",
        "td_error",
        next(key for key in before if key in ("loss_qvalue", "loss_critic")),
    }


def test_gradients_reach_swapped_weights(make_batch):
    loss, batch = make_loss("bcq"), make_batch(6)
    weights = swapped_weights(loss).apply(lambda value: value.requires_grad_() if value.is_floating_point() else value)
    with weights.to_module(loss):
        loss.qvalue_loss(batch)[0].backward()
    assert weights["qvalue_network_params", "critics", "0", "module", "0", "weight"].grad.any()
    assert weights["actor_network_params", "network", "0", "weight"].grad is None
    assert all(parameter.grad is None for parameter in loss.parameters())


def test_own_weights_return_after_an_error_under_swapped_weights(make_batch, monkeypatch):
    loss = make_loss("bcq")
    own = dict(loss.qvalue_network.named_parameters())
    with pytest.raises(ValueError, match="lacks"), swapped_weights(loss).to_module(loss):
        loss.qvalue_loss(make_batch(4).exclude("action"))
    assert all(parameter is own[name] for name, parameter in loss.qvalue_network.named_parameters())


@pytest.mark.filterwarnings("ignore:torch._dynamo.config.inline_inbuilt_nn_modules:FutureWarning")  # read by tensordict
@pytest.mark.parametrize("name", DELAYED)
def test_compiled_losses_are_those_before_and_after_a_swap(make_batch, name):
    loss, batch = make_loss(name), make_batch(6)
    torch._dynamo.reset()
    method = f"{loss.delayed_names[0]}_loss"
    compiled = torch.compile(getattr(loss, method), fullgraph=True, backend="eager")

    def value(function) -> torch.Tensor:
        torch.manual_seed(1)
        return function(batch.clone())[0].detach()

    expected = value(getattr(loss, method))
    torch.testing.assert_close(value(compiled), expected, rtol=0, atol=0)
    with swapped_weights(loss).to_module(loss):
        assert value(getattr(loss, method)) != expected
    torch.testing.assert_close(value(compiled), expected, rtol=0, atol=0)
