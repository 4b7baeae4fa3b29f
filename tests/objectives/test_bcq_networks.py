"""BCQLoss and BCQPolicy name a network that breaks its protocol."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import (
    EnsembleModule,
    ProbabilisticTensorDictModule,
    TensorDictModule,
    TensorDictModuleBase,
    TensorDictSequential,
)
from torch import nn
from torch.distributions import Normal
from torchrl.data import Composite, Unbounded
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import MLP, BatchRenorm1d, LSTMModule
from torchrl.objectives import SoftUpdate

from torchrl_bcq import (
    ActionVAE,
    BCQLoss,
    BCQPolicy,
    BehaviorCloningPolicy,
    FQELoss,
    PerturbationActor,
    QEnsemble,
    make_bcq_modules,
)
from torchrl_bcq.trainers.execution import Execution

from ..batch_norm import Normalized
from ..conftest import ACTION_SPEC


class Gaussian(nn.Module):
    """A generative model that keeps its protocol, unless its loss or its action is changed."""

    observation_keys, action_key, latent_dim, latent_clip, loss_keys = ("observation",), "action", 2, math.inf, ()

    def __init__(self, change_loss=lambda rows: (rows, {}), change_action=lambda td, action: td.set("action", action)):
        super().__init__()
        self.mean = nn.Linear(3, 2)
        self.change_loss, self.change_action = change_loss, change_action

    def training_loss(self, tensordict, noise=None):
        return self.change_loss((tensordict["action"] - self.mean(tensordict["observation"])).square().sum(-1))

    def decode(self, tensordict, latent):
        return self.change_action(tensordict, self.mean(tensordict["observation"]) + latent)


def loss_of(vae, actor, critics) -> BCQLoss:
    loss = BCQLoss(vae, actor, critics)
    SoftUpdate(loss, tau=0.005)
    return loss


def test_a_model_that_keeps_the_protocol(modules, make_batch):
    model, batch = Gaussian(), make_batch(8)
    loss = loss_of(model, *modules[1:])
    expected = (batch["action"] - model.mean(batch["observation"])).square().sum(-1).mean()
    torch.testing.assert_close(loss.vae_loss(batch)[0], expected)
    assert loss.out_keys == ["loss_vae", "loss_qvalue", "loss_actor", "td_error", "pred_value", "target_value"]


class Sampling(Gaussian):
    """Learns from random numbers, which one of TorchRL's modules draws."""

    def training_loss(self, tensordict, noise=None):
        draw = ProbabilisticTensorDictModule(["loc", "scale"], ["x"], distribution_class=Normal)
        zeros = torch.zeros(tensordict.shape)
        return draw(TensorDict(loc=zeros, scale=zeros + 1))["x"] + 0 * self.mean(tensordict["observation"]).sum(-1), {}


@pytest.mark.parametrize("name", ["forward", "vae_loss"])
def test_a_model_samples_with_modules_of_torchrl(modules, make_batch, name):
    """In the losses, also when one of them is called alone, the module draws instead of taking the mean, 0."""
    loss, batch = loss_of(Sampling(), *modules[1:]), make_batch(8)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        found = loss(batch)["loss_vae"] if name == "forward" else loss.vae_loss(batch)[0]
    assert found != 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda rows: (rows.mean(), {}),
            r"training_loss gave a loss of shape \(\) and metadata \[\]; it must return one loss per row, \(8,\)",
        ),
        (lambda rows: (rows.unsqueeze(-1), {}), r"training_loss gave a loss of shape \(8, 1\)"),
        (lambda rows: (rows, {"nll": rows}), r"shape \(8,\) and metadata \['nll'\]; .* and the metadata \[\]"),
    ],
)
def test_training_loss_must_have_one_value_for_each_row(modules, make_batch, change, message):
    with pytest.raises(ValueError, match=message):
        loss_of(Gaussian(change_loss=change), *modules[1:]).vae_loss(make_batch(8))


def test_a_model_that_replaces_the_recorded_actions_is_refused(modules, make_batch):
    """Its error would be 0."""

    class InPlace(Gaussian):
        def training_loss(self, tensordict, noise=None):
            return (self.decode(tensordict, 0.0)["action"] - tensordict["action"]).square().sum(-1), {}

    with pytest.raises(ValueError, match="training_loss replaced the recorded actions; let it decode into a copy"):
        loss_of(InPlace(), *modules[1:]).vae_loss(make_batch(8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda td, action: td, "decode wrote nothing to 'action'; it must write one action"),
        (lambda td, action: td.empty().set("other", action), "decode wrote nothing to 'action'"),
        (
            lambda td, action: td.empty().set("action", action.sum(-1)),
            r"wrote a tensor of shape \(.*\) to 'action'; it must write one",
        ),
    ],
)
def test_decode_must_write_an_action(modules, make_batch, change, message):
    model, batch = Gaussian(change_action=change), make_batch(8)
    loss = loss_of(model, *modules[1:])
    for call in (loss.actor_loss, loss.qvalue_loss, BCQPolicy(model, *modules[1:])):
        with pytest.raises(ValueError, match=message):
            call(batch.clone())


def test_outputs_that_would_broadcast_are_refused(modules, make_batch):
    """One number for two action dimensions."""
    vae, actor, critics = modules
    narrow_actor = PerturbationActor(MLP(5, 1, num_cells=[4]), ACTION_SPEC)
    narrow_vae = ActionVAE(vae.encoder, MLP(7, 1, num_cells=[4]), ACTION_SPEC, latent_dim=4)
    with pytest.raises(ValueError, match="the actor's network returns 1 features, the action has 2 dimensions"):
        loss_of(vae, narrow_actor, critics).actor_loss(make_batch(4))
    for name in ("vae", "qvalue", "actor"):
        with pytest.raises(ValueError, match=r"decoder returns the shape \(4.*, 1\), expected \(4.*, 2\); change"):
            getattr(loss_of(narrow_vae, actor, critics), f"{name}_loss")(make_batch(4))


@pytest.mark.parametrize("width", [2, 0])
def test_critics_write_one_value(modules, make_batch, width):
    """``[*B, 2]`` would look like two critics, ``[*B]`` like none."""

    class Critic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(5, max(width, 1))

        def forward(self, observation, action):
            value = self.net(torch.cat([observation, action], -1))
            return value if width else value.squeeze(-1)

    critics = QEnsemble([TensorDictModule(Critic(), ["observation", "action"], ["q"]) for _ in range(2)])
    loss, shape = loss_of(*modules[:2], critics), r"\(4, 2\)" if width else r"\(4,\)"
    for call in (loss.qvalue_loss, loss.actor_loss):
        with pytest.raises(ValueError, match=rf"critic 0 writes values of shape {shape}, expected one .* \(4, 1\)"):
            call(make_batch(4))
    with pytest.raises(ValueError, match="critic 0 writes values of shape"):
        BCQPolicy(*modules[:2], critics)(make_batch(4).select("observation"))
    mlps = [TensorDictModule(MLP(5, 2, num_cells=[4]), ["observation", "action"], ["q"]) for _ in range(2)]
    with pytest.raises(ValueError, match="critic 0 writes values of shape"):
        QEnsemble(mlps)(make_batch(4))


def test_policies_check_their_networks(modules):
    vae, actor, critics = modules
    with pytest.raises(TypeError, match=r"critics is a PerturbationActor, which lacks \['first'\]"):
        BCQPolicy(vae, critics, actor)
    with pytest.raises(TypeError, match="vae is a PerturbationActor, which lacks .*'decode'"):
        BCQPolicy(actor, vae, critics)
    with pytest.raises(TypeError, match="vae is a PerturbationActor, which lacks .*'decode'"):
        BehaviorCloningPolicy(actor)
    elsewhere = TensorDictModule(nn.Bilinear(3, 2, 2), ["observation", "action"], ["pert"])
    with pytest.raises(ValueError, match=r"actor reads .* and writes \['pert'\]; it must read and overwrite only"):
        BCQPolicy(vae, elsewhere, critics)
    blind = QEnsemble([TensorDictModule(nn.Linear(3, 1), ["observation"], ["q"]) for _ in range(2)])
    with pytest.raises(
        ValueError, match=r"critics reads \['observation'\], but not the action 'action', which vae writes"
    ):
        BCQPolicy(vae, actor, blind)


def test_keys_in_a_string_and_lazy_layers_are_refused(modules):
    vae, actor, critics = modules
    model = Gaussian()
    model.observation_keys = "observation"
    with pytest.raises(TypeError, match="vae_network.observation_keys is the string 'observation', expected a list"):
        BCQLoss(model, actor, critics)
    lazy = PerturbationActor(MLP(out_features=2, num_cells=[4]), ACTION_SPEC)
    with pytest.raises(
        ValueError, match="actor_network has uninitialised lazy layers; call actor_network once with data"
    ):
        BCQLoss(vae, lazy, critics)
    with pytest.raises(TypeError, match="actor_network is a Linear, expected a TensorDictModule, or None for no actor"):
        BCQLoss(vae, nn.Linear(3, 2), critics)
    with pytest.raises(ValueError, match="critic 0 has uninitialised lazy layers"):
        QEnsemble([TensorDictModule(MLP(out_features=1, num_cells=[4]), ["observation", "action"], ["q"])])
    with pytest.raises(TypeError, match="critic 0 is a MLP; wrap it as TensorDictModule"):
        QEnsemble([MLP(5, 1)])


@pytest.mark.filterwarnings("ignore:torch._dynamo.config.inline_inbuilt_nn_modules:FutureWarning")  # read by tensordict
@pytest.mark.parametrize("name", ["vae", "qvalue", "actor"])
def test_nested_keys_compile_as_one_graph(make_batch, name):
    """tensordict's own select breaks the graph where keys are nested."""
    observations = Composite(robot=Composite(joints=Unbounded((3,))))
    modules = make_bcq_modules(observations, ACTION_SPEC, hidden=(8,), vae_hidden=(8,), action_key=("robot", "torque"))
    loss = loss_of(*modules)
    loss.set_keys(reward=("outcome", "gain"), done=("outcome", "over"), terminated=("outcome", "end"))
    flat, noise = make_batch(6), torch.randn(6, 10, 4) if name == "qvalue" else torch.randn(6, 4)
    batch = TensorDict(batch_size=[6])
    batch["robot", "joints"], batch["robot", "torque"] = flat["observation"], flat["action"]
    batch["next", "robot", "joints"] = flat["next", "observation"]
    for new, old in (("gain", "reward"), ("over", "done"), ("end", "terminated")):
        batch["next", "outcome", new] = flat["next", old]
    torch._dynamo.reset()
    compiled = torch.compile(getattr(loss, f"{name}_loss"), fullgraph=True, backend="aot_eager")
    value = compiled(batch.clone(), noise)[0]
    torch.testing.assert_close(value, getattr(loss, f"{name}_loss")(batch.clone(), noise)[0])


def test_a_new_tensordict_of_decode_is_accepted(modules, make_batch):
    batch, noise = make_batch(8), torch.zeros(8, 2)
    model = Gaussian()
    loss = loss_of(model, *modules[1:])
    usual = loss.actor_loss(batch, noise)[0]
    model.change_action = lambda td, action: td.empty().set("action", action)
    torch.testing.assert_close(loss.actor_loss(batch, noise)[0], usual)


@pytest.mark.parametrize("width", [None, 1])
def test_own_ensembles_write_one_value_for_each_row_and_critic(modules, make_batch, width):
    """``first`` must write that of one critic; otherwise the actor's loss would be a mean over critics."""
    vae, actor, critics = modules
    wrong = copy.deepcopy(critics)
    if width is None:
        wrong.first = wrong.forward
        message = "qvalue_network.first writes 2 values for each row, expected one"
    else:
        inner = wrong.forward
        wrong.forward = wrong.first = lambda td: inner(td).set("state_action_value", torch.zeros(td.batch_size))
        message = r"the critics write 'state_action_value' of shape \(8,\), expected \(8, 'C'\)"
    with pytest.raises(ValueError, match=message):
        loss_of(vae, actor, wrong).actor_loss(make_batch(8))


class StackedCritics(TensorDictModuleBase):
    """Critics whose weights are stacked by tensordict's EnsembleModule."""

    in_keys, out_keys = ["observation", "action"], ["state_action_value"]

    def __init__(self) -> None:
        super().__init__()
        critic = TensorDictModule(MLP(in_features=5, out_features=1, num_cells=[8]), self.in_keys, self.out_keys)
        self.stacked = EnsembleModule(critic, 2)

    def forward(self, tensordict):
        values = self.stacked(tensordict.select(*self.in_keys))["state_action_value"]  # [C, *B, 1]
        return tensordict.set("state_action_value", values.squeeze(-1).movedim(0, -1))

    def first(self, tensordict):
        values = self.stacked(tensordict.select(*self.in_keys))["state_action_value"]
        return tensordict.set("state_action_value", values[0])


def test_critics_with_stacked_weights(modules, make_batch, latent):
    loss, batch = BCQLoss(*modules[:2], StackedCritics()), make_batch(6)
    updater = SoftUpdate(loss, tau=0.5)

    def target() -> torch.Tensor:
        return loss.qvalue_loss(batch, latent)[1]["target_value"]

    before = target()
    with torch.no_grad():
        for parameter in loss.qvalue_network_params.parameters():
            parameter.add_(1.0)
    torch.testing.assert_close(target(), before, rtol=0, atol=0)
    updater.step()
    assert (target() - before).abs().min() > 1e-3
    loss.actor_loss(batch)[0].backward()
    assert all(parameter.grad is None for parameter in loss.qvalue_network_params.parameters())
    assert all(parameter.grad is not None for parameter in loss.actor_network_params.parameters())
    with pytest.raises(ValueError, match="with a TensorDictParams, such as EnsembleModule, need compile=False"):
        Execution(loss, compile=True)


@pytest.mark.parametrize("make", [BCQLoss, BCQPolicy])
def test_recurrent_critics_are_refused(modules, make):
    def critic() -> TensorDictSequential:
        memory = LSTMModule(input_size=3, hidden_size=4, in_key="observation", out_key="memory")
        value = TensorDictModule(
            MLP(in_features=6, out_features=1, num_cells=[8]), ["memory", "action"], ["state_action_value"]
        )
        return TensorDictSequential(memory, value)

    with pytest.raises(ValueError, match=r"has a recurrent layer \(LSTMModule\), which would take the actions"):
        make(*modules[:2], QEnsemble([critic(), critic()]))
    with pytest.raises(ValueError, match=r"qvalue_network has a recurrent layer \(LSTMModule\)"):
        FQELoss(QEnsemble([critic()]))


def test_an_actor_with_selected_outputs_keeps_the_entries_of_the_critics(modules, make_batch):
    """The actor does not read the entry ``goal``, but the critics do."""

    class TwoOutputs(nn.Module):
        def forward(self, observation, action):
            return action * 0.5, observation

    actor = TensorDictModule(TwoOutputs(), ["observation", "action"], ["action", "aux"]).select_out_keys("action")
    critic = TensorDictModule(MLP(6, 1, num_cells=[8]), ["observation", "goal", "action"], ["state_action_value"])
    batch = make_batch(5).set("goal", torch.randn(5, 1))
    critics = QEnsemble([critic])
    action = BCQPolicy(modules[0], actor, critics)(batch.clone())["action"]
    assert action.shape == (5, 2)
    assert BCQLoss(modules[0], actor, critics).actor_loss(batch)[0].isfinite()


def test_an_actor_with_batch_norm_acts_on_rows(modules, make_batch, latent):
    """In evaluation mode, each row has the same result alone and in the batch."""
    actor = TensorDictModule(Normalized(2), ["observation", "action"], ["action"], inplace=False)
    loss, batch = loss_of(modules[0], actor, modules[2]), make_batch(6)
    loss.actor_loss(batch)
    with pytest.raises(ValueError, match=r"size \(2, 3\), but a network has BatchNorm"):
        loss.actor_loss(make_batch(2, 3))
    actor.eval()
    assert loss.qvalue_loss(batch[:0], latent[:0])[1]["target_value"].shape == (0,)
    together = loss.qvalue_loss(batch, latent)[1]["target_value"]
    rows = [loss.qvalue_loss(batch[i : i + 1], latent[i : i + 1])[1]["target_value"] for i in range(6)]
    torch.testing.assert_close(together, torch.cat(rows))
    policy = BCQPolicy(modules[0], actor, modules[2], num_action_samples=10, return_candidates=True)
    states = batch.select("observation")
    found = policy(states.clone(), latents=latent)
    pairs = states.unsqueeze(-1).expand(6, 10).copy().set("action", found["candidates"])
    value = modules[2](pairs)["state_action_value"][..., 0]
    torch.testing.assert_close(found["action_value"], value)
    torch.testing.assert_close(found["action"], found["candidates"][torch.arange(6), value.argmax(-1)])


def test_critics_with_batch_renorm_see_all_rows_at_once(modules, make_batch, latent):
    keys = ["observation", "action"], ["state_action_value"]
    critics = QEnsemble([TensorDictModule(Normalized(1, BatchRenorm1d), *keys) for _ in range(2)])
    loss, batch = loss_of(*modules[:2], critics), make_batch(6)
    before = copy.deepcopy(loss)
    whole = loss.qvalue_loss(batch, latent)[1]["target_value"]
    before.target_chunk_size = 10
    torch.testing.assert_close(before.qvalue_loss(batch, latent)[1]["target_value"], whole, rtol=0, atol=0)


def test_an_actor_that_writes_no_action_is_refused(modules, make_batch):
    class Silent(TensorDictModule):
        def forward(self, tensordict):
            return tensordict.exclude("action")

    actor = Silent(Normalized(2), ["observation", "action"], ["action"])
    loss = loss_of(modules[0], actor, modules[2])
    with pytest.raises(ValueError, match="the actor wrote nothing to 'action'; it must write one action"):
        loss.actor_loss(make_batch(6))
