"""Datasets by name, TorchRL's registry, and recipes for datasets of other libraries."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gymnasium
import h5py
import minari
import numpy as np
import pyarrow as pa
import pytest
import torch
from minari.data_collector import EpisodeBuffer
from pyarrow import csv, parquet
from tensordict import TensorDict
from torchrl.data import Bounded, LazyTensorStorage, TensorDictReplayBuffer
from torchrl.data.datasets import load_dataset, register_dataset
from torchrl.data.datasets.d4rl_infos import D4RL_DATASETS

from torchrl_bcq import DatasetError, from_arrays, load_memmap, load_transitions

from ..array_files import same, write_arrays

D3RLPY = """\
ends = [(e, np.arange(len(e.rewards), 0, -1) == 1) for e in dataset.episodes]
steps = [(e.observations, e.actions, e.rewards, end * e.terminated, end & (not e.terminated)) for e, end in ends]
transitions = from_arrays(*map(np.concatenate, zip(*steps)))
"""
TIANSHOU = """\
rows = buffer[:]
transitions = from_arrays(rows.obs, rows.act, rows.rew, rows.terminated, next_observations=rows.obs_next)
"""

GUIDE = (Path(__file__).parents[2] / "examples" / "guides" / "your_data.md").read_text()

TIME = np.arange(12, dtype=np.float32)
STEPS = {
    "observations": np.stack([TIME, -TIME], 1),
    "actions": np.linspace(-1, 1, 12, dtype=np.float32)[:, None],
    "rewards": TIME / 10,
    "terminated": TIME == 4,
    "truncated": TIME == 8,
}
ROLES = {"observation": ["x", "y"], "action": ["a"], "reward": "r", "terminated": "died", "truncated": "cut"}


@pytest.fixture
def expected():
    return from_arrays(**STEPS)


@pytest.fixture
def folder(tmp_path):
    """One dataset in every kind of file."""
    for kind in ("hdf5", "h5", "npz"):
        write_arrays(tmp_path / f"d.{kind}", STEPS)
    columns = {"x": TIME, "y": -TIME, "a": STEPS["actions"][:, 0], "r": STEPS["rewards"]}
    table = pa.table(columns | {"died": STEPS["terminated"], "cut": STEPS["truncated"]})
    parquet.write_table(table, tmp_path / "d.parquet")
    csv.write_csv(table, tmp_path / "d.csv")
    with pa.CompressedOutputStream(tmp_path / "d.csv.gz", "gzip") as stream:
        csv.write_csv(table, stream)
    from_arrays(**STEPS).memmap(str(tmp_path / "copy"))
    return tmp_path


NAMES = ["hdf5:d.hdf5", "hdf5:d.h5", "npz:d.npz", "csv:d.csv", "csv:d.csv.gz", "parquet:d.parquet", "memmap:copy"]


def settings_of(name: str) -> dict:
    return ROLES if "csv" in name or "parquet" in name else {}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prefix", [True, False])
def test_files_and_folders(folder, monkeypatch, expected, name, prefix):
    """By a prefix, or by their endings."""
    monkeypatch.chdir(folder)
    same(load_transitions(name if prefix else name.partition(":")[2], **settings_of(name)), expected)
    kind, _, path = name.partition(":")
    same(load_transitions(f"{kind + ':' if prefix else ''}{folder / path}", **settings_of(name)), expected)


@pytest.mark.parametrize("name", NAMES)
def test_in_torchrls_registry(folder, monkeypatch, expected, name):
    monkeypatch.chdir(folder)
    buffer = load_dataset(f"bcq:{name}", batch_size=5, seed=0, **settings_of(name))
    assert isinstance(buffer, TensorDictReplayBuffer)
    assert len(buffer) == len(expected)
    batch = buffer.sample()
    assert batch.batch_size == (5,)
    known = {tuple(row) for row in expected["observation"].tolist()}
    assert {tuple(row) for row in batch["observation"].tolist()} <= known


def test_bounds_and_copies(folder, expected):
    with pytest.raises(ValueError, match=r"^d.npz: actions has 10 rows \(first: 0\) outside the action bounds"):
        load_transitions(f"npz:{folder / 'd.npz'}", action_spec=Bounded(-0.1, 0.1, (1,)))
    td = load_transitions(str(folder / "d.npz"), root=folder / "copies")
    assert td.is_memmap()
    same(td, expected)
    (copy,) = [path for path in (folder / "copies").iterdir() if path.is_dir()]
    same(load_transitions(str(copy)), expected)


def test_a_file_may_have_a_colon_in_its_name(folder, expected):
    path = (folder / "d.npz").rename(folder / "csv:d.npz")
    same(load_transitions(str(path)), expected)


def test_settings_of_the_reader(folder, expected):
    with h5py.File(folder / "d.hdf5", "a") as file:
        file.move("observations", "robot/state")
    same(load_transitions(str(folder / "d.hdf5"), names={"observations": "robot/state"}), expected)


def test_d4rl(folder, monkeypatch, expected):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(folder))
    (folder / "d.hdf5").rename(folder / D4RL_DATASETS["hopper-medium-v2"].rpartition("/")[2])
    same(load_transitions("d4rl:hopper-medium-v2"), expected)


@pytest.mark.filterwarnings("ignore::UserWarning:minari")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_minari(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    ends = np.array([False, False, True])
    box = gymnasium.spaces.Box
    flags = {"terminations": ends, "truncations": ends & False}
    record = EpisodeBuffer(observations=TIME[:4, None], actions=TIME[1:4, None] / 4, rewards=TIME[1:4], **flags)
    minari.create_dataset_from_buffers(
        "test/named-v0",
        buffer=[record],
        action_space=box(-1, 1, (1,)),
        observation_space=box(-20, 20, (1,)),
        algorithm_name="none",
        author="none",
        author_email="none",
        code_permalink="none",
        requirements=[],
    )
    assert load_transitions("minari:test/named-v0")["next", "observation"].flatten().tolist() == [1, 2, 3]


def test_unknown_sources_name_the_known_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("notes")
    with pytest.raises(ValueError, match=r"^notes.txt has none of the endings .*'.npz'.*; give it the ending of its"):
        load_transitions("notes.txt")
    for name in ("nonsense", "nonsense:id", "none.txt"):
        with pytest.raises(ValueError, match="the known sources are") as error:
            load_transitions(name)
        assert repr(name) in str(error.value)
        for known in (
            "hdf5",
            "npz",
            "csv",
            "parquet",
            "minari",
            "d4rl",
            "memmap",
            "vd4rl",
        ):  # the last one is TorchRL's, which is asked for names with a prefix only
            assert (repr(known) in str(error.value)) == (known != "vd4rl" or ":" in name)


def test_copies_are_checked_against_the_bounds_asked_for(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert load_transitions("memmap:copy", action_spec=Bounded(-1, 1, (1,))).is_memmap()
    with pytest.raises(
        ValueError, match=r"^copy: actions has 1 row \(first: 0\) outside the action bounds: the actions"
    ):
        load_transitions("memmap:copy", action_spec=Bounded(-0.9, 1, (1,)))
    assert len(load_transitions("copy", action_spec=Bounded(-0.9, 1, (1,)), strict=False)) == 10


@pytest.mark.parametrize("name", ["none.hdf5", "hdf5:none.hdf5", "npz:none.npz", "csv:none.csv", "memmap:none"])
def test_absent_files(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="^there is no (file|folder) none"):
        load_transitions(name, **settings_of(name))


def test_missing_and_unknown_settings_are_named(folder):
    for name in (f"csv:{folder / 'd.csv'}", str(folder / "d.parquet")):
        with pytest.raises(ValueError) as error:  # noqa: PT011 (the whole message is compared below)
            load_transitions(name)
        kind = "csv" if "csv" in name else "parquet"
        needed = ["observation", "action", "reward", "terminated"]
        assert str(error.value) == f"{name} is a {kind} source, which also needs the arguments {needed}."
    with pytest.raises(ValueError, match="columns"):
        load_transitions(str(folder / "d.hdf5"), columns=3)
    with pytest.raises(
        ValueError, match=r"needs the arguments \['terminated'\]. Without final states, add a column of"
    ):
        load_transitions(str(folder / "d.csv"), observation="x", action="a", reward="r")


def counting(length: int) -> TensorDict:
    """A rollout that counts up, and starts again in the middle."""
    state = torch.arange(1.0, length + 1)[:, None]
    state[length // 2 :] += 100
    end = torch.zeros(length, 1, dtype=torch.bool)
    outcome = {"observation": state + 1, "reward": state / 10, "done": end, "terminated": end, "truncated": end.clone()}
    return TensorDict({"observation": state, "action": state / 200, "next": outcome}, [length])


def filled(rollout: TensorDict, batch_size: int) -> TensorDictReplayBuffer:
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(len(rollout) + 5), batch_size=batch_size)
    buffer.extend(rollout)
    return buffer


KINDS = {
    "rollout": counting,
    "rollouts": lambda length: [counting(length)[:1], counting(length)[1:]],
    "buffer": lambda length: filled(counting(length), 2),
}


@pytest.mark.parametrize("kind", KINDS)
def test_prefixes_of_the_users_own(kind):
    register_dataset("mine", lambda name, scale=1: KINDS[kind](int(name) * scale), replace=True)
    td = load_transitions("mine:6")
    assert td["observation"].flatten().tolist() == [1, 2, 3, 104, 105, 106]
    assert td["episode"].tolist() == [0, 0, 0, 1, 1, 1]
    assert td["next", "truncated"].flatten().tolist() == [False, False, True, False, False, True]
    assert len(load_transitions("mine:6", scale=3)) == 18
    with pytest.raises(ValueError, match=r"actions has 3 rows \(first: 3\) outside the action bounds"):
        load_transitions("mine:6", action_spec=Bounded(0, 0.5, (1,)))
    assert len(load_dataset("bcq:mine:6", batch_size=2).sample()) == 2


def test_a_pattern_in_a_name_of_the_users_own_is_left_to_its_loader():
    register_dataset("mine", lambda name: counting({"all?": 6}[name]), replace=True)
    assert len(load_transitions("mine:all?")) == 6


@dataclass
class Episode:
    """The attributes of d3rlpy 2's ``Episode`` that recipes use; rewards are [T, 1], one flag says how it ended."""

    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminated: bool


@dataclass
class Dataset:
    episodes: list[Episode]


def test_recipe_for_d3rlpy():
    """Terminated after 3 steps, cut off after 3 and after 1, terminated after 1: rows that were cut off are dropped."""
    parts, first = [], 0
    for length, terminated in ((3, True), (3, False), (1, False), (1, np.True_)):
        rows = np.arange(first, first + length, dtype=np.float32)
        parts.append(Episode(rows[:, None] + 1, rows[:, None] / 10 + 0.1, rows[:, None] + 0.5, terminated))
        first += length
    namespace = {"np": np, "from_arrays": from_arrays, "dataset": Dataset(parts)}
    exec(D3RLPY, namespace)
    td = namespace["transitions"]
    assert td["observation"].flatten().tolist() == [1, 2, 3, 4, 5, 8]
    assert td["next", "observation"].flatten().tolist() == [2, 3, 3, 5, 6, 8]
    assert td["next", "reward"].flatten().tolist() == [0.5, 1.5, 2.5, 3.5, 4.5, 7.5]
    assert td["next", "terminated"].flatten().tolist() == [False, False, True, False, False, True]
    assert td["next", "truncated"].flatten().tolist() == [False, False, False, False, True, False]
    assert td["episode"].tolist() == [0, 0, 0, 1, 1, 3]


@pytest.mark.parametrize("recipe", [D3RLPY, TIANSHOU])
def test_recipes_are_those_of_the_guide(recipe):
    assert f"```python\n{recipe}```\n" in GUIDE


class Buffer:
    """The parts of Tianshou 2's ``ReplayBuffer`` and ``VectorReplayBuffer`` that recipes use.

    Storage has free rows; ``buffer.obs`` is all of it. ``buffer[:]`` gives the rows in use, those of each environment
    after those of the one before, from the oldest one on.
    """

    def __init__(self, sizes: list[int], capacity: int, obs, act, rew, terminated, truncated, obs_next):
        self.storage = {"obs": obs, "act": act, "rew": rew, "terminated": terminated}
        self.storage |= {"truncated": truncated, "obs_next": obs_next}
        self.capacity, self.written = capacity, sizes

    def __getitem__(self, index: slice):
        assert index == slice(None)
        used = []
        for number, written in enumerate(self.written):
            oldest = written % self.capacity if written > self.capacity else 0
            rows = np.roll(np.arange(min(written, self.capacity)), -oldest)
            used.append(rows + number * self.capacity)
        rows = np.concatenate(used)
        return type("Batch", (), {name: values[rows] for name, values in self.storage.items()})


def fill(steps_of_each: list[list[tuple]], capacity: int) -> Buffer:
    """Write steps ``(obs, obs_next, terminated, truncated)`` of each environment to a ring buffer."""
    size = capacity * len(steps_of_each)
    columns = {"obs": np.zeros((size, 1)), "obs_next": np.zeros((size, 1)), "act": np.zeros((size, 1))}
    columns |= {"rew": np.zeros(size), "terminated": np.zeros(size, bool), "truncated": np.zeros(size, bool)}
    for number, steps in enumerate(steps_of_each):
        for count, (before, after, terminated, truncated) in enumerate(steps):
            row = number * capacity + count % capacity
            columns["obs"][row], columns["obs_next"][row], columns["act"][row] = before, after, before / 100
            columns["rew"][row], columns["terminated"][row], columns["truncated"][row] = before, terminated, truncated
    return Buffer([len(steps) for steps in steps_of_each], capacity, **columns)


def run_tianshou(buffer: Buffer) -> TensorDict:
    namespace = {"from_arrays": from_arrays, "buffer": buffer}
    exec(TIANSHOU, namespace)
    return namespace["transitions"]


def test_recipe_for_tianshou():
    """Terminated after 2 steps, cut off after 2, unfinished: every row is kept with its true next observation."""
    steps = [
        (1, 2, False, False),
        (2, 3, True, False),
        (5, 6, False, False),
        (6, 7, False, True),
        (9, 10, False, False),
    ]
    td = run_tianshou(fill([steps], capacity=8))
    assert td["observation"].flatten().tolist() == [1, 2, 5, 6, 9]
    assert td["next", "observation"].flatten().tolist() == [2, 3, 6, 7, 10]
    assert td["next", "reward"].flatten().tolist() == [1, 2, 5, 6, 9]
    assert td["next", "terminated"].flatten().tolist() == [False, True, False, False, False]
    assert td["next", "truncated"].flatten().tolist() == [False, False, False, True, True]
    assert td["episode"].tolist() == [0, 0, 1, 1, 2]


def test_recipe_for_tianshou_with_several_environments_and_a_full_buffer():
    """Two environments with 4 rows each: the first one wrote 6 steps, so the oldest 2 are gone; the other wrote 3."""
    first = [(step, step + 1, False, False) for step in (1, 2, 3)] + [(4, 5, False, True)]
    first += [(20, 21, False, False), (21, 22, False, False)]
    second = [(50, 51, False, False), (51, 52, True, False), (60, 61, False, False)]
    td = run_tianshou(fill([first, second], capacity=4))
    assert td["observation"].flatten().tolist() == [3, 4, 20, 21, 50, 51, 60]
    assert td["next", "observation"].flatten().tolist() == [4, 5, 21, 22, 51, 52, 61]
    assert td["next", "truncated"].flatten().tolist() == [False, True, False, True, False, False, True]
    assert td["next", "terminated"].flatten().tolist() == [False, False, False, False, False, True, False]
    assert td["episode"].tolist() == [0, 0, 1, 1, 2, 2, 3]


def test_a_copy_with_other_names_is_refused_and_can_be_renamed(tmp_path):
    rows = from_arrays(**STEPS)
    rows.clone().rename_key_("action", "torque").memmap(str(tmp_path / "other"))
    with pytest.raises(DatasetError, match=r"it lacks the entries \['action'\]; rename them in Python"):
        load_transitions(tmp_path / "other")
    renamed = load_memmap(tmp_path / "other").unlock_().rename_key_("torque", "action")
    renamed.memmap(str(tmp_path / "renamed"), copy_existing=True)
    assert torch.equal(load_transitions(tmp_path / "renamed")["action"], rows["action"])
