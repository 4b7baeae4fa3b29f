"""Runs with other behaviour models, without a perturbation actor, and with the options for steadier policies."""

from __future__ import annotations

import json
import re

import pytest
import torch

from torchrl_bcq import ExportedPolicy, load_policy
from torchrl_bcq.__main__ import main
from torchrl_bcq.runs.folder import load

from ..small_runs import TINY
from .folders import state

CHANGES = [
    ["network.behavior=mixture", "network.num_components=3", "network.noise_clip=0.5"],
    ["network.behavior=flow", "network.flow_steps=3", "network.phi=null"],
    ["network.phi=null", "policy.num_action_samples=30"],
    ["average_decay=0.8"],
    ["network.layer_norm=true", "network.num_critics=3", "policy.choose_by=min", "normalize=true"],
]


@pytest.mark.parametrize("changes", CHANGES, ids=lambda words: words[0])
def test_train_resume_evaluate_and_export(changes, file, tmp_path, capsys):
    """An interrupted and resumed run ends with the weights of an uninterrupted one."""
    words = [f"dataset={file}", *TINY, *changes, "seed=3"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(["train", *words, f"out={whole}"]) == 0
    assert main(["train", *words, f"out={parts}", "steps=10"]) == 0
    assert main(["train", f"resume={parts}", "steps=20"]) == 0
    for checkpoint in ("best", "last"):
        first, second = (load_policy(run, checkpoint).state_dict() for run in (whole, parts))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
    capsys.readouterr()
    assert main(["evaluate", str(whole), "--episodes", "2"]) == 0
    assert re.search(r"^BCQ +-?\d", capsys.readouterr().out, re.MULTILINE)
    out = tmp_path / "policy.onnx"
    assert main(["export", str(whole), str(out)]) == 0
    assert ExportedPolicy(out).act([0.1, 0.2, 0.3]).shape == (1,)


def test_the_policy_acts_with_the_average(file, tmp_path):
    """The average over steps is not the last weights; with a decay of 0, it is. Training does not use the average."""
    found, trained, logged = {}, {}, {}
    for decay in ("null", "0.0", "0.8"):
        run = tmp_path / decay
        assert main(["train", f"dataset={file}", *TINY, f"average_decay={decay}", f"out={run}"]) == 0
        found[decay] = load_policy(run, "last").state_dict()
        trained[decay] = state(run)
        logged[decay] = (run / "log" / "scalars" / "return.csv").read_text().splitlines()
    assert logged["null"] == logged["0.0"]
    assert logged["null"][0] == logged["0.8"][0]  # before the first step
    assert logged["null"][-1] != logged["0.8"][-1]
    assert all(torch.equal(found["null"][name], found["0.0"][name]) for name in found["null"])
    assert all(torch.equal(trained["null"][name], trained["0.8"][name]) for name in trained["null"])
    changed = [name for name in found["null"] if not torch.equal(found["null"][name], found["0.8"][name])]
    assert {"vae", "actor", "critics"} <= {name.partition(".")[0] for name in changed}


def test_held_out_losses_are_those_of_the_average(file, tmp_path):
    """The last logged loss is that of the loaded networks, which have the averaged weights."""
    run = tmp_path / "run"
    words = [f"dataset={file}", "algorithm=cloning", TINY[0], *TINY[5:], "held_out=0.3", "optim.lr=0.1"]
    assert main(["train", *words, "average_decay=0.9", f"out={run}", "evaluation.env=null"]) == 0
    logged = (run / "log" / "scalars" / "held_out_loss_actor.csv").read_text().splitlines()[-1]
    assert main(["evaluate", str(run), "--checkpoint", "last"]) == 0
    found = json.loads((run / "evaluation.json").read_text())["cloning"]["held_out_loss_actor"]
    assert float(logged.partition(",")[2]) == pytest.approx(found, rel=1e-5)
    averaged, trained = load(run, "last").loss.state_dict(), state(run)
    assert not any(torch.equal(averaged[name], trained[name]) for name in trained if "weight" in name)


def test_a_run_starts_with_the_average_of_an_earlier_one(file, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    words = [f"dataset={file}", *TINY, "average_decay=0.8"]
    assert main(["train", *words, f"out={first}", "checkpoint.monitor=null"]) == 0
    assert main(["train", *words, f"out={second}", f"init_from={first}"]) == 0
    last, start = ((run / "log" / "scalars" / "return.csv").read_text().splitlines() for run in (first, second))
    assert last[-1].partition(",")[2] == start[0].partition(",")[2]


def test_unknown_names_are_refused(file, tmp_path, capsys):
    for word, message in (
        ("network.flow_steps=0 network.behavior=flow", "flow_steps is 0, expected at least 1"),
        ("network.flow_steps=5", "flow_steps has an effect only with network.behavior=flow, but this run has network."),
        ("network.behavior=flow network.kl_weight=1", "kl_weight has an effect only with network.behavior=vae, but"),
        ("network.behavior=mixture network.noise_clip=-1", "noise_clip is -1.0, expected 0 or more"),
        ("network.noise_clip=0.5", "noise_clip has an effect only with network.behavior=mixture, but this run has"),
        ("network.latent_clip=-1", "latent_clip is -1.0, expected a positive number"),
        ("network.behavior=gan", "behavior is 'gan', expected vae, mixture or flow"),
        ("average_decay=1", "average_decay is 1.0, expected at least 0 and below 1, or null for no average"),
        ("policy.choose_by=max", "choose_by is 'max', expected one of ['first', 'min', 'mean']"),
    ):
        assert main(["train", f"dataset={file}", *TINY, *word.split(), f"out={tmp_path / 'run'}"]) == 1
        assert message in capsys.readouterr().err
