"""Files made on the spot, in the layouts of D4RL and Minari."""

from __future__ import annotations

import dataclasses

import gymnasium
import h5py
import minari
import numpy as np
import pytest
import torch
from minari.data_collector import EpisodeBuffer
from torchrl.data import Bounded

from torchrl_bcq import from_arrays, load_hdf5, load_minari


@pytest.fixture
def steps():
    rng = np.random.default_rng(0)
    return {
        "observations": rng.normal(size=(9, 3)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (9, 2)).astype(np.float32),
        "rewards": rng.normal(size=9).astype(np.float32),
        "terminals": np.array([0, 0, 0, 1, 0, 0, 0, 0, 0], dtype=bool),
        "timeouts": np.array([0, 0, 0, 0, 0, 0, 0, 0, 1], dtype=bool),
        "next_observations": rng.normal(size=(9, 3)).astype(np.float32),
    }


def write(path, fields):
    with h5py.File(path, "w") as file:
        for name, value in fields.items():
            file.create_dataset(name, data=value)
    return path


def test_hdf5_is_read_like_its_arrays(tmp_path, steps):
    td = load_hdf5(write(tmp_path / "d.hdf5", steps))
    expected = from_arrays(
        steps["observations"],
        steps["actions"],
        steps["rewards"],
        steps["terminals"],
        steps["timeouts"],
        steps["next_observations"],
    )
    assert (td == expected).all()
    assert len(td) == 9


def test_hdf5_without_next_observations(tmp_path, steps):
    """As D4RL's own files: the row that was cut off has no successor."""
    del steps["next_observations"]
    td = load_hdf5(write(tmp_path / "d.hdf5", steps))
    assert len(td) == 8
    np.testing.assert_array_equal(td["next", "observation"][:3], steps["observations"][1:4])
    np.testing.assert_array_equal(td["next", "observation"][3], steps["observations"][3])
    np.testing.assert_array_equal(td["next", "observation"][4:8], steps["observations"][5:9])
    assert td["next", "terminated"].flatten().tolist() == steps["terminals"][:8].tolist()


def test_hdf5_that_would_join_episodes_is_refused(tmp_path, steps):
    del steps["next_observations"], steps["timeouts"]
    with pytest.raises(
        ValueError, match="has neither timeouts nor next_observations, so nothing says where an episode"
    ):
        load_hdf5(write(tmp_path / "d.hdf5", steps))


def test_hdf5_refusals(tmp_path, steps):
    with pytest.raises(FileNotFoundError, match="there is no file .*none.hdf5"):
        load_hdf5(tmp_path / "none.hdf5")
    path = tmp_path / "text.hdf5"
    path.write_text("not an HDF5 file")
    with pytest.raises(ValueError, match="text.hdf5 is not an HDF5 file"):
        load_hdf5(path)
    whole = write(tmp_path / "d.hdf5", steps)
    path.write_bytes(whole.read_bytes()[:-500])
    with pytest.raises(ValueError, match=r"text.hdf5 cannot be read \(.*truncated file.*\); copy it again"):
        load_hdf5(path)
    with pytest.raises(ValueError, match=r"actions has 9 rows \(first: 0\) outside the action spec"):
        load_hdf5(whole, action_spec=Bounded(5, 6, (2,)))
    del steps["rewards"]
    with pytest.raises(
        ValueError, match=r"lacks \['rewards'\]; it holds \['actions', 'next_observations', 'observations'"
    ):
        load_hdf5(write(tmp_path / "d.hdf5", steps))


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))


def create(dataset_id: str, episodes: list[EpisodeBuffer], action_space=None, observation_space=None) -> None:
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
    assert td["next", "truncated"].flatten().tolist() == [False] * 4 + [True, False, True]  # a broken-off record is cut
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
    with pytest.raises(ValueError, match=r"actions has 1 row \(first: 1\) outside the action spec"):
        load_minari("test/wild-v0")
    discrete = dataclasses.replace(episode(1, 3, True, False), actions=np.array([0, 1, 0]))
    create("test/discrete-v0", [discrete], action_space=gymnasium.spaces.Discrete(2))
    with pytest.raises(ValueError, match=r"test/discrete-v0 has action space Discrete\(2\); only boxes can be read"):
        load_minari("test/discrete-v0")
