"""Discrete BCQ in bare PyTorch: the cost of an update without any framework.

Like floor.py, it consists of layers and tensors. It computes only what is used: the target network has no logits.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam
from transitions import ACTIONS, DISCRETE, OBSERVATIONS

GAMMA, THRESHOLD, PENALTY = 0.99, 0.3, 0.01
CONVOLUTIONS = ((4, 32, 8, 4), (32, 64, 4, 2), (64, 64, 3, 1))  # channels, kernel, stride
FRAME_FEATURES = 64 * 7 * 7

Layers = list[tuple[Tensor, Tensor]]


class DiscreteFloor:
    """Networks, target, optimizer and data of one run.

    Args:
        transitions: batch size ``[N]``.
        batch_size: rows of a gradient step, ``B``.
        device: of networks and data.
        kind: of the observations, ``"vectors"`` or ``"frames"``.
    """

    def __init__(self, transitions: TensorDict, batch_size: int, device: str, kind: str) -> None:
        self.batch_size, self.device, self.settings = batch_size, device, DISCRETE[kind]
        held = transitions.to(device)
        fields = ("observation", "action", ("next", "reward"), ("next", "observation"), ("next", "terminated"))
        self.fields = [held[field] for field in fields]
        trunk = [nn.Conv2d(*sizes) for sizes in CONVOLUTIONS] if kind == "frames" else []
        widths = [FRAME_FEATURES if trunk else OBSERVATIONS, *self.settings.hidden, ACTIONS]
        heads = [nn.Linear(*pair) for _ in range(2) for pair in pairwise(widths)]
        net = nn.ModuleList([*trunk, *heads]).to(device)
        self.optimizer = Adam(net.parameters(), lr=self.settings.lr, eps=self.settings.eps, fused=True)
        pairs = [(layer.weight, layer.bias) for layer in net]
        depth, end = len(trunk), len(trunk) + len(heads) // 2  # the target ends before the logits
        self.trunk, self.value, self.logits = pairs[:depth], pairs[depth:end], pairs[end:]
        self.sources = [tensor.detach() for pair in pairs[:end] for tensor in pair]
        self.targets = [source.clone() for source in self.sources]
        copies = list(zip(self.targets[::2], self.targets[1::2], strict=True))
        self.target_trunk, self.target_value = copies[:depth], copies[depth:]
        self.steps = 0

    def update(self, steps: int) -> None:
        """Make gradient steps, each on a new batch."""
        for _ in range(steps):
            rows = torch.randint(len(self.fields[0]), (self.batch_size,), device=self.device)
            loss = self.loss(*(field[rows] for field in self.fields))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.steps += 1
            if self.settings.tau is not None:
                torch._foreach_lerp_(self.targets, self.sources, self.settings.tau)
            elif self.steps % self.settings.copy_every == 0:
                torch._foreach_copy_(self.targets, self.sources)

    def loss(self, state: Tensor, action: Tensor, reward: Tensor, following: Tensor, terminated: Tensor) -> Tensor:
        """Huber loss of the values, imitation loss and penalty. ``action`` is ``[B]``."""
        with torch.no_grad():
            following = _scale(following)
            features = _convolve(self.trunk, following)
            logits = _mlp(self.logits, features)
            unlikely = logits - logits.amax(1, keepdim=True) <= math.log(THRESHOLD)
            best = _mlp(self.value, features).masked_fill_(unlikely, -math.inf).argmax(1, keepdim=True)
            value = _mlp(self.target_value, _convolve(self.target_trunk, following)).gather(1, best)
            target = reward + GAMMA * ~terminated * value
        features = _convolve(self.trunk, _scale(state))
        logits = _mlp(self.logits, features)
        value = _mlp(self.value, features).gather(1, action.unsqueeze(1))
        return F.smooth_l1_loss(value, target) + F.cross_entropy(logits, action) + PENALTY * logits.square().mean()


def _scale(state: Tensor) -> Tensor:
    return state / 255 if state.dtype == torch.uint8 else state


def _convolve(layers: Layers, x: Tensor) -> Tensor:
    """``[B, C, H, W] -> [B, F]``, or nothing for vectors."""
    for (weight, bias), (*_, stride) in zip(layers, CONVOLUTIONS, strict=False):
        x = F.relu(F.conv2d(x, weight, bias, stride), inplace=True)
    return x.flatten(1)


def _mlp(layers: Layers, x: Tensor) -> Tensor:
    for weight, bias in layers[:-1]:
        x = F.relu(F.linear(x, weight, bias), inplace=True)
    return F.linear(x, *layers[-1])
