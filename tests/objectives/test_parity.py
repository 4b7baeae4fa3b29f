"""Twenty updates compared with an implementation in plain PyTorch, written from the paper's equations."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import torch
from torch import nn
from torchrl.data import Unbounded
from torchrl.objectives import SoftUpdate

from torchrl_bcq import BCQLoss, OfflineOptimizationStepper, make_bcq_modules

from ..conftest import ACTION_SPEC

GAMMA, TAU, LMBDA, PHI, KL, LR, SAMPLES, ROWS, UPDATES = 0.97, 0.01, 0.6, 0.2, 0.5, 1e-3, 7, 32, 20


class Reference:
    """BCQ with one tensor operation after the other: no tensordict, no TorchRL, no code of the package."""

    def __init__(self, vae, actor, critics) -> None:
        self.low, self.high = ACTION_SPEC.space.low.double(), ACTION_SPEC.space.high.double()
        self.encoder, self.decoder = self.copy(vae.encoder), self.copy(vae.decoder)
        self.actor = self.copy(actor.network)
        self.critics = nn.ModuleList(self.copy(critic.module) for critic in critics.critics)
        self.actor_target, self.critics_target = copy.deepcopy(self.actor), copy.deepcopy(self.critics)
        self.vae_optimizer = torch.optim.Adam([*self.encoder.parameters(), *self.decoder.parameters()], lr=LR)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=LR)
        self.critic_optimizer = torch.optim.Adam(self.critics.parameters(), lr=LR)

    @staticmethod
    def copy(net: nn.Module) -> nn.Sequential:
        linear = [layer for layer in net if isinstance(layer, nn.Linear)]
        layers: list[nn.Module] = []
        for layer in linear:
            layers += [nn.Linear(layer.in_features, layer.out_features, dtype=torch.float64), nn.ReLU()]
            layers[-2].load_state_dict(layer.state_dict())
        return nn.Sequential(*layers[:-1])

    def bounded(self, x):
        return self.low + (self.high - self.low) * (torch.tanh(x) + 1) / 2

    def decode(self, s, z):
        return self.bounded(self.decoder(torch.cat([s, z], 1)))

    def perturbed(self, net, s, a):
        xi = PHI * (self.high - self.low) / 2 * torch.tanh(net(torch.cat([s, a], 1)))
        return torch.maximum(torch.minimum(a + xi, self.high), self.low)

    def update(self, s, a, r, s2, not_terminated, noise, next_latent, latent):
        mean, log_std = self.encoder(torch.cat([s, a], 1)).split(4, 1)
        std = torch.exp(torch.clamp(log_std, -4, 15))
        recon = self.decode(s, mean + std * noise)
        kl = -0.5 * (1 + torch.log(std**2) - mean**2 - std**2)
        vae_loss = nn.functional.mse_loss(recon, a) + KL * kl.mean()
        self.vae_optimizer.zero_grad()
        vae_loss.backward()
        self.vae_optimizer.step()

        with torch.no_grad():
            best = torch.full((ROWS, 1), -torch.inf, dtype=torch.float64)
            for i in range(SAMPLES):
                a2 = self.perturbed(self.actor_target, s2, self.decode(s2, next_latent[:, i]))
                q1, q2 = (critic(torch.cat([s2, a2], 1)) for critic in self.critics_target)
                best = torch.maximum(best, LMBDA * torch.minimum(q1, q2) + (1 - LMBDA) * torch.maximum(q1, q2))
            y = r + not_terminated * GAMMA * best
        critic_loss = sum(nn.functional.mse_loss(critic(torch.cat([s, a], 1)), y) for critic in self.critics)
        self.critic_optimizer.zero_grad()
        critic_loss.backward()
        self.critic_optimizer.step()

        sampled = self.decode(s, latent).detach()
        actor_loss = -self.critics[0](torch.cat([s, self.perturbed(self.actor, s, sampled)], 1)).mean()
        self.actor_optimizer.zero_grad()
        actor_loss.backward()
        self.actor_optimizer.step()

        for net, target in ((self.actor, self.actor_target), (self.critics, self.critics_target)):
            for p, p_target in zip(net.parameters(), target.parameters(), strict=True):
                p_target.data = TAU * p.data + (1 - TAU) * p_target.data
        return vae_loss.item(), critic_loss.item(), actor_loss.item()


def test_twenty_updates_equal_the_reference(make_batch, show_figure):
    sizes = {"hidden": (24, 16), "vae_hidden": (20, 20), "phi": PHI, "dtype": torch.float64}
    vae, actor, critics = make_bcq_modules(Unbounded((3,), dtype=torch.float64), ACTION_SPEC, **sizes)
    reference = Reference(vae, actor, critics)
    loss = BCQLoss(vae, actor, critics, lmbda=LMBDA, num_target_samples=SAMPLES)
    loss.make_value_estimator(gamma=GAMMA)
    updater = SoftUpdate(loss, tau=TAU)
    stepper = OfflineOptimizationStepper.adam(loss, lr=LR)

    deviations, moved = [0.0], vae.encoder[0].weight.detach().clone()
    for _ in range(UPDATES):
        batch = make_batch(ROWS, dtype=torch.float64)
        ended, cut = torch.rand(2, ROWS, 1) < 0.2
        batch["next", "terminated"], batch["next", "done"] = ended, ended | cut  # cut rows bootstrap
        noise, latent = torch.randn(2, ROWS, 4, dtype=torch.float64)
        next_latent = torch.randn(ROWS, SAMPLES, 4, dtype=torch.float64).clamp(-0.5, 0.5)
        draws = {"vae_loss": noise, "qvalue_loss": next_latent, "actor_loss": latent}
        trainer = SimpleNamespace(
            loss_module=loss,
            compute_loss=lambda td, method, draws=draws: getattr(loss, method)(td, draws[method]),
            clip_norm=None,
        )
        logs = stepper.step(trainer, batch)
        updater.step()
        expected = reference.update(
            batch["observation"],
            batch["action"],
            batch["next", "reward"],
            batch["next", "observation"],
            (~ended).double(),
            noise,
            next_latent,
            latent,
        )
        deviations += [
            abs(logs[name].item() - value)
            for name, value in zip(("loss_vae", "loss_qvalue", "loss_actor"), expected, strict=True)
        ]

    pairs = [
        (vae.encoder, reference.encoder),
        (vae.decoder, reference.decoder),
        (actor.network, reference.actor),
        *((critic.module, other) for critic, other in zip(critics.critics, reference.critics, strict=True)),
    ]
    for ours, theirs in pairs:
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            deviations.append((p - q).abs().max().item())
    targets = [
        (loss.target_actor_network_params["network"], reference.actor_target),
        *(
            (loss.target_qvalue_network_params["critics", str(i), "module"], reference.critics_target[i])
            for i in (0, 1)
        ),
    ]
    for ours, theirs in targets:
        for layer, name_layer in zip((0, 2, 4), ("0", "2", "4"), strict=True):
            deviations.append((ours[name_layer, "weight"] - theirs[layer].weight).abs().max().item())
            deviations.append((ours[name_layer, "bias"] - theirs[layer].bias).abs().max().item())

    show_figure(f"parity with plain PyTorch, float64, {UPDATES} updates: largest deviation {max(deviations):.1e}")
    assert (vae.encoder[0].weight - moved).abs().max() > 1e-3
    assert max(deviations) < 1e-9
