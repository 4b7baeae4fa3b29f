"""Environments with frames have the entries of datasets with these frames."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict
from minari import create_dataset_from_buffers
from minari.data_collector import EpisodeBuffer

from torchrl_bcq import DatasetError, load_minari, stack_observations
from torchrl_bcq.data.frame_stack import FrameStack
from torchrl_bcq.data.sources.environment import Environment
from torchrl_bcq.errors import RunError
from torchrl_bcq.evaluation.environments import check_fits, make_env
from torchrl_bcq.evaluation.recording import record

SHAPES = {"HW": (9, 8), "CHW": (3, 9, 8), "HWC": (9, 8, 3)}
VECTORS = {"pixels": Box(-9, 9, (2,), np.float64), "goal": Dict(x=Box(-9, 9, (), np.float32))}


class Screen(gymnasium.Env):
    """The same 6 random frames in each episode, of any layout, alone or beside vectors."""

    action_space = Box(-1, 1, (1,), np.float32)

    def __init__(self, layout="HW", beside=False, image="observation", second=False):
        frames = Box(0, 255, SHAPES[layout], np.uint8)
        images = {image: frames, "other": frames} if second else {image: frames}
        self.observation_space = Dict({**images, **VECTORS}) if beside else frames

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(7)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 1.0, False, False, {}


@pytest.fixture(autouse=True)
def _registered():
    gymnasium.register("Screen-v0", Screen, max_episode_steps=5)
    yield
    del gymnasium.registry["Screen-v0"]


def first(layout: str, frame: np.ndarray) -> torch.Tensor:
    """The frame with its channels first."""
    frame = torch.from_numpy(frame)
    return {"HW": frame[None] if frame.ndim == 2 else frame, "CHW": frame}.get(layout, frame.movedim(-1, 0))


@pytest.mark.parametrize("layout", SHAPES)
def test_frames_are_channels_first_and_stacked(layout):
    env = make_env(Environment("Screen-v0", {"layout": layout}, stack=3))
    plain = Screen(layout)
    plain.observation_space.seed(7)
    rollout = env.rollout(4)
    frames = [first(layout, plain.observation_space.sample()) for _ in range(5)]
    assert torch.equal(rollout["observation"][0], torch.cat(frames[:1] * 3))
    assert torch.equal(rollout["next", "observation"][3], torch.cat(frames[2:]))
    channels = 1 if layout == "HW" else 3
    assert env.observation_spec["observation"].shape == (3 * channels, 9, 8)
    assert rollout["observation"].dtype == env.observation_spec["observation"].dtype == torch.uint8
    env.close()


@pytest.mark.parametrize("image", ["observation", "camera"])
def test_one_image_beside_vectors(image):
    """The entries may have each other's names: a vector pixels, and an image observation."""
    env = Environment("Screen-v0", {"layout": "HWC", "beside": True, "image": image}, stack=2)
    made = make_env(env)
    rollout = made.rollout(4)
    assert {key: tuple(spec.shape) for key, spec in made.observation_spec.items(True, True)} == {
        "observation": (6,),
        "pixels": (6, 9, 8),
    }
    assert rollout["observation"].dtype == torch.float32
    assert torch.equal(rollout["pixels"][1, 3:], rollout["next", "pixels"][0, 3:])
    made.close()
    only = make_env(Environment("Screen-v0", {"beside": True, "image": image}, observation=(image,)))
    assert only.observation_spec["observation"].shape == (1, 9, 8)
    assert "pixels" not in only.observation_spec.keys()
    only.close()


def test_frames_that_do_not_fit_are_refused():
    env = Environment("Screen-v0", {"beside": True}, observation=("observation", "pixels"))
    made = make_env(env)
    shapes = {"observation": (2,), "pixels": (1, 9, 8)}
    check_fits(made, env, "change it", whose="the run", shapes=shapes)
    with pytest.raises(
        RunError, match=r"frames of shape \(1, 9, 8\) beside its vectors, but the run has no frames; chan"
    ):
        check_fits(made, env, "change it", whose="the run", shapes={"observation": (2,)})
    made.close()
    with pytest.raises(
        RunError, match=r"but \['observation', 'other'\] are chosen; choose from the vectors \['goal/x', 'pixels'\]"
    ):
        make_env(Environment("Screen-v0", {"beside": True, "second": True}))


def test_frames_are_not_recorded():
    for settings in ({"layout": "CHW"}, {"beside": True}):
        with pytest.raises(RunError, match="but only one-dimensional Box spaces|has frames, which cannot be recorded"):
            record(Environment("Screen-v0", settings), None, 4)
    vectors = Environment("Screen-v0", {"beside": True}, observation=("pixels",))
    assert record(vectors, None, 4)["observation"].shape == (4, 2)


@pytest.mark.filterwarnings("ignore::UserWarning:minari")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("beside", [False, True])
def test_minari_has_the_entries_of_its_environment(tmp_path, monkeypatch, beside):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    space = Screen("HWC", beside).observation_space
    space.seed(0)
    states = [space.sample() for _ in range(7)]
    observations = np.stack(states) if not beside else {
        **{key: np.stack([state[key] for state in states]) for key in ("observation", "pixels")},
        "goal": {"x": np.stack([state["goal"]["x"] for state in states])},
    }  # fmt: skip
    flags = np.arange(6) == 5
    episode = EpisodeBuffer(
        observations=observations, actions=np.ones((6, 1), np.float32), rewards=np.ones(6),
        terminations=flags & False, truncations=flags,
    )  # fmt: skip
    create_dataset_from_buffers(
        "test/screen-v0", buffer=[episode, episode], action_space=Screen.action_space, observation_space=space,
        algorithm_name="-", author="-", author_email="-", code_permalink="-", requirements=[],
    )  # fmt: skip
    rows = stack_observations(load_minari("test/screen-v0", root=tmp_path / "copies"), 2)
    made = make_env(Environment("Screen-v0", {"layout": "HWC", "beside": beside}, stack=2))
    for key, spec in made.observation_spec.items(True, True):
        assert rows[key].shape[1:] == spec.shape
        assert rows[key].dtype == spec.dtype
    made.close()
    frames = rows["next", "pixels" if beside else "observation"]
    assert isinstance(frames, FrameStack)
    assert len(frames.frames) == 14
    images = [state["observation"] if beside else state for state in states]
    assert torch.equal(frames[5], torch.cat([first("HWC", images[5]), first("HWC", images[6])]))
    if beside:
        vector = [states[0]["goal"]["x"].item(), *states[0]["pixels"].tolist()]
        assert torch.equal(rows["observation"][0], torch.tensor(vector * 2))
        with pytest.raises(DatasetError, match="has no entries"):
            load_minari("test/screen-v0", observation=["goal/x", "observation", "goal"])
