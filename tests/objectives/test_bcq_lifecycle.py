"""BCQLoss is copied, pickled, reset, moved and compiled."""

from __future__ import annotations

import copy
import pickle
from dataclasses import asdict

import pytest
import torch
from tensordict.nn import InteractionType, ProbabilisticTensorDictModule
from torch import nn
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.objectives import SoftUpdate
from torchrl.objectives.utils import ValueEstimators

from torchrl_bcq import BCQLoss, BCQPolicy, make_bcq_modules

from ..conftest import ACTION_SPEC, OBSERVATION_SPEC
from .conftest import LOSSES


def draws(*batch: int) -> dict[str, torch.Tensor]:
    """Fixed noise for each loss."""
    return {"vae": torch.randn(*batch, 4), "qvalue": torch.randn(*batch, 10, 4), "actor": torch.randn(*batch, 4)}


def replaced(loss: BCQLoss) -> BCQLoss:
    loss.load_state_dict({name: value.clone() for name, value in loss.state_dict().items()}, assign=True)
    return loss


CHANGES = {  # after each but the first, the loss holds other tensors than before
    "none": lambda loss: loss,
    "deepcopy": copy.deepcopy,
    "pickle": lambda loss: pickle.loads(pickle.dumps(loss)),
    "assign": replaced,
    "double": lambda loss: loss.double(),
    "moved": lambda loss: loss._apply(torch.clone),
    "pickle of a copy": lambda loss: pickle.loads(pickle.dumps(copy.deepcopy(loss))),
    "copy, cast, replaced": lambda loss: replaced(copy.deepcopy(loss).double()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_modules_hold_the_parameters_of_their_loss(loss, change):
    """Otherwise an optimizer would step parameters that the losses do not use."""
    loss = CHANGES[change](loss)
    for name in LOSSES:
        tensors = getattr(loss, f"{name}_network_params")
        network = getattr(loss, f"{name}_network")
        held = {**dict(network.named_parameters()), **dict(network.named_buffers())}
        own = {".".join(key) if isinstance(key, tuple) else key: value for key, value in tensors.items(True, True)}
        assert held.keys() == own.keys()
        assert all(held[key] is own[key] for key in held if isinstance(own[key], nn.Parameter))
        assert all(held[key].data_ptr() == own[key].data_ptr() for key in held)
    parameters = {id(p) for name in LOSSES for p in getattr(loss, f"{name}_network").parameters()}
    assert parameters == {id(p) for p in loss.parameters()}
    assert len(parameters) == 12 + 12 + 6


@pytest.mark.parametrize("change", CHANGES)
def test_a_policy_of_the_modules_acts_with_the_trained_weights(loss, make_batch, change):
    """It acts as a policy of new modules, into which the trained weights are loaded."""
    loss = CHANGES[change](loss)
    dtype = next(loss.parameters()).dtype
    policy = BCQPolicy(loss.vae_network, loss.actor_network, loss.qvalue_network)
    states, batch = make_batch(20, dtype=dtype).select("observation"), make_batch(64, dtype=dtype)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.1)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        before = policy(states.clone())["action"]
        for _ in range(5):
            optimizer.zero_grad()
            sum(getattr(loss, f"{name}_loss")(batch)[0] for name in LOSSES).backward()
            optimizer.step()
        after = policy(states.clone())["action"]
        fresh = make_bcq_modules(OBSERVATION_SPEC, ACTION_SPEC, hidden=(16, 16), vae_hidden=(16, 16))
        copied = BCQLoss(*(module.to(dtype) for module in fresh))
        SoftUpdate(copied, tau=0.005)
        copied.load_state_dict(loss.state_dict())
        expected = BCQPolicy(*fresh)(states.clone())["action"]
    assert (after - before).abs().max() > 0.1
    torch.testing.assert_close(after, expected)


@pytest.mark.parametrize("name", ["qvalue", "actor"])
def test_after_an_error_the_modules_hold_their_own_weights(loss, modules, make_batch, monkeypatch, name):
    """The error is raised while the modules hold the weights of the targets, or detached ones."""
    own = {name: p for i, module in enumerate(modules) for name, p in module.named_parameters(f"{i}")}

    def fail(*inputs):
        raise ZeroDivisionError

    monkeypatch.setattr(modules[1].network, "forward", fail)
    monkeypatch.setattr(modules[2], "first", fail)
    with pytest.raises(ZeroDivisionError):
        getattr(loss, f"{name}_loss")(make_batch(4))
    for i, module in enumerate(modules):
        assert all(p is own[name] for name, p in module.named_parameters(f"{i}"))


def test_a_state_dict_may_be_incomplete_if_it_is_not_loaded_strictly(loss, modules):
    """Only the behaviour model is loaded; everything else stays."""
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    part = {name: value + 1 for name, value in before.items() if name.startswith("vae_network_params")}
    found = loss.load_state_dict({**part, "unknown": torch.zeros(1)}, strict=False)
    assert (found.missing_keys, found.unexpected_keys) == (sorted(before.keys() - part.keys()), ["unknown"])
    torch.testing.assert_close(dict(loss.state_dict()), {**before, **part}, rtol=0, atol=0)
    assert modules[0].encoder[0].weight.equal(part["vae_network_params.encoder.0.weight"])
    with pytest.raises(RuntimeError, match="the state_dict lacks"):
        loss.load_state_dict(part)


def test_reset_parameters_recursive(loss, modules):
    """Each weight is drawn again, also in the modules, and the critics differ from each other."""
    with torch.no_grad():
        for p in loss.state_dict().values():
            p.add_(1000.0)
    bounds = {"low", "high"}
    loss.reset_parameters_recursive()
    for name, p in loss.state_dict().items():
        assert (p.abs().max() > 900) == (name.rsplit(".", 1)[-1] in bounds), name
    first, second = (list(critic.parameters()) for critic in modules[2].critics)
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert max(p.abs().max() for p in first) < 2


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
@pytest.mark.parametrize("estimator", [ValueEstimators.TD0, ValueEstimators.TD1, ValueEstimators.TDLambda])
def test_moving_a_loss_moves_its_modules(loss, modules, make_batch, estimator, device):
    """Moves to a device and, as that may be the present one, to other memory; the modules move, too."""
    loss.make_value_estimator(estimator)
    batch, noise = make_batch(2, 3), draws(2, 3)["qvalue"]
    before = loss.qvalue_loss(batch, noise)[0]
    old = [tensor.data for tensor in loss.state_dict().values()]  # kept alive, so that no address is used again
    loss.to(device)._apply(torch.clone)
    tensors = [tensor for module in modules for tensor in module.state_dict().values()]
    new = {tensor.data_ptr() for tensor in loss.state_dict().values()}
    assert {tensor.data_ptr() for tensor in tensors} < new
    assert not {tensor.data_ptr() for tensor in old} & {tensor.data_ptr() for tensor in tensors}
    assert {tensor.device.type for tensor in tensors} == {device}
    torch.testing.assert_close(loss.qvalue_loss(batch.to(device), noise.to(device))[0].cpu(), before)


def test_key_names_and_their_defaults(modules):
    loss = BCQLoss(*modules)
    assert asdict(loss.tensor_keys) == {
        "action": "action",
        "state_action_value": "state_action_value",
        "reward": "reward",
        "done": "done",
        "terminated": "terminated",
        "steps_to_next_obs": "steps_to_next_obs",
        "priority": "td_error",
        "priority_weight": "priority_weight",
    }
    for name in ("reward", "done", "terminated", "steps_to_next_obs"):
        loss.set_keys(**{name: ("mine", name)})
        assert getattr(loss.value_estimator.tensor_keys, name) == ("mine", name)
        loss.set_keys(**{name: None})  # TorchRL's way back to the default
        assert getattr(loss.value_estimator.tensor_keys, name) == name
    with pytest.raises(ValueError, match="priorty is not an accepted tensordict key"):
        loss.set_keys(priorty="p")


@pytest.mark.parametrize("estimator", [ValueEstimators.TD0, ValueEstimators.TDLambda])
def test_vmap_switches_change_nothing(modules, make_batch, estimator):
    """Nothing is vmapped: TorchRL's switches are accepted and have no effect."""
    values, batch, latent = [], make_batch(2, 3), torch.randn(2, 3, 10, 4)
    loss = BCQLoss(*modules)
    SoftUpdate(loss, tau=0.005)
    for settings in ({}, {"deactivate_vmap": True}):
        loss.make_value_estimator(estimator, **settings)
        assert loss.value_estimator.deactivate_vmap == bool(settings)
        values.append(loss.qvalue_loss(batch, latent)[0])
        loss.set_vmap_randomness("different")
        values.append(loss.qvalue_loss(batch, latent)[0])
    assert all(torch.equal(value, values[0]) for value in values)


def test_dropout_draws_for_each_candidate(modules, make_batch):
    """Dropout in a critic needs no setting of vmap's randomness."""
    vae, actor, critics = modules
    for critic in critics.critics:
        critic.module.insert(2, nn.Dropout(0.5))
    critics._batched = False
    loss = BCQLoss(vae, actor, critics, reduction="none")
    SoftUpdate(loss, tau=0.005)
    one = make_batch(1)
    batch = one.expand(50).clone()
    errors = loss.qvalue_loss(batch, torch.zeros(50, 10, 4))[0]
    assert errors.unique().numel() > 40


class RandomDecoder(nn.Module):
    """A generative model that samples by TorchRL's probabilistic module, independent of its latent."""

    observation_keys, action_key, latent_dim, latent_clip, loss_keys = ("observation",), "action", 1, 0.5, ()

    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(2))
        self.sample = ProbabilisticTensorDictModule(
            ["loc", "scale"],
            ["action"],
            distribution_class=torch.distributions.Normal,
            default_interaction_type=InteractionType.RANDOM,
        )

    def training_loss(self, tensordict, noise=None):
        return (tensordict["action"] - self.loc).square().mean(-1), {}

    def decode(self, tensordict, latent):
        loc = self.loc.expand(*tensordict.batch_size, 2)
        action = self.sample(tensordict.empty().set("loc", loc).set("scale", torch.ones_like(loc)))["action"]
        return tensordict.set("action", action)


def test_candidates_differ_inside_the_losses(modules, make_batch):
    """TorchRL's losses sample in DETERMINISTIC mode, in which all candidates of such a model are equal."""
    _, actor, critics = modules
    loss = BCQLoss(RandomDecoder(), actor, critics)
    SoftUpdate(loss, tau=0.005)
    seen = []
    actor.network.register_forward_hook(lambda module, args, output: seen.append(args[-1]))
    loss(make_batch(6))
    assert [tuple(action.shape) for action in seen] == [(6, 10, 2), (6, 2)]
    assert seen[0].unique().numel() == 120
    BCQPolicy(RandomDecoder(), actor, critics)(make_batch(6).select("observation"))
    assert seen[2].unique().numel() == 1200


@pytest.mark.filterwarnings("ignore:torch._dynamo.config.inline_inbuilt_nn_modules:FutureWarning")  # read by tensordict
@pytest.mark.parametrize("name", LOSSES)
def test_compiles_as_one_graph(loss, make_batch, name):
    """With a backend that traces forward and backward; inductor would take a minute."""
    batch, noise = make_batch(6), draws(6)[name]
    eager, metadata = getattr(loss, f"{name}_loss")(batch.clone(), noise)
    eager.backward()
    expected = {key: p.grad.clone() for key, p in loss.named_parameters() if p.grad is not None}
    loss.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(getattr(loss, f"{name}_loss"), fullgraph=True, backend="aot_eager")
    value, compiled_metadata = compiled(batch.clone(), noise)
    value.backward()
    torch.testing.assert_close(value, eager)
    torch.testing.assert_close(compiled_metadata, metadata)
    torch.testing.assert_close({k: p.grad for k, p in loss.named_parameters() if p.grad is not None}, expected)
    assert compiled(batch.clone())[0].isfinite()  # with drawn noise


def test_a_behaviour_model_without_a_method_to_reset_keeps_its_weights(modules):
    model = RandomDecoder()
    with torch.no_grad():
        model.loc.fill_(3)
    loss = BCQLoss(model, *modules[1:])
    before = [weight.clone() for network in modules[1:] for weight in network.parameters()]
    loss.reset_parameters_recursive()
    assert model.loc.tolist() == [3, 3]
    after = [weight for network in modules[1:] for weight in network.parameters()]
    assert not any(map(torch.equal, before, after))
