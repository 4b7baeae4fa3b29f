"""Dict observations: joined in a stated order in the dataset of Minari, in training, evaluation and recording."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import gymnasium
import h5py
import minari
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict
from minari.data_collector import EpisodeBuffer

from torchrl_bcq import DatasetError, load_hdf5, load_minari, load_policy, load_transitions
from torchrl_bcq.__main__ import main
from torchrl_bcq.data.sources.array_files import hdf5
from torchrl_bcq.data.sources.dict_spaces import check_entries
from torchrl_bcq.data.sources.environment import Environment
from torchrl_bcq.data.sources.hubs import minari as minari_source
from torchrl_bcq.data.sources.joined import join
from torchrl_bcq.errors import RunError
from torchrl_bcq.evaluation.environments import make_env
from torchrl_bcq.runs.dataset import open_dataset
from torchrl_bcq.runs.job import train

STEPS = 6
ENTRIES = ["observation", "goal/y", "goal/x"]  # not the alphabetical order


class Reach(gymnasium.Env):
    """A point that moves to a goal; as in Gymnasium-Robotics, one entry is called observation."""

    observation_space = Dict(
        observation=Box(-9, 9, (2,), np.float64),
        goal=Dict(x=Box(-9, 9, (1,), np.float32), y=Box(-9, 9, (), np.float64)),
        image=Box(0, 255, (2, 2, 3), np.float32),
    )
    action_space = Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.goal = self.np_random.uniform(-1, 1, (2, 2))
        return self._observe(), {}

    def step(self, action):
        self.place = self.place + action
        return self._observe(), -float(np.abs(self.place - self.goal).sum()), False, False, {}

    def _observe(self):
        goal = {"x": self.goal[:1].astype(np.float32), "y": np.array(self.goal[1])}
        return {"observation": self.place, "goal": goal, "image": np.zeros((2, 2, 3), np.float32)}

    def render(self):
        return np.zeros((16, 16, 3), np.uint8)


def rewards(states: torch.Tensor) -> torch.Tensor:
    """Return the reward of reaching each of the states ``[N, 4]``, whose entries are in the order of ENTRIES."""
    return -(states[:, 0] - states[:, 3]).abs() - (states[:, 1] - states[:, 2]).abs()


def record(env: gymnasium.Env) -> Iterator[EpisodeBuffer]:
    """Record ten episodes of random actions."""
    for seed in range(10):
        states, rewards = [env.reset(seed=seed)[0]], []
        env.action_space.seed(seed)
        actions = [env.action_space.sample() for _ in range(STEPS)]
        for action in actions:
            state, reward, *_ = env.step(action)
            states.append(state)
            rewards.append(reward)
        yield EpisodeBuffer(
            observations={
                "observation": np.stack([state["observation"] for state in states]),
                "goal": {name: np.stack([state["goal"][name] for state in states]) for name in ("x", "y")},
                "image": np.stack([state["image"] for state in states]),
            },
            actions=np.stack(actions),
            rewards=np.array(rewards),
            terminations=np.zeros(STEPS, bool),
            truncations=np.arange(STEPS) == STEPS - 1,
        )


@pytest.fixture(autouse=True)
def _recorded(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.chdir(tmp_path)
    gymnasium.register("Reach-v0", f"{__name__}:Reach", max_episode_steps=STEPS)
    env = gymnasium.make("Reach-v0")
    names = {
        "algorithm_name": "random",
        "author": "none",
        "author_email": "none",
        "code_permalink": "none",
        "description": "none",
    }
    warnings.filterwarnings("ignore", module="minari")
    minari.create_dataset_from_buffers(
        "reach/random-v0", buffer=[*record(env)], env=env.spec, eval_env=env.spec, requirements=[], **names
    )
    yield
    del gymnasium.registry["Reach-v0"]


@pytest.fixture
def make_run(make_settings):
    """The settings of a small run on this dataset."""
    words = ["dataset=minari:reach/random-v0", f"reader.observation=[{','.join(ENTRIES)}]"]
    return lambda *overrides: make_settings(*words, *overrides)


def test_dataset_and_environment_join_the_entries_in_the_stated_order(tmp_path):
    data = load_minari("reach/random-v0", observation=ENTRIES)
    assert data["observation"].shape == (60, 4)
    torch.testing.assert_close(data["next", "reward"].squeeze(1), rewards(data["next", "observation"]))
    rollout = make_env(Environment("Reach-v0", observation=ENTRIES)).rollout(STEPS)
    torch.testing.assert_close(rollout["next", "reward"].squeeze(1), rewards(rollout["next", "observation"]))
    turned = load_minari("reach/random-v0", observation=ENTRIES[::-1])["observation"]
    assert torch.equal(turned, data["observation"][:, [3, 2, 0, 1]])
    for entries, expected in ((ENTRIES, data["observation"]), (ENTRIES[::-1], turned)):  # each order has its own copy
        assert torch.equal(load_minari("reach/random-v0", observation=entries, root=tmp_path)["observation"], expected)


def test_a_run_is_evaluated_and_recorded_with_the_entries_of_its_dataset(make_run, make_settings, capsys):
    _, task = open_dataset(make_run())
    assert (task.shapes, task.observation, str(task.env)) == (
        {"observation": [4]}, ENTRIES, "Reach-v0 (observation of observation + goal/y + goal/x)",
    )  # fmt: skip
    train(make_run())
    assert train(make_run("resume=true", "steps=30"))["steps"] == 30
    assert main(["evaluate", "run", "--episodes", "3"]) == 0
    assert "Reach-v0 (observation of observation + goal/y + goal/x), 3 episodes" in capsys.readouterr().out
    assert main(["record", "--policy", "run", "--steps", "20", "--out", "steps.hdf5"]) == 0
    assert main(["record", "--policy", "run", "--out", "minari:reach/policy-v0"]) == 1
    assert capsys.readouterr().err.endswith("which Minari cannot store; record into an HDF5 file.\n")
    steps = load_hdf5("steps.hdf5")
    torch.testing.assert_close(steps["next", "reward"].squeeze(1), rewards(steps["next", "observation"]))
    assert open_dataset(make_settings("dataset=steps.hdf5"))[1].observation == ENTRIES
    assert load_policy("run").act(np.zeros(4)).shape == (2,)


def test_random_actions_are_recorded_with_all_chosen_entries(capsys):
    words = ["--env", "Reach-v0", "--steps", "8", "--out", "random.hdf5"]
    assert main(["record", *words]) == 1
    error = capsys.readouterr().err
    assert "2 or 3 dimensions) can be read, but {'image': Box(0.0, 255.0, (2, 2, 3), float32)}" in error
    assert main(["record", *words, "--observation", *ENTRIES]) == 0
    with h5py.File("random.hdf5") as file:
        assert file["observations"].shape == (8, 4)


def test_an_unknown_order_is_refused(make_settings, tmp_path, capsys):
    train(make_settings("evaluation.env=null"))  # on vectors of three numbers
    message = (
        "the observation of Goal-v0 has the entries ['place', 'goal']; name those that the {} has, in the same order"
    )
    with pytest.raises(RunError) as error:
        open_dataset(make_settings("evaluation.env=Goal-v0"))
    assert str(error.value).startswith(message.format("dataset"))
    assert "with evaluation.observation=[...], or choose another with evaluation.env=ID" in str(error.value)
    _, task = open_dataset(make_settings("evaluation.env=Goal-v0", "evaluation.observation=[place]"))
    assert task.observation == ["place"]
    assert main(["evaluate", "run", "--env", "Goal-v0"]) == 1
    assert message.format("run") in (found := capsys.readouterr().err)
    assert "with --observation ENTRY ..., or choose another with --env ID" in found
    assert main(["record", "--policy", "run", "--env", "Goal-v0", "--out", "a.hdf5"]) == 1
    assert message.format("run") in capsys.readouterr().err
    assert not (tmp_path / "a.hdf5").exists()
    assert main(["evaluate", "run", "--env", "Goal-v0", "--observation", "place", "--episodes", "2"]) == 0
    assert "Goal-v0 (observation of place), 2 episodes" in capsys.readouterr().out


def test_entries_that_contradict_the_dataset_are_refused(make_run, make_settings, capsys):
    with pytest.raises(
        RunError, match=r"^evaluation\.observation is \['goal/x'\], but the dataset joins \['observation'"
    ):
        open_dataset(make_run("evaluation.observation=[goal/x]"))
    with pytest.raises(RunError, match=r"^environment Reach-v0: the observation has no entries \['goal/z'\]; its ent"):
        open_dataset(make_settings("evaluation.env=Reach-v0", "evaluation.observation=[goal/z]"))
    train(make_run())
    assert main(["evaluate", "run", "--observation", "observation", "goal/x", "goal/y"]) == 1
    assert capsys.readouterr().err.endswith(f"but the run was trained on {ENTRIES}; leave it out.\n")
    train(make_run("reader.observation=[goal/x,goal/y,observation]", "out=other"))
    assert main(["evaluate", "run", "--baseline", "other"]) == 1
    assert "other reads other columns or entries than run; compare" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            None,
            "only vectors (Box) and one image (Box of uint8, 2 or 3 dimensions) can be read, but {'image': Box(0.0, ",
        ),
        (
            ["goal"],
            "the observation has no entries ['goal']; its entries are ['goal/x', 'goal/y', 'image', 'observation']",
        ),
        ([], "[] is empty or names an entry twice; the entries of the observation are ['goal/x', "),
        (["goal/x", "goal/x"], "['goal/x', 'goal/x'] is empty or names an entry twice"),
        ("image", "only vectors (Box) and one image (Box of uint8, 2 or 3 dimensions) can be read, but {'image'"),
    ],
)
def test_entries_that_cannot_be_joined_are_refused(entries, message):
    with pytest.raises(DatasetError) as error:
        load_transitions("minari:reach/random-v0", observation=entries)
    assert str(error.value).startswith(f"reach/random-v0: {message}")
    assert str(error.value).endswith("; pass observation=[...] with the entries to join.")


def test_a_matrix_is_no_vector():
    space = gymnasium.spaces.Dict(grid=gymnasium.spaces.Box(0, 1, (2, 2)), place=gymnasium.spaces.Box(0, 1, (2,)))
    assert check_entries(space, ["place"]) == ["place"]
    with pytest.raises(ValueError, match=r"2 or 3 dimensions\) can be read, but {'grid': Box\("):
        check_entries(space, ["place", "grid"])


def test_datasets_with_other_entries_are_not_joined():
    minari.combine_datasets([minari.load_dataset("reach/random-v0")] * 2, "reach/twice-v0")
    names = ["minari:reach/random-v0", "minari:reach/twice-v0"]
    assert len(load_transitions(names, observation=ENTRIES)) == 180
    words = ["--env", "Reach-v0", "--steps", "8", "--out", "other.hdf5", "--observation", *ENTRIES[::-1]]
    assert main(["record", *words]) == 0
    with pytest.raises(
        DatasetError, match=r"^other\.hdf5 joins the entries \['goal/x', 'goal/y', 'observation'\] to one"
    ):
        join([minari_source("reach/random-v0", observation=ENTRIES), hdf5("other.hdf5")])
