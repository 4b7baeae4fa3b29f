"""A record is all that the command line needs of an algorithm."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Categorical, Unbounded

import torchrl_bcq
from torchrl_bcq import Algorithm, DiscreteBCQLoss, load_policy, make_discrete_bcq_modules
from torchrl_bcq.__main__ import main
from torchrl_bcq.errors import RunError
from torchrl_bcq.runs import algorithms as module
from torchrl_bcq.runs.algorithms import ALGORITHMS, algorithms_of, find_algorithm, soft_or_hard_update, soft_update
from torchrl_bcq.runs.folder import find_checkpoint, load, read_metadata
from torchrl_bcq.runs.settings import load_settings

from ..own_objective import OwnLoss, make_own_modules
from ..small_runs import TINY
from .folders import assert_same, equal, state

ROOT = Path(torchrl_bcq.__file__).parent
GENERAL = [TINY[0], *TINY[5:]]  # without those of BCQ


def test_each_algorithm_has_a_record():
    assert [*ALGORITHMS] == ["bcq", "cloning", "discrete_bcq", "discrete_cloning"]
    assert find_algorithm("cloning") is ALGORITHMS["cloning"]
    assert (algorithms_of(discrete=False)[0], algorithms_of(discrete=True)[0]) == ("bcq", "discrete_bcq")
    for record in ALGORITHMS.values():
        assert record.baseline is None or record.baseline in ALGORITHMS
    with pytest.raises(RunError) as error:
        find_algorithm("bqc")
    assert str(error.value) == (
        f"algorithm is 'bqc', expected one of {[*ALGORITHMS]}. If a script defines it, run this script in place of "
        "torchrl-bcq."
    )


def test_only_the_records_name_algorithms_and_networks():
    """Apart from the default of ``algorithm``, examples in help texts, and the name of the package."""
    general = ["runs/folder.py", "runs/job.py", "runs/assembly.py", "runs/build.py", "runs/settings.py"]
    general += ["runs/optimizers.py", "runs/signatures.py"]
    for file in [*(ROOT / name for name in general), *(ROOT / "cli").glob("*.py")]:
        text = re.sub(r"torchrl[-_]bcq|examples:\n.*?\n\n", "", file.read_text(), flags=re.DOTALL)
        text = re.sub(r'algorithm: str = "bcq"|get\("algorithm", "bcq"\)', "", text)
        assert re.findall(r"(?i)[^\n]*(?:bcq|cloning|\bvae|qvalue|\bactor)[^\n]*", text) == [], file


def test_targets_are_copied_after_exactly_this_many_steps():
    networks = make_discrete_bcq_modules(Unbounded((2,)), Categorical(3), hidden=[4])
    loss = DiscreteBCQLoss(*networks)
    updater = soft_or_hard_update(loss, copy_interval=3)
    copied = []
    for _ in range(7):
        with torch.no_grad():
            for parameter in loss.qvalue_network_params.parameters():
                parameter.add_(1.0)
        updater.step()
        online, target = loss.qvalue_network_params, loss.target_qvalue_network_params
        copied.append(all(torch.equal(value, target[key]) for key, value in online.items(True, True)))
    assert copied == [False, False, True, False, False, True, False]
    with pytest.raises(RunError, match=r"loss.copy_interval is 0, expected at least 1 step, or null for soft updates."):
        soft_or_hard_update(loss, copy_interval=0)


# an algorithm of its own


@pytest.fixture
def train(monkeypatch, file, tmp_path):
    """Train the algorithm of ``tests/own_objective.py`` by the command line."""
    record = Algorithm(
        title="own",
        loss=OwnLoss,
        make_modules=make_own_modules,
        policy=lambda policy, critic: policy,
        make_updater=soft_update,
        baseline="cloning",
        compared={"still": lambda policy, critic: lambda td: td.set("action", torch.zeros(*td.shape, 1))},
    )
    monkeypatch.setitem(module.ALGORITHMS, "own", record)

    def call(*words: str, out: str = "run", algorithm: str = "own") -> int:
        small = [word for word in GENERAL if algorithm != "own" or not word.startswith("network.")]
        return main(["train", f"algorithm={algorithm}", f"dataset={file}", f"out={tmp_path / out}", *small, *words])

    return call


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


THOROUGH = ["loss.new=0.5", "network.width=6", "loss.tau=0.1", "loss.gamma=0.9", "normalize=true", "held_out=0.3"]
THOROUGH += ["optim.policy.stop_after=15", "optim.critic.start_after=4", "optim.critic.lr=0.01"]


def test_its_settings_are_those_of_its_constructors(train, run, capsys):
    assert train("--cfg", "loss.new=0.5", "dataset=none.hdf5") == 0
    shown = capsys.readouterr().out
    assert "loss:\n  gamma: 0.99\n  new: 0.5\n  tau: 0.005\n" in shown
    assert "network:\n  width: 8\n" in shown
    assert re.findall(r"^  (\w+):\n    optimizer: null", shown, re.MULTILINE) == ["policy", "critic"]
    mentions = [file for file in ROOT.rglob("*") if file.suffix in (".py", ".yaml") and "loss.new" in file.read_text()]
    assert mentions == []
    for word, message in {
        "loss.new=high": "loss.new is 'high'",
        "loss.lmbda=1": "loss.lmbda is a setting of bcq, but this run has algorithm=own; leave loss.lmbda out",
        "network.hidden=[8]": "network.hidden is a setting of bcq and cloning, but this run has algorithm=own",
        "optim.qvalue.lr=1": "optim.qvalue.lr is a setting of bcq, but this run has algorithm=own",
    }.items():
        assert train(word) == 1
        assert capsys.readouterr().err.startswith(f"torchrl-bcq: {message}")
    assert train("loss.new=0.5", algorithm="cloning") == 1
    message = "torchrl-bcq: loss.new is a setting of own, but this run has algorithm=cloning; leave loss.new out"
    assert capsys.readouterr().err.startswith(message)
    assert not run.exists()


def test_it_trains_resumes_evaluates_and_loads(train, run, tmp_path, capsys):
    assert train(*THOROUGH) == 0
    assert train(*THOROUGH, "resume=true", "steps=30") == 0
    assert train(*THOROUGH, "steps=30", "baseline=cloning", out="undisturbed") == 0
    assert_same(tmp_path / "undisturbed", run)
    trained = load(run, "last")
    assert (trained.loss.new, trained.settings.network.width, trained.step) == (0.5, 6, 30)
    assert float(trained.loss.value_estimator.gamma) == pytest.approx(0.9)
    assert equal(dict(trained.loss.state_dict()), dict(state(run)))

    acted = load_policy(run, "last")(TensorDict({"observation": torch.randn(50, 3)}, [50]))["action"]
    assert acted.shape == (50, 1)
    assert len(acted.unique()) == 50
    logged = {path.stem for path in (run / "log" / "scalars").iterdir()}
    assert {"held_out_loss_policy", "held_out_td_error", "value_estimate", "loss_critic"} <= logged

    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "undisturbed"), "--episodes", "2"]) == 0
    found = json.loads((tmp_path / "undisturbed" / "evaluation.json").read_text())
    assert list(found)[-4:] == ["random", "still", "cloning", "own"]
    assert "value_estimate" in found["own"]
    assert "\nAt the initial states the critic estimates " in capsys.readouterr().out
    assert main(["plot", str(run)]) == 0
    settings = load_settings(tmp_path / "undisturbed" / "baseline")
    assert (settings.algorithm, settings.steps, settings.held_out) == ("cloning", 30, 0.3)


def test_its_setting_changes_what_is_learned(train, tmp_path):
    """``new`` scales the loss of the policy: with 0 nothing is learned."""
    learned = []
    for new, steps in ((0, 5), (0, 10), (1, 10)):
        assert train(f"loss.new={new}", f"steps={steps}", out=f"{new}-{steps}") == 0
        learned.append([*load(tmp_path / f"{new}-{steps}", "last").loss.policy_network.parameters()])
    assert all(map(torch.equal, learned[0], learned[1]))
    assert not any(map(torch.equal, learned[1], learned[2]))


def test_it_is_not_resumed_with_another_setting(train, run, capsys):
    assert train("loss.new=0.5", "steps=10") == 0
    assert train("loss.new=0.25", "resume=true") == 1
    assert "loss.new was 0.5 and is now 0.25" in capsys.readouterr().err


def test_it_may_be_a_baseline(train, run):
    assert train("baseline=own", "steps=10", algorithm="cloning") == 0
    assert read_metadata(find_checkpoint(run / "baseline"))[0].algorithm == "own"


def test_without_its_record_its_runs_are_refused(train, run, monkeypatch):
    assert train("steps=10") == 0
    monkeypatch.delitem(module.ALGORITHMS, "own")
    with pytest.raises(RunError, match=r"algorithm is 'own', expected one of \['bcq', 'cloning', "):
        load_policy(run)


def test_a_record_needs_no_more_than_loss_modules_and_policy():
    required = [f.name for f in dataclasses.fields(Algorithm) if f.default is f.default_factory is dataclasses.MISSING]
    assert required == ["title", "loss", "make_modules", "policy"]
