"""DatasetMetrics: numbers by an independent computation."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from torchrl_bcq import (
    BCQLoss,
    BCQPolicy,
    CloningLoss,
    DatasetMetrics,
    make_bcq_modules,
    make_cloning_modules,
)
from torchrl_bcq.functional import clipped_normal

from ..conftest import ACTION_SPEC, OBSERVATION_SPEC
from ..own_objective import OwnLoss, make_own_modules
from ..trainers.conftest import soft_update


def with_targets(*networks) -> BCQLoss:
    loss = BCQLoss(*networks)
    soft_update(loss)
    return loss


@pytest.fixture
def transitions(make_batch) -> TensorDict:
    """Three episodes, of 3, 2 and 4 steps; the second ends at a terminal state, the others are truncated."""
    transitions = make_batch(9)
    transitions["next", "done"][[2, 4, 8]] = True
    transitions["next", "terminated"][4] = True
    return transitions


class Constant(nn.Module):
    """Always takes the same action."""

    def forward(self, tensordict):
        return tensordict.set("action", torch.tensor([0.25, 3.0]).expand(*tensordict.batch_size, 2).clone())


def test_dataset_metrics_by_an_independent_computation(modules, transitions):
    vae, actor, critics = modules
    loss = with_targets(vae, actor, critics)
    for target in loss.target_qvalue_network_params.flatten_keys().values():
        target.data.add_(0.01)  # differs from the trained network
    metrics = DatasetMetrics(loss, Constant(), transitions, interval=10, seed=5)
    found = metrics.measure()

    torch.manual_seed(5)  # the noise of the VAE, then the latents of target and actor
    noise = torch.randn(9, vae.latent_dim)
    latent = clipped_normal((9, 10, vae.latent_dim), vae.latent_clip, like=torch.zeros(1))
    sampled = clipped_normal((9, vae.latent_dim), vae.latent_clip, like=torch.zeros(1))
    after = transitions["next", "observation"].unsqueeze(1).expand(9, 10, 3)
    candidates = vae.decode(TensorDict({"observation": after}, [9, 10]), latent)
    with torch.no_grad(), loss.target_actor_network_params.to_module(actor):
        candidates = actor(candidates)
    with torch.no_grad(), loss.target_qvalue_network_params.to_module(critics):
        q = critics(candidates)["state_action_value"]  # [9, 10, 2]
    best = (0.75 * q.amin(-1) + 0.25 * q.amax(-1)).amax(1)
    alive = torch.ones(9)
    alive[4] = 0
    target = transitions["next", "reward"].squeeze(1) + 0.99 * alive * best
    predicted = critics(transitions.select("observation", "action"))["state_action_value"]
    td_error = predicted - target.unsqueeze(1)
    rows = transitions.select("observation", "action")
    vae_loss, vae_parts = vae.training_loss(rows.clone(), noise=noise)
    perturbed = actor(vae.decode(transitions.select("observation"), sampled))
    actor_loss = -critics(perturbed)["state_action_value"][:, 0].mean()

    distance = (transitions["action"] - torch.tensor([0.25, 3.0])).square().sum(1).sqrt().mean().item()
    starts = transitions[torch.tensor([0, 3, 5])].select("observation")
    value = critics(Constant()(starts))["state_action_value"][:, 0].mean().item()
    expected = {
        "held_out_loss_vae": vae_loss.mean().item(),
        "held_out_loss_qvalue": td_error.square().sum(1).mean().item(),
        "held_out_loss_actor": actor_loss.item(),
        **{f"held_out_{name}": rows.mean().item() for name, rows in vae_parts.items()},
        "held_out_td_error": td_error.abs().mean().item(),
        "held_out_pred_value": predicted.mean().item(),
        "held_out_target_value": target.mean().item(),
        "action_distance": distance,
        "initial_value": value,
    }
    assert found == pytest.approx(expected, rel=1e-5)
    assert metrics.main == "held_out_td_error"
    assert set(metrics.names) == set(found)


def test_metrics_of_transitions_that_are_learned_from(modules, transitions):
    metrics = DatasetMetrics(with_targets(*modules), Constant(), transitions, interval=10, held_out=False)
    assert metrics.names == list(metrics.measure()) == ["action_distance", "initial_value"]
    assert metrics.main == "action_distance"


def test_metrics_of_an_objective_without_values(transitions):
    (actor,) = make_cloning_modules(OBSERVATION_SPEC, ACTION_SPEC, hidden=(8,))
    metrics = DatasetMetrics(CloningLoss(actor), actor, transitions, interval=10)
    with torch.no_grad():
        error = actor(transitions.select("observation"))["action"] - transitions["action"]
    expected = {"held_out_loss_actor": error.square().mean().item(), "action_distance": error.norm(dim=1).mean().item()}
    assert metrics.measure() == pytest.approx(expected)
    assert metrics.main == "held_out_loss_actor"


def test_metrics_of_another_objective(transitions):
    policy, critic = make_own_modules(OBSERVATION_SPEC, ACTION_SPEC)
    loss = OwnLoss(policy, critic, new=3.0)
    soft_update(loss)
    found = DatasetMetrics(loss, policy, transitions, interval=10).measure()
    names = ["loss_policy", "loss_critic", "td_error", "pred_value", "target_value"]
    assert set(found) == {*(f"held_out_{name}" for name in names), "action_distance", "initial_value"}
    with torch.no_grad():
        error = policy(transitions.select("observation"))["action"] - transitions["action"]
    assert found["held_out_loss_policy"] == pytest.approx(3 * error.square().sum(1).mean().item())


def test_episode_numbers_come_before_flags(modules, transitions):
    """By the numbers, rows 0, 4 and 6 begin an episode."""
    transitions["episode"] = torch.tensor([8, 8, 8, 8, 2, 2, 5, 5, 5])
    transitions["next", "done"].zero_()
    found = DatasetMetrics(with_targets(*modules), Constant(), transitions, interval=10).measure()
    starts = transitions[torch.tensor([0, 4, 6])].select("observation")
    expected = modules[2](Constant()(starts))["state_action_value"][:, 0].mean().item()
    assert found["initial_value"] == pytest.approx(expected, rel=1e-5)


class Counting(Constant):
    """Remembers the states in which it acts."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    def forward(self, tensordict):
        self.seen.append(tensordict["observation"].clone())
        return super().forward(tensordict)


def test_max_rows_are_drawn_once(modules, make_batch):
    transitions = make_batch(200)
    transitions["next", "done"][1::2] = True  # 100 episodes of 2
    rows = {tuple(row) for row in transitions["observation"].tolist()}
    starts = {tuple(row) for row in transitions["observation"][::2].tolist()}
    drawn = []
    for seed in (0, 0, 1):
        policy = Counting()
        metrics = DatasetMetrics(with_targets(*modules), policy, transitions, interval=10, max_rows=30, seed=seed)
        first, second = metrics.measure(), metrics.measure()
        assert first == second
        assert [len(seen) for seen in policy.seen] == [30, 30, 30, 30]  # rows and starts, twice
        torch.testing.assert_close(policy.seen[:2], policy.seen[2:], rtol=0, atol=0)
        of_rows, of_starts = ({tuple(row) for row in seen.tolist()} for seen in policy.seen[:2])
        assert len(of_rows) == len(of_starts) == 30
        assert of_rows <= rows
        assert of_starts <= starts
        drawn.append(of_rows)
    assert drawn[0] == drawn[1] != drawn[2]


def test_chunks_make_no_difference(modules, transitions, monkeypatch):
    """Each row has the same weight, also in a last chunk that is shorter."""
    metrics = DatasetMetrics(with_targets(*modules), Constant(), transitions, interval=10, held_out=False)
    whole = metrics.measure()
    monkeypatch.setattr("torchrl_bcq.evaluation.metrics._CHUNK", 2)
    assert metrics.measure() == pytest.approx(whole, rel=1e-6)


def test_the_transitions_are_copied(modules, transitions):
    metrics = DatasetMetrics(with_targets(*modules), Constant(), transitions, interval=10)
    before = metrics.measure()
    transitions["action"].zero_()
    assert metrics.measure() == before


def test_networks_with_dropout_are_measured_without_it(transitions):
    vae, actor, critics = make_bcq_modules(OBSERVATION_SPEC, ACTION_SPEC, hidden=(8,), vae_hidden=(8,))
    policy = BCQPolicy(vae, actor, critics, num_action_samples=5)
    metrics = DatasetMetrics(with_targets(vae, actor, critics), policy, transitions, interval=10)
    policy.train()
    modes = []
    critics.register_forward_pre_hook(lambda module, args: modes.append(module.training))
    metrics.measure()
    assert modes
    assert not any(modes)
    assert critics.training
    assert policy.training
