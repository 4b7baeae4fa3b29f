"""Values and gradients of BCQLoss."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_bcq import BCQPolicy

from ..batch_norm import with_batch_norm
from .conftest import LOSSES, target_values

# mistakes of other implementations


def test_target_of_a_row_depends_on_that_row_alone(loss, make_batch, latent):
    batch = make_batch(6)
    before = target_values(loss, batch, latent)
    batch["next", "observation"][0] += 1
    batch["next", "reward"][0] += 1
    after = target_values(loss, batch, latent)
    assert before.shape == (6,)
    assert before[0] != after[0]
    torch.testing.assert_close(before[1:], after[1:])
    alone = torch.cat([target_values(loss, batch[i : i + 1], latent[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(alone, after)


def test_target_uses_the_target_perturbation(loss, make_batch, latent):
    batch = make_batch(6)
    before = target_values(loss, batch, latent)
    loss.target_actor_network_params["network", "4", "bias"].data.add_(10)
    moved = target_values(loss, batch, latent)
    assert (before != moved).all()
    loss.actor_network_params["network", "4", "bias"].data.sub_(10)  # the trained actor is not used
    torch.testing.assert_close(target_values(loss, batch, latent), moved)


def test_target_uses_the_target_critics(loss, make_batch, latent):
    batch = make_batch(6)
    before = target_values(loss, batch, latent)
    for i in "01":
        loss.target_qvalue_network_params["critics", i, "module", "4", "bias"].data.add_(1)
    torch.testing.assert_close(target_values(loss, batch, latent), before + 0.99)
    loss.qvalue_network_params["critics", "0", "module", "4", "bias"].data.add_(1)
    torch.testing.assert_close(target_values(loss, batch, latent), before + 0.99)


def test_terminated_ends_the_bootstrap_and_truncated_does_not(loss, make_batch, latent):
    batch = make_batch(6)
    running = target_values(loss, batch, latent)
    batch["next", "done"][:] = True
    batch["next", "truncated"] = torch.ones(6, 1, dtype=torch.bool)
    torch.testing.assert_close(target_values(loss, batch, latent), running)
    batch["next", "terminated"][:3] = True
    ended = target_values(loss, batch, latent)
    torch.testing.assert_close(ended[:3], batch["next", "reward"][:3, 0])
    torch.testing.assert_close(ended[3:], running[3:])


def test_sampled_latents_of_the_target_are_clipped(loss, make_batch, monkeypatch):
    """The decoder gets latents of magnitude 0.5 at most; the reconstruction uses unclipped ones."""
    seen = []
    vae = loss.vae_network
    monkeypatch.setattr(vae.decoder, "forward", lambda *x: seen.append(x[-1]) or x[-1][..., :2])
    loss.qvalue_loss(make_batch(250))
    loss.actor_loss(make_batch(250))
    assert [tuple(z.shape) for z in seen] == [(250, 10, 4), (250, 4)]
    assert all(z.abs().max() == 0.5 for z in seen)
    loss.vae_loss(make_batch(250))
    assert seen[-1].abs().max() > 1


def test_target_by_hand(loss, make_batch):
    """Two candidates, two critics that are constants per candidate: 0.75 * min + 0.25 * max, then the larger."""
    values = torch.tensor([[1.0, 5.0], [3.0, 2.5]])  # mixtures 2 and 2.625
    loss.num_target_samples = 2

    def fake(td):
        return td.set(
            "state_action_value", values.expand(*td.batch_size[:-1], 2, 2) if td.ndim == 2 else torch.zeros(4, 2)
        )

    object.__setattr__(loss.qvalue_network, "forward", fake)
    batch = make_batch(4)
    batch["next", "reward"] = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    target = loss.qvalue_loss(batch)[1]["target_value"]
    torch.testing.assert_close(target, torch.tensor([0.0, 1.0, 2.0, 3.0]) + 0.99 * 2.625)


@pytest.mark.parametrize("shape", [(6,), (2, 5), (3, 2, 4)])
@pytest.mark.parametrize("size", [1, 30, 10_000])
def test_target_in_parts_equals_the_whole_target(loss, make_batch, monkeypatch, shape, size):
    loss, batch = loss.double(), make_batch(*shape, dtype=torch.float64)
    latent = torch.randn(*shape, 10, 4, dtype=torch.float64)
    whole = loss.qvalue_loss(batch, latent)[1]["target_value"]
    loss.target_chunk_size, calls = size, []
    best_value = loss._best_value
    monkeypatch.setattr(loss, "_best_value", lambda *part: calls.append(1) or best_value(*part))
    torch.testing.assert_close(loss.qvalue_loss(batch, latent)[1]["target_value"], whole)
    assert {1: len(calls) == shape[-1], 30: len(calls) > 1, 10_000: len(calls) == 1}[size]


def test_target_is_evaluated_as_a_whole_where_a_layer_mixes_rows(make_batch):
    """Statistics of a part differ from those of the batch, so the chunk size must not matter."""
    loss, batch, latent = with_batch_norm(), make_batch(12), torch.randn(12, 10, 4)
    whole = target_values(loss, batch, latent)
    loss.target_chunk_size = 20
    torch.testing.assert_close(target_values(loss, batch, latent), whole, rtol=0, atol=0)
    parts = torch.cat([target_values(loss, batch[i : i + 2], latent[i : i + 2]) for i in range(0, 12, 2)])
    assert (parts - whole).abs().max() > 1e-2


# gradients and the modules


def test_forward_gives_the_same_gradients_as_the_single_losses(loss, make_batch):
    batch = make_batch(8)
    torch.manual_seed(1)
    out = loss(batch)
    assert set(out.keys()) == set(loss.out_keys)
    (out["loss_vae"] + out["loss_qvalue"] + out["loss_actor"]).backward()
    together = {name: p.grad.clone() for name, p in loss.named_parameters()}
    loss.zero_grad()
    torch.manual_seed(1)
    for name in LOSSES:
        getattr(loss, f"{name}_loss")(batch)[0].backward()
    torch.testing.assert_close({name: p.grad for name, p in loss.named_parameters()}, together)


def test_actor_ascends_the_first_critic(loss, make_batch):
    batch, latent = make_batch(64), torch.zeros(64, 4)
    optimizer = torch.optim.SGD(loss.actor_network_params.parameters(), lr=1.0)

    def value_of_critic(i: int) -> torch.Tensor:
        td = loss.actor_network(loss.vae_network.decode(batch.clone(), latent))
        return loss.qvalue_network(td)["state_action_value"][:, i].mean()

    before = value_of_critic(0)
    loss_actor = loss.actor_loss(batch, latent)[0]
    torch.testing.assert_close(loss_actor, -before)
    loss_actor.backward()
    optimizer.step()
    assert value_of_critic(0) > before


def test_casting_the_loss_casts_the_policy(modules, loss):
    policy = BCQPolicy(*modules)
    loss.double()
    assert {tensor.dtype for module in modules for tensor in module.state_dict().values()} == {torch.float64}
    for ours, theirs in zip(loss.vae_network_params.parameters(), modules[0].parameters(), strict=True):
        assert ours.data_ptr() == theirs.data_ptr()
    states = TensorDict({"observation": torch.randn(2, 3, dtype=torch.float64)}, [2])
    for mode in (ExplorationType.RANDOM, ExplorationType.DETERMINISTIC):  # drawn latents, and the policy's own
        with set_exploration_type(mode):
            assert policy(states)["action"].dtype == torch.float64
