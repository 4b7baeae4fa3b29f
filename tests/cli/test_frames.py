"""Frames on the command line: alone or beside a vector, for continuous and for discrete actions."""

from __future__ import annotations

import json

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete

from torchrl_bcq import ExportedPolicy, History, load_policy
from torchrl_bcq.__main__ import main
from torchrl_bcq.data.frame_stack import FrameStack
from torchrl_bcq.runs.dataset import open_dataset
from torchrl_bcq.runs.folder import load

from ..array_files import write_arrays
from ..runs.folders import assert_same

SIZE, LENGTH, EPISODES = 36, 6, 8
SMALL = ["steps=4", "batch_size=4", "log_interval=2", "evaluation.interval=2", "checkpoint.interval=2", "stack=2"]
SMALL += ["evaluation.episodes=1", "loss.gamma=0.5"]
OF = {
    "discrete_bcq": ["network.frame_hidden=[8]"],
    "discrete_cloning": ["network.frame_hidden=[8]"],
    "bcq": ["network.hidden=[8]", "network.vae_hidden=[8]", "loss.num_target_samples=2", "policy.num_action_samples=3"],
    "cloning": ["network.hidden=[8]"],
}


class Dots(gymnasium.Env):
    """A dot that moves to the right; its row is random. The action changes nothing."""

    def __init__(self, discrete=True, beside=False):
        self.beside = beside
        frame = Box(0, 255, (SIZE, SIZE), np.uint8)
        self.observation_space = Dict(place=Box(0, SIZE, (2,), np.float32), screen=frame) if beside else frame
        self.action_space = Discrete(3) if discrete else Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.row, self.column = int(self.np_random.integers(SIZE)), 0
        return self._observe(), {}

    def step(self, action):
        self.column += 1
        return self._observe(), 1.0, False, False, {}

    def _observe(self):
        frame = np.zeros((SIZE, SIZE), np.uint8)
        frame[self.row, self.column] = 255
        return {"place": np.array([self.row, self.column], np.float32), "screen": frame} if self.beside else frame


@pytest.fixture(autouse=True, scope="module")
def _dots():
    gymnasium.register("Dots-v0", Dots, max_episode_steps=LENGTH)


def write_frames(tmp_path, discrete, beside):
    env, rng = Dots(discrete, beside), np.random.default_rng(0)
    frames, places = [], []
    for episode in range(EPISODES):
        states = [env.reset(seed=episode)[0], *(env.step(0)[0] for _ in range(LENGTH - 1))]
        frames += [state["screen"] if beside else state for state in states]
        places += [state["place"] for state in states] if beside else []
    rows = len(frames)
    actions = rng.integers(3, size=rows) if discrete else rng.uniform(-1, 1, (rows, 2))
    steps = {"actions": actions, "rewards": np.ones(rows), "terminals": np.arange(rows) % LENGTH == LENGTH - 1}
    steps |= {"timeouts": np.zeros(rows), "observations": np.array(places if beside else frames)}
    steps |= {"frames": np.array(frames)} if beside else {}
    attributes = {"env_id": "Dots-v0", "env_kwargs": json.dumps({"discrete": discrete, "beside": beside})}
    attributes |= {"observation_entries": json.dumps(["place", "screen"])} if beside else {}
    path = write_arrays(tmp_path / "dots.hdf5", steps, **attributes)
    return [f"dataset={path}", *(["reader.names.frames=frames"] if beside else [])]


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("algorithm", OF)
def test_runs_on_frames(tmp_path, monkeypatch, algorithm, beside):
    monkeypatch.chdir(tmp_path)
    discrete, run = algorithm.startswith("discrete"), tmp_path / "run"
    data = write_frames(tmp_path, discrete, beside)
    words = [*data, f"algorithm={algorithm}", *SMALL, *OF[algorithm], "normalize=true"]
    words = [word for word in words if "gamma" not in word or "cloning" not in algorithm]
    assert main(["train", *words, f"out={run}"]) == 0
    trained = load(run)
    expected = {"observation": [2], "pixels": [2, SIZE, SIZE]} if beside else {"observation": [2, SIZE, SIZE]}
    expected |= {"observation": [4]} if beside else {}
    assert trained.task.shapes == expected
    assert main(["evaluate", str(run), "--episodes", "2"]) == 0
    own = json.loads((run / "evaluation.json").read_text())[trained.algorithm.title]
    assert own["return"] == LENGTH
    policy, history = load_policy(run), History(2, dim=-3)
    if not beside:
        frame = np.zeros((1, SIZE, SIZE), np.uint8)
        assert policy.act(history(frame)).shape == (() if discrete else (2,))
    else:
        state = {"observation": np.zeros(4), "pixels": np.zeros((2, SIZE, SIZE), np.uint8)}
        assert policy.act(state).shape == (() if discrete else (2,))
    if beside and algorithm == "discrete_bcq":  # frames are an input of their own, and not joined with the vector
        assert main(["export", str(run), "policy.onnx"]) == 0
        exported = ExportedPolicy("policy.onnx")
        assert exported.contract["observation_entries"] is None
        (place,) = (port["low"] for port in exported.contract["inputs"] if port["name"] == "observation")
        assert exported.act({"observation": place, "pixels": np.zeros((1, SIZE, SIZE), np.uint8)}).shape == ()
    assert main(["plot", str(run)]) == 0


@pytest.mark.parametrize("root", [None, "copies"])
def test_frames_are_held_once_and_a_resumed_run_equals_an_uninterrupted_run(tmp_path, root):
    words = [*write_frames(tmp_path, True, False), *SMALL, *OF["discrete_bcq"], "held_out=0.3", "n_step=2"]
    words += [] if root is None else [f"root={tmp_path / root}"]
    for run, lengths in (("whole", [4]), ("parts", [2, 4])):
        for steps in lengths:
            assert main(["train", *words, f"steps={steps}", f"out={tmp_path / run}", "resume=true"]) == 0
    assert_same(tmp_path / "whole", tmp_path / "parts")
    transitions, _ = open_dataset(load(tmp_path / "whole").settings)
    assert isinstance(transitions["observation"], FrameStack)
    assert transitions["observation"].frames is transitions["next", "observation"].frames
    assert len(transitions["observation"].frames) == EPISODES * LENGTH
    if root is not None:
        held = list((tmp_path / root).rglob("*.frames"))
        assert {file.stat().st_size for file in held} == {EPISODES * LENGTH * SIZE * SIZE}
        assert len({file.stat().st_ino for file in held}) == 1


def test_an_environment_with_other_frames_is_refused(tmp_path, capsys):
    data = write_frames(tmp_path, True, True)
    words = [*data, *SMALL, *OF["discrete_bcq"], "evaluation.env_kwargs.beside=false", f"out={tmp_path / 'run'}"]
    assert main(["train", *words]) == 1
    assert "has observations of shape (1, 36, 36), but the dataset has (2,); choose another" in capsys.readouterr().err


def test_describe_and_convert(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = write_frames(tmp_path, True, False)[0].partition("=")[2]
    assert main(["describe", path]) == 0
    assert "[1, 36, 36] uint8  min 0  max 255" in " ".join(capsys.readouterr().out.split("\n"))
    assert main(["convert", path, "copies"]) == 0
    (copy,) = (folder for folder in (tmp_path / "copies").iterdir() if folder.is_dir())
    words = [f"dataset={copy}", *SMALL, *OF["discrete_bcq"], "evaluation.env=null", f"out={tmp_path / 'run'}"]
    assert main(["train", *words]) == 0
    assert torch.isfinite(load(tmp_path / "run").loss.qvalue_network.heads[0][-1].weight).all()


@pytest.mark.parametrize("beside", [False, True])
def test_policies_on_frames_are_ranked(tmp_path, monkeypatch, capsys, beside):
    monkeypatch.chdir(tmp_path)
    words = [*write_frames(tmp_path, True, beside), *SMALL, *OF["discrete_bcq"], "evaluation.env=null", "out=run"]
    assert main(["train", *words]) == 0
    capsys.readouterr()
    assert main(["rank", "run", "--steps", "2", "--held-out", "0.5"]) == 0
    out = capsys.readouterr().out
    assert "far" not in out.partition("\n\n")[2].splitlines()[0]  # frames have no distances
    assert "run: cannot tell" in out


@pytest.mark.parametrize("stack", [1, 2])
def test_export(tmp_path, stack):
    words = [*write_frames(tmp_path, True, False), *SMALL, *OF["discrete_bcq"], f"stack={stack}"]
    assert main(["train", *words, f"out={tmp_path / 'run'}"]) == 0
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "policy.onnx")]) == 0
    assert (tmp_path / "policy.onnx").is_file()
