from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from torchrl_bcq import ActionVAE

from ..conftest import ACTION_SPEC


class Encoder(nn.Module):
    """A posterior with the same mean and log standard deviation everywhere."""

    def __init__(self, loc: float, log_std: float) -> None:
        super().__init__()
        self.posterior = nn.Parameter(torch.tensor([loc] * 4 + [log_std] * 4))

    def forward(self, observation, action):
        return self.posterior.expand(*action.shape[:-1], -1)


class Decoder(nn.Module):
    """Logits that are the first two latents, scaled."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, observation, latent):
        return self.scale * latent[..., :2]


def test_latents_are_clipped_when_sampled_and_never_in_the_reconstruction(make_batch):
    """Slip 6. With mean 3 and almost no spread the reconstruction is tanh(3), beyond any clipped latent's tanh(0.5)."""
    vae = ActionVAE(Encoder(3.0, -4.0), Decoder(), ACTION_SPEC, latent_dim=4)
    reconstruction = vae(make_batch(64))["reconstruction"][:, 0]
    assert reconstruction.min() > torch.tanh(torch.tensor(2.8))
    sampled = vae.decode(make_batch(4096))["action"][:, 0]
    torch.testing.assert_close(sampled.max(), torch.tanh(torch.tensor(0.5)))
    torch.testing.assert_close(sampled.min(), torch.tanh(torch.tensor(-0.5)))


def test_reparametrisation_by_hand(make_batch):
    vae = ActionVAE(Encoder(0.5, 0.0), Decoder(), ACTION_SPEC, latent_dim=4)
    out = vae(make_batch(1), noise=torch.tensor([[1.0, -1.0, 0.0, 0.0]]))
    # z = 0.5 + 1 * noise = 1.5, -0.5; action = tanh(1.5), 2 + 2 * tanh(-0.5)
    torch.testing.assert_close(out["reconstruction"], torch.tensor([[0.9051483, 1.0757656]]))


@pytest.mark.parametrize(("scale", "expected"), [(None, 2.26098574), ((1.0, 2.0), 0.87248147)])
def test_unit_of_the_reconstruction_error_by_hand(make_batch, scale, expected):
    """(0.9051483 - 0)^2 = 0.8192934 and (1.0757656 - 3)^2 = 3.7026780, which in half-ranges of 2 is 0.9256695."""
    vae = ActionVAE(Encoder(0.5, 0.0), Decoder(), ACTION_SPEC, latent_dim=4, error_scale=scale)
    batch = make_batch(1).set("action", torch.tensor([[0.0, 3.0]]))
    loss, parts = vae.training_loss(batch, noise=torch.tensor([[1.0, -1.0, 0.0, 0.0]]))
    torch.testing.assert_close(parts["vae_reconstruction"], torch.tensor([expected]))
    # KL of a mean of 0.5 at a deviation of 1: 0.5^2 / 2, with its weight of one half
    torch.testing.assert_close(loss, torch.tensor([expected + 0.0625]))


@pytest.mark.parametrize("scale", [(1.0,), (1.0, 0.0), (1.0, float("nan"))])
def test_error_scales_that_cannot_work(scale):
    with pytest.raises(ValueError, match=r"error_scale is \[1.0.*, expected 2 positive numbers, one for each action"):
        ActionVAE(Encoder(0.0, 0.0), Decoder(), ACTION_SPEC, latent_dim=4, error_scale=scale)


@pytest.mark.parametrize(("log_std", "expected"), [(-100.0, -4.0), (0.3, 0.3), (100.0, 15.0)])
def test_log_std_is_clamped(make_batch, log_std, expected):
    vae = ActionVAE(Encoder(0.0, log_std), Decoder(), ACTION_SPEC, latent_dim=4)
    torch.testing.assert_close(vae.encode(make_batch(2))["log_std"], torch.full((2, 4), expected))


def test_decoder_stays_inside_the_bounds_for_any_logits(make_batch):
    """Slip 4."""
    vae = ActionVAE(Encoder(0.0, 0.0), Decoder(scale=1e6), ACTION_SPEC, latent_dim=4)
    action = vae.decode(make_batch(1000))["action"]
    assert (action >= ACTION_SPEC.space.low).all()
    assert (action <= ACTION_SPEC.space.high).all()
    # and it reaches them, on the side that the logits say
    latent = torch.tensor([[0.5, -0.5, 0.0, 0.0]])
    assert vae.decode(make_batch(1), latent)["action"].tolist() == [[1.0, 0.0]]


def test_rows_do_not_mix(modules, make_batch):
    vae, _, _ = modules
    batch, latent = make_batch(5), torch.randn(5, 4)
    together = vae.decode(batch.clone(), latent)["action"]
    for i in range(5):
        alone = vae.decode(batch[i : i + 1].clone(), latent[i : i + 1])["action"]
        torch.testing.assert_close(alone[0], together[i])


def test_encoder_of_the_wrong_size_is_refused(make_batch):
    vae = ActionVAE(Encoder(0.0, 0.0), Decoder(), ACTION_SPEC, latent_dim=3)
    with pytest.raises(
        ValueError, match=r"encoder returns the shape \(1, 8\), expected \(1, 6\); change its output size"
    ):
        vae(make_batch(1))


@pytest.mark.parametrize("settings", [{"latent_dim": 0}, {"latent_dim": 2, "latent_clip": -0.5}])
def test_sizes_that_are_not_positive_are_refused(settings):
    with pytest.raises(ValueError, match="both must be positive"):
        ActionVAE(Encoder(0.0, 0.0), Decoder(), ACTION_SPEC, **settings)
    with pytest.raises(ValueError, match="kl_weight is -1.0, expected a finite number, 0 or more"):
        ActionVAE(Encoder(0.0, 0.0), Decoder(), ACTION_SPEC, latent_dim=2, kl_weight=-1.0)


def test_sampling_needs_no_action(modules):
    vae, _, _ = modules
    sampled = vae.decode(TensorDict({"observation": torch.randn(2, 3, 3)}, [2, 3]))["action"]
    assert sampled.shape == (2, 3, 2)
    assert sampled.unique(dim=0).shape[0] == 2


def test_a_selection_of_entries_does_not_change_the_loss(modules, make_batch):
    vae, batch = modules[0], make_batch(5)
    noise = torch.randn(5, vae.latent_dim)
    before = vae.training_loss(batch, noise)[0]
    vae.select_out_keys("reconstruction")
    assert set(vae(batch.clone()).keys()) - set(batch.keys()) == {"reconstruction"}
    torch.testing.assert_close(vae.training_loss(batch, noise)[0], before, rtol=0, atol=0)


def test_noise_is_not_broadcast(make_batch):
    vae = ActionVAE(Encoder(0.0, 0.0), Decoder(), ACTION_SPEC, latent_dim=4)
    with pytest.raises(ValueError, match=r"noise has shape \(6, 1\), expected \(6, 4\)"):
        vae.training_loss(make_batch(6), noise=torch.ones(6, 1))


@pytest.mark.parametrize("setting", [{"log_std_range": (5.0, -5.0)}, {"kl_weight": float("inf")}])
def test_settings_out_of_range(setting):
    (name,) = setting
    with pytest.raises(ValueError, match=f"{name} is "):
        ActionVAE(Encoder(0.0, 0.0), Decoder(), ACTION_SPEC, latent_dim=4, **setting)
