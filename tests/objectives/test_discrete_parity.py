"""Twenty updates compared with an implementation in plain PyTorch, written from the paper and the author's settings."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.data import Categorical, Unbounded
from torchrl.objectives import HardUpdate, SoftUpdate

from torchrl_bcq import DiscreteBCQLoss, OfflineOptimizationStepper, make_discrete_bcq_modules

GAMMA, TAU, LR, THRESHOLD, PENALTY, K, UPDATES = 0.97, 0.05, 1e-3, 0.6, 0.05, 3, 20
SHAPES = {"vectors": (3,), "frames": (2, 36, 36)}


def plain_layers(network: nn.Module, kinds: tuple) -> list[nn.Module]:
    return [copy.deepcopy(layer) for layer in network.modules() if isinstance(layer, kinds)]


class PlainNetwork(nn.Module):
    """The author's networks, one layer after the other, with the same weights."""

    def __init__(self, network) -> None:
        super().__init__()
        convolutions = [] if network.trunk is None else plain_layers(network.trunk, (nn.Conv2d,))
        self.convolutions = nn.ModuleList(convolutions)
        self.q, self.i = (nn.ModuleList(plain_layers(head, (nn.Linear,))) for head in network.heads)

    def forward(self, x):
        x = x.double()
        if len(self.convolutions):
            x = x / 255
            for convolution in self.convolutions:
                x = torch.relu(convolution(x))
            x = x.reshape(len(x), -1)
        outputs = []
        for layers in (self.q, self.i):
            y = x
            for layer in layers[:-1]:
                y = torch.relu(layer(y))
            outputs.append(layers[-1](y))
        return outputs


class Reference:
    """Discrete BCQ with one tensor operation after the other: no tensordict, no TorchRL, no code of the package."""

    def __init__(self, network, copy_every: int | None) -> None:
        self.net = PlainNetwork(network)
        self.target = copy.deepcopy(self.net)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=LR)
        self.copy_every, self.steps = copy_every, 0

    def update(self, s, a, r, s2, not_terminated):
        with torch.no_grad():
            q, i = self.net(s2)
            imitation = torch.exp(torch.log_softmax(i, 1))
            passes = (imitation / imitation.max(1, keepdim=True).values > THRESHOLD).double()
            chosen = (passes * q + (1 - passes) * -1e8).argmax(1, keepdim=True)
            y = r + not_terminated * GAMMA * self.target(s2)[0].gather(1, chosen)
        q, i = self.net(s)
        terms = (
            nn.functional.smooth_l1_loss(q.gather(1, a), y),
            nn.functional.nll_loss(torch.log_softmax(i, 1), a.reshape(-1)),
            PENALTY * i.pow(2).mean(),
        )
        self.optimizer.zero_grad()
        sum(terms).backward()
        self.optimizer.step()
        self.steps += 1
        for p, p_target in zip(self.net.parameters(), self.target.parameters(), strict=True):
            if self.copy_every is None:
                p_target.data = TAU * p.data + (1 - TAU) * p_target.data
            elif self.steps % self.copy_every == 0:
                p_target.data = p.data.clone()
        return [term.item() for term in terms], passes.mean().item()


def draw(shape: tuple, rows: int) -> TensorDict:
    def observe() -> torch.Tensor:
        if len(shape) == 3:
            return torch.randint(256, (rows, *shape), dtype=torch.uint8)
        return torch.randn(rows, *shape, dtype=torch.float64)

    ended, cut = torch.rand(2, rows, 1) < 0.2  # rows that are only cut off bootstrap
    outcome = {"reward": torch.randn(rows, 1, dtype=torch.float64), "terminated": ended, "done": ended | cut}
    following = {"observation": observe(), **outcome}
    return TensorDict({"observation": observe(), "action": torch.randint(K, (rows,)), "next": following}, [rows])


@pytest.mark.parametrize("updates", ["soft", "hard"])
@pytest.mark.parametrize("kind", SHAPES)
def test_twenty_updates_equal_the_reference(kind, updates, show_figure):
    shape, rows = SHAPES[kind], 32 if kind == "vectors" else 8
    dtype = torch.float64 if kind == "vectors" else torch.uint8
    sizes = {"hidden": (24, 16), "frame_hidden": (24,), "dtype": torch.float64}
    (network,) = make_discrete_bcq_modules(Unbounded(shape, dtype=dtype), Categorical(K), **sizes)
    network.heads[1][-1].weight.data.mul_(10)  # so that the threshold excludes actions from the start
    reference = Reference(network, copy_every=None if updates == "soft" else 7)
    settings = {"unlikely_action_threshold": THRESHOLD, "imitation_logits_penalty": PENALTY}
    loss = DiscreteBCQLoss(network, **settings).make_value_estimator(gamma=GAMMA)
    updater = (
        SoftUpdate(loss, tau=TAU) if updates == "soft" else HardUpdate(loss, value_network_update_interval=6)
    )  # copies in each 7th step
    stepper = OfflineOptimizationStepper.adam(loss, lr=LR)

    def compute_loss(td, method):
        return getattr(loss, method)(td)

    trainer = SimpleNamespace(loss_module=loss, compute_loss=compute_loss, clip_norm=None)
    deviations, shares, start = [], [], copy.deepcopy(reference.net)
    for _ in range(UPDATES):
        batch = draw(shape, rows)
        logs = stepper.step(trainer, batch)
        updater.step()
        terms, share = reference.update(
            batch["observation"],
            batch["action"].unsqueeze(-1),
            batch["next", "reward"],
            batch["next", "observation"],
            (~batch["next", "terminated"]).double(),
        )
        names = ("loss_qvalue", "loss_imitation", "loss_penalty", "allowed_share")
        deviations += [abs(logs[name].item() - value) for name, value in zip(names, (*terms, share), strict=True)]
        shares.append(share)

    assert 1 / K < sum(shares) / UPDATES < 1  # the threshold excludes some actions, but not all
    ours, theirs = list(PlainNetwork(network).parameters()), list(reference.net.parameters())
    assert min((p - q).abs().max().item() for p, q in zip(ours, start.parameters(), strict=True)) > 1e-3
    with loss.target_networks():
        ours += [p.clone() for p in PlainNetwork(network).parameters()]
    theirs += reference.target.parameters()
    deviations += [(p - q).abs().max().item() for p, q in zip(ours, theirs, strict=True)]
    assert any(
        (p - q).abs().max() > 1e-4 for p, q in zip(reference.target.parameters(), start.parameters(), strict=True)
    )
    figure = f"discrete BCQ, {kind}, {updates} updates: parity with plain PyTorch, float64, {UPDATES} updates"
    show_figure(f"{figure}: largest deviation {max(deviations):.1e}")
    assert max(deviations) < 1e-9
