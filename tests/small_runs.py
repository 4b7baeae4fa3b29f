"""A small dataset, its environment, and settings of runs that take a fraction of a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from omegaconf import DictConfig

from torchrl_bcq.runs.settings import compose

from .array_files import write_arrays

ROWS, EPISODE = 200, 20  # of the file
LENGTH = 5  # of an episode in the environment
TINY = [
    "network.hidden=[8]",
    "loss.gamma=0.9",  # few steps past the time limit
    "policy.num_action_samples=5",
    "loss.num_target_samples=2",
    "network.vae_hidden=[8]",
    "batch_size=8",
    "steps=20",
    "log_interval=5",
    "evaluation.interval=10",
    "evaluation.episodes=2",
    "checkpoint.interval=10",
]


class Swing(gymnasium.Env):
    """Shaped like Pendulum; an action is added to the first number of the state, which is the reward."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = gymnasium.spaces.Box(-2, 2, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = self.np_random.uniform(-1, 1, 3).astype(np.float32)
        return self.state.copy(), {}

    def step(self, action):
        self.state[0] += action[0]
        return self.state.copy(), float(self.state[0]), False, False, {}


class Goal(Swing):
    """Observations in a dictionary, none of which is called ``observation``."""

    observation_space = gymnasium.spaces.Dict(place=Swing.observation_space, goal=Swing.observation_space)

    def reset(self, *, seed=None, options=None):
        state, info = super().reset(seed=seed)
        return {"place": state, "goal": state}, info

    def step(self, action):
        state, *outcome = super().step(action)
        return {"place": state, "goal": state}, *outcome


@pytest.fixture(autouse=True, scope="session")
def _environments():
    for name, kind in {"Swing-v0": Swing, "Goal-v0": Goal}.items():
        gymnasium.register(name, kind, max_episode_steps=LENGTH)


@pytest.fixture
def make_file(tmp_path):
    """An HDF5 file in D4RL's layout: ten episodes of 20 steps, cut off at their ends."""

    def make(name: str = "swings.hdf5", env_id: str | None = "Swing-v0", seed: int = 0, **fields: Any) -> Path:
        rng = np.random.default_rng(seed)
        columns = {
            "observations": rng.uniform(-1, 1, (ROWS, 3)),
            "next_observations": rng.uniform(-1, 1, (ROWS, 3)),
            "actions": rng.uniform(-2, 2, (ROWS, 1)),
            "rewards": rng.normal(size=ROWS),
            "terminals": np.zeros(ROWS, dtype=bool),
            "timeouts": np.arange(ROWS) % EPISODE == EPISODE - 1,
        }
        attributes = {key: fields.pop(key) for key in ("ref_min_score", "ref_max_score") if key in fields}
        attributes |= {} if env_id is None else {"env_id": env_id}
        return write_arrays(tmp_path / name, {**columns, **fields}, **attributes)

    return make


@pytest.fixture
def file(make_file) -> Path:
    return make_file()


@pytest.fixture
def make_settings(file, tmp_path):
    """The settings of a small run in ``tmp_path / "run"``, with these overrides."""

    def make(*overrides: str) -> DictConfig:
        chosen = [word for word in overrides if word.startswith("algorithm=")]
        sizes = TINY if chosen in ([], ["algorithm=bcq"]) else [TINY[0], *TINY[5:]]
        (settings,) = compose([f"dataset={file}", f"out={tmp_path / 'run'}", *sizes, *overrides])
        return settings

    return make
