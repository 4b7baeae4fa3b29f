"""BCQLoss for each value estimator, number of critics, delay and reduction, against sums in plain Python."""

from __future__ import annotations

import copy

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import MultiStep
from torchrl.objectives import SoftUpdate
from torchrl.objectives.utils import ValueEstimators

from torchrl_bcq import BCQLoss, make_bcq_modules

from ..conftest import ACTION_SPEC, OBSERVATION_SPEC

GAMMA, DECAY, LMBDA, SAMPLES, ROWS, TIME = 0.9, 0.7, 0.6, 3, 2, 5
ESTIMATORS = {None: 0.0, "TD0": 0.0, "TD1": 1.0, "TDLambda": DECAY}  # the decay that each one stands for


def make_loss(num_critics: int, **settings):
    """A loss whose networks differ from their targets, and copies of the networks with the targets' weights."""
    modules = make_bcq_modules(OBSERVATION_SPEC, ACTION_SPEC, hidden=(8,), vae_hidden=(8,), num_critics=num_critics)
    loss = BCQLoss(*modules, lmbda=LMBDA, num_target_samples=SAMPLES, **settings)
    if loss.delay_actor or loss.delay_qvalue:
        SoftUpdate(loss, tau=0.005)
    before = copy.deepcopy(modules)
    with torch.no_grad():
        for p in loss.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return loss, modules, before


def trajectories(make_batch) -> TensorDict:
    """Two slices of five steps: row 0 ends in the middle by a terminal state, row 1 by a time limit."""
    batch = make_batch(ROWS, TIME)
    batch["next", "terminated"][0, 2] = batch["next", "done"][0, 2] = batch["next", "done"][1, 1] = True
    return batch


def next_values(batch: TensorDict, latent: torch.Tensor, vae, actor, critics) -> torch.Tensor:
    """``max_i [lmbda * min_j + (1 - lmbda) * max_j]``, one candidate and one critic after the other: ``[*B]``."""
    best = torch.full(batch.shape, -torch.inf)
    for i in range(SAMPLES):
        td = actor(vae.decode(batch["next"].select("observation"), latent[..., i, :]))
        values = [critic(td.copy())["state_action_value"].squeeze(-1) for critic in critics.critics]
        low, high = values[0], values[0]
        for value in values[1:]:
            low, high = torch.minimum(low, value), torch.maximum(high, value)
        best = torch.maximum(best, LMBDA * low + (1 - LMBDA) * high)
    return best


def returns(batch: TensorDict, value: torch.Tensor, decay: float) -> torch.Tensor:
    """The lambda-return of each step, from the last one backwards; it bootstraps where a slice or an episode ends."""
    reward, done, terminated = (batch["next", key].squeeze(-1) for key in ("reward", "done", "terminated"))
    out = torch.zeros(ROWS, TIME)
    for row in range(ROWS):
        for t in reversed(range(TIME)):
            goes_on = t < TIME - 1 and not done[row, t]
            following = (1 - decay) * value[row, t] + decay * out[row, t + 1] if goes_on else value[row, t]
            out[row, t] = reward[row, t] + (0.0 if terminated[row, t] else GAMMA * following)
    return out


@pytest.mark.parametrize("reduction", [None, "none", "mean", "sum"])
@pytest.mark.parametrize("delay_qvalue", [True, False])
@pytest.mark.parametrize("delay_actor", [True, False])
@pytest.mark.parametrize("num_critics", [1, 2, 5])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_losses_by_hand(make_batch, estimator, num_critics, delay_actor, delay_qvalue, reduction):
    loss, (vae, actor, critics), before = make_loss(
        num_critics, delay_actor=delay_actor, delay_qvalue=delay_qvalue, reduction=reduction
    )
    loss.make_value_estimator(
        estimator and ValueEstimators[estimator], gamma=GAMMA, **({"lmbda": DECAY} if estimator == "TDLambda" else {})
    )
    batch, latent, noise = trajectories(make_batch), torch.randn(ROWS, TIME, SAMPLES, 4), torch.randn(ROWS, TIME, 4)
    with torch.no_grad():
        target = returns(
            batch,
            next_values(
                batch, latent, vae, before[1] if delay_actor else actor, before[2] if delay_qvalue else critics
            ),
            ESTIMATORS[estimator],
        )
        pred = critics(batch.copy())["state_action_value"]
        sampled = actor(vae.decode(batch.select("observation"), noise))
        out = vae(batch.copy(), noise=noise)
        loc, log_std = out["loc"], out["log_std"]
        kl = (loc**2 + torch.exp(2 * log_std) - 2 * log_std - 1).mean(-1) / 2
        rows = {
            "vae": ((out["reconstruction"] - batch["action"]) ** 2).mean(-1) + 0.5 * kl,
            "qvalue": sum((pred[..., j] - target) ** 2 for j in range(num_critics)),
            "actor": -critics.critics[0](sampled)["state_action_value"].squeeze(-1),
        }
    reduce = {None: torch.mean, "mean": torch.mean, "sum": torch.sum, "none": lambda x: x}[reduction]
    for name, draw in (("vae", noise), ("qvalue", latent), ("actor", noise)):
        value, metadata = getattr(loss, f"{name}_loss")(batch, draw)
        torch.testing.assert_close(value, reduce(rows[name]), rtol=1e-4, atol=1e-5)
        if name == "qvalue":
            torch.testing.assert_close(metadata["target_value"], target, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_critics", [1, 2, 5])
@pytest.mark.parametrize("delayed", [True, False])
def test_without_an_actor_sampled_actions_are_taken_as_they_are(make_batch, num_critics, delayed):
    modules = make_bcq_modules(OBSERVATION_SPEC, ACTION_SPEC, hidden=(8,), vae_hidden=(8,), num_critics=num_critics)
    vae, _, critics = modules
    loss = BCQLoss(vae, None, critics, lmbda=LMBDA, num_target_samples=SAMPLES, delay_qvalue=delayed)
    if delayed:
        SoftUpdate(loss, tau=0.005)
    batch, latent = make_batch(4), torch.randn(4, SAMPLES, 4)
    with torch.no_grad():
        expected = batch["next", "reward"].squeeze(-1) + 0.99 * next_values(batch, latent, vae, lambda td: td, critics)
    torch.testing.assert_close(loss.qvalue_loss(batch, latent)[1]["target_value"], expected)
    assert {key for key in loss(batch).keys() if key.startswith("loss_")} == {"loss_vae", "loss_qvalue"}
    assert set(loss.out_keys) == set(loss(batch).keys())
    with pytest.raises(ValueError, match="there is no actor_loss, because actor_network is None"):
        loss.actor_loss(batch)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_multi_step_returns_of_torchrl(make_batch, n):
    """Summed rewards, the observation ``n`` steps ahead and its discount ``gamma ** n``."""
    loss, (vae, *_), before = make_loss(2)
    loss.make_value_estimator(gamma=GAMMA)
    steps = make_batch(1, TIME)
    steps["next", "observation"][:, :-1] = steps["observation"][:, 1:]
    batch = MultiStep(GAMMA, n)(steps.clone())
    latent = torch.randn(1, TIME, SAMPLES, 4)
    reward = steps["next", "reward"][0, :, 0]
    with torch.no_grad():
        value = next_values(batch, latent, vae, *before[1:])[0]
    expected = [
        sum(GAMMA**k * reward[t + k] for k in range(ahead)) + GAMMA**ahead * value[t]
        for t, ahead in ((t, min(n, TIME - t)) for t in range(TIME))
    ]
    assert batch["steps_to_next_obs"].max() == n
    torch.testing.assert_close(loss.qvalue_loss(batch, latent)[1]["target_value"][0], torch.stack(expected))


@pytest.mark.parametrize("estimator", [ValueEstimators.TD1, ValueEstimators.TDLambda])
def test_multi_step_estimators_need_a_time_dimension(make_batch, estimator):
    loss, *_ = make_loss(2)
    loss.make_value_estimator(estimator, gamma=GAMMA)
    with pytest.raises(ValueError, match=r"the batch has size \(5,\), but TD\(1\) and TD\(lambda\) need a time dimen"):
        loss.qvalue_loss(make_batch(TIME))
    batch, latent = trajectories(make_batch), torch.randn(ROWS, TIME, SAMPLES, 4)
    expected = loss.qvalue_loss(batch, latent)[1]["target_value"]
    one = batch[0].clone()
    one.names = ["time"]  # as env.rollout names it
    torch.testing.assert_close(loss.qvalue_loss(one, latent[0])[1]["target_value"], expected[0])
    time_first = batch.transpose(0, 1).clone()
    time_first.names = ["time", None]
    out = loss.qvalue_loss(time_first, latent.transpose(0, 1))[1]["target_value"]
    torch.testing.assert_close(out, expected.T)
