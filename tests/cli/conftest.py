"""A small dataset, its environment, settings with which a run takes a fraction of a second, and Hydra put away."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import gymnasium
import h5py
import numpy as np
import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from torchrl_bcq.cli.config import default_config
from torchrl_bcq.cli.run import find_checkpoint

ROWS, EPISODE = 200, 20  # of the file
LENGTH = 5  # of an episode in the environment
TINY = {
    "network.hidden": [8],
    "network.vae_hidden": [8],
    "loss.num_target_samples": 2,
    "policy.num_action_samples": 5,
    "batch_size": 8,
    "steps": 20,
    "log_interval": 5,
    "evaluation.interval": 10,
    "evaluation.episodes": 2,
    "checkpoint.interval": 10,
}


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


@pytest.fixture(autouse=True, scope="session")
def _environments():
    kinds = {"Swing-v0": Swing, "Goal-v0": Goal}
    for name, kind in kinds.items():
        gymnasium.register(name, kind, max_episode_steps=LENGTH)
    yield
    for name in kinds:
        del gymnasium.registry[name]


@pytest.fixture(autouse=True)
def _logging_as_before(monkeypatch):
    """Hydra gives the root logger its own handlers, and leaves files open."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    yield
    for handler in set(root.handlers) - set(handlers):
        handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)


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
        with h5py.File(tmp_path / name, "w") as file:
            for key, values in {**columns, **fields}.items():
                file[key] = values
            file.attrs.update(attributes)
            if env_id is not None:
                file.attrs["env_id"] = env_id
        return tmp_path / name

    return make


@pytest.fixture
def file(make_file) -> Path:
    return make_file()


@pytest.fixture
def words(file, tmp_path):
    """Overrides as a user types them, of small settings and these."""

    def make(*overrides: str) -> list[str]:
        small = [f"{name}={value}".replace(" ", "") for name, value in TINY.items()]
        return [f"dataset={file}", f"out={tmp_path / 'run'}", *small, *overrides]

    return make


@pytest.fixture
def make_config(words):
    """The settings of a run in ``tmp_path / "run"``, small ones, but for these overrides."""

    def make(*overrides: str) -> DictConfig:
        return OmegaConf.merge(default_config(), OmegaConf.from_dotlist(words(*overrides)))

    return make


@pytest.fixture
def run(tmp_path) -> Path:
    return tmp_path / "run"


def contents(folder: Path, *without: str) -> dict[str, bytes]:
    """The bytes of all files by name, but for those that tell times, and these."""
    skipped = {"train.log", ".lock", *without}
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not skipped & set(file.relative_to(folder).parts)
    }


def scalars(run: Path) -> dict[str, bytes]:
    found = contents(run / "log" / "scalars")
    assert found
    return found


def state(run: Path) -> dict[str, torch.Tensor]:
    (file,) = find_checkpoint(run, "last").glob("components/*-loss_module/state.pt")
    return torch.load(file, weights_only=True)


def assert_same(one: Path, other: Path) -> None:
    """Checkpoints, all of their parts, and the log are the same bit by bit."""
    assert scalars(one) == scalars(other)
    names = [sorted(path.name for path in (run / "checkpoints").iterdir()) for run in (one, other)]
    assert names[0] == names[1]
    files = [sorted(find_checkpoint(run, "last").rglob("state.pt")) for run in (one, other)]
    assert len(files[0]) == len(files[1]) > 5
    for pair in zip(*files, strict=True):
        first, second = (torch.load(file, weights_only=True) for file in pair)
        if not pair[0].parent.name.endswith("logger"):
            assert equal(first, second), pair[0].parent.name


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) or (a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b or (a != a and b != b)
