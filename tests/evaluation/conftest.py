"""Environments whose returns are known, and policies that follow a rule."""

from __future__ import annotations

import functools

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.data import Binary, Composite, Unbounded
from torchrl.envs import EnvBase, SerialEnv

from torchrl_bcq import BCQPolicy

from ..conftest import ACTION_SPEC, OBSERVATION_SPEC


class Stairs(EnvBase):
    """An episode of ``height`` steps; the reward of step t is t, or, by the action, ``t * action[1]``.

    Observes the number of steps made, a number drawn when the episode began, and the height.
    """

    def __init__(self, height: int, by_action: bool = False) -> None:
        super().__init__()
        self.height = height
        self.by_action = by_action
        self.observation_spec = Composite(observation=OBSERVATION_SPEC.clone())
        self.action_spec = ACTION_SPEC.clone()
        self.reward_spec = Unbounded((1,))
        self.full_done_spec = Composite(
            {name: Binary(1, (1,), dtype=torch.bool) for name in ("done", "terminated")}  # type: ignore[arg-type]
        )
        self.generator = torch.Generator()
        self.steps_made = 0

    def _reset(self, tensordict=None, **kwargs) -> TensorDict:
        self.made, self.drawn = 0, torch.rand((), generator=self.generator)
        return TensorDict({"observation": self._observe()})

    def _step(self, tensordict) -> TensorDict:
        self.made += 1
        self.steps_made += 1
        reward = torch.tensor([float(self.made)]) * (tensordict["action"][1] if self.by_action else 1)
        done = torch.tensor([self.made >= self.height])
        return TensorDict({"observation": self._observe(), "reward": reward, "done": done, "terminated": done})

    def _observe(self) -> torch.Tensor:
        return torch.tensor([self.made, self.drawn, self.height], dtype=torch.float32)

    def _set_seed(self, seed: int | None) -> None:
        self.generator.manual_seed(seed)


def stairs(*heights: int, by_action: bool = False) -> SerialEnv:
    return SerialEnv(len(heights), [functools.partial(Stairs, height, by_action) for height in heights])


class Watching(nn.Module):
    """Acts by a rule, and remembers its modes and the observations."""

    def __init__(self, rule=lambda observation: torch.full((*observation.shape[:-1], 2), 0.5)) -> None:
        super().__init__()
        self.rule = rule
        self.modes = []
        self.seen = []

    def forward(self, tensordict):
        self.modes.append(self.training)
        self.seen.append(tensordict["observation"].clone())
        return tensordict.set("action", self.rule(tensordict["observation"]))


@pytest.fixture
def policy(modules) -> BCQPolicy:
    return BCQPolicy(*modules, num_action_samples=5)
