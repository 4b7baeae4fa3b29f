"""BCQ in bare PyTorch: the cost of an update without any framework.

It consists of linear layers and tensors, without TorchRL, checks or logs. It computes only gradients that are used: the
target, and the decoder in the actor's loss, run without gradients, and the actor's loss uses detached weights of the
first critic. Adam is fused, one call moves all targets, and a batch is one gather per field.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam
from transitions import ACTIONS, LATENTS, OBSERVATIONS, Sizes

GAMMA, TAU, LMBDA, PHI, KL_WEIGHT, LATENT_CLIP, LR, TARGET_SAMPLES = 0.99, 0.005, 0.75, 0.05, 0.5, 0.5, 1e-3, 10


class Floor:
    """Networks, targets, optimizers and data of one run. Actions are within 1.

    Args:
        transitions: batch size ``[N]``.
        batch_size: rows of a gradient step, ``B``.
        device: of networks and data.
        sizes: of the networks.
    """

    def __init__(self, transitions: TensorDict, batch_size: int, device: str, sizes: Sizes) -> None:
        def mlp(inputs: int, hidden: Sequence[int], outputs: int) -> nn.ModuleList:
            pairs = zip([OBSERVATIONS + inputs, *hidden], [*hidden, outputs], strict=True)
            return nn.ModuleList(nn.Linear(*pair) for pair in pairs).to(device)

        self.batch_size, self.device = batch_size, device
        held = transitions.to(device)
        fields = ("observation", "action", ("next", "reward"), ("next", "observation"), ("next", "terminated"))
        self.fields = [held[field].float() for field in fields]
        vae = nn.ModuleList([mlp(ACTIONS, sizes.vae_hidden, 2 * LATENTS), mlp(LATENTS, sizes.vae_hidden, ACTIONS)])
        actor = mlp(ACTIONS, sizes.hidden, ACTIONS)
        critics = nn.ModuleList(mlp(ACTIONS, sizes.hidden, 1) for _ in range(2))
        networks = {"vae": vae, "critics": critics, "actor": actor}
        self.optimizers = {name: Adam(net.parameters(), lr=LR, fused=True) for name, net in networks.items()}
        self.encoder, self.decoder = map(_layers, vae)
        self.actor, self.critics = _layers(actor), [_layers(critic) for critic in critics]
        # detached tensors share memory with the trained parameters
        self.first_critic = [(weight.detach(), bias.detach()) for weight, bias in self.critics[0]]
        self.sources = [parameter.detach() for net in (actor, *critics) for parameter in net.parameters()]
        self.targets = [source.clone() for source in self.sources]
        pairs = list(zip(self.targets[::2], self.targets[1::2], strict=True))
        depth = len(actor)
        self.target_actor, *self.target_critics = pairs[:depth], pairs[depth : 2 * depth], pairs[2 * depth :]

    def update(self, steps: int) -> None:
        """Make gradient steps, each on a new batch."""
        for _ in range(steps):
            rows = torch.randint(len(self.fields[0]), (self.batch_size,), device=self.device)
            state, action, *outcome = (field[rows] for field in self.fields)
            self._step("vae", self.vae_loss(state, action, self._normal(len(rows), LATENTS)))
            self._step("critics", self.critic_loss(state, action, *outcome, self._latents(len(rows), TARGET_SAMPLES)))
            self._step("actor", self.actor_loss(state, self._latents(len(rows))))
            torch._foreach_lerp_(self.targets, self.sources, TAU)

    def vae_loss(self, state: Tensor, action: Tensor, noise: Tensor) -> Tensor:
        loc, log_std = _mlp(self.encoder, state, action).chunk(2, -1)
        std = log_std.clamp(-4, 15).exp()
        reconstruction = torch.tanh(_mlp(self.decoder, state, loc + std * noise))
        kl = (loc.square() + std.square() - 1) / 2 - std.log()
        return F.mse_loss(reconstruction, action) + KL_WEIGHT * kl.mean()

    def critic_loss(self, state, action, reward, following, terminated, latent: Tensor) -> Tensor:
        """``latent`` is ``[B, n, L]``."""
        with torch.no_grad():
            following = following.repeat_interleave(latent.shape[1], 0)  # [B, D] -> [B*n, D]
            candidate = torch.tanh(_mlp(self.decoder, following, latent.flatten(0, 1)))
            candidate = _perturb(self.target_actor, following, candidate)
            one, other = (_mlp(critic, following, candidate) for critic in self.target_critics)
            value = LMBDA * torch.minimum(one, other) + (1 - LMBDA) * torch.maximum(one, other)
            best = value.view(latent.shape[:2]).amax(1, keepdim=True)  # [B*n, 1] -> [B, 1]
            target = reward + (1 - terminated) * GAMMA * best
        one, other = (_mlp(critic, state, action) for critic in self.critics)
        return F.mse_loss(one, target) + F.mse_loss(other, target)

    def actor_loss(self, state: Tensor, latent: Tensor) -> Tensor:
        with torch.no_grad():
            sampled = torch.tanh(_mlp(self.decoder, state, latent))
        return -_mlp(self.first_critic, state, _perturb(self.actor, state, sampled)).mean()

    @torch.no_grad()
    def act(self, state: Tensor, samples: int) -> Tensor:
        """The best of ``samples`` candidates of each state, evaluated in one pass. ``[S, D] -> [S, A]``."""
        repeated = state.repeat_interleave(samples, 0)
        candidate = torch.tanh(_mlp(self.decoder, repeated, self._latents(len(repeated))))
        candidate = _perturb(self.actor, repeated, candidate)
        best = _mlp(self.first_critic, repeated, candidate).view(len(state), samples).argmax(1)  # [S*n, 1] -> [S]
        return candidate.view(len(state), samples, -1)[torch.arange(len(state), device=best.device), best]

    def _step(self, name: str, loss: Tensor) -> None:
        self.optimizers[name].zero_grad()
        loss.backward()
        self.optimizers[name].step()

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device)

    def _latents(self, *shape: int) -> Tensor:
        return self._normal(*shape, LATENTS).clamp_(-LATENT_CLIP, LATENT_CLIP)


def _layers(net: nn.ModuleList) -> list[tuple[Tensor, Tensor]]:
    return [(layer.weight, layer.bias) for layer in net]


def _mlp(layers: list[tuple[Tensor, Tensor]], state: Tensor, beside: Tensor) -> Tensor:
    x = torch.cat([state, beside], -1)
    for weight, bias in layers[:-1]:
        x = F.relu(F.linear(x, weight, bias), inplace=True)
    return F.linear(x, *layers[-1])


def _perturb(actor: list[tuple[Tensor, Tensor]], state: Tensor, action: Tensor) -> Tensor:
    return (action + PHI * torch.tanh(_mlp(actor, state, action))).clamp(-1, 1)
