"""Each line of the guide's table of sources, executed; all hold the same three episodes."""

from __future__ import annotations

import re
from pathlib import Path

import gymnasium
import h5py
import minari
import numpy as np
import pytest
from minari.data_collector import EpisodeBuffer
from tensordict import TensorDictBase
from torchrl.data import ReplayBuffer
from torchrl.data.datasets import load_dataset
from torchrl.envs import GymEnv

import torchrl_bcq as bcq

PAGE = (Path(__file__).parents[1] / "examples" / "guides" / "your_data.md").read_text()
SECTION = PAGE.partition("## Read a dataset\n")[2].partition("\n## ")[0]
CALLS = re.findall(r"^\|.*\| `(\w+\(.+)` \|$", SECTION, re.MULTILINE)

LENGTHS = (1000, 300, 200)  # of which the first is cut off by a time limit and the others terminate
ROWS = sum(LENGTHS)
LAST = np.cumsum(LENGTHS) - 1
RNG = np.random.default_rng(0)
STEPS = {
    "observations": RNG.normal(size=(ROWS, 2)).astype(np.float32),
    "actions": RNG.uniform(-1, 1, (ROWS, 1)).astype(np.float32),
    "rewards": RNG.normal(size=ROWS).astype(np.float32),
    "terminated": np.isin(np.arange(ROWS), LAST[1:]),
    "truncated": np.arange(ROWS) == LAST[0],
}
FINAL = np.ones((3, 2), dtype=np.float32)  # observations after the last steps
D4RL = {"terminated": "terminals", "truncated": "timeouts"}


def hdf5(path, left_out=()):
    with h5py.File(path, "w") as file:
        for name, values in STEPS.items():
            if name not in left_out:
                file[D4RL.get(name, name)] = values


def episodes():
    """Fields of each episode; one observation more than steps."""
    for last, length, final in zip(LAST, LENGTHS, FINAL, strict=True):
        fields = {name: values[last + 1 - length : last + 1] for name, values in STEPS.items()}
        yield {**fields, "observations": np.vstack([fields["observations"], final])}


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A folder with all the files, and what the calls name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    hdf5("hopper.hdf5")
    hdf5("hopper_medium-v2.hdf5")
    hdf5("first.hdf5")
    hdf5("second.hdf5")
    hdf5("old.hdf5", left_out=["truncated"])
    np.savez("hopper.npz", **STEPS)
    with h5py.File("demos.hdf5", "w") as file:
        for i, fields in enumerate(episodes()):
            names = {"observations": "obs/state", "terminated": "dones"}
            for name in ("observations", "actions", "rewards", "terminated"):
                file[f"demo_{i}/{names.get(name, name)}"] = fields[name]
    trip = np.repeat(["a", "b", "c"], LENGTHS)
    columns = (*STEPS["observations"].T, STEPS["actions"][:, 0], STEPS["rewards"], STEPS["terminated"], trip)
    rows = [",".join(map(str, row)) for row in zip(*(column.tolist() for column in columns), strict=True)]
    Path("trips.csv").write_text("\n".join(["x,v,force,r,crashed,trip", *rows]))
    buffers = [
        EpisodeBuffer(
            observations=fields["observations"],
            actions=fields["actions"],
            rewards=fields["rewards"],
            terminations=fields["terminated"],
            truncations=fields["truncated"],
        )
        for fields in episodes()
    ]
    box = gymnasium.spaces.Box
    minari.create_dataset_from_buffers(
        "mujoco/hopper/medium-v0",
        buffer=buffers,
        observation_space=box(-9, 9, (2,)),
        action_space=box(-1, 1, (1,)),
        algorithm_name="none",
        author="none",
        author_email="none",
        code_permalink="none",
        requirements=[],
    )
    return {
        **{name: getattr(bcq, name) for name in bcq.__all__},
        **STEPS,
        "env": GymEnv("Pendulum-v1"),
        "load_dataset": load_dataset,
    }


def test_the_table_names_every_reader():
    readers = {name for name in bcq.__all__ if name.startswith(("load_", "from_"))} - {"load_memmap", "load_policy"}
    assert {re.match(r"\w+", call)[0] for call in CALLS} == readers | {"load_dataset"}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.filterwarnings("ignore::UserWarning:minari", "ignore::DeprecationWarning")
def test_call(world, call):
    result = eval(call, world)
    if isinstance(result, ReplayBuffer):
        assert result.sample().batch_size == (256,)
        result = result[:]
    assert isinstance(result, TensorDictBase)
    if "rollout" in call:
        assert (len(result), result["episode"].unique().tolist()) == (1000, [0, 1, 2, 3, 4])
        return
    if "second" in call:  # two files with the same steps
        half = len(result) // 2
        assert (result[half:].exclude("episode") == result[:half].exclude("episode")).all()
        assert result["episode"].unique().tolist() == [0, 1, 2, 3, 4, 5]
        result = result[:half]
    cut = [] if "minari" in call or "demos" in call else [LAST[0]]  # they know what followed; others drop that row
    kept = np.delete(np.arange(ROWS), cut)
    for key, name in (("observation", "observations"), ("action", "actions")):
        assert np.array_equal(result[key].numpy(), STEPS[name][kept])
    assert np.array_equal(result["next", "reward"].numpy(), STEPS["rewards"][kept, None])
    assert np.array_equal(result["next", "terminated"].numpy(), STEPS["terminated"][kept, None])
    assert result["episode"].bincount().tolist() == [1000 - len(cut), 300, 200]
    middle = 500
    assert np.array_equal(result["next", "observation"][middle].numpy(), STEPS["observations"][middle + 1])
    if not cut:
        assert result["next", "observation"][LAST[0]].tolist() == [1, 1]
    assert result.is_memmap() == ("root=" in call)
