"""A video is one episode of a policy, complete or absent."""

from __future__ import annotations

import os

import gymnasium
import imageio.v3 as iio
import numpy as np
import pytest
import torch
from tensordict.nn import TensorDictModule

from torchrl_bcq.errors import RunError
from torchrl_bcq.evaluation.environments import make_env
from torchrl_bcq.reports.video import record_video, render_offscreen

LENGTH = 5  # of an episode


class Painted(gymnasium.Env):
    """A grey picture, brighter by 40 times the action with every step."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = gymnasium.spaces.Box(-2, 2, (1,), np.float32)
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    fails = False

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.grey = 0
        return np.zeros(3, np.float32), {}

    def step(self, action):
        self.grey += int(40 * action[0])
        return np.zeros(3, np.float32), 0.0, False, False, {}

    def render(self):
        if self.fails:
            raise RuntimeError("no screen")
        return np.full((16, 16, 3), self.grey, np.uint8)


@pytest.fixture
def env():
    gymnasium.register("Painted-v0", Painted, max_episode_steps=LENGTH)
    yield make_env("Painted-v0", render_mode="rgb_array")
    del gymnasium.registry["Painted-v0"]


@pytest.fixture
def policy():
    return TensorDictModule(lambda x: torch.ones(*x.shape[:-1], 1), ["observation"], ["action"])


def test_frames_follow_one_another_at_the_environments_pace(env, policy, tmp_path):
    file = record_video(env, policy, tmp_path / "pictures" / "policy.gif")
    frames = iio.imread(file)
    assert frames[:, 0, 0, 0].tolist() == [40 * step for step in range(LENGTH + 1)]  # from the first to the final state
    assert iio.immeta(file)["duration"] == 100
    assert [path.name for path in file.parent.iterdir()] == ["policy.gif"]


def test_the_seed_is_that_of_initial_states_and_actions_and_the_random_state_is_kept(env, tmp_path):
    policy = TensorDictModule(lambda x: 1 + torch.rand(*x.shape[:-1], 1), ["observation"], ["action"])
    torch.manual_seed(3)
    first = iio.imread(record_video(env, policy, tmp_path / "1.gif", seed=1, max_steps=2))
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(1))
    torch.manual_seed(1)
    greys = np.cumsum([0, *(int(40 * (1 + torch.rand(1).item())) for _ in range(2))])
    assert first[:, 0, 0, 0].tolist() == greys.tolist()


def test_an_episode_of_one_step_has_two_frames(env, policy, tmp_path):
    assert len(iio.imread(record_video(env, policy, tmp_path / "policy.gif", max_steps=1))) == 2


def test_an_error_of_the_policy_is_no_error_of_the_screen(env, tmp_path):
    def refuse(observation):
        raise ValueError("no such state")

    with pytest.raises(ValueError, match="^no such state"):
        record_video(env, TensorDictModule(refuse, ["observation"], ["action"]), tmp_path / "policy.gif")


def test_what_cannot_be_drawn_is_said(env, policy, tmp_path, monkeypatch):
    monkeypatch.setattr(Painted, "fails", True)
    with pytest.raises(RunError, match=r"Painted-v0 cannot be rendered: no screen\. .* install OpenGL"):
        record_video(env, policy, tmp_path / "policy.gif")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("display", "chosen"), [(None, "egl"), (":0", None)])
def test_without_a_display_rendering_is_off_screen(monkeypatch, display, chosen):
    for name in ("MUJOCO_GL", "SDL_VIDEODRIVER", "DISPLAY"):
        monkeypatch.setenv(name, "")  # so that both are restored
        monkeypatch.delenv(name)
    if display:
        monkeypatch.setenv("DISPLAY", display)
    monkeypatch.setattr("sys.platform", "linux")
    render_offscreen()
    assert os.environ.get("MUJOCO_GL") == chosen
