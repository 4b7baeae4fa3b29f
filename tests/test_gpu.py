"""The algorithms on a GPU: losses, runs, resumed runs and policies; skipped on machines without one."""

from __future__ import annotations

import json
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete

from torchrl_bcq import load_policy
from torchrl_bcq.__main__ import main

from .array_files import write_arrays
from .objectives.conftest import OBJECTIVES, make_batch, with_updater
from .runs.folders import assert_same, state
from .small_runs import TINY

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch._inductor"),  # PyTorch's compiler, of what could be faster
]
__all__ = ["make_batch"]  # a fixture

DEVICE = "cuda"
LENGTH, EPISODES, ACTIONS, SIZE = 5, 20, 3, 36
ALGORITHMS = {  # small networks
    "bcq": TINY[:5],
    "cloning": TINY[:1],
    "discrete_bcq": [*TINY[:2], "loss.copy_interval=7"],
    "discrete_cloning": TINY[:1],
}
MODES = [
    [],
    ["cudagraph=true"],
    ["compile=true"],
    ["cudagraph=true", "precision=bf16-mixed"],
    ["cudagraph=true", "compile=true"],
    ["cudagraph=true", "average_decay=0.9"],
]


class Walk(gymnasium.Env):
    """Any action moves the state, or the bright pixels, by one; the reward is the action."""

    def __init__(self, discrete: bool, frames: bool) -> None:
        shape = (SIZE, SIZE) if frames else (3,)
        self.observation_space = Box(0, 255, shape, np.uint8 if frames else np.float32)
        self.action_space = Discrete(ACTIONS) if discrete else Box(-2, 2, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = int(self.np_random.integers(10))
        return self._observe(), {}

    def step(self, action):
        self.place += 1
        return self._observe(), float(np.sum(action)), False, False, {}

    def _observe(self):
        space = self.observation_space
        state = np.zeros(space.shape, space.dtype)
        state[self.place % len(state)] = 1
        return state


@pytest.fixture(autouse=True, scope="module")
def _walk():
    gymnasium.register("Walk-v0", Walk, max_episode_steps=LENGTH)


@pytest.fixture
def make_words(tmp_path):
    """Write a dataset for the algorithm, and return the settings of a run with it."""

    def make(algorithm: str, frames: bool = False) -> list[str]:
        discrete, rng = algorithm.startswith("discrete"), np.random.default_rng(0)
        env, rows = Walk(discrete, frames), LENGTH * EPISODES
        states, following = [], []
        for episode in range(EPISODES):
            walk = [env.reset(seed=episode)[0], *(env.step(0)[0] for _ in range(LENGTH))]
            states, following = states + walk[:-1], following + walk[1:]
        steps = {
            "observations": np.array(states),
            "next_observations": np.array(following),
            "actions": rng.integers(ACTIONS, size=rows) if discrete else rng.uniform(-2, 2, (rows, 1)),
            "rewards": rng.normal(size=rows),
            "terminals": np.zeros(rows, bool),
            "timeouts": np.arange(rows) % LENGTH == LENGTH - 1,
        }
        attributes = {"env_id": "Walk-v0", "env_kwargs": json.dumps({"discrete": discrete, "frames": frames})}
        path = write_arrays(tmp_path / "walks.hdf5", steps, **attributes)
        words = [f"dataset={path}", f"algorithm={algorithm}", f"device={DEVICE}", *ALGORITHMS[algorithm], *TINY[5:]]
        words = [word for word in words if "gamma" not in word or "cloning" not in algorithm]
        return [*words, *(["stack=2"] if frames else [])]

    return make


def on_device(like, device):
    """A function that draws as ``torch.randn`` does, with the same numbers on each device."""
    return lambda *args, **settings: like(*args, **{**settings, "device": "cpu"}).to(device)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses_and_gradients_equal_those_of_the_cpu(objective, make_batch, monkeypatch):
    batch, found = make_batch(16, dtype=torch.float64), {}
    randn, randn_like = torch.randn, torch.randn_like
    for device in ("cpu", DEVICE):
        torch.manual_seed(0)
        loss = with_updater(OBJECTIVES[objective]().double()).to(device)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "randn", on_device(randn, device))
            patch.setattr(torch, "randn_like", on_device(randn_like, device))
            losses = loss(batch.clone().to(device))
        sum(value for name, value in losses.items() if name.startswith("loss_")).backward()
        gradients = {f"gradient of {name}": p.grad for name, p in loss.named_parameters() if p.grad is not None}
        assert gradients
        found[device] = {name: value.detach() for name, value in {**losses, **gradients}.items()}
    assert {value.device.type for value in found[DEVICE].values()} == {DEVICE}
    moved = {name: value.cpu() for name, value in found[DEVICE].items()}
    torch.testing.assert_close(moved, found["cpu"], rtol=1e-9, atol=1e-12)


def whole_and_parts(folder, words: list[str]) -> list[Path]:
    """Two runs of 20 steps, the second one interrupted after 10."""
    runs = {folder / "whole": [20], folder / "parts": [10, 20]}
    for run, lengths in runs.items():
        for steps in lengths:
            assert main(["train", *words, f"steps={steps}", f"out={run}", "resume=true"]) == 0
    return [*runs]


@pytest.mark.parametrize("behavior", ["mixture", "flow"])
def test_runs_with_other_behaviour_models(make_words, tmp_path, behavior):
    words = [*make_words("bcq"), "cudagraph=true", f"network.behavior={behavior}"]
    assert_same(*whole_and_parts(tmp_path, words))


@pytest.mark.parametrize("mode", MODES, ids=" ".join)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_resumed_run_equals_an_uninterrupted_run(make_words, tmp_path, algorithm, mode):
    words = [*make_words(algorithm), *mode, "held_out=0.2"]
    runs = whole_and_parts(tmp_path, words)
    if "compile=true" in mode:  # the compiler chooses kernels by timing, and others round differently
        torch.testing.assert_close(*map(state, runs), rtol=1e-4, atol=1e-6)
    else:
        assert_same(*runs)


@pytest.mark.parametrize("frames", [False, True])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_policy_trained_on_the_gpu_acts_alike_on_both_devices(make_words, tmp_path, algorithm, frames):
    run = tmp_path / "run"
    assert main(["train", *make_words(algorithm, frames), f"out={run}", "normalize=true"]) == 0
    assert main(["evaluate", str(run), "--episodes", "2", "--checkpoint", "last"]) == 0
    numbers = json.loads((run / "evaluation.json").read_text())
    assert all(np.isfinite(row["return"]) for row in numbers.values() if isinstance(row, dict) and "return" in row)
    policies = [load_policy(run, "last", device) for device in ("cpu", DEVICE)]
    rng = np.random.default_rng(0)
    states = rng.integers(256, size=(30, 2, SIZE, SIZE), dtype=np.uint8) if frames else rng.normal(size=(30, 3))
    one, other = (policy.act(states) for policy in policies)
    assert isinstance(other, np.ndarray)
    assert np.isclose(one, other, rtol=1e-2, atol=1e-3).mean() > 0.9  # values that are almost equal may change places


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_estimates_on_the_gpu_equal_those_on_the_cpu(make_words, tmp_path, monkeypatch, algorithm):
    """The critics start with other random weights, so only the numbers that do not depend on critics are compared."""
    monkeypatch.chdir(tmp_path)
    words = [*make_words(algorithm), "evaluation.env=null", "checkpoint.monitor=fqe", "evaluation.fqe_steps=3"]
    assert main(["train", *words, "steps=20", "out=run"]) == 0
    found = {}
    for device in ("cpu", DEVICE):
        assert main(["rank", "run", "--steps", "3", "--device", device, "--out", device]) == 0
        found[device] = json.loads((tmp_path / device / "ranking.json").read_text())["estimates"][1]
    assert found[DEVICE]["far"] == pytest.approx(found["cpu"]["far"], abs=0.1)
    assert np.isfinite(found[DEVICE]["critics"]).all()
    assert found[DEVICE]["limits"] == found["cpu"]["limits"]
