"""The folder of a run: facts about its dataset, its checkpoints, and the policy loaded from them."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from tensordict import TensorDict
from torchrl.checkpoint import Checkpoint
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_bcq import load_policy
from torchrl_bcq.data import DatasetError
from torchrl_bcq.errors import RunError
from torchrl_bcq.runs.algorithms import ALGORITHMS
from torchrl_bcq.runs.assembly import assemble
from torchrl_bcq.runs.dataset import open_dataset
from torchrl_bcq.runs.folder import choose_device, find_checkpoint, load, read_metadata
from torchrl_bcq.version import __version__


@pytest.fixture
def make_trained(make_settings):
    """A trainer that has made 20 steps, with checkpoints of steps 10 and 20 in ``tmp_path / "run"``."""

    def make(*overrides):
        settings = make_settings("logger=[]", *overrides)
        trainer = assemble(settings, *open_dataset(settings))
        trainer.train()
        return trainer

    return make


@pytest.fixture
def run(make_trained, tmp_path) -> Path:
    make_trained("evaluation.env=null")
    return tmp_path / "run"


def damage(run: Path, change) -> None:
    """Change the metadata of a run's last checkpoint."""
    file = find_checkpoint(run, "last") / "manifest.json"
    manifest = json.loads(file.read_text())
    change(manifest["metadata"])
    file.write_text(json.dumps(manifest))


# dataset and environment


def test_several_files(make_settings, file, tmp_path):
    other = shutil.copy(file, tmp_path / "other.hdf5")
    with pytest.raises(DatasetError, match="are the same data; name it only once"):
        open_dataset(make_settings(f"dataset=[{file},{file}]"))
    one, _ = open_dataset(make_settings(f"dataset={file}"))
    both, task = open_dataset(make_settings(f"dataset=[{file},{other}]"))
    assert len(both) == 2 * len(one)
    assert task.behaviour["episodes"] == 2 * (1 + int(one["episode"].max()))
    assert torch.equal(both["observation"][len(one) :], one["observation"])
    settings = make_settings(f"dataset={file.parent}/*.hdf5")
    assert (open_dataset(settings)[0]["observation"] == open_dataset(settings)[0]["observation"]).all()
    for wrong in ("null", "[]", "{a: b}"):
        with pytest.raises(DatasetError, match=r"^the (dataset is|list of datasets is empty)"):
            open_dataset(make_settings(f"dataset={wrong}"))


def test_the_file_names_the_environment_which_gives_the_bounds(make_settings):
    transitions, task = open_dataset(make_settings())
    assert (len(transitions), task.shapes, task.env_id) == (200, {"observation": [3]}, "Swing-v0")
    assert (task.action_low, task.action_high) == ([-2.0], [2.0])
    assert task.reference_scores is None
    returns = transitions["next", "reward"].view(10, 20).double().sum(1)
    expected = {"mean": returns.mean().item(), "std": returns.std(correction=0).item(), "episodes": 10}
    expected |= {"length": 20.0, "cut_off": 1.0, "cut_off_after": 20.0}
    assert task.behaviour == pytest.approx(expected)


@pytest.mark.parametrize("setting", [["evaluation.env=null"], []])
def test_without_an_environment_bounds_are_those_of_the_data(make_settings, make_file, setting):
    make_file(env_id="Swing-v0" if setting else None)
    transitions, task = open_dataset(make_settings(*setting))
    assert task.env_id is None
    assert task.action_low == transitions["action"].amin(0).tolist() != [-2.0]
    assert task.action_high == transitions["action"].amax(0).tolist() != [2.0]


def test_a_named_environment_stands_before_the_files(make_settings, make_file):
    make_file(env_id="Nonsense-v0")
    assert open_dataset(make_settings("evaluation.env=Swing-v0"))[1].env_id == "Swing-v0"


def test_an_environment_of_the_file_that_cannot_be_made_is_done_without_and_told(make_settings, make_file, caplog):
    make_file(env_id="Nonsense-v0")
    with caplog.at_level(logging.WARNING):
        assert open_dataset(make_settings())[1].env_id is None
    assert caplog.messages[:1] == [
        "the dataset names the environment Nonsense-v0, which cannot be made (Environment `Nonsense` doesn't exist.); "
        "no policy is evaluated in it; to name an environment, set evaluation.env=ID."
    ]


@pytest.mark.parametrize(
    ("env", "error", "message"),
    [
        ("Nonsense-v0", RunError, "environment 'Nonsense-v0' cannot be made: "),
        (
            "Goal-v0",
            RunError,
            "the observation of Goal-v0 has the entries ['place', 'goal']; name those that the dataset has",
        ),
        ("MountainCarContinuous-v0", DatasetError, "outside the action bounds: "),
        (
            "CartPole-v1",
            RunError,
            "environment CartPole-v1: the actions are discrete, but algorithm=bcq needs continuous actions; set alg",
        ),
    ],
)
def test_an_environment_that_does_not_fit_is_refused(make_settings, env, error, message):
    with pytest.raises(error) as refusal:
        open_dataset(make_settings(f"evaluation.env={env}"))
    assert message in str(refusal.value)


def test_an_environment_with_other_observations_is_refused(make_settings, make_file):
    states = np.random.default_rng(0).normal(size=(200, 4))
    make_file(observations=states, next_observations=states + 1)
    with pytest.raises(RunError) as refusal:
        open_dataset(make_settings())
    assert str(refusal.value) == (
        "Swing-v0 has observations of shape (3,), but the dataset has (4,); choose another with evaluation.env=ID, set "
        "its arguments with evaluation.env_kwargs.NAME=VALUE, or use none with evaluation.env=null."
    )


def test_reference_scores_are_those_of_the_settings_or_else_of_the_file(make_settings, make_file):
    make_file(ref_min_score=-5.0, ref_max_score=7.5)
    assert open_dataset(make_settings())[1].reference_scores == (-5.0, 7.5)
    assert open_dataset(make_settings("evaluation.reference_scores=[1,2]"))[1].reference_scores == (1.0, 2.0)
    assert open_dataset(make_settings("evaluation.reference_scores=null"))[1].reference_scores is None


@pytest.mark.parametrize("scores", ["[2,1]", "[1,1]", "[1]", "[1,2,3]", "[a,b]", "[1,null]", "5", "ab", "[1,.nan]"])
def test_reference_scores_that_are_none_are_refused(make_settings, scores):
    with pytest.raises(RunError, match=r"^evaluation.reference_scores is .*, expected \[random, expert\]"):
        open_dataset(make_settings(f"evaluation.reference_scores={scores}"))


def test_the_readers_settings_reach_it(make_settings, make_file):
    make_file(bonus=np.full(200, 3.0))
    with pytest.raises(RunError, match="there is no setting reader.columns for .*swings.hdf5"):
        make_settings("reader.columns=1")
    transitions, task = open_dataset(make_settings("reader.names.rewards=bonus"))
    assert (transitions["next", "reward"] == 3).all()
    expected = {"mean": 60.0, "std": 0.0, "episodes": 10, "length": 20.0, "cut_off": 1.0, "cut_off_after": 20.0}
    assert task.behaviour == expected


def test_large_data_is_memory_mapped_below_root(make_settings, tmp_path):
    transitions, _ = open_dataset(make_settings(f"root={tmp_path / 'copies'}"))
    assert transitions.is_memmap()
    assert [path.suffix for path in (tmp_path / "copies").iterdir() if path.is_file()] == [".lock"]


# devices and checkpoints


def test_devices():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("abacus", "cuda:99", "meta", "hpu"):
        with pytest.raises(RunError, match=rf"^device={name} cannot be used: "):
            choose_device(name)


def test_the_best_checkpoint_is_found_or_else_the_last(make_trained, tmp_path, caplog):
    make_trained("checkpoint.monitor=loss_vae", "checkpoint.mode=max")
    caplog.clear()
    run = tmp_path / "run"
    last = run / "checkpoints" / "checkpoint-000000000020"
    best = run / "best" / "checkpoint-000000000010"
    assert find_checkpoint(run) == find_checkpoint(run, "best") == best
    assert find_checkpoint(run, "last") == last
    assert find_checkpoint(last) == last
    (best / "manifest.json").write_text("")
    assert find_checkpoint(run, "best") == last
    (message,) = caplog.messages
    assert message == f"the manifest.json of {best} cannot be read, so the last checkpoint is used"
    shutil.rmtree(run / "best")
    assert find_checkpoint(run, "best") == last


def test_episodes_of_other_lengths_are_not_compared(make_trained, run):
    task = read_metadata(find_checkpoint(run, "last"))[1]
    long = replace(task, env_id="Walk-v0", behaviour={"length": 700.5, "cut_off": 0.5, "cut_off_after": 1000.0})
    assert long.uneven_length(200) == (
        "the recorded episodes have 700.5 steps on average, but episodes of Walk-v0 have up to 200 steps, so their "
        "returns cannot be compared",
        1000,
    )
    assert long.uneven_length(1000) is long.uneven_length(1001) is long.uneven_length(None) is None
    for limit in (1002, 900):
        found, steps = long.uneven_length(limit)
        assert "were cut off after 1000 steps (median)" in found
        assert steps == 1000


def test_where_there_is_no_checkpoint_nothing_is_made(tmp_path):
    with pytest.raises(RunError, match="contains no checkpoint; choose the folder of a run"):
        find_checkpoint(tmp_path)
    with pytest.raises(RunError, match="there is no folder .*none; choose the folder of a run"):
        find_checkpoint(tmp_path / "none")
    assert list(tmp_path.iterdir()) == []
    for seed in "10":
        (tmp_path / seed / "checkpoints").mkdir(parents=True)
    with pytest.raises(RunError, match=r"or a checkpoint\. It contains the runs \['0', '1'\]\.$"):
        find_checkpoint(tmp_path)


def test_metadata_are_those_of_the_run(make_settings, run):
    settings, task, step = read_metadata(find_checkpoint(run, "last"))
    expected = make_settings("logger=[]", "evaluation.env=null")
    assert (settings, task, step) == (expected, open_dataset(expected)[1], 20)
    assert Checkpoint.manifest(find_checkpoint(run))["metadata"]["config"]["version"] == __version__


# the policy


SIZES = ["network.latent_dim=3", "network.num_critics=3", "network.phi=0.2", "policy.num_action_samples=7"]


@pytest.mark.parametrize("settings", [[], ["normalize=true"], SIZES, ["algorithm=cloning", "normalize=true"]])
@pytest.mark.parametrize("mode", [ExplorationType.DETERMINISTIC, ExplorationType.RANDOM])
def test_a_loaded_policy_acts_as_the_trained_one(make_trained, make_settings, tmp_path, file, settings, mode):
    loss, record = make_trained(*settings).loss_module, make_settings(*settings)
    file.unlink()  # neither is needed
    (tmp_path / "run" / "config.yaml").unlink(missing_ok=True)
    trained = ALGORITHMS[record.algorithm].policy(*loss.networks, **record.policy)
    loaded = load_policy(tmp_path / "run", "last")
    states = TensorDict({"observation": torch.randn(50, 3)}, [50])
    actions = []
    for policy in (trained, loaded):
        torch.manual_seed(0)
        with set_exploration_type(mode):
            actions.append(policy(states.clone())["action"])
    assert torch.equal(*actions)
    assert len(actions[0].unique()) == 50
    other = load_policy(tmp_path / "run" / "checkpoints" / "checkpoint-000000000010")
    torch.manual_seed(0)
    with set_exploration_type(mode):
        assert not torch.equal(other(states.clone())["action"], actions[0])


def test_the_loaded_policy_has_the_settings_of_its_run(make_trained, tmp_path):
    make_trained("evaluation.env=null", *SIZES)
    policy = load_policy(tmp_path / "run")
    assert (type(policy).__name__, policy.num_action_samples) == ("BCQPolicy", 7)


@pytest.mark.parametrize("algorithm", ["bcq", "cloning"])
def test_the_whole_loss_is_loaded(make_trained, tmp_path, algorithm):
    discount = ["loss.gamma=0.5", "loss.lmbda=0.25"] if algorithm == "bcq" else []
    expected = make_trained(f"algorithm={algorithm}", *discount).loss_module
    found = load(tmp_path / "run", "last").loss
    assert found.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(found.state_dict()[name], value) for name, value in expected.state_dict().items())
    if discount:
        assert (found.value_estimator.gamma, found.lmbda) == (expected.value_estimator.gamma, 0.25) == (0.5, 0.25)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda metadata: metadata.clear(), "is not a checkpoint of torchrl-bcq train, or it is damaged: "),
        (lambda metadata: metadata.pop("task"), "is not a checkpoint of torchrl-bcq train, or it is damaged: "),
        (lambda metadata: metadata["task"].pop("action_low"), "is not a checkpoint of torchrl-bcq train, or it is"),
        (lambda metadata: metadata.pop("config"), "is not a checkpoint of torchrl-bcq train, or it is damaged: "),
        (lambda metadata: metadata.update(config=[1]), "is empty or damaged; restore it"),
        (lambda metadata: metadata["config"].update(steps="many"), "cannot be read: Value 'many'"),
        (lambda metadata: metadata["config"].update(sed=1), "cannot be read: Key 'sed' not in "),
        (lambda metadata: metadata["config"].update(algorithm="bqc"), "cannot be read: algorithm is 'bqc', expected "),
        (lambda metadata: metadata["config"].update(_target_="os.system"), "_target_ is refused, because names of"),
        (lambda metadata: metadata["config"]["network"].update(_target_="os.system"), "network._target_ is refused, b"),
        (
            lambda metadata: metadata["config"]["reader"].update(_target_="os.system"),
            "reader._target_ is refused, because names of",
        ),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(run, change, message):
    damage(run, change)
    with pytest.raises(RunError) as error:
        load_policy(run)
    assert str(error.value).startswith(str(find_checkpoint(run)))
    assert message in str(error.value)


def test_nothing_in_a_manifest_is_looked_up_or_imported(run, monkeypatch):
    monkeypatch.setenv("SECRET", "swordfish")

    def change(metadata):
        metadata["config"]["sampler"] = "${oc.env:SECRET}"
        metadata["config"]["reader"] = {"names": "${oc.env:SECRET}"}
        metadata["config"]["optim"]["optimizer"] = "antigravity"
        metadata["task"]["env_id"] = "antigravity:Bomb-v0"

    damage(run, change)
    monkeypatch.setitem(__import__("sys").modules, "antigravity", None)  # importing it raises
    plain = OmegaConf.to_container(load(run).settings, resolve=True)
    assert plain["sampler"] == plain["reader"]["names"] == "${oc.env:SECRET}"


class Bomb:
    """Leaves a trace where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("protocol", ["torch", "pickle"])
def test_a_pickle_in_a_checkpoint_is_not_opened(run, tmp_path, protocol):
    for state in find_checkpoint(run).rglob("state.pt"):
        if protocol == "torch":
            torch.save({"state": Bomb(tmp_path / "trace")}, state)
        else:
            state.write_bytes(pickle.dumps(Bomb(tmp_path / "trace")))
    with pytest.raises(RunError, match=r"checkpoint-000000000020 cannot be loaded, so it may be damaged: "):
        load_policy(run)
    assert not (tmp_path / "trace").exists()
    pickle.loads(pickle.dumps(Bomb(tmp_path / "trace")))
    assert (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.write_bytes(state.read_bytes()[:-100]),
        lambda state: state.unlink(),
        lambda state: torch.save({}, state),
    ],
)
def test_a_damaged_checkpoint_is_refused(run, change):
    (state,) = find_checkpoint(run).glob("components/*-loss_module/state.pt")
    change(state)
    with pytest.raises(RunError, match=r"checkpoint-000000000020 cannot be loaded, so it may be damaged: "):
        load_policy(run)


def test_a_network_of_another_size_is_refused(run):
    damage(run, lambda metadata: metadata["config"]["network"].update(hidden=[9]))
    with pytest.raises(
        RunError,
        match=r"cannot be loaded, so .*18 entries whose shape differs .*: \[8\] in the state_dict, \[9\] in the loss",
    ):
        load_policy(run)


def test_which_checkpoint_is_loaded(make_trained, tmp_path):
    make_trained()
    run = tmp_path / "run"
    newest = find_checkpoint(run, "last")
    assert find_checkpoint(run / "checkpoints") == newest
    assert find_checkpoint(run / "best") == find_checkpoint(run, "best")
    for word in ("latest", "all", None):
        with pytest.raises(RunError, match=f"checkpoint is {word!r}, expected 'best' or 'last'"):
            load_policy(run, word)
    with pytest.raises(RunError, match="manifest.json is a file; choose the folder of a run"):
        find_checkpoint(newest / "manifest.json")
