"""A run whose states join several observations, as a user types it."""

from __future__ import annotations

import json

import gymnasium
import numpy as np
import pytest
import torch
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_bcq import load_hdf5, load_policy, stack_observations
from torchrl_bcq.__main__ import main
from torchrl_bcq.evaluation import recording

from ..small_runs import Swing


def test_train_evaluate_resume_and_record(words, run, capsys, tmp_path):
    assert main(["train", *words("stack=3", "baseline=cloning")]) == 0
    assert "evaluated in Swing-v0 (states of 3 observations), steps 0 to 20" in capsys.readouterr().err
    assert main(["evaluate", str(run), "--episodes", "2"]) == 0
    found = json.loads((run / "evaluation.json").read_text())
    assert found["env"] == "Swing-v0 (states of 3 observations)"
    assert {name: found[name]["episode_length"] for name in ("BCQ", "cloning", "random")} == dict.fromkeys(
        ("BCQ", "cloning", "random"), 5
    )
    assert main(["train", f"resume={run}", "steps=30"]) == 0
    assert main(["train", f"resume={run}", "stack=2"]) == 1
    assert "stack was 3 and is now 2" in capsys.readouterr().err

    out = tmp_path / "again.hdf5"
    assert main(["record", "--policy", str(run), "--steps", "12", "--out", str(out)]) == 0
    rows = load_hdf5(out)
    assert rows["observation"].shape == rows["next", "observation"].shape == (12, 3)
    assert rows["episode"].bincount().tolist() == [5, 5, 2]
    inside = rows["episode"][1:] == rows["episode"][:-1]
    assert torch.equal(rows["next", "observation"][:-1][inside], rows["observation"][1:][inside])
    moved = rows["next", "observation"][:, :1] - rows["observation"][:, :1]  # the environment adds the action
    torch.testing.assert_close(moved, rows["action"], atol=1e-5, rtol=1e-5)
    capsys.readouterr()
    assert main(["train", *words(f"dataset={out}", "stack=3", f"out={tmp_path / 'next'}")]) == 0
    printed = capsys.readouterr().err
    assert "next observation is not" not in printed  # the recorded rows follow each other
    assert "stacked already" not in printed


def test_recorded_actions_are_those_of_the_states(words, run, tmp_path, monkeypatch):
    """Recorded without randomness, stacked again, the states lead to the same actions."""
    assert main(["train", *words("stack=3")]) == 0
    monkeypatch.setattr(
        recording, "set_exploration_type", lambda _: set_exploration_type(ExplorationType.DETERMINISTIC)
    )
    assert main(["record", "--policy", str(run), "--steps", "9", "--out", str(tmp_path / "same.hdf5")]) == 0
    rows = stack_observations(load_hdf5(tmp_path / "same.hdf5"), 3)
    np.testing.assert_allclose(load_policy(run).act(rows["observation"]), rows["action"], atol=1e-6)


def test_without_an_environment(words, run, capsys):
    assert main(["train", *words("stack=3", "evaluation.env=null", "held_out=0.2")]) == 0
    logged = {file.stem: file.read_text().split(",")[-1] for file in (run / "log/scalars").glob("*.csv")}
    assert main(["evaluate", str(run), "--checkpoint", "last"]) == 0
    found = json.loads((run / "evaluation.json").read_text())
    assert found["BCQ"]["action_distance"] == pytest.approx(float(logged["action_distance"]), rel=1e-5)
    assert main(["evaluate", str(run), "--env", "Swing-v0", "--episodes", "1"]) == 0
    assert "Swing-v0 (states of 3 observations), 1 episodes" in capsys.readouterr().out
    out = run / "rows.hdf5"
    assert main(["record", "--policy", str(run), "--env", "Swing-v0", "--steps", "7", "--out", str(out)]) == 0
    assert load_hdf5(out)["observation"].shape == (7, 3)


def test_runs_with_other_states_are_not_compared(words, run, tmp_path, capsys):
    assert main(["train", *words("stack=3")]) == 0
    other = tmp_path / "other"
    assert main(["train", *words(f"out={other}")]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(run), "--baseline", str(other)]) == 1
    assert capsys.readouterr().err == (
        f"torchrl-bcq: {other} was trained with stack=1, but {run} with stack=3; compare runs with the same stack.\n"
    )
    assert main(["evaluate", str(run), "--env", "Pendulum-v1", "--episodes", "1"]) == 0  # 3 numbers too, from 3 states
    assert "Pendulum-v1 (states of 3 observations), 1 episodes" in capsys.readouterr().out
    assert main(["evaluate", str(run), "--env", "MountainCarContinuous-v0"]) == 1
    assert "has observations of shape (6,), but the run has (9,)" in capsys.readouterr().err


@pytest.mark.parametrize("stack", ["0", "-1", "2.5", "k"])
def test_odd_numbers_take_one_line(words, stack, capsys):
    assert main(["train", *words(f"stack={stack}")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "stack is" in line or "stack cannot be" in line


def test_a_video(words, run, monkeypatch):
    monkeypatch.setattr("imageio.v3.imwrite", lambda file, frames, **_: file.write_text(str(len(frames))))

    class Painted(Swing):
        metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

        def __init__(self, render_mode=None):
            self.render_mode = render_mode

        def render(self):
            return np.zeros((16, 16, 3), np.uint8)

    gymnasium.register("Dyed-v0", Painted, max_episode_steps=5)
    try:
        assert main(["train", *words("stack=3", "evaluation.env=Dyed-v0")]) == 0
        assert main(["plot", str(run), "--video"]) == 0
    finally:
        del gymnasium.registry["Dyed-v0"]
    assert int((run / "policy.mp4").read_text()) >= 4
