"""The share of actions that are far from the recorded ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchrl.data import Bounded, Categorical

from torchrl_bcq import from_arrays
from torchrl_bcq.evaluation.support import Support


def recorded(actions, states=None, rows=200, seed=0):
    rng = np.random.default_rng(seed)
    states = rng.normal(size=(rows, 2)) * [1, 100] if states is None else states
    return from_arrays(states, actions, np.ones(rows), np.ones(rows), np.zeros(rows))


def test_five_of_a_hundred_recorded_actions_are_far():
    rng = np.random.default_rng(1)
    train, rows = (recorded(rng.uniform(-0.2, 0.2, (200, 1)), seed=seed) for seed in (2, 3))
    support = Support(train, rows, Bounded(-1, 1, (1,)))
    assert support.share_far(rows["action"].unsqueeze(1)) == pytest.approx(0.05)


def test_other_actions_are_far():
    """All recorded actions are close to 0, and all states are equal, so the distance is that of the action."""
    states = np.tile([[1.0, 2.0]], (200, 1))
    train = recorded(np.linspace(-0.2, 0.2, 200)[:, None], states)
    rows = recorded(np.linspace(-0.19, 0.19, 200)[:, None], states)
    support = Support(train, rows, Bounded(-1, 1, (1,)))
    assert support.share_far(torch.full((200, 1, 1), 0.2)) == 0
    assert support.share_far(torch.ones(200, 1, 1)) == 1
    mixed = torch.cat([rows["action"].unsqueeze(1), torch.ones(200, 1, 1)], 1)  # two actions in each state
    assert support.share_far(mixed) == pytest.approx(0.5, abs=0.03)  # half of them, and a few recorded ones


def test_distances_are_in_units_of_the_spread():
    """One feature varies a hundred times as much as the other one, and counts as much."""
    rng, scale = np.random.default_rng(0), np.array([1, 100])
    pairs = [rng.normal(size=(200, 2)) for _ in range(2)]
    actions, spec = np.linspace(-1, 1, 200)[:, None], Bounded(-1, 1, (1,))
    shares = [
        Support(*(recorded(actions, states * factor) for states in pairs), spec).share_far(torch.ones(200, 1, 1))
        for factor in (1, scale)
    ]
    assert shares[0] == shares[1]
    assert 0.05 < shares[0] < 1


def test_discrete_actions_are_compared_with_the_same_action():
    """Action 1 was recorded only at the state 10, action 2 never."""
    states = np.repeat([[0.0, 0.0], [10.0, 0.0]], 100, 0)
    train = recorded(np.repeat([0, 1], 100), states)
    rows = recorded(np.repeat([0, 1], 100), states)
    support = Support(train, rows, Categorical(3))
    share = {k: support.share_far(torch.eye(3)[[k] * 200]) for k in range(3)}
    assert share == {0: 0.5, 1: 0.5, 2: 1.0}
    never = recorded(np.full(200, 2), states)
    assert Support(train, never, Categorical(3)).share_far(torch.eye(3)[[2] * 200]) == 1
    half = torch.tensor([[0.5, 0.25, 0.25]]).expand(200, 3)
    assert support.share_far(half) == pytest.approx(0.5 * 0.5 + 0.25 * 0.5 + 0.25 * 1)


def test_a_feature_that_varies_by_rounding_only_does_not_count():
    rng = np.random.default_rng(0)
    angle = rng.uniform(0, 6, 400).astype(np.float32)
    one = np.cos(angle) ** 2 + np.sin(angle) ** 2
    assert 0 < one.std() < 1e-6
    states, actions = rng.normal(size=(400, 2)), rng.uniform(-0.5, 0.5, (400, 1))
    limits = []
    for constant in (one, np.ones(400)):
        both = np.concatenate([states, constant[:, None]], 1)
        train, rows = (recorded(actions[part], both[part]) for part in (slice(200), slice(200, 400)))
        limits.append(Support(train, rows, Bounded(-1, 1, (1,)))._limit)
    assert limits[0] == pytest.approx(limits[1], rel=1e-5)
