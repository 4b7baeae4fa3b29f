"""A video is an episode of the run's policy, whole or not there."""

from __future__ import annotations

import gymnasium
import imageio.v3 as iio
import numpy as np
import pytest

from torchrl_bcq.cli.errors import RunError
from torchrl_bcq.cli.train import train
from torchrl_bcq.cli.video import record_video

from .conftest import LENGTH, Swing


class Painted(Swing):
    """A grey picture, brighter by 40 with every step."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    fails = False

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, **kwargs):
        self.steps = 0
        return super().reset(**kwargs)

    def step(self, action):
        self.steps += 1
        return super().step(action)

    def render(self):
        if self.fails:
            raise RuntimeError("no screen")
        return np.full((16, 16, 3), 40 * self.steps, np.uint8)


@pytest.fixture
def painted(make_config, run):
    gymnasium.register("Painted-v0", Painted, max_episode_steps=LENGTH)
    train(make_config("evaluation.env=Painted-v0"))
    yield run
    del gymnasium.registry["Painted-v0"]


def test_frames_follow_one_another_at_the_environments_pace(painted, tmp_path):
    file = record_video(painted, tmp_path / "pictures" / "policy.gif")
    frames = iio.imread(file)
    assert frames[:, 0, 0, 0].tolist() == [40 * step for step in range(1, len(frames) + 1)]
    assert len(frames) in (LENGTH - 1, LENGTH)  # TorchRL may leave out the last one
    assert iio.immeta(file)["duration"] == 100
    assert [path.name for path in file.parent.iterdir()] == ["policy.gif"]


def test_what_cannot_be_drawn_is_said(painted, tmp_path, monkeypatch):
    monkeypatch.setattr(Painted, "fails", True)
    with pytest.raises(RunError, match=r"Painted-v0 cannot be drawn here: no screen\. .* install OpenGL"):
        record_video(painted, tmp_path / "policy.gif")
    assert not (tmp_path / "policy.gif").exists()


def test_a_run_without_an_environment_is_refused(make_config, run, tmp_path):
    train(make_config("evaluation.env=null"))
    with pytest.raises(RunError, match="has no environment to record a video in"):
        record_video(run, tmp_path / "policy.gif")
