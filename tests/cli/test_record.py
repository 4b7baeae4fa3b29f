"""``torchrl-bcq record``, as a user types it."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import minari
import pytest
import torch
from tensordict.nn import TensorDictModule
from torchrl.data import Bounded

from torchrl_bcq import load_hdf5, load_minari
from torchrl_bcq.cli.record import add_parser
from torchrl_bcq.errors import RunError
from torchrl_bcq.evaluation import recording
from torchrl_bcq.evaluation.recording import record, record_swing_up

ENV = "Pendulum-v1"


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "store"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "store"


def command(*arguments: str) -> None:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    args = parser.parse_args(["record", *arguments])
    args.run(args)


def test_without_an_environment_the_default_dataset_is_recorded_once(store, monkeypatch, capsys):
    monkeypatch.setattr(recording, "record_swing_up", lambda: record_swing_up(steps=600))
    command()
    assert capsys.readouterr() == ("recorded minari:torchrl-bcq/pendulum/swing-up-v0\n", "")
    assert len(load_minari("torchrl-bcq/pendulum/swing-up-v0")) == 600
    monkeypatch.setattr(recording, "record_swing_up", lambda: record_swing_up(steps=1200))
    command()
    assert capsys.readouterr().out.endswith("swing-up-v0 exists already; use --overwrite to record it again\n")
    assert len(load_minari("torchrl-bcq/pendulum/swing-up-v0")) == 600
    command("--overwrite")
    assert len(load_minari("torchrl-bcq/pendulum/swing-up-v0")) == 1200
    with pytest.raises(RunError, match=r"^--steps, --seed needs --env; the default dataset is always recorded in the"):
        command("--seed", "1", "--steps", "5")


def test_a_default_dataset_whose_recording_was_killed_is_recorded_again(store, monkeypatch):
    monkeypatch.setattr(recording, "record_swing_up", lambda: record_swing_up(steps=600))
    command()
    metadata = store / "torchrl-bcq/pendulum/swing-up-v0/data/metadata.json"
    metadata.write_text(json.dumps(json.loads(metadata.read_text()) | {"total_episodes": 0}))  # as Minari begins
    assert recording.record_default()
    assert len(load_minari("torchrl-bcq/pendulum/swing-up-v0")) == 600


def test_two_runs_at_once_record_the_default_dataset_once(store, monkeypatch):
    calls = []

    def slow():
        calls.append("recorded")
        time.sleep(0.5)
        return record_swing_up(steps=600)

    monkeypatch.setattr(recording, "record_swing_up", slow)
    with ThreadPoolExecutor(2) as pool:
        new = [*pool.map(lambda _: recording.record_default(), range(2))]
    assert (sorted(new), calls) == ([False, True], ["recorded"])


def test_random_actions_into_a_file_and_into_minari(store, capsys):
    command("--env", ENV, "--steps", "250", "--seed", "5", "--out", "swings/a.hdf5")
    transitions = record(ENV, None, 250, seed=5)
    mean = transitions["next", "reward"].sum().item() / 2  # of 200 and of 50 steps
    assert capsys.readouterr().out == f"swings/a.hdf5: 250 steps of {ENV} in 2 episodes, mean return {mean:.1f}\n"
    assert (load_hdf5("swings/a.hdf5").exclude("episode") == transitions).all()
    command("--env", ENV, "--policy", "random", "--steps", "250", "--seed", "5", "--out", "minari:swings/a-v0")
    assert (load_minari("swings/a-v0").exclude("episode") == transitions).all()
    assert minari.load_dataset("swings/a-v0").storage.metadata["algorithm_name"] == "uniform random actions"
    command("--env", ENV, "--steps", "3")
    assert len(load_hdf5("Pendulum-v1.hdf5")) == 3


def push(*shape: int) -> TensorDictModule:
    """A policy that pushes with 1 N m, of an action of this shape."""
    return TensorDictModule(lambda x: torch.ones(*x.shape[:-1], *shape), ["observation"], ["action"])


@pytest.fixture
def learned(monkeypatch):
    """Stands in for the loading of a run; gives the runs that were asked for."""
    asked = []

    def load(run, which, device):
        asked.append((str(run), which, device))
        actions = 2 if run.name == "wide" else 1
        spec = Bounded(-torch.ones(actions), torch.ones(actions), (actions,))
        task = SimpleNamespace(env=None, observation=None, stack=1)
        task.expected = {"shapes": {"observation": (3,)}, "action_spec": spec}
        policy = push(actions)
        return SimpleNamespace(
            policy=policy, algorithm=SimpleNamespace(title="Cloning", discrete=False), task=task, path=run
        )

    monkeypatch.setitem(sys.modules, "torchrl_bcq.runs.folder", SimpleNamespace(load=load))
    return asked


def test_a_learned_policy(store, learned):
    command("--env", ENV, "--policy", "runs/good", "--steps", "12", "--out", "a.hdf5")
    assert learned == [("runs/good", "best", "cpu")]
    assert load_hdf5("a.hdf5")["action"].tolist() == [[1.0]] * 12
    command("--env", ENV, "--policy", "runs/good", "--noise", "0.1", "--steps", "12", "--out", "minari:mine/b-v0")
    noisy = load_minari("mine/b-v0")["action"]
    assert torch.equal(noisy, record(ENV, push(1), 12, noise=0.1)["action"])
    assert noisy.unique(dim=0).shape == (12, 1)
    kept = minari.load_dataset("mine/b-v0").storage.metadata["algorithm_name"]
    assert kept == "Cloning, Gaussian noise of 0.1 half-ranges"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--env Nonsense-v1", "environment 'Nonsense-v1' cannot be made: "),
        ("--env Pendulum-v1 --steps 0", "steps is 0, expected at least 1."),
        (
            "--env Pendulum-v1 --noise 0.1",
            "--noise needs --policy RUN; without a policy, all actions are uniformly random.",
        ),
        (
            "--env Pendulum-v1 --policy runs/wide",
            "Pendulum-v1 has actions of shape (1,), but the run has actions of shape (2,); choose another with",
        ),
        (
            "--env Pendulum-v1 --out swings.npz",
            "swings.npz is neither FILE.hdf5 nor minari:NAMESPACE/DATASET-v0; use one of these",
        ),
        ("--env Pendulum-v1 --out there.hdf5", "there.hdf5 already exists; choose another name, or overwrite it"),
    ],
)
def test_refusals_come_before_anything_is_recorded(store, learned, monkeypatch, arguments, message):
    (store.parent / "there.hdf5").touch()
    monkeypatch.setattr(recording, "_collect", lambda *_: pytest.fail("it was recorded"))
    with pytest.raises(RunError, match=re.escape(message)):
        command(*arguments.split())
    assert {path.name for path in store.parent.iterdir()} <= {"there.hdf5", "store"}


def test_a_file_that_cannot_be_written_is_found_before_anything_is_recorded(store, monkeypatch):
    (store.parent / "blocked").touch()
    monkeypatch.setattr(recording, "_collect", lambda *_: pytest.fail("it was recorded"))
    with pytest.raises(OSError, match=r"blocked.x\.hdf5 cannot be written: .*; choose another file with --out"):
        command("--env", "Pendulum-v1", "--out", "blocked/x.hdf5")
