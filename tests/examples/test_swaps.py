"""Each swap example runs in a short form, and its parts do what its first line says."""

from __future__ import annotations

import ast
import importlib
import math
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs import ActionScaling, ExplorationType, GymEnv, GymWrapper, TransformedEnv, set_exploration_type
from torchrl.objectives import SoftUpdate

from torchrl_bcq import BCQLoss, BCQPolicy, make_bcq_modules
from torchrl_bcq.functional import clipped_normal

EXAMPLES = Path(__file__).parents[2] / "examples"
SWAPS = sorted(path.stem for path in EXAMPLES.glob("swap_*.py"))
SPECS = Unbounded((3,)), Bounded(low=torch.tensor([-1.0, 0.0]), high=torch.tensor([1.0, 4.0]), shape=(2,))
SMALL = {"hidden": (16, 16), "vae_hidden": (16, 16)}


@pytest.fixture
def load(monkeypatch):
    """Import an example as a script does, its neighbours on the path; a run is one episode."""
    monkeypatch.syspath_prepend(EXAMPLES)
    pendulum_data = importlib.import_module("pendulum_data")
    monkeypatch.setattr(pendulum_data, "RECORDED", 1)
    monkeypatch.setattr(pendulum_data, "EVALUATED", 1)
    return importlib.import_module


def loss_of(*networks) -> BCQLoss:
    loss = BCQLoss(*networks)
    SoftUpdate(loss, tau=0.5)  # TorchRL warns without one
    return loss


def decoded(vae, states: TensorDict, latent: torch.Tensor) -> TensorDict:
    """Actions of the behaviour for ``n`` latents of each state. ``[B], [B, n, L] -> [B, n]``."""
    return vae.decode(states.unsqueeze(-1).expand(latent.shape[:-1]).clone(), latent)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short_and_says_what_it_shows(path):
    text = path.read_text()
    docstring = ast.get_docstring(ast.parse(text))
    assert docstring
    assert len(text.splitlines()) < (60 if path.stem in SWAPS else 120)
    if path.stem in SWAPS:
        assert f"python examples/{path.name}" in docstring


@pytest.mark.parametrize("name", SWAPS)
def test_short_form(load, name):
    figures = load(name).main(steps=2)
    assert {"behaviour", "bcq"} <= figures.keys()
    for policy in figures.keys() - {"spread_of_critics"}:  # 200 steps of at most pi^2 + 0.1 * 8^2 + 0.001 * 2^2 each
        assert -200 * 16.28 < figures[policy] < 0


class TestGenerativeModel:
    @pytest.fixture
    def model(self, load):
        return load("swap_generative_model").MixtureDensityNetwork(3, SPECS[1])

    def test_log_likelihood_by_hand(self, model, make_batch):
        batch = make_batch(7)
        logit, mean, log_std = model.net(batch["observation"]).split([1, 2, 2], -1)
        z = (batch["action"].unsqueeze(1) - mean) / log_std.exp()
        log_normal = (-0.5 * z.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)  # [7, K]
        expected = torch.logsumexp(logit.squeeze(-1).log_softmax(-1) + log_normal, -1)
        assert log_std.abs().max() < 1  # so that no clamp acts
        loss, metadata = model.training_loss(batch)
        torch.testing.assert_close(-loss, expected)
        torch.testing.assert_close(metadata["log_likelihood"], expected.detach())

    def test_both_modes_in_proportion_and_nothing_between(self, load):
        model = load("swap_generative_model").MixtureDensityNetwork(1, Bounded(-1, 1, (1,)))
        left = torch.rand(1000, 1) < 0.3
        actions = torch.where(left, -0.6, 0.6) + 0.05 * torch.randn(1000, 1)
        bandit = TensorDict({"observation": torch.ones(1000, 1), "action": actions}, [1000])
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(200):
            optimizer.zero_grad()
            model.training_loss(bandit)[0].mean().backward()
            optimizer.step()
        states = TensorDict({"observation": torch.ones(4000, 1)}, [4000])
        sampled = model.decode(states, clipped_normal((4000, 2), math.inf, actions))["action"]
        assert ((sampled + 0.6).abs() < 0.2).float().mean().item() == pytest.approx(
            left.float().mean().item(), abs=0.03
        )
        assert (sampled.abs() < 0.35).float().mean() < 0.002  # 5 standard deviations from either mode
        assert sampled[sampled > 0].std().item() == pytest.approx(0.05, rel=0.2)

    def test_an_action_is_a_function_of_state_and_latent(self, model, make_batch):
        states, latent = make_batch(50).select("observation"), torch.randn(50, 3)
        one, again = (model.decode(states.clone(), latent)["action"] for _ in range(2))
        torch.testing.assert_close(one, again, rtol=0, atol=0)
        row = model.decode(states[7:8].clone(), latent[7:8])["action"]
        torch.testing.assert_close(row, one[7:8])
        assert ((one >= SPECS[1].space.low) & (one <= SPECS[1].space.high)).all()

    def test_its_loss_reaches_it_alone(self, model, make_batch):
        _, actor, critics = make_bcq_modules(*SPECS, **SMALL)
        loss = loss_of(model, actor, critics)
        loss.vae_loss(make_batch(7))[0].backward()
        assert all(p.grad is not None and p.grad.any() for p in model.parameters())
        assert all(p.grad is None for part in (actor, critics) for p in part.parameters())


@pytest.mark.parametrize("highest_critic", range(5))
def test_target_takes_min_and_max_over_exactly_five_critics(load, make_batch, highest_critic):
    critics = load("swap_critics").make_critics(observations=3, actions=2)
    list(critics.critics[highest_critic].parameters())[-1].data += 10  # bias of its last layer
    vae, actor, _ = make_bcq_modules(*SPECS, **SMALL)
    loss, batch, latent = loss_of(vae, actor, critics), make_batch(7), torch.randn(7, 10, vae.latent_dim)
    value, metadata = loss.qvalue_loss(batch, latent=latent)
    candidates = actor(decoded(vae, batch["next"].select("observation"), latent))
    q = [critic(candidates.clone())["state_action_value"].squeeze(-1) for critic in critics.critics]
    assert len(q) == 5
    assert (torch.stack(q).argmax(0) == highest_critic).all()
    lowest, highest = q[0], q[0]
    for other in q[1:]:
        lowest, highest = torch.minimum(lowest, other), torch.maximum(highest, other)
    best = (0.75 * lowest + 0.25 * highest).max(1).values  # [7, 10] -> [7]
    expected = batch["next", "reward"].squeeze(-1) + 0.99 * best
    torch.testing.assert_close(metadata["target_value"], expected.detach())
    value.backward()
    assert all(p.grad is not None and p.grad.any() for p in critics.parameters())


class TestNoPerturbation:
    def test_policy_takes_a_sample_of_the_vae_as_it_is(self, make_batch):
        vae, _, critics = make_bcq_modules(*SPECS, **SMALL)
        policy, states = BCQPolicy(vae, None, critics, num_action_samples=8), make_batch(7).select("observation")
        with set_exploration_type(ExplorationType.DETERMINISTIC):
            action = policy(states.clone())["action"]
        samples = decoded(vae, states, policy.latents.expand(7, -1, -1))
        best = critics.first(samples)["state_action_value"].squeeze(-1).argmax(1)
        torch.testing.assert_close(action, samples["action"][range(7), best].detach(), rtol=0, atol=0)

    def test_target_by_hand(self, make_batch):
        vae, _, critics = make_bcq_modules(*SPECS, **SMALL)
        loss, batch, latent = loss_of(vae, None, critics), make_batch(7), torch.randn(7, 10, vae.latent_dim)
        batch["next", "terminated"][0] = batch["next", "done"][0] = True
        q = critics(decoded(vae, batch["next"].select("observation"), latent))["state_action_value"]  # [7, 10, 2]
        best = (0.75 * q.min(-1).values + 0.25 * q.max(-1).values).max(-1).values
        expected = batch["next", "reward"].squeeze(-1) + 0.99 * best * torch.tensor([0.0, 1, 1, 1, 1, 1, 1])
        torch.testing.assert_close(loss.qvalue_loss(batch, latent=latent)[1]["target_value"], expected.detach())
        assert loss.network_names == ("vae", "qvalue")


def test_dict_observations_are_all_read_and_by_their_names(load):
    import gymnasium

    swap = load("swap_dict_observations")
    env = GymWrapper(swap.DictPendulum(gymnasium.make("Pendulum-v1")))
    policy = BCQPolicy(*make_bcq_modules(env.observation_spec, env.action_spec, **SMALL))
    assert set(policy.in_keys) == set(swap.KEYS)
    env.set_seed(0)
    (plain := GymEnv("Pendulum-v1")).set_seed(0)
    first = env.reset()
    torch.testing.assert_close(torch.cat([first[key] for key in swap.KEYS]), plain.reset()["observation"])
    state = TensorDict({key: torch.randn(50, 1) for key in swap.KEYS}, [50])
    reordered = TensorDict({key: state[key] for key in reversed(swap.KEYS)}, [50])
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        action = policy(state.clone())["action"]
        torch.testing.assert_close(policy(reordered)["action"], action, rtol=0, atol=0)
        for key in swap.KEYS:
            altered = policy(state.clone().set(key, state[key] + 1))["action"]
            assert ((altered - action).abs() > 1e-4).float().mean() > 0.9, key


class TestImages:
    def test_picture_by_hand(self, load):
        """Upright at speed 8 rad/s: now at x = 0, y = 1; a step before 0.4 rad to the left."""
        now, before = load("swap_image_observations").draw(torch.tensor([1.0, 0.0, 8.0]))
        grid = torch.linspace(-1.2, 1.2, 24)
        for picture, x, y in ((now, 0.0, 1.0), (before, math.sin(-0.4), math.cos(-0.4))):
            row, column = divmod(picture.argmax().item(), 24)
            assert (grid[column] - x).abs() < 0.06  # half a pixel
            assert (grid[row] - y).abs() < 0.06

    def test_the_encoder_learns_from_the_critics_loss_alone(self, load, make_batch):
        swap = load("swap_image_observations")
        encoder = TensorDictModule(nn.Sequential(nn.Flatten(-3), nn.Linear(2 * 24 * 24, 3)), ["pixels"], ["features"])
        loss = loss_of(*make_bcq_modules(Composite(features=Unbounded((3,))), SPECS[1], **SMALL))
        batch = make_batch(7)
        for states in (batch, batch["next"]):
            states["pixels"] = swap.draw(states["observation"])
        weights = list(encoder.parameters())
        qvalue_loss, vae_loss, actor_loss = swap.losses(encoder, loss, batch)
        for other in (vae_loss, actor_loss):
            assert torch.autograd.grad(other, weights, allow_unused=True, retain_graph=True) == (None, None)
        assert all(gradient.any() for gradient in torch.autograd.grad(qvalue_loss, weights, retain_graph=True))
        (qvalue_loss + vae_loss + actor_loss).backward()
        assert all(p.grad is not None for name, p in loss.named_parameters())  # and all the networks learn
        assert batch["features"].requires_grad
        assert not batch["next", "features"].requires_grad


def test_losses_under_other_keys_are_the_same(load, make_batch):
    swap = load("swap_keys")
    ours = make_bcq_modules(*SPECS, **SMALL)
    observation, reward, done, terminated = (swap.NAMES[k] for k in ("observation", "reward", "done", "terminated"))
    keys = {"action_key": swap.ACTION, "value_key": swap.VALUE}
    theirs = make_bcq_modules(Composite({observation: SPECS[0]}), SPECS[1], **keys, **SMALL)
    for one, other in zip(ours, theirs, strict=True):
        other.load_state_dict(one.state_dict())
    loss, renamed_loss = loss_of(*ours), swap.make_loss(*theirs)
    SoftUpdate(renamed_loss, tau=0.5)
    batch = make_batch(7)
    batch["next", "terminated"][0] = batch["next", "done"][0] = True
    outcome = batch["next"]
    following = {observation: outcome["observation"], reward: outcome["reward"], done: outcome["done"]}
    renamed = TensorDict({observation: batch["observation"], swap.ACTION: batch["action"]}, [7])
    renamed["next"] = TensorDict({**following, terminated: outcome["terminated"]}, [7])
    for name, size in (("vae", (7, 4)), ("qvalue", (7, 10, 4)), ("actor", (7, 4))):
        noise = {"noise" if name == "vae" else "latent": torch.randn(size)}
        expected, got = (
            getattr(part, f"{name}_loss")(b, **noise)[0] for part, b in ((loss, batch), (renamed_loss, renamed))
        )
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_an_environment_under_other_keys_records_the_same(load, monkeypatch):
    """TorchRL resets only what lies beside and below a nested done: a stale first observation would show here."""
    monkeypatch.setattr(load("pendulum_data"), "RECORDED", 2)
    swap, record = load("swap_keys"), load("pendulum_data").record
    torch.manual_seed(0)
    plain = record(GymEnv("Pendulum-v1"))
    torch.manual_seed(0)
    renamed = record(swap.make_env(), [swap.NAMES["observation"]], swap.ACTION)
    assert plain["next", "done"].sum() == 2
    for name, key in swap.NAMES.items():
        torch.testing.assert_close(renamed["next"][key], plain["next"][name], rtol=0, atol=0)
    torch.testing.assert_close(renamed[swap.NAMES["observation"]], plain["observation"], rtol=0, atol=0)
    torch.testing.assert_close(renamed[swap.ACTION], plain["action"], rtol=0, atol=0)


class TestActionBounds:
    def test_each_dimension_keeps_and_reaches_its_own_bounds(self, load):
        env = load("swap_action_bounds").two_motors(low=[-0.5, -1.5], high=[1.5, 0.5])
        low, high = torch.tensor([-0.5, -1.5]), torch.tensor([1.5, 0.5])
        vae, actor, critics = make_bcq_modules(env.observation_spec, env.action_spec, phi=0.5, **SMALL)
        policy = BCQPolicy(vae, actor, critics)
        for bias, bound in ((50.0, high), (-50.0, low)):
            nn.init.constant_(vae.decoder[-1].bias, bias)
            nn.init.constant_(actor.network[-1].bias, bias)
            torch.testing.assert_close(policy(env.reset())["action"], bound, rtol=0, atol=0)
        nn.init.zeros_(vae.decoder[-1].bias)
        actions = env.rollout(100, policy)["action"]
        assert ((actions >= low) & (actions <= high)).all()

    def test_an_unbounded_spec_is_refused(self, load, capsys):
        load("swap_action_bounds").main(steps=1)
        out = capsys.readouterr().out
        assert out.startswith("refused: action_spec is unbounded in dimensions [0, 1]; pass torchrl.data.Bounded")
        assert "Bounded" in out

    def test_scaled_and_unscaled_training_agree(self, make_batch):
        """With the first layers' weights rescaled, both see the same numbers: the same values, losses and actions."""
        low, high = SPECS[1].space.low, SPECS[1].space.high
        scaling = ActionScaling.from_stats(low=low, high=high)
        raw, scaled = make_bcq_modules(*SPECS, **SMALL), make_bcq_modules(SPECS[0], Bounded(-1, 1, (2,)), **SMALL)
        for one, other in zip(raw, scaled, strict=True):
            parameters = {name: p for name, p in one.state_dict().items() if name not in ("low", "high")}
            other.load_state_dict(parameters, strict=False)
        readers = [scaled[0].encoder, scaled[1].network, *(critic.module for critic in scaled[2].critics)]
        for network in readers:  # they read [observation, action]
            weight, bias = network[0].weight.data, network[0].bias.data
            bias += weight[:, -2:] @ scaling.loc
            weight[:, -2:] *= scaling.scale
        batch = make_batch(7)
        scaled_batch = batch.clone().set("action", scaling.normalize(batch["action"]))
        one, other = loss_of(*raw), loss_of(*scaled)
        latent = torch.randn(7, 10, 4)
        for name, noise in (("qvalue_loss", latent), ("actor_loss", latent[:, 0])):
            expected = getattr(one, name)(batch, latent=noise)[0]
            torch.testing.assert_close(getattr(other, name)(scaled_batch, latent=noise)[0], expected)
        with set_exploration_type(ExplorationType.DETERMINISTIC):
            expected, got = (BCQPolicy(*m)(batch.select("observation"))["action"] for m in (raw, scaled))
        torch.testing.assert_close(scaling.denormalize(got), expected)

    def test_two_motors_add_up_also_in_the_scaled_environment(self, load):
        two_motors, action = load("swap_action_bounds").two_motors, torch.tensor([0.7, -1.2])
        scaling = ActionScaling.from_stats(low=[-0.5, -1.5], high=[1.5, 0.5])
        environments = {
            GymEnv("Pendulum-v1"): action.sum(-1, keepdim=True),
            two_motors(-math.inf, math.inf): action,
            TransformedEnv(two_motors(-math.inf, math.inf), scaling): scaling.normalize(action),
        }
        after = []
        for env, its_action in environments.items():
            env.set_seed(0)
            after.append(env.step(env.reset().set("action", its_action))["next", "observation"])
        torch.testing.assert_close(after[1], after[0])
        torch.testing.assert_close(after[2], after[0])
