"""A local Minari store, and files of D4RL in its folder."""

from __future__ import annotations

import dataclasses
import json
import re
import sys

import gymnasium
import minari
import numpy as np
import pytest
import torch
from minari.data_collector import EpisodeBuffer
from torchrl.data import Bounded
from torchrl.data.datasets.d4rl_infos import D4RL_DATASETS

from torchrl_bcq import load_d4rl, load_hdf5, load_minari
from torchrl_bcq.data.sources import hubs

from ...array_files import write_arrays


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))


def create(
    dataset_id: str, episodes: list[EpisodeBuffer], action_space=None, observation_space=None, **metadata
) -> None:
    box = gymnasium.spaces.Box
    minari.create_dataset_from_buffers(
        dataset_id,
        buffer=episodes,
        action_space=action_space or box(-2, 2, (1,)),
        observation_space=observation_space or box(-9, 9, (2,)),
        algorithm_name="none",
        author="none",
        author_email="none",
        code_permalink="none",
        requirements=[],
        **metadata,
    )


def episode(first: float, length: int, terminated: bool, truncated: bool) -> EpisodeBuffer:
    flags = np.zeros((2, length), dtype=bool)
    flags[:, -1] = terminated, truncated
    time = np.arange(length + 1, dtype=np.float32)
    return EpisodeBuffer(
        observations=np.stack([np.full(length + 1, first, dtype=np.float32), time], 1),
        actions=np.linspace(-1, 1, length, dtype=np.float32)[:, None],
        rewards=time[:-1] + first,
        terminations=flags[0],
        truncations=flags[1],
    )


@pytest.mark.filterwarnings("ignore::UserWarning:minari")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_minari_keeps_the_true_next_observation_at_every_end(store):
    create("test/ends-v0", [episode(1, 3, True, False), episode(2, 2, False, True), episode(3, 2, False, False)])
    td = load_minari("test/ends-v0")
    assert td["observation"].tolist() == [[1, 0], [1, 1], [1, 2], [2, 0], [2, 1], [3, 0], [3, 1]]
    assert td["next", "observation"].tolist() == [[1, 1], [1, 2], [1, 3], [2, 1], [2, 2], [3, 1], [3, 2]]
    assert td["next", "reward"].flatten().tolist() == [1, 2, 3, 2, 3, 3, 4]
    assert td["next", "terminated"].flatten().tolist() == [False, False, True] + [False] * 4
    assert td["next", "truncated"].flatten().tolist() == [False] * 4 + [
        True,
        False,
        True,
    ]  # an end without a flag is a cut
    assert td["episode"].tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert td["action"].dtype == torch.float32


@pytest.mark.filterwarnings("ignore::UserWarning:minari")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_minari_refusals(store):
    with pytest.raises(ValueError, match="Minari dataset 'nonsense' can be neither opened nor downloaded"):
        load_minari("nonsense")
    wild = episode(1, 3, True, False)
    wild.actions[1] = 7
    create("test/wild-v0", [wild])
    with pytest.raises(ValueError, match=r"actions has 1 row \(first: 1\) outside the action bounds"):
        load_minari("test/wild-v0")
    shifted = dataclasses.replace(episode(1, 3, True, False), actions=np.array([1, 2, 1]))
    create("test/shifted-v0", [shifted], action_space=gymnasium.spaces.Discrete(2, start=1))
    message = r"test/shifted-v0 has action space Discrete\(2, start=1\); only Box of floats, and Discrete whose first"
    with pytest.raises(ValueError, match=message):
        load_minari("test/shifted-v0")
    whole = dataclasses.replace(episode(1, 3, True, False), actions=np.array([[0], [1], [0]]))
    create("test/whole-v0", [whole], action_space=gymnasium.spaces.Box(0, 2, (1,), np.int64))
    with pytest.raises(
        ValueError, match=r"test/whole-v0 has action space Box\(0, 2, \(1,\), int64\); only Box of floats"
    ):
        load_minari("test/whole-v0")


@pytest.mark.filterwarnings("ignore::UserWarning:minari")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_minari_copy_is_the_same(store, tmp_path):
    create("test/copied-v0", [episode(1, 3, True, False), episode(2, 2, False, True)])
    td = load_minari("test/copied-v0")
    copy = load_minari("test/copied-v0", root=tmp_path / "copies")
    assert copy.is_memmap()
    assert (copy == td).all()
    folders = [path.name for path in (tmp_path / "copies").iterdir() if not path.name.startswith(".")]
    assert len(folders) == 1
    assert re.fullmatch(r"copied-v0-[0-9a-f]{16}", folders[0])


@pytest.mark.filterwarnings("ignore::UserWarning:minari")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_minari_bounds_may_be_given(store):
    """They replace those of its action space, -2 to 2."""
    create("test/narrow-v0", [episode(1, 3, True, False)])
    assert len(load_minari("test/narrow-v0")) == 3
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the whole message is compared below)
        load_minari("test/narrow-v0", action_spec=Bounded(-0.5, 0.5, (1,)))
    assert str(error.value) == (
        "test/narrow-v0: actions has 2 rows (first: 0) outside the action bounds: the actions span [-1.0] to [1.0], "
        "the bounds are [-0.5] to [0.5]; clip or rescale the actions."
    )


@pytest.mark.filterwarnings("ignore::UserWarning:minari")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_minari_knows_its_environment_and_scores(store, tmp_path):
    scores = {"ref_min_score": -1186.5, "ref_max_score": -139.75, "num_episodes_average_score": 50}
    create("test/known-v0", [episode(1, 3, True, False)], env="Pendulum-v1", **scores)
    source = hubs.minari("test/known-v0")
    assert (str(source.env), source.reference_scores) == ("Pendulum-v1 (at most 200 steps)", (-1186.5, -139.75))
    file = tmp_path / "test/known-v0/data/metadata.json"
    metadata = json.loads(file.read_text())
    spec = json.loads(metadata["env_spec"])
    for env_id, low in (("antigravity:Pendulum-v1", -139.75), ("this/Pendulum-v1", None)):  # Python's own modules
        spec |= {"id": env_id, "entry_point": "antigravity:Pendulum"}
        file.write_text(json.dumps(metadata | {"env_spec": json.dumps(spec), "ref_min_score": low}))
        source = hubs.minari("test/known-v0")
        assert (source.env.id, source.env.module) == (env_id.rpartition(":")[2], "antigravity")
        assert source.reference_scores is None
    assert "antigravity" not in sys.modules


@pytest.mark.filterwarnings("ignore::UserWarning:minari")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_minari_without_an_environment(store):
    create("test/spaces-v0", [episode(1, 3, True, False)])
    source = hubs.minari("test/spaces-v0")
    assert (source.env, source.reference_scores) == (None, None)


@pytest.mark.filterwarnings("ignore::UserWarning:minari")
@pytest.mark.filterwarnings("ignore::UserWarning:gymnasium")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("low", "high"), [(-np.inf, np.inf), (-1, np.inf), (-1, [1, -1])])
def test_minari_action_spaces_that_are_no_finite_box_keep_their_finite_bounds(store, low, high):
    actions = np.array([[0.5, -1]] * 3, dtype=np.float32)
    recorded = dataclasses.replace(episode(1, 3, True, False), actions=actions)
    space = gymnasium.spaces.Box(np.full(2, low, np.float32), np.full(2, high, np.float32))
    create("test/wide-v0", [recorded], action_space=space)
    spec = hubs.minari("test/wide-v0").action_spec
    assert spec.space.low.tolist() == np.full(2, low).tolist()
    assert spec.space.high.tolist() == np.full(2, high).tolist()
    assert load_minari("test/wide-v0")["action"].tolist() == [[0.5, -1]] * 3
    with pytest.raises(ValueError, match=r"actions has 3 rows \(first: 0\) outside the action bounds"):
        load_minari("test/wide-v0", action_spec=Bounded(torch.tensor([0.6, -np.inf]), torch.tensor(np.inf), (2,)))


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """The folder of D4RL's files; downloads fail the test."""
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "shelf"))
    monkeypatch.setattr(hubs, "_download", lambda url, file: pytest.fail(f"{url} was downloaded"))
    (tmp_path / "shelf").mkdir()
    return tmp_path / "shelf"


def write(path, length: int, terminated: list[int], **more: np.ndarray):
    time = np.arange(1, length + 1, dtype=np.float32)
    flags = np.zeros(length, dtype=bool)
    flags[terminated] = True
    fields = {"observations": time[:, None], "actions": time[:, None] / length, "rewards": time, "terminals": flags}
    return write_arrays(path, fields | more)


def file_of(dataset_id: str) -> str:
    return D4RL_DATASETS[dataset_id].rpartition("/")[2]


def test_d4rl_file_without_time_outs(shelf):
    """hopper-medium-v0 has a limit of 1000 steps since the last end; rows at the limit are dropped."""
    write(shelf / file_of("hopper-medium-v0"), 2510, [299])
    td = load_d4rl("hopper-medium-v0")
    cut = {1300, 2300, 2510}  # the last one is unfinished
    assert td["observation"].flatten().tolist() == [step for step in range(1, 2511) if step not in cut]
    assert torch.equal(td["next", "observation"][:299], torch.arange(2.0, 301)[:, None])
    assert td["next", "observation"][299].item() == 300  # repeats its own
    assert td["next", "observation"][300:].flatten().tolist() == [s + 1 for s in range(301, 2511) if s not in cut]
    assert td["episode"].bincount().tolist() == [300, 999, 999, 209]
    assert td["observation"][td["next", "truncated"]].tolist() == [1299, 2299, 2509]


def test_d4rl_time_limit_may_be_given(shelf):
    write(shelf / file_of("hopper-medium-v0"), 25, [])
    td = load_d4rl("hopper-medium-v0", max_episode_steps=10)
    assert td["observation"].flatten().tolist() == [step for step in range(1, 26) if step not in (10, 20, 25)]
    with pytest.raises(ValueError, match="^max_episode_steps is 0, expected a whole number of at least 1.$"):
        load_d4rl("hopper-medium-v0", max_episode_steps=0)


def test_d4rl_known_time_limits(shelf, monkeypatch):
    monkeypatch.setattr(hubs, "_D4RL_TIME_LIMIT", 7)
    write(shelf / file_of("walker2d-expert-v0"), 20, [])
    assert len(load_d4rl("walker2d-expert-v0")) == 20 - 3
    write(shelf / file_of("antmaze-umaze-v0"), 20, [])
    with pytest.raises(ValueError, match="it has neither timeouts nor next_observations, .* Pass max_episode_steps="):
        load_d4rl("antmaze-umaze-v0")


def test_d4rl_file_with_everything(shelf, caplog):
    """hopper-medium-v2: its own time-outs replace the known limit and keep their true next observation."""
    timeouts = np.zeros(1100, dtype=bool)
    timeouts[[49, 1049]] = True
    after = np.arange(2, 1102, dtype=np.float32)[:, None]
    after[49] = 77
    path = write(shelf / file_of("hopper-medium-v2"), 1100, [9], timeouts=timeouts, next_observations=after)
    td = load_d4rl("hopper-medium-v2")
    assert "max_episode_steps" not in caplog.text  # the user has set no time limit
    assert len(td) == 1100
    assert td["next", "truncated"].flatten().nonzero().flatten().tolist() == [49, 1049, 1099]
    assert td["next", "terminated"].flatten().nonzero().flatten().tolist() == [9]
    assert td["next", "observation"].flatten().tolist() == after.flatten().tolist()
    assert (td == load_hdf5(path)).all()
    assert (load_d4rl("hopper-medium-v2", root=shelf / "copies") == td).all()


@pytest.mark.parametrize(
    ("task", "env_id", "middle"),  # the return with a score of 50
    [
        ("hopper", "Hopper-v5", 1607.0138475),
        ("halfcheetah", "HalfCheetah-v5", 5927.4105235),
        ("walker2d", "Walker2d-v5", 2296.964504),
        ("ant", None, 1777.05),  # no environment of Gymnasium's has its 111 observations
    ],
)
def test_d4rl_knows_its_environment_and_scores(shelf, task, env_id, middle):
    write(shelf / file_of(f"{task}-medium-v2"), 30, [9])
    source = hubs.d4rl(f"{task}-medium-v2")
    low, high = source.reference_scores
    assert (source.env and source.env.id) == env_id
    assert 100 * (middle - low) / (high - low) == pytest.approx(50)


def test_d4rl_of_other_tasks_knows_neither(shelf):
    write(shelf / file_of("antmaze-umaze-v0"), 30, [9])
    source = hubs.d4rl("antmaze-umaze-v0")
    assert (source.env, source.reference_scores) == (None, None)


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """The file of hopper-medium-v2 at a file:// address, and an empty folder for downloads."""
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "own" / "shelf"))
    source = tmp_path / "hopper_medium-v2.hdf5"
    monkeypatch.setitem(D4RL_DATASETS, "hopper-medium-v2", source.as_uri())
    write(source, 30, [9, 29], timeouts=np.arange(30) == 19)
    return source, tmp_path / "own" / "shelf"


def test_d4rl_is_downloaded_once(mirror, capfd):
    source, shelf = mirror
    td = load_d4rl("hopper-medium-v2")
    assert len(td) == 29
    assert [path.name for path in shelf.iterdir()] == [source.name]
    assert (shelf / source.name).read_bytes() == source.read_bytes()
    source.unlink()
    assert (load_d4rl("hopper-medium-v2") == td).all()
    assert capfd.readouterr() == ("", "")  # no progress bar where there is no terminal


@pytest.mark.parametrize("defect", ["cut off", "absent", "a web page"])
def test_d4rl_download_that_fails_leaves_nothing(mirror, defect):
    source, shelf = mirror
    if defect == "cut off":
        source.write_bytes(source.read_bytes()[:-100])
    elif defect == "absent":
        source.unlink()
    else:
        source.write_text("<html>sign in</html>")
    with pytest.raises(ValueError, match=r"cannot be downloaded") as error:
        load_d4rl("hopper-medium-v2")
    end = f"; try again, or save it as {shelf / source.name}."
    assert re.fullmatch(re.escape(source.as_uri()) + r" cannot be downloaded \(.*\)" + re.escape(end), str(error.value))
    assert list(shelf.iterdir()) == []


def test_d4rl_in_the_home_folder(mirror, monkeypatch):
    source, shelf = mirror
    monkeypatch.delenv("D4RL_DATASET_DIR")
    monkeypatch.setenv("HOME", str(shelf))
    load_d4rl("hopper-medium-v2")
    assert (shelf / ".d4rl" / "datasets" / source.name).is_file()


def test_unknown_d4rl_ids_name_others(shelf):
    with pytest.raises(
        ValueError, match="^D4RL has no dataset 'hopper-middling-v2'; available datasets are hopper-expert-v0, hopper-"
    ) as e:
        load_d4rl("hopper-middling-v2")
    named = str(e.value).partition("available datasets are ")[2].removesuffix(".").split(", ")
    assert named == sorted(name for name in D4RL_DATASETS if name.startswith("hopper"))
    with pytest.raises(
        ValueError, match="^D4RL has no dataset 'nonsense'; available datasets are ant-expert-v0, "
    ) as e:
        load_d4rl("nonsense")
    assert str(e.value).partition("available datasets are ")[2].removesuffix(".").split(", ") == sorted(D4RL_DATASETS)
