"""Learning on small datasets with a known solution."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Bounded, Unbounded
from torchrl.objectives import SoftUpdate

from torchrl_bcq import (
    BCQLoss,
    BCQPolicy,
    BCQTrainer,
    OfflineOptimizationStepper,
    from_arrays,
    make_bcq_modules,
    make_replay_buffer,
)

pytestmark = pytest.mark.no_cover  # training steps by the thousand, which coverage's tracing makes five times as slow
ROWS = 512


def train(transitions: TensorDict, steps: int, gamma: float = 0.99, bound: float = 1.0):
    """Train small networks; returns ``(vae, actor, critics)``."""
    specs = Unbounded((transitions["observation"].shape[-1],)), Bounded(-bound, bound, (1,))
    networks = make_bcq_modules(*specs, hidden=(64, 64), vae_hidden=(64, 64))
    loss = BCQLoss(*networks)
    loss.make_value_estimator(gamma=gamma)
    buffer = make_replay_buffer(transitions, batch_size=64, seed=0)
    updater = SoftUpdate(loss, tau=0.05)
    stepper = OfflineOptimizationStepper.adam(loss, lr=3e-3)
    BCQTrainer(
        loss,
        buffer,
        target_net_updater=updater,
        total_steps=steps,
        optimization_stepper=stepper,
        progress_bar=False,
        seed=0,
    ).train()
    return networks


def bandit(actions: np.ndarray, rewards: np.ndarray) -> TensorDict:
    """Episodes of one step in one state."""
    return from_arrays(
        np.ones((len(actions), 1)), actions[:, None], rewards, np.ones(len(actions)), truncated=np.zeros(len(actions))
    )


def value(critics, observation: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
    return critics(TensorDict({"observation": observation, "action": action}, [len(action)]))[
        "state_action_value"
    ].detach()


def test_the_better_of_two_modes_is_taken_and_not_their_mean():
    rng = np.random.default_rng(0)
    mode = rng.integers(0, 2, ROWS)
    actions = np.where(mode, 0.6, -0.6) + rng.uniform(-0.05, 0.05, ROWS)
    networks = train(bandit(actions, np.where(mode, 1.0, 0.5)), steps=600)
    chosen = BCQPolicy(*networks)(TensorDict({"observation": torch.ones(200, 1)}, [200]))["action"]
    # the mode is 0.55 to 0.65; the perturbation adds at most 0.05, the VAE's spread another 0.05
    assert chosen.min() > 0.45
    assert chosen.max() < 0.75


def test_values_of_a_chain():
    """Four states in a row and a reward of 1 at the end: Q is 0.9^3, 0.9^2, 0.9, 1 for any action."""
    rng = np.random.default_rng(0)
    state = np.tile(np.arange(4), ROWS // 4)
    transitions = from_arrays(
        np.eye(4)[state],
        rng.uniform(-1, 1, (ROWS, 1)),
        (state == 3) * 1.0,
        terminated=state == 3,
        next_observations=np.eye(4)[(state + 1) % 4],
    )
    _, _, critics = train(transitions, steps=1500, gamma=0.9)
    exact = torch.tensor([0.729, 0.81, 0.9, 1.0])
    for action in (-0.9, 0.0, 0.9):
        q = value(critics, torch.eye(4), torch.full((4, 1), action))
        torch.testing.assert_close(q, exact.unsqueeze(-1).expand(4, 2), rtol=0.02, atol=0)


def test_actions_stay_within_the_data():
    """Rewards rise towards the edge of the data at 0, and the critic extrapolates beyond it."""
    rng = np.random.default_rng(0)
    actions = rng.uniform(-4.0, 0.0, ROWS)
    networks = train(bandit(actions, actions / 4), steps=600, bound=4.0)
    grid = torch.linspace(-4, 4, 201).unsqueeze(-1)
    ddpg_choice = grid[value(networks[2], torch.ones(201, 1), grid)[:, 0].argmax()].item()
    assert ddpg_choice > 2  # the critic alone prefers actions far outside of the data
    chosen = BCQPolicy(*networks)(TensorDict({"observation": torch.ones(500, 1)}, [500]))["action"]
    assert chosen.max().item() <= 0.2  # the perturbation moves at most phi = 0.05 half-ranges beyond the data
    assert chosen.min().item() > -1.3  # better than the mean of the data, -2


@pytest.mark.parametrize(("end", "exact"), [("terminated", 1.0), ("truncated", 2.0)])
def test_values_at_the_end_of_an_episode(end, exact):
    """One state that leads to itself, a reward of 1, gamma 0.5: its value is 2 if truncated, 1 if terminated."""
    rng = np.random.default_rng(0)
    ones, flags = np.ones((ROWS, 1)), {"terminated": np.zeros(ROWS), "truncated": np.zeros(ROWS), end: np.ones(ROWS)}
    transitions = from_arrays(ones, rng.uniform(-1, 1, (ROWS, 1)), ones, next_observations=ones, **flags)
    _, _, critics = train(transitions, steps=800, gamma=0.5)
    q = value(critics, torch.ones(3, 1), torch.tensor([[-0.9], [0.0], [0.9]]))
    torch.testing.assert_close(q, torch.full((3, 2), exact), rtol=0.02, atol=0)
