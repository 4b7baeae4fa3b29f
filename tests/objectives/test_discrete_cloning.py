"""DiscreteCloningLoss: numbers by hand."""

from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from torchrl_bcq import DiscreteCloningLoss


@pytest.fixture
def network() -> TensorDictModule:
    """At the observations 0 and 1 the probabilities are (1/4, 3/4) and (1/2, 1/2)."""
    linear = nn.Linear(1, 2)
    linear.load_state_dict({"weight": torch.tensor([[math.log(3)], [0.0]]), "bias": torch.tensor([-math.log(3), 0.0])})
    return TensorDictModule(linear, ["observation"], ["logits"])


@pytest.fixture
def batch() -> TensorDict:
    return TensorDict({"observation": torch.tensor([[0.0], [1.0]]), "action": torch.tensor([0, 1])}, [2])


ROWS = [math.log(4), math.log(2)]


@pytest.mark.parametrize(
    ("reduction", "expected"), [("mean", sum(ROWS) / 2), (None, sum(ROWS) / 2), ("sum", sum(ROWS)), ("none", ROWS)]
)
def test_value_priority_and_accuracy_by_hand(network, batch, reduction, expected):
    value, metadata = DiscreteCloningLoss(network, action_space="categorical", reduction=reduction).actor_loss(batch)
    assert value.tolist() == pytest.approx(expected)
    assert batch["td_error"].tolist() == pytest.approx(ROWS)
    assert metadata["imitation_accuracy"].tolist() == [0, 0]  # the second is a tie, which the first action wins


def test_the_priority_has_the_dtype_of_prioritized_samplers(network, batch):
    batch = batch.set("observation", batch["observation"].double())
    assert DiscreteCloningLoss(network.double(), action_space="categorical").actor_loss(batch)[0].dtype == torch.float64
    assert batch["td_error"].dtype == torch.float32


def test_gradient_by_hand(network, batch):
    """Mean over the rows of p - onehot: (-3/4, 3/4) at 0 and (1/2, -1/2) at 1."""
    DiscreteCloningLoss(network, action_space="categorical").actor_loss(batch)[0].backward()
    torch.testing.assert_close(network.module.bias.grad, torch.tensor([-0.125, 0.125]))
    torch.testing.assert_close(network.module.weight.grad, torch.tensor([[0.25], [-0.25]]))


def test_weights_and_masks_by_hand(network, batch):
    loss = DiscreteCloningLoss(network, action_space="categorical")
    batch["priority_weight"] = torch.tensor([3.0, 1.0])
    assert loss.actor_loss(batch)[0].item() == pytest.approx((3 * ROWS[0] + ROWS[1]) / 4)
    loss.set_keys(action_mask="free")
    batch["free"] = torch.tensor([[True, True], [False, True]])
    value, metadata = loss.actor_loss(batch)
    assert value.item() == pytest.approx(3 * ROWS[0] / 4)
    assert metadata["imitation_accuracy"].tolist() == [0, 1]
    assert loss.in_keys == ["observation", "free", "action"]


def test_it_has_no_values_and_no_targets(network, batch):
    loss = DiscreteCloningLoss(network, action_space="categorical")
    assert loss.value(batch) is None
    assert not loss.has_values
    assert loss.delayed_names == ()
    assert loss.out_keys == ["loss_actor", "imitation_accuracy"]
    two = TensorDictModule(lambda x: (x, x), ["observation"], ["values", "logits"])
    with pytest.raises(ValueError, match=r"actor_network writes \['values', 'logits'\], expected 1 entry: the logits"):
        DiscreteCloningLoss(two, action_space="categorical")
