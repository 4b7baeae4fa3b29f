"""ActionMixture and ActionFlow: equations by hand, what they learn, and that they fit where the VAE does."""

from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.objectives import SoftUpdate

from torchrl_bcq import (
    ActionFlow,
    ActionMixture,
    BCQLoss,
    BCQPolicy,
    BehaviorCloningPolicy,
    Normalization,
    QEnsemble,
    make_bcq_modules,
)

from ..conftest import ACTION_SPEC, OBSERVATION_SPEC
from ..exporters import EXPORTERS

KINDS = ["mixture", "flow"]
SMALL = {"hidden": (16, 16), "vae_hidden": (16, 16)}


class Constant(nn.Module):
    """Returns the same numbers in each state."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.tensor(values))

    def forward(self, observation, *others):
        return self.values.expand(*observation.shape[:-1], -1)


class Single(nn.Module):
    """Ignores the number of states."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, observation, *others):
        return torch.zeros(1, self.size)


class Velocity(nn.Module):
    """Moves each point towards 0: the velocity is minus the action."""

    def forward(self, observation, point):
        return -point[..., :-1]


def states(number: int) -> TensorDict:
    return TensorDict({"observation": torch.zeros(number, 3)}, [number])


def two_gaussians(**settings) -> ActionMixture:
    """Weights 0.25 and 0.75; means -0.5 and 0.2; standard deviations 0.1 and 0.3, of actions scaled to [-1, 1]."""
    logs = [math.log(0.25), -0.5, math.log(0.1), math.log(0.75), 0.2, math.log(0.3)]
    wide = {"log_std_range": (-50.0, 50.0)}  # far from the bounds, the deviations are not changed
    return ActionMixture(Constant(*logs), Bounded(0, 4, (1,)), **wide, **settings)


def test_mixture_samples_by_hand():
    latent = torch.tensor([[-0.7, 0.0], [-0.67, 0.0], [3.0, 0.2], [3.0, 9.0], [-3.0, -9.0]])  # Phi(-0.6745) is 0.25
    action = two_gaussians(noise_clip=0.5).decode(states(5), latent)["action"]
    scaled = [-0.5, 0.2, 0.2 + 0.3 * 0.2, 0.2 + 0.3 * 0.5, -0.5 - 0.1 * 0.5]
    torch.testing.assert_close(action, 2 + 2 * torch.tensor(scaled)[:, None])


@pytest.mark.parametrize("start", [-12.0, 9.0])
def test_deviations_stay_within_their_bounds_and_keep_learning(start):
    """log std is 1 - softplus(1 - x), then -4 + softplus of this + 4; actions of std 0.15 of the range are learned."""
    network = Constant(0.0, 0.0, start)
    mixture = ActionMixture(network, Bounded(0, 4, (1,)))
    std = mixture.decode(states(1), torch.tensor([[0.0, 0.1]]))["action"].item() / 2 - 1
    upper = 1 - math.log1p(math.exp(1 - start))
    expected = min(0.1 * math.exp(-4 + math.log1p(math.exp(upper + 4))), 1)
    assert std == pytest.approx(expected, rel=1e-3)
    optimizer = torch.optim.Adam(mixture.parameters(), lr=0.1)
    for _ in range(400):
        optimizer.zero_grad()
        mixture.training_loss(states(256).set("action", 2 + 0.6 * torch.randn(256, 1)))[0].mean().backward()
        optimizer.step()
    std = mixture.decode(states(1), torch.tensor([[0.0, 1.0]]))["action"].item() / 2 - 1 - network.values[1].item()
    assert std == pytest.approx(0.3, rel=0.15)


def test_mixture_loss_by_hand():
    data = states(2).set("action", torch.tensor([[1.0], [2.4]]))  # -0.5 and 0.2 in [-1, 1]
    loss, metadata = two_gaussians().training_loss(data)

    def density(x, mean, std):
        return math.exp(-0.5 * ((x - mean) / std) ** 2) / (std * math.sqrt(2 * math.pi))

    expected = [-math.log(0.25 * density(x, -0.5, 0.1) + 0.75 * density(x, 0.2, 0.3)) for x in (-0.5, 0.2)]
    assert loss.tolist() == pytest.approx(expected, abs=1e-6)
    assert metadata["negative_log_likelihood"].tolist() == loss.tolist()
    assert not metadata["negative_log_likelihood"].requires_grad


def test_samples_stay_within_the_bounds():
    for low, high in ((-0.7, 0.1), (0.1, 0.4), (0.1, 0.7)):  # of the first two, rounding leaves one bound
        wide = ActionMixture(Constant(0.0, 5.0, 0.0), Bounded(low, high, (1,)))
        highest = wide.decode(states(1), torch.zeros(1, 2))["action"].item()
        assert torch.tensor(high).item() >= highest == pytest.approx(high)
        flow = ActionFlow(Constant(-9.0), Bounded(low, high, (1,)))
        lowest = flow.decode(states(1), torch.zeros(1, 1))["action"].item()
        assert torch.tensor(low).item() <= lowest == pytest.approx(low)


def test_flow_samples_by_hand():
    """Euler steps of dx/dt = -x multiply the noise by 1 - 1/n, n times; a constant velocity is exact."""
    latent = torch.tensor([[0.8], [-0.4]])
    moved = ActionFlow(Velocity(), Bounded(0, 4, (1,)), steps=4).decode(states(2), latent)["action"]
    torch.testing.assert_close(moved, 2 + 2 * latent * 0.75**4)
    moved = ActionFlow(Constant(0.15), Bounded(0, 4, (1,)), steps=7).decode(states(2), latent)["action"]
    torch.testing.assert_close(moved, 2 + 2 * (latent + 0.15))


def test_flow_loss_by_hand():
    data = states(2).set("action", torch.tensor([[1.0], [3.0]]))  # -0.5 and 0.5 in [-1, 1]
    noise = torch.tensor([[0.1, 0.0], [0.2, 0.6745]])  # times 0.5 and 0.75
    loss, _ = ActionFlow(Velocity(), Bounded(0, 4, (1,))).training_loss(data, noise)
    points = [0.5 * 0.1 + 0.5 * -0.5, 0.25 * 0.2 + 0.75 * 0.5]
    expected = [(-points[0] - (-0.5 - 0.1)) ** 2, (-points[1] - (0.5 - 0.2)) ** 2]
    assert loss.tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_two_modes_are_kept_apart(kind):
    """Actions near -1 and near 3 in the bounds -2 to 4, in equal numbers: few are sampled between them."""
    (model, _, _) = make_bcq_modules(Unbounded((3,)), Bounded(-2, 4, (1,)), behavior=kind, vae_hidden=(64, 64))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(600):
        mode = torch.where(torch.rand(256, 1) < 0.5, -1.0, 3.0)
        data = states(256).set("action", mode + 0.1 * torch.randn(256, 1))
        optimizer.zero_grad()
        model.training_loss(data)[0].mean().backward()
        optimizer.step()
    with torch.no_grad():
        action = model(states(2000))["action"]
    near = [((action - mode).abs() < 0.5).float().mean().item() for mode in (-1, 3)]
    assert sum(near) > 0.8
    assert min(near) > 0.35


@pytest.mark.parametrize("kind", KINDS)
def test_the_policy_stays_in_the_support(kind):
    """Recorded actions lie between -1 and 0; critics that prefer larger actions do not lead beyond them."""
    model, _, _ = make_bcq_modules(Unbounded((3,)), Bounded(-2, 4, (1,)), behavior=kind, vae_hidden=(64, 64))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(600):
        optimizer.zero_grad()
        model.training_loss(states(256).set("action", -torch.rand(256, 1)))[0].mean().backward()
        optimizer.step()
    larger = TensorDictModule(lambda observation, action: action, ["observation", "action"], ["state_action_value"])
    policy = BCQPolicy(model, None, QEnsemble([larger]))
    for mode in (ExplorationType.DETERMINISTIC, ExplorationType.RANDOM):
        with set_exploration_type(mode):
            action = policy(states(100))["action"]
        assert action.max() < 0.5  # of a range of 6
        assert action.mean() > -0.35  # among the largest recorded actions


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("phi", [0.05, None])
def test_they_fit_the_loss_and_the_policy(kind, phi, make_batch):
    modules = make_bcq_modules(OBSERVATION_SPEC, ACTION_SPEC, behavior=kind, phi=phi, **SMALL)
    assert (modules[1] is None) == (phi is None)
    loss = BCQLoss(*modules)
    SoftUpdate(loss, tau=0.5)
    found = loss(make_batch(8))
    sum(found[key] for key in loss.out_keys if key.startswith("loss_")).backward()
    assert all(
        parameter.grad is not None for module in modules if module is not None for parameter in module.parameters()
    )
    assert {*modules[0].loss_keys} <= {*loss.out_keys}
    for policy in (BCQPolicy(*modules), BehaviorCloningPolicy(modules[0])):
        action = policy(make_batch(7).select("observation"))["action"]
        assert action.shape == (7, 2)
        assert ((action >= ACTION_SPEC.space.low) & (action <= ACTION_SPEC.space.high)).all()
    assert policy.act([0.0, 0.0, 0.0]).tolist() == policy.act([0.0, 0.0, 0.0]).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_other_dtypes_scaling_and_frames(kind, make_batch):
    rows = make_batch(20)
    fitted = Normalization.fit(rows)
    frames = Composite(observation=OBSERVATION_SPEC, pixels=Unbounded((1, 36, 36), dtype=torch.uint8))
    for spec, settings in ((OBSERVATION_SPEC, {"normalization": fitted}), (frames, {})):
        (model, _, _) = make_bcq_modules(spec, ACTION_SPEC, behavior=kind, **SMALL, **settings)
        batch = rows.clone().set("pixels", torch.zeros(20, 1, 36, 36, dtype=torch.uint8))
        assert model.training_loss(batch)[0].shape == (20,)
        assert model.decode(batch.select(*model.observation_keys))["action"].shape == (20, 2)
    (model, _, _) = make_bcq_modules(
        Unbounded((3,), dtype=torch.float64), ACTION_SPEC, behavior=kind, dtype=torch.float64, **SMALL
    )
    assert model.training_loss(make_batch(4, dtype=torch.float64))[0].dtype == torch.float64


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_losses_are_equal(kind, make_batch):
    loss = BCQLoss(*make_bcq_modules(OBSERVATION_SPEC, ACTION_SPEC, behavior=kind, **SMALL), num_target_samples=3)
    SoftUpdate(loss, tau=0.5)
    batch, size = make_batch(8), loss.vae_network.latent_dim
    noise, latents = torch.randn(8, 3), torch.randn(8, 3, size)  # the mixture needs no noise
    for function, given in ((loss.vae_loss, {"noise": noise}), (loss.qvalue_loss, {"latent": latents})):
        compiled = torch.compile(function, fullgraph=True)(batch.clone(), **given)[0]
        torch.testing.assert_close(compiled, function(batch.clone(), **given)[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("convert", EXPORTERS)
def test_exported_graph_takes_any_number_of_states(kind, convert):
    policy = BCQPolicy(*make_bcq_modules(OBSERVATION_SPEC, ACTION_SPEC, behavior=kind, **SMALL), num_action_samples=5)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        graph = EXPORTERS[convert](policy, torch.randn(4, 3))
        for number in (1, 9, 1000):
            observation = torch.randn(number, 3)
            torch.testing.assert_close(graph(observation), policy(observation))


@pytest.mark.parametrize("kind", KINDS)
def test_scaled_inputs(kind, make_batch):
    """Normalised networks read raw observations as plain networks read standardised ones."""
    rows = make_batch(20).set("observation", 3 + 5 * torch.randn(20, 3))
    fitted = Normalization.fit(rows)
    plain, scaled = (
        make_bcq_modules(OBSERVATION_SPEC, ACTION_SPEC, behavior=kind, normalization=each, **SMALL)[0]
        for each in (None, fitted)
    )
    for own, other in zip(plain.parameters(), scaled.parameters(), strict=True):
        own.data.copy_(other.data)
    statistics = rows["observation"].mean(0), rows["observation"].std(0, correction=0)
    standardised = rows.clone().set("observation", (rows["observation"] - statistics[0]) / statistics[1])
    noise = torch.randn(20, 3)
    torch.testing.assert_close(scaled.training_loss(rows, noise)[0], plain.training_loss(standardised, noise)[0])


def test_clipped_noise_of_the_flow():
    flow = ActionFlow(Constant(0.0), Bounded(-1, 1, (1,)), latent_clip=0.1)
    assert flow(states(200))["action"].abs().max().item() == pytest.approx(0.1)


def test_wrong_shapes_are_refused(make_batch):
    for kind, size in (("mixture", 3), ("flow", 2)):
        model = make_bcq_modules(OBSERVATION_SPEC, ACTION_SPEC, behavior=kind, **SMALL)[0]
        batch = make_batch(4)
        with pytest.raises(ValueError, match=f"latent has 1 numbers for each state, expected {size}"):
            model.decode(batch, torch.zeros(4, 1))
        with pytest.raises(ValueError, match=r"the action has shape \(4, 1\), expected 2 dimensions"):
            model.training_loss(batch.clone().set("action", torch.zeros(4, 1)))
    with pytest.raises(ValueError, match=r"noise has shape \(4, 2\), expected \(4, 3\)"):
        model.training_loss(batch, torch.zeros(4, 2))


def test_bad_settings():
    box = Bounded(0, 4, (1,))
    with pytest.raises(ValueError, match="noise_clip is -1, expected 0 or more"):
        ActionMixture(Constant(0.0), box, noise_clip=-1)
    with pytest.raises(ValueError, match="steps is 0 and latent_clip inf; both must be positive"):
        ActionFlow(Constant(0.0), box, steps=0)
    with pytest.raises(ValueError, match=r"network returns 4 features, expected a multiple of 1 \+ 2 \* 1"):
        ActionMixture(Constant(0.0, 0.0, 0.0, 0.0), box)(states(2))
    with pytest.raises(ValueError, match=r"network returns the shape \(2, 2\), expected \(2, 1\); change its"):
        ActionFlow(Constant(0.0, 0.0), box)(states(2))
    for model in (ActionMixture(Single(3), box), ActionFlow(Single(1), box)):
        for call in (model, model.training_loss):
            with pytest.raises(ValueError, match=r"network returns the shape \(1, [13]\), expected \(2, [13]\)"):
                call(states(2).set("action", torch.zeros(2, 1)))
    with pytest.raises(ValueError, match=r"log_std_range is \(1, -4\), expected a lower and a higher number"):
        ActionMixture(Constant(0.0), box, log_std_range=(1, -4))
    with pytest.raises(ValueError, match="behavior is 'gan', expected vae, mixture or flow"):
        make_bcq_modules(OBSERVATION_SPEC, ACTION_SPEC, behavior="gan")


# options for steadier policies


def test_the_value_that_chooses():
    """Candidates 0 and 4; the first critic prefers 4, the minimum and the mean prefer 0."""
    tables = [(1.0, 2.0), (3.0, 0.0), (2.0, 0.5)]
    critics = QEnsemble(
        [
            TensorDictModule(
                lambda observation, action, low=low, high=high: torch.where(action > 2, high, low),
                ["observation", "action"],
                ["state_action_value"],
            )
            for low, high in tables
        ]
    )
    model = ActionFlow(Constant(0.0), Bounded(0, 4, (1,)))
    for choose_by, best, value in (("first", 4, 2), ("min", 0, 1), ("mean", 0, 2)):
        policy = BCQPolicy(model, None, critics, choose_by=choose_by, num_action_samples=2, return_value=True)
        action, found = (
            policy(states(3), latents=torch.tensor([[-1.0], [1.0]]).expand(3, 2, 1))
            .select("action", "chosen_action_value")
            .values()
        )
        assert (action.unique().tolist(), found.unique().tolist()) == ([best], [value])
    with pytest.raises(ValueError, match="choose_by is 'max', expected one of"):
        BCQPolicy(model, None, critics, choose_by="max")


def test_layer_norm_in_the_critics(make_batch):
    vae, actor, critics = make_bcq_modules(OBSERVATION_SPEC, ACTION_SPEC, layer_norm=True, **SMALL)
    for part, number in ((vae, 0), (actor, 0), (critics, 4)):
        assert sum(isinstance(layer, nn.LayerNorm) for layer in part.modules()) == number
    batch = make_batch(5)
    each = [critic(batch.clone())["state_action_value"] for critic in critics.critics]
    torch.testing.assert_close(critics(batch.clone())["state_action_value"], torch.cat(each, -1))
    critics.critics[0].module[1].weight.data.zero_()  # the norm is in use
    assert not torch.allclose(critics.first(batch.clone())["state_action_value"], each[0])
