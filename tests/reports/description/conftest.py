"""A healthy dataset, and what is found in one."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Bounded

from torchrl_bcq import describe

SPEC = Bounded(-1, 1, (2,))
LENGTHS = torch.arange(90, 114, 2)  # of 12 episodes; every other one terminates
ROWS = 1212
LAST = LENGTHS.cumsum(0) - 1


def healthy(lengths=LENGTHS):
    """Random observations that continue, up to the last ones of an episode."""
    random = torch.Generator().manual_seed(0)
    episode = torch.arange(len(lengths)).repeat_interleave(lengths)
    n, last = len(episode), lengths.cumsum(0) - 1
    observation = torch.randn(n + 1, 3, generator=random)
    following = observation[1:].clone()
    following[last] = torch.randn(len(last), 3, generator=random)
    terminated, truncated = torch.zeros(2, n, 1, dtype=torch.bool)
    terminated[last[1::2]] = truncated[last[::2]] = True
    return TensorDict(
        {
            "observation": observation[:-1].clone(),
            "action": torch.rand(n, 2, generator=random) * 1.8 - 0.9,
            "episode": episode,
            "next": {
                "observation": following,
                "reward": torch.randn(n, 1, generator=random),
                "done": terminated | truncated,
                "terminated": terminated,
                "truncated": truncated,
            },
        },
        [n],
    )


@pytest.fixture
def data():
    return healthy()


def messages(data, spec=SPEC):
    return [str(finding) for finding in describe(data, action_spec=spec).findings]
