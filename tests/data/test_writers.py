"""Written transitions: read back, complete or absent."""

from __future__ import annotations

import re

import gymnasium
import h5py
import minari
import pytest
import torch
from tensordict import TensorDict

from torchrl_bcq import load_hdf5, load_minari
from torchrl_bcq.data.writers import check_out, write_hdf5, write_minari
from torchrl_bcq.errors import RunError


def make_transitions(rows, length=200):
    """Observations of Pendulum's size that continue inside episodes of this length, which are cut off."""
    states = torch.randn(rows + 1, 3)
    done = (torch.arange(1, rows + 1) % length == 0).unsqueeze(-1)
    done[-1] = True
    after = {
        "observation": states[1:], "reward": torch.randn(rows, 1),
        "done": done, "terminated": torch.zeros_like(done), "truncated": done,
    }  # fmt: skip
    action = torch.rand(rows, 1) * 4 - 2
    return TensorDict({"observation": states[:-1], "action": action, "next": after}, [rows])


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "store"))
    return tmp_path / "store"


def test_hdf5_is_in_d4rls_layout(tmp_path):
    transitions = make_transitions(50, length=20)
    path = tmp_path / "new" / "walk.hdf5"
    write_hdf5(path, transitions, "Walk-v0")
    with h5py.File(path) as file:
        assert dict(file.attrs) == {"env_id": "Walk-v0"}
        kinds = {name: (field.shape, field.dtype.kind, field.compression) for name, field in file.items()}
    states = dict.fromkeys(["observations", "next_observations"], ((50, 3), "f", "gzip"))
    flags = dict.fromkeys(["terminals", "timeouts"], ((50,), "b", "gzip"))
    assert kinds == {**states, **flags, "actions": ((50, 1), "f", "gzip"), "rewards": ((50,), "f", "gzip")}
    assert (load_hdf5(path).exclude("episode") == transitions).all()
    assert [entry.name for entry in path.parent.iterdir()] == ["walk.hdf5"]


def test_hdf5_that_fails_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    transitions, path = make_transitions(10), tmp_path / "walk.hdf5"
    write_hdf5(path, make_transitions(5), "Walk-v0")
    before = path.read_bytes()
    with pytest.raises(
        RunError, match=r"walk.hdf5 already exists; choose another name, or overwrite it with overwrite=True"
    ):
        write_hdf5(path, transitions, "Walk-v0")
    with monkeypatch.context() as patch:
        patch.setattr(h5py.File, "create_dataset", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            write_hdf5(path, transitions, "Walk-v0", overwrite=True)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["walk.hdf5"]
    write_hdf5(path, transitions, "Walk-v0", overwrite=True)
    assert len(load_hdf5(path)) == 10


def test_minari_gives_back_what_was_recorded(store, monkeypatch):
    transitions = make_transitions(450)
    write_minari("mine/swing-v0", transitions, "Pendulum-v1", algorithm="none")
    assert (load_minari("mine/swing-v0").exclude("episode") == transitions).all()
    assert [len(episode) for episode in minari.load_dataset("mine/swing-v0")] == [200, 200, 50]
    with pytest.raises(RunError, match=r"^minari:mine/swing-v0 already exists"):
        write_minari("mine/swing-v0", transitions, "Pendulum-v1", algorithm="none")
    gymnasium.register("Nameless-v0", lambda: gymnasium.make("Pendulum-v1"))
    with pytest.raises(RunError, match=r"^Minari cannot store mine/less-v0 \(.*entry_point.*\); record into an HD"):
        write_minari("mine/less-v0", transitions, "Nameless-v0", algorithm="none")
    del gymnasium.registry["Nameless-v0"]
    with monkeypatch.context() as patch:
        patch.setattr(minari.dataset.minari_storage.MinariStorage, "update_metadata", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_minari("mine/swing-v0", transitions, "Pendulum-v1", algorithm="none", overwrite=True)
    assert (load_minari("mine/swing-v0").exclude("episode") == transitions).all()  # the one that was there
    write_minari("mine/swing-v0", transitions[200:], "Pendulum-v1", algorithm="none", overwrite=True)
    assert len(load_minari("mine/swing-v0")) == 250
    assert [entry.name for entry in (store / "mine").iterdir() if entry.is_dir()] == ["swing-v0"]


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("walk.npz", "walk.npz is neither FILE.hdf5 nor minari:NAMESPACE/DATASET-v0; use one of these forms."),
        ("minari:walk", "'walk' is not a Minari id; use one such as 'mine/hopper/noisy-v0'."),
        ("minari:../walk-v0", "'../walk-v0' is not a Minari id"),
        ("there.hdf5", "there.hdf5 already exists; choose another name, or overwrite it"),
        ("folder.h5", "folder.h5 is a folder; choose a file."),
    ],
)
def test_targets_that_are_refused(tmp_path, monkeypatch, store, out, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.hdf5").touch()
    (tmp_path / "folder.h5").mkdir()
    with pytest.raises(RunError, match=re.escape(message)):
        check_out(out, overwrite=out == "folder.h5")
    check_out("there.hdf5", overwrite=True)
