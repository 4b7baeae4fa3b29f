"""The example of frames: what the player records, and a short training on the command line."""

from __future__ import annotations

import json
from collections import Counter
from importlib import import_module
from pathlib import Path

import gymnasium
import h5py
import numpy as np
import pytest

pytest.importorskip("ale_py", reason="the package ale-py is not installed")
pytest.importorskip("cv2", reason="the package opencv-python-headless is not installed")


@pytest.fixture
def pong(monkeypatch):
    """Import the example as a script does."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")
    return import_module("pong")


def memory(ball: int, paddle: int) -> np.ndarray:
    now = np.zeros(128, np.uint8)
    now[[54, 51]] = ball, paddle
    return now


@pytest.mark.parametrize(
    ("now", "before", "action"),
    [
        ((100, 60), (100, 60), 3),  # the ball is 34 below its place before the paddle
        ((100, 130), (100, 130), 2),
        ((106, 100), (106, 100), 0),
        ((114, 100), (114, 100), 0),  # gap 8
        ((115, 100), (115, 100), 3),  # gap 9
        ((106, 100), (90, 100), 3),  # the ball moves down by 16
        ((126, 100), (126, 80), 0),  # the paddle glides down by 14: gap 6
        ((0, 60), (100, 60), 0),  # no ball
        ((100, 94), (0, 94), 0),  # a new ball has not moved
        ((250, 200), (251, 200), 3),  # bytes do not overflow
    ],
)
def test_the_player_follows_the_ball(pong, now, before, action):
    assert pong.follow(memory(*now), memory(*before)) == action


def test_the_player_wins_without_noise(pong):
    env = gymnasium.make(pong.ID)
    assert sum(pong.play(env, 0.0, np.random.default_rng(0), 1000)["rewards"]) >= 2
    env.close()


def test_recorded_steps_are_those_of_the_game(pong, tmp_path, capsys):
    pong.record(tmp_path / "pong.hdf5", 400)
    assert [path.name for path in tmp_path.iterdir()] == ["pong.hdf5"]
    with h5py.File(tmp_path / "pong.hdf5") as file:
        assert dict(file.attrs) == {"env_id": "pong:PongFrames-v0", "n_actions": 6}
        rows = {name: values[:] for name, values in file.items()}
    assert {name: values.dtype for name, values in rows.items()} == {
        "observations": np.uint8, "actions": np.int64, "rewards": np.float64, "terminals": bool, "timeouts": bool,
        "action_probabilities": np.float64,
    }  # fmt: skip
    env = gymnasium.make(pong.ID)
    frame, _ = env.reset(seed=int(np.random.default_rng(0).integers(2**31)))
    for index, action in enumerate(rows["actions"]):
        assert np.array_equal(rows["observations"][index], frame)
        frame, reward, *_ = env.step(action)
        assert rows["rewards"][index] == reward
    env.close()
    assert rows["rewards"].sum() < 0
    assert not rows["terminals"].any()
    assert rows["timeouts"].nonzero()[0].tolist() == [399]
    # noise of 0.1 and 6 actions: 0.9 + 0.1 / 6 for the player's choice, 0.1 / 6 for each other action
    counts = Counter(rows["action_probabilities"].round(6).tolist())
    assert set(counts) == {0.916667, 0.016667}
    assert 400 / 12 * 0.5 < counts[0.016667] < 400 / 12 * 1.6
    assert capsys.readouterr().out.startswith("10% random actions: episodes 1, mean return -")


def test_an_episode_that_is_cut_off_is_left_out_and_the_noise_changes(pong, tmp_path, monkeypatch, capsys):
    """Episodes of 30 steps: 2 of them in 80 steps, and 20 steps of a third one."""
    spec = gymnasium.registry[pong.ID]
    monkeypatch.setattr(spec, "max_episode_steps", 30)
    monkeypatch.setattr(pong, "NOISES", (0.0, 1.0))
    pong.record(tmp_path / "pong.hdf5", 80)
    with h5py.File(tmp_path / "pong.hdf5") as file:
        assert file["timeouts"][:].nonzero()[0].tolist() == [29, 59]
        assert file["observations"].shape == (60, 84, 84)
        assert file["action_probabilities"][:30].tolist() == [1] * 30
        assert file["action_probabilities"][30:] == pytest.approx(np.full(30, 1 / 6))
        assert len(set(file["actions"][30:])) == 6
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == [
        "0% random actions",
        "100% random actions",
    ]


def test_short_form(pong, tmp_path, capsys):
    words = ["--frames", "300", "--steps", "4", "--episodes", "1", "--out", str(tmp_path)]
    words += ["evaluation.max_episode_steps=5", "loss.gamma=0.5", "network.frame_hidden=[8]"]
    for _ in range(2):  # the second time, all is done but the evaluation
        assert pong.main(words) == 0
        assert "policy" in capsys.readouterr().out
    run = tmp_path / "run"
    for folder in (run, run / "baseline"):
        assert json.loads((folder / "results.json").read_text())["steps"] == 4
    assert {"random", "imitation", "cloning", "discrete BCQ"} < set(json.loads((run / "evaluation.json").read_text()))
    (frames,) = {path.stat().st_size for path in (tmp_path / "copies").rglob("*.frames")}
    assert frames == 300 * 84 * 84
