"""A run that starts from the networks of another run: ``init_from``."""

from __future__ import annotations

import logging
import shutil

import numpy as np
import pytest
import torch

from torchrl_bcq.errors import RunError
from torchrl_bcq.runs.assembly import assemble
from torchrl_bcq.runs.dataset import open_dataset
from torchrl_bcq.runs.folder import find_checkpoint, load
from torchrl_bcq.runs.initial import load_networks
from torchrl_bcq.runs.job import train
from torchrl_bcq.runs.settings import compose, load_settings

from .folders import state


@pytest.fixture
def old(make_settings, tmp_path):
    train(make_settings(f"out={tmp_path / 'old'}", "steps=10", "normalize=true"))
    return tmp_path / "old"


def start(settings):
    """The trainer of a run before its first step."""
    transitions, task = open_dataset(settings)
    trainer = assemble(settings, transitions, task)
    load_networks(trainer.loss_module, settings, task)
    return trainer


def networks(state):
    return {name: value for name, value in state.items() if "_params." in name}


@pytest.mark.parametrize("of", ["run", "checkpoint"])
def test_networks_and_targets_are_those_of_the_run_and_nothing_else_is(make_settings, make_file, old, of, tmp_path):
    new = make_file("new.hdf5", seed=1)
    path = old if of == "run" else find_checkpoint(old, "last")
    changed = ["normalize=true", "optim.lr=1e-4", "loss.gamma=0.5", "policy.num_action_samples=3", "network.phi=0.1"]
    trainer = start(make_settings(f"dataset={new}", f"init_from={path}", *changed))
    there, here = networks(state(old)), networks(trainer.loss_module.state_dict())
    assert there.keys() == here.keys()
    assert any(name.startswith("target_qvalue") for name in here)
    assert all(torch.equal(there[name], here[name]) for name in here)
    assert [name for name in here if name.endswith("loc")]  # the scales belong to the networks
    assert trainer.loss_module.value_estimator.gamma == 0.5
    assert trainer.collected_frames == 0
    for optimizer in trainer.optimization_stepper.optimizers.values():
        assert not optimizer.state
        assert optimizer.param_groups[0]["lr"] == 1e-4


def test_a_run_keeps_the_path_and_resumes_from_its_own_checkpoint(make_settings, old, tmp_path):
    own = [f"init_from={old}", "normalize=true", "seed=5"]
    train(make_settings(*own, f"out={tmp_path / 'whole'}", "steps=20"))
    train(make_settings(*own, f"out={tmp_path / 'parts'}", "steps=10"))
    assert load_settings(tmp_path / "parts").init_from == str(old)
    assert load(tmp_path / "parts", "last").step == 10
    old.rename(tmp_path / "away")  # a resumed run does not need it
    (settings,) = compose([f"resume={tmp_path / 'parts'}", "steps=20"])
    train(settings)
    whole, parts = (state(tmp_path / name) for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_the_bounds_are_those_of_the_run_if_the_data_have_none(make_settings, make_file, tmp_path):
    one = make_file("one.hdf5", None)
    best = ["held_out=0.2", "checkpoint.monitor=held_out_td_error", "checkpoint.mode=min"]
    train(make_settings(f"dataset={one}", f"out={tmp_path / 'old'}", "steps=10", *best))
    inside = make_file("inside.hdf5", None, actions=np.random.default_rng(1).uniform(-1, 1, (200, 1)))
    settings = make_settings(f"dataset={inside}", f"init_from={tmp_path / 'old'}")
    assert open_dataset(settings)[1].action_high == load(tmp_path / "old").task.action_high
    start(settings)
    shutil.rmtree(tmp_path / "old" / "checkpoints")  # the best checkpoint has the bounds too
    assert open_dataset(settings)[1].action_high == load(tmp_path / "old").task.action_high
    beyond = make_file("beyond.hdf5", None, actions=np.random.default_rng(1).uniform(-3, 3, (200, 1)))
    with pytest.raises(ValueError, match="outside the action bounds"):
        start(make_settings(f"dataset={beyond}", f"init_from={tmp_path / 'old'}"))
    high = load(tmp_path / "old").task.action_high
    own = make_settings(f"dataset={inside}", f"init_from={tmp_path / 'old'}", f"out={tmp_path / 'own'}", "steps=10")
    train(own)
    (tmp_path / "old").rename(tmp_path / "away")  # a resumed run has its own bounds
    assert open_dataset(own)[1].action_high == high


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["network.hidden=[8,8]"], r"of another structure, such as .*; set normalize=true network\.hidden=\[8\]\.$"),
        (
            ["normalize=true", "network.num_critics=3"],
            r"such as qvalue.*\.critics\.2\..*; set network\.num_critics=2\.$",
        ),
        (
            ["normalize=true", "network.num_critics=1"],
            r"such as qvalue.*\.critics\.1\..*; set network\.num_critics=2\.$",
        ),
        (["algorithm=cloning"], r"is of algorithm bcq, not cloning; set another init_from or algorithm\.$"),
    ],
)
def test_networks_that_do_not_fit_are_refused_with_the_settings_that_fit(make_settings, old, words, message):
    with pytest.raises(RunError, match=message):
        start(make_settings(f"init_from={old}", *words))


def test_data_that_do_not_fit_are_refused(make_settings, make_file, old, tmp_path):
    values = np.random.default_rng(0).uniform(-1, 1, (200, 4))
    other = make_file("other.hdf5", None, observations=values, next_observations=values)
    with pytest.raises(RunError, match=r"\[3\]\} and 1 action dimensions, but the"):
        start(make_settings(f"dataset={other}", f"init_from={old}", "normalize=true"))
    narrow = make_file("narrow.hdf5", None, actions=np.random.default_rng(0).uniform(-1, 1, (200, 1)))
    train(make_settings(f"dataset={narrow}", f"out={tmp_path / 'narrow'}", "steps=10"))
    with pytest.raises(RunError, match=r"but this run has actions from \[-2\.0\] to \[2\.0\]; set 'action_low="):
        start(make_settings(f"init_from={tmp_path / 'narrow'}"))
    discrete = make_file("discrete.hdf5", None, actions=np.random.default_rng(0).integers(0, 2, (200, 1)))
    with pytest.raises(RunError, match="the run of init_from has continuous actions, but algorithm=discrete_bcq needs"):
        start(make_settings(f"dataset={discrete}", f"init_from={old}", "algorithm=discrete_bcq"))
    with pytest.raises(RunError, match="there is no folder .*none; choose the folder"):
        start(make_settings(f"init_from={tmp_path / 'none'}"))


def test_settings_that_differ_are_logged(make_settings, make_file, tmp_path, caplog):
    first = tmp_path / "first"
    train(make_settings(f"out={first}", "held_out=0.3", "loss.gamma=0.5"))

    def messages(*overrides):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            start(make_settings(f"init_from={first}", *overrides))
        return caplog.messages

    same = messages("held_out=0.3", "loss.gamma=0.5", "steps=30", "evaluation.episodes=3")
    assert not [text for text in same if "only the networks are copied" in text or "held-out" in text]
    assert "only the networks are copied, not the settings: loss.gamma was 0.5 and is now 0.9" in messages(
        "held_out=0.3"
    )
    leak = "held-out metrics may look too good; to hold out the same episodes, set held_out=0.3 seed=0."
    for changed in (["held_out=0.2"], ["held_out=0.3", "seed=1"]):
        assert [text for text in messages(*changed) if text.endswith(leak)]
    train(make_settings(f"out={tmp_path / 'all'}"))
    (none,) = [text for text in messages("held_out=0.2", f"init_from={tmp_path / 'all'}") if "too good" in text]
    assert none.endswith("too good; the run of init_from held out none.")
    other = f"dataset={make_file('other.hdf5', seed=1)}"
    for changed in (["held_out=0"], ["held_out=0.2", other]):
        assert not [text for text in messages(*changed) if text.endswith(leak)]


def test_a_run_is_not_resumed_from_other_networks(old, tmp_path):
    with pytest.raises(RunError, match=f"init_from starts a new run, but resume={old} continues a run; set only one"):
        compose([f"resume={old}", f"init_from={tmp_path}"])


def test_the_baseline_has_the_bounds_of_the_run(make_settings, make_file, tmp_path):
    """They are those of the old run, so the two policies can be compared. -0.1 is no float32."""
    actions = np.random.default_rng(1).uniform(-0.1, 0.1, (200, 1))
    actions[0] = -0.1
    dataset = f"dataset={make_file('narrow.hdf5', None, actions=actions)}"
    train(make_settings(dataset, f"out={tmp_path / 'old'}", "steps=10", "action_low=-0.1", "action_high=0.2"))
    words = [dataset, f"out={tmp_path / 'new'}", f"init_from={tmp_path / 'old'}", "baseline=cloning"]
    train(make_settings(*words))
    for run in (tmp_path / "new", tmp_path / "new" / "baseline"):
        assert (load(run).task.action_low, load(run).task.action_high) == ([-0.1], [0.2])
    train(make_settings(*words, "steps=30", "resume=true"))
    assert load(tmp_path / "new" / "baseline", "last").step == 30
