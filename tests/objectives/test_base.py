"""Behaviour that all objectives share: TorchRL's contract for losses, and the networks of an objective."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torchrl.data import Categorical, Composite, OneHot, Unbounded

from torchrl_bcq import (
    BCQLoss,
    CloningLoss,
    OfflineLoss,
    make_bcq_modules,
    make_cloning_modules,
    make_discrete_bcq_modules,
    make_discrete_cloning_modules,
)

from ..conftest import ACTION_SPEC, OBSERVATION_SPEC
from .conftest import DELAYED, NUM_ACTIONS, OBJECTIVES, bcq_modules, evaluate, make_loss, with_updater


@pytest.fixture(params=OBJECTIVES)
def loss(request) -> OfflineLoss:
    return make_loss(request.param)


# TorchRL's contract


def test_out_keys_are_losses_in_learning_order_then_metadata(loss, make_batch):
    assert loss.out_keys[: len(loss.network_names)] == [f"loss_{name}" for name in loss.network_names]
    assert set(loss(make_batch(4)).keys()) == set(loss.out_keys)
    assert len(loss.out_keys) == len(set(loss.out_keys))


@pytest.mark.parametrize("by_keyword", [True, False])
def test_tensors_can_be_passed_without_a_tensordict(loss, make_batch, by_keyword):
    """Keywords join nested keys by an underscore; positions follow ``in_keys``; the result follows ``out_keys``."""
    batch = make_batch(5)
    expected = evaluate(loss, batch)
    torch.manual_seed(1)
    if by_keyword:
        out = loss(**{key if isinstance(key, str) else "_".join(key): batch[key] for key in loss.in_keys})
    else:
        out = loss(*(batch[key] for key in loss.in_keys))
    out = out if isinstance(out, tuple) else (out,)
    for key, value in zip(loss.out_keys, out, strict=True):
        torch.testing.assert_close(value, expected[key], rtol=0, atol=0)


def test_in_keys_are_in_order():
    outcome = [("next", "observation"), ("next", "reward"), ("next", "done"), ("next", "terminated")]
    assert make_loss("cloning").in_keys == ["observation", "action"]
    for name in ("bcq", "bcq without an actor", "own"):
        assert make_loss(name).in_keys == ["observation", "action", *outcome]
    assert make_loss("discrete cloning").in_keys == ["observation", "choice"]
    assert make_loss("discrete bcq").in_keys == ["observation", "choice", *outcome]
    observation, *rest = outcome
    masked = ["observation", "available", "choice", observation, ("next", "available"), *rest]
    assert make_loss("discrete bcq, masked").in_keys == masked


def test_in_keys_are_all_that_is_read(loss, make_batch):
    batch = make_batch(4).set("other", torch.zeros(4, 1))
    assert evaluate(loss, batch.select(*loss.in_keys)).keys() == evaluate(loss, batch).keys()
    for key in loss.in_keys:
        with pytest.raises(ValueError, match="the batch lacks"):
            loss(batch.exclude(key))


def test_selected_out_keys(loss, make_batch):
    key = loss.out_keys[0]
    assert list(loss.select_out_keys(key)(make_batch(4)).keys()) == [key]
    assert loss.out_keys == [key]


def test_set_keys(loss, make_batch):
    batch = make_batch(4)
    names = [name for name in ("reward", "done", "terminated") if hasattr(loss.tensor_keys, name)]
    expected = evaluate(loss, batch)
    loss.set_keys(priority=("its", "urgency"), **{name: ("its", name) for name in names})
    for name in names:
        batch.rename_key_(("next", name), ("next", "its", name))
    assert {("next", "its", name) for name in names} <= {*loss.in_keys}
    assert {("next", name) for name in names}.isdisjoint(loss.in_keys)
    torch.testing.assert_close(evaluate(loss, batch), expected, rtol=0, atol=0)
    loss(batch)
    assert batch["its", "urgency"].shape == (4,)
    action = loss.tensor_keys.action
    with pytest.raises(ValueError, match=f"cannot change the action key to 'a', because the networks use '{action}'"):
        loss.set_keys(action="a")
    assert loss.tensor_keys.action == action
    with pytest.raises(ValueError, match="urgency is not an accepted tensordict key"):
        loss.set_keys(urgency="u")


@pytest.mark.parametrize("shape", [(6,), (2, 3), (3, 1, 2)])
def test_batches_of_any_rank_give_the_same_losses(loss, make_batch, shape):
    flat = make_batch(6)
    expected, found = evaluate(loss, flat), evaluate(loss, flat.reshape(shape))
    for key in loss.out_keys:
        torch.testing.assert_close(found[key].reshape(expected[key].shape), expected[key])


def test_reductions_and_importance_weights(loss, make_batch):
    batch, weights = make_batch(6), torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, 3.0])
    weighted = batch.clone().set("priority_weight", weights)

    def losses(td, reduction="mean", use="auto"):
        loss.reduction, loss.use_prioritized_weights = reduction, use
        return torch.stack([value for key, value in evaluate(loss, td).items() if key.startswith("loss_")], -1)

    rows = losses(batch, "none")
    assert rows.shape[0] == 6
    for found, expected in (
        (losses(batch, "sum"), rows.sum(0)),
        (losses(batch), rows.mean(0)),
        (losses(weighted), (rows[0] + 3 * rows[5]) / 4),
        (losses(weighted, "sum"), rows[0] + 3 * rows[5]),
        (losses(weighted, "none"), rows * weights[:, None]),
        (losses(weighted, use=False), rows.mean(0)),
    ):
        torch.testing.assert_close(found, expected)
    with pytest.raises(
        ValueError, match=r"priority_weight has shape \(6, 1\), expected \(6,\): one weight for each row"
    ):
        losses(weighted.set("priority_weight", weights[:, None]), "none")


@pytest.mark.parametrize("name", ["bcq", "cloning", "discrete bcq", "discrete bcq, one-hot", "discrete cloning"])
def test_nested_keys(make_batch, name):
    observations = Composite(robot=Composite(joints=Unbounded((3,))))
    keys = {"hidden": (8,), "action_key": ("robot", "torque")}
    actions = OneHot(NUM_ACTIONS) if "one-hot" in name else Categorical(NUM_ACTIONS)
    make = {
        "bcq": lambda: make_bcq_modules(observations, ACTION_SPEC, vae_hidden=(8,), **keys),
        "cloning": lambda: make_cloning_modules(observations, ACTION_SPEC, **keys),
        "discrete cloning": lambda: make_discrete_cloning_modules(observations, actions, **keys),
    }
    modules = make.get(name, lambda: make_discrete_bcq_modules(observations, actions, **keys))()
    flat = make_loss(name)
    nested = with_updater(type(flat)(*modules))
    nested.load_state_dict(flat.state_dict())
    batch = make_batch(4)
    expected = evaluate(flat, batch)
    for prefix in ((), ("next",)):
        batch.rename_key_((*prefix, "observation"), (*prefix, "robot", "joints"))
    batch.rename_key_(flat.tensor_keys.action, ("robot", "torque"))
    torch.testing.assert_close(evaluate(nested, batch), expected, rtol=0, atol=0)


def test_each_loss_has_gradients_for_its_own_network_only(loss, make_batch):
    for name in loss.network_names:
        getattr(loss, f"{name}_loss")(make_batch(16))[0].backward()
        for other in loss.network_names:
            gradients = [p.grad for p in getattr(loss, f"{other}_network").parameters()]
            assert all((gradient is not None) == (other == name) for gradient in gradients)
            assert all(gradient.any() for gradient in gradients if gradient is not None)
        loss.zero_grad()


def test_metadata_are_detached_rows(loss, make_batch):
    out = loss(make_batch(2, 3))
    for name in loss.network_names:
        for key in loss.metadata_keys[name]:
            if key.startswith("loss_"):  # a term of the loss
                continue
            assert out[key].shape[:2] == (2, 3)
            assert not out[key].requires_grad


def test_losses_in_double_precision(loss, make_batch):
    batch = make_batch(4, dtype=torch.float64)
    with pytest.raises(ValueError, match="has dtype torch.float64, expected torch.float32; cast the entry or the loss"):
        loss(batch)
    assert {value.dtype for value in loss.double()(batch).values()} == {torch.float64}


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))])
def test_copies_are_equal_and_independent(loss, make_batch, make_copy):
    batch, copied = make_batch(4), make_copy(loss)
    before = evaluate(loss, batch)
    torch.testing.assert_close(evaluate(copied, batch), before, rtol=0, atol=0)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.add_(0.1)
    torch.testing.assert_close(evaluate(loss, batch), before, rtol=0, atol=0)
    changed = evaluate(copied, batch)
    assert not any(torch.equal(changed[f"loss_{name}"], before[f"loss_{name}"]) for name in loss.network_names)


def test_state_dict_is_loaded_into_another_loss(make_batch):
    for name in OBJECTIVES:
        loss, other, batch = make_loss(name), make_loss(name), make_batch(4)
        state = loss.state_dict()
        assert evaluate(other, batch)["loss_" + loss.network_names[0]] != evaluate(loss, batch)[loss.out_keys[0]]
        other.load_state_dict(state)
        torch.testing.assert_close(evaluate(other, batch), evaluate(loss, batch), rtol=0, atol=0)
        assert loss.state_dict().keys() == state.keys()  # a call adds nothing


def test_reset_parameters_draws_all_weights_again(loss):
    before = {name: parameter.detach().clone() for name, parameter in loss.named_parameters()}
    loss.reset_parameters_recursive()
    assert not any(torch.equal(parameter, before[name]) for name, parameter in loss.named_parameters())


def test_missing_target_updater_is_warned_of(make_batch):
    for name in DELAYED:
        with pytest.warns(UserWarning, match="No target network updater has been associated"):
            OBJECTIVES[name]()(make_batch(4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        OBJECTIVES["cloning"]()(make_batch(4))


@pytest.mark.parametrize("name", DELAYED)
def test_target_dtype_is_the_precision_of_targets(make_batch, name):
    loss, batch = make_loss(name), make_batch(6)
    exact = evaluate(loss, batch)["target_value"]
    loss.target_dtype = torch.bfloat16
    rough = evaluate(loss, batch)["target_value"]
    assert (rough - exact).abs().max() > 1e-5  # 8 bits
    assert rough.dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reduction": "max"}, r"reduction is 'max', expected one of \['mean', 'sum', 'none', None\]"),
        ({"use_prioritized_weights": "yes"}, "use_prioritized_weights is 'yes', expected one of"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        BCQLoss(*bcq_modules(), **settings)
    with pytest.raises(ValueError, match=message):
        CloningLoss(*make_cloning_modules(OBSERVATION_SPEC, ACTION_SPEC, hidden=(8,)), **settings)


# networks


def test_networks_are_in_the_constructors_order():
    vae, actor, critics = bcq_modules()
    loss = BCQLoss(vae, actor, critics)
    assert loss.networks == (vae, actor, critics)
    assert loss.network_names == ("vae", "qvalue", "actor")
    assert BCQLoss(vae, None, critics).networks == (vae, None, critics)


def test_networks_of_a_subclass_that_passes_all_arguments_on(make_batch):
    class Renamed(BCQLoss):
        def __init__(self, *networks, scale: float = 2.0, **settings) -> None:
            super().__init__(*networks, **settings)
            self.scale = scale

    modules = bcq_modules()
    loss = with_updater(Renamed(*modules, lmbda=0.5))
    assert loss.networks == modules
    assert loss.in_keys == BCQLoss(*modules).in_keys
    assert loss(make_batch(4))["loss_vae"].isfinite()


def test_arguments_that_are_not_named_as_the_networks_are_refused():
    class Misnamed(OfflineLoss):
        def __init__(self, policy_network) -> None:
            super().__init__({"actor": policy_network})

    expected = r"the constructor's network arguments are \['policy_network'\], expected \['actor_network'\]"
    with pytest.raises(ValueError, match=expected):
        Misnamed(*make_cloning_modules(OBSERVATION_SPEC, ACTION_SPEC, hidden=(8,)))


def test_trainable_names(make_batch):
    loss = make_loss("bcq")
    loss.vae_network.requires_grad_(False)
    assert loss.trainable_names == ("qvalue", "actor")
    loss.vae_network.decoder[0].bias.requires_grad_(True)
    assert loss.trainable_names == ("vae", "qvalue", "actor")


def test_frozen_weights_stay_frozen_in_copies_and_after_a_load():
    loss = make_loss("own")
    loss.policy_network.network[0].weight.requires_grad_(False)
    for changed in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), loss.double()):
        frozen = [name for name, parameter in changed.policy_network.named_parameters() if not parameter.requires_grad]
        assert frozen == ["network.0.weight"]
        assert changed.trainable_names == ("policy", "critic")
