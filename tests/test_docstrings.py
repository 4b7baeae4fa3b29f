"""The examples in the docstrings of the package run and print what they say."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import h5py
import minari
import numpy as np
import pytest
from gymnasium.spaces import Box
from minari.data_collector import EpisodeBuffer

import torchrl_bcq
from torchrl_bcq.__main__ import main

ROOT = Path(torchrl_bcq.__file__).parent
MODULES = [
    ".".join(file.relative_to(ROOT.parent).with_suffix("").parts)
    for file in sorted(ROOT.rglob("*.py"))
    if ">>>" in file.read_text()
]
WITH_AN_EXAMPLE = [
    "ActionVAE",
    "BCQLoss",
    "BCQPolicy",
    "BCQTrainer",
    "CloningLoss",
    "DeterministicActor",
    "DiscreteBCQLoss",
    "DiscreteBCQPolicy",
    "DiscreteCloningLoss",
    "ExportedPolicy",
    "History",
    "MultiHeadNetwork",
    "OfflineLoss",
    "OfflineTrainer",
    "PerturbationActor",
    "QEnsemble",
    "describe",
    "export_policy",
    "from_arrays",
    "from_rollouts",
    "load_d4rl",
    "load_hdf5",
    "load_minari",
    "load_npz",
    "load_policy",
    "load_table",
    "make_bcq_modules",
    "make_discrete_bcq_modules",
    "make_replay_buffer",
    "stack_observations",
]
FAST = ["steps=2", "log_interval=1", "evaluation.interval=2", "checkpoint.interval=2", "evaluation.env=null"]
SMALL = ["network.hidden=[8]", "network.vae_hidden=[8]", "progress_bar=false"]


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(size=shape).astype(np.float32)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with the datasets and the run that the examples name: small ones, with random numbers."""
    place = tmp_path_factory.mktemp("place")
    ends, ended = np.arange(9) == 8, np.zeros(9, bool)
    for name, observations, actions in (("hopper_medium-v2", 11, 3), ("pendulum", 3, 1)):
        with h5py.File(place / f"{name}.hdf5", "w") as file:
            file["observations"], file["actions"], file["rewards"] = (
                numbers(9, observations),
                numbers(9, actions),
                numbers(9),
            )
            file["terminals"], file["timeouts"] = ended, ends
    episode = EpisodeBuffer(
        observations=numbers(10, 11), actions=numbers(9, 3), rewards=numbers(9), terminations=ended, truncations=ends
    )
    spaces = {"observation_space": Box(-9, 9, (11,)), "action_space": Box(-1, 1, (3,))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(place / "minari"))
        minari.create_dataset_from_buffers("mujoco/hopper/medium-v0", [episode], **spaces)
    assert main(["train", f"dataset={place / 'pendulum.hdf5'}", f"out={place / 'runs/first'}", *FAST, *SMALL]) == 0
    assert main(["export", str(place / "runs/first"), str(place / "policy.onnx"), "--random-states"]) == 0
    return place


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.filterwarnings(
    "ignore::UserWarning:minari", "ignore::DeprecationWarning"
)  # of a dataset without an author
def test_examples(name, place, tmp_path, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(place))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(place / "minari"))
    monkeypatch.chdir(tmp_path)
    for made in ("runs", "policy.onnx"):
        (tmp_path / made).symlink_to(place / made)
    failed, attempted = doctest.testmod(importlib.import_module(name))
    assert attempted > 0
    assert failed == 0


@pytest.mark.parametrize("name", WITH_AN_EXAMPLE)
def test_what_people_build_first_has_an_example(name):
    assert ">>> " in getattr(torchrl_bcq, name).__doc__
