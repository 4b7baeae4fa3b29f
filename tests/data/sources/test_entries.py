"""States of several entries: HDF5 and NPZ entries, and Dict observations of Minari, joined in a stated order."""

from __future__ import annotations

import h5py
import numpy as np
import pytest

from torchrl_bcq import DatasetError, load_hdf5, load_npz, load_transitions
from torchrl_bcq.data.sources.entries import Joined
from torchrl_bcq.errors import on_command_line

OBJECT = np.arange(32.0).reshape(16, 2)
ARM = np.arange(48.0, dtype=np.float32).reshape(16, 3) / 7
WEIGHT = np.arange(16)  # one number for each step, of integers
ENDS = np.arange(16) % 8 == 7
STEPS = {"actions": np.linspace(-1, 1, 16)[:, None], "rewards": np.ones(16), "dones": ENDS}
NAMES = {"observations": ["obs/arm", "obs/object", "obs/weight"], "terminated": "dones", "truncated": "cut"}


def entries(rows=slice(None)) -> dict[str, np.ndarray]:
    state = {"obs/object": OBJECT, "obs/arm": ARM, "obs/weight": WEIGHT}
    after = {f"next_{name}": values + 100 for name, values in state.items()}
    return {name: values[rows] for name, values in {**STEPS, **state, **after, "cut": np.zeros(16)}.items()}


@pytest.fixture
def write(tmp_path):
    """Write entries to ``d.hdf5``, where ``/`` makes groups, or to ``d.npz``."""

    def call(kind: str, groups: tuple[str, ...] = ("",), **changes):
        path = tmp_path / f"d.{kind}"
        found = {**entries(), **changes}
        if kind == "npz":
            np.savez(path, **found)
            return path
        with h5py.File(path, "w") as file:
            for number, group in enumerate(groups):
                rows = slice(8 * number, 8 * number + 8) if len(groups) > 1 else ()
                for name, values in found.items():
                    file[f"{group}/{name}" if group else name] = values[rows]
        return path

    return call


@pytest.mark.parametrize("kind", ["hdf5", "npz"])
def test_entries_are_joined_in_the_stated_order(write, kind):
    path = write(kind)
    after = [name.replace("obs", "next_obs") for name in NAMES["observations"]]
    data = load_transitions(path, names={**NAMES, "next_observations": after})
    expected = np.concatenate([ARM, OBJECT, WEIGHT[:, None]], 1)
    np.testing.assert_allclose(data["observation"], expected, rtol=1e-6)
    np.testing.assert_allclose(data["next", "observation"], expected + 100, rtol=1e-6)
    names = {**NAMES, "observations": ["obs/object", "obs/arm"], "next_observations": after[1::-1]}
    other = (load_hdf5 if kind == "hdf5" else load_npz)(path, names=names)
    np.testing.assert_allclose(other["observation"], np.concatenate([OBJECT, ARM], 1), rtol=1e-6)


def test_entries_in_the_group_of_each_episode(write, tmp_path):
    """As in robomimic, whose observations and next observations are groups."""
    path = write("hdf5", ("data/demo_10", "data/demo_2"))
    names = {**NAMES, "observations": ["obs/object", "obs/arm"]}
    data = load_hdf5(path, names=names, root=tmp_path / "copies")
    rows = np.r_[8:16, 0:8]  # demo_2 comes first
    np.testing.assert_allclose(data["observation"], np.concatenate([OBJECT, ARM], 1)[rows], rtol=1e-6)
    np.testing.assert_allclose(data["next", "observation"], data["observation"] + 100, rtol=1e-5)
    assert data["episode"].tolist() == [0] * 8 + [1] * 8
    after = ["next_obs/arm", "next_obs/object"]
    other = load_hdf5(path, names={**names, "next_observations": after})["next", "observation"]
    np.testing.assert_allclose(other, np.concatenate([ARM, OBJECT], 1)[rows] + 100, rtol=1e-5)
    with pytest.raises(DatasetError) as error:
        load_hdf5(path, names={"terminated": "dones"})
    choice = "['obs/arm', 'obs/object', 'obs/weight']"
    assert str(error.value) == (
        f"d.hdf5: observations is the group 'obs'; choose from it, as in names={{'observations': {choice}}}."
    )
    with on_command_line(), pytest.raises(DatasetError) as error:
        load_hdf5(path, names={"terminated": "dones"})
    assert str(error.value).endswith("as in reader.names.observations=[obs/arm,obs/object,obs/weight].")


def test_padded_episodes_and_actions_of_several_entries(write):
    shaped = {name: values.reshape(2, 8, *values.shape[1:]) for name, values in entries().items()}
    shaped |= {"arm": shaped["actions"], "hand": shaped["actions"] / 2, "steps": np.array([8, 5])}
    del shaped["actions"]
    path = write("npz").with_name("padded.npz")
    np.savez(path, **shaped)
    names = {**NAMES, "actions": ["hand", "arm"], "lengths": "steps"}
    del names["truncated"]
    data = load_npz(path, names={**names, "observations": ["obs/arm", "obs/weight"]})
    rows = np.r_[0:8, 8:12]  # the last row of the second episode is cut off and has no next observation
    np.testing.assert_allclose(data["observation"], np.concatenate([ARM, WEIGHT[:, None]], 1)[rows], rtol=1e-6)
    np.testing.assert_allclose(data["action"], STEPS["actions"][rows] * [[0.5, 1]], rtol=1e-6)


@pytest.mark.parametrize("kind", ["hdf5", "npz"])
@pytest.mark.parametrize(
    ("names", "changes", "message"),
    [
        (
            {"observations": []},
            {},
            "names has [] for observations, expected the name of an entry, or a list of different names.",
        ),
        ({"observations": ["obs/arm", 3]}, {}, "names has ['obs/arm', 3] for observations, expected the name"),
        ({"observations": 3}, {}, "names has 3 for observations, expected the name"),
        ({"observations": ["obs/arm", "obs/arm"]}, {}, "names has ['obs/arm', 'obs/arm'] for observations, expected"),
        ({"rewards": ["rewards", "cut"]}, {}, "names has ['rewards', 'cut'] for rewards; only the entries of ['obs"),
        ({"observations": ["obs/arm", "obs/leg"]}, {}, "names refers to the entries ['obs/leg'], but the file holds"),
        (
            {},
            {"obs/arm": ARM[:9]},
            "entries with the shapes {'obs/arm': (9, 3), 'obs/object': (16, 2), 'obs/weight': (1",
        ),
        ({}, {"obs/arm": np.zeros((16, 2, 2, 3))}, "entries with the shapes {'obs/arm': (16, 2, 2, 3), 'obs/object'"),
        ({}, {"obs/arm": np.float64(3)}, "entries with the shapes {'obs/arm': (), 'obs/object': (16, 2), 'obs/wei"),
        ({}, {"obs/arm": np.full((16, 1), b"a")}, "entries with the dtypes {'obs/arm': '|S1'} cannot be joined; they"),
        ({}, {"obs/arm": ARM * np.nan}, "observations has 16 rows (first: 0) that are not finite in float32; drop or"),
        (
            {"actions": ["actions", "obs/weight"]},
            {},
            "actions has the dtypes {'actions': 'float64', 'obs/weight': 'int64'}; store all of them as floating",
        ),
        ({"actions": ["obs/weight", "whole"]}, {"whole": WEIGHT}, "actions has 16 rows (first: 0) that are not one-ho"),
    ],
)
def test_entries_that_cannot_be_joined_are_refused(write, kind, names, changes, message):
    with pytest.raises(DatasetError) as error:
        load_transitions(write(kind, **changes), names={**NAMES, **names})
    assert str(error.value).startswith(f"d.{kind}: {message}")


def test_joined_entries_are_indexed_as_one_array():
    joined = Joined({"a": OBJECT, "b": WEIGHT, "c": ARM})
    whole = np.concatenate([OBJECT, WEIGHT[:, None], ARM], 1)
    assert (joined.shape, joined.dtype, len(joined)) == (whole.shape, np.float64, 16)
    for rows in (slice(3, 9), (), slice(20, 30), np.array([4, 2])):
        np.testing.assert_array_equal(joined[rows], whole[rows])
    flags = Joined({"a": WEIGHT > 3, "b": WEIGHT})
    np.testing.assert_array_equal(flags[()], np.stack([WEIGHT > 3, WEIGHT], 1))
