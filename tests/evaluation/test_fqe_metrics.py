"""The estimate of fitted Q evaluation as a metric of a run, which selects the best checkpoint."""

from __future__ import annotations

import csv

import pytest
import torch
from torchrl.checkpoint import Checkpoint

from torchrl_bcq import FQEMetrics, OffPolicyEvaluation, load_policy
from torchrl_bcq.__main__ import main
from torchrl_bcq.runs.dataset import open_dataset
from torchrl_bcq.runs.folder import BEST, load
from torchrl_bcq.trainers.best import best_checkpoint

from ..runs.folders import state
from ..small_runs import TINY

FQE = ["evaluation.env=null", "checkpoint.monitor=fqe", "evaluation.fqe_steps=3"]


def scalars(run, name):
    with open(run / "log" / "scalars" / f"{name}.csv") as file:
        return {int(step): float(value) for step, value in csv.reader(file)}


@pytest.fixture
def dataset(make_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return f"dataset={make_file()}"


def test_the_best_checkpoint_has_the_best_estimate(dataset, tmp_path):
    assert main(["train", dataset, *TINY, *FQE, "held_out=0.3", "out=run"]) == 0
    values = scalars(tmp_path / "run", "fqe")
    assert list(values) == [0, 10, 20]
    later = {step: value for step, value in values.items() if step}
    best = best_checkpoint(tmp_path / "run" / BEST)
    assert Checkpoint.manifest(best)["metadata"]["optim_steps"] == max(later, key=later.get)
    trained = load(tmp_path / "run", "last")
    transitions, task = open_dataset(trained.settings)
    settings = {"gamma": 0.9, "held_out": 0.3, "steps": 3, "seed": trained.settings.seed}
    found = OffPolicyEvaluation(transitions, task.action_spec, **settings).estimate(
        load_policy("run", checkpoint="last")
    )
    assert values[20] == pytest.approx(found.value, rel=1e-5)
    assert scalars(tmp_path / "run", "fqe_difference")[20] == pytest.approx(found.difference, rel=1e-4)


def test_the_estimate_changes_nothing_in_training(dataset, tmp_path):
    for name, words in {"with": FQE, "without": FQE[:1]}.items():
        assert main(["train", dataset, *TINY, *words, f"out={name}"]) == 0
    one, other = (state(tmp_path / name) for name in ("with", "without"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_it_is_measured_only_if_a_setting_names_it(dataset, tmp_path, capsys):
    assert main(["train", dataset, *TINY, FQE[0], "out=none"]) == 0
    assert not (tmp_path / "none" / "log" / "scalars" / "fqe.csv").exists()
    assert main(["train", dataset, *TINY, *FQE[::2], "early_stopping.monitor=fqe_difference", "out=stop"]) == 0
    assert len(scalars(tmp_path / "stop", "fqe_difference")) == 3
    assert main(["train", dataset, *TINY, *FQE, "evaluation.fqe_steps=0", "out=bad"]) == 1
    assert "evaluation.fqe_steps is 0, expected at least 1" in capsys.readouterr().err


def test_the_interval_must_fit():
    with pytest.raises(ValueError, match="interval is 0"):
        FQEMetrics(None, None, None, interval=0)


def test_other_estimators_are_refused():
    with pytest.raises(ValueError, match="FQEMetrics estimates by fitted Q evaluation; leave out the argument"):
        FQEMetrics(None, None, None, interval=10, estimator="doubly_robust")
