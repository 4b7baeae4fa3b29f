"""Several agents in one run: each leaves what it leaves alone, and goes on as it does alone."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from torchrl_bcq.__main__ import main
from torchrl_bcq.cli import job
from torchrl_bcq.cli.config import flat, load_config
from torchrl_bcq.cli.errors import RunError
from torchrl_bcq.cli.train import train

from .conftest import contents, state

SEEDS = (3, 5)


def numbers(folder) -> dict[str, np.ndarray]:
    """What was logged, by name: rows of step and value."""
    return {file.stem: np.loadtxt(file, delimiter=",", ndmin=2) for file in (folder / "log/scalars").iterdir()}


def test_each_agent_leaves_what_it_leaves_alone(make_config, run):
    results = train(make_config("seeds=[3,5]"))
    for seed in SEEDS:
        alone, own = run.with_name(f"alone-{seed}"), run / str(seed)
        expected = train(make_config(f"seed={seed}", f"out={alone}"))
        assert results[str(seed)].keys() == expected.keys()
        assert json.loads((own / "results.json").read_text()) == results[str(seed)]
        assert sorted(contents(own)) == sorted(contents(alone))
        settings, other = flat(load_config(own)), flat(load_config(alone))
        assert {name for name in settings if settings[name] != other[name]} <= {"out", "progress_bar"}
        logged, twin = numbers(own), numbers(alone)
        for name in twin:
            np.testing.assert_allclose(logged[name], twin[name], rtol=1e-3, atol=1e-5, err_msg=name)
        torch.testing.assert_close(state(own), state(alone), rtol=1e-4, atol=1e-5)
    assert results["stopped"] is None
    assert not (run / "config.yaml").exists()


def test_a_run_of_several_goes_on_and_each_of_them_alone(make_config, run):
    train(make_config("seeds=[3,5]", "steps=10"))
    with pytest.raises(RunError, match="holds a run of 10 steps; go on with it by resume=true"):
        train(make_config("seeds=[3,5]"))
    results = train(make_config("seeds=[3,5]", "resume=true"))
    assert [results[str(seed)]["steps"] for seed in SEEDS] == [20, 20]
    again = train(make_config("seeds=[3,5]", "resume=true"))
    assert again == results
    alone = train(make_config("seed=5", f"out={run / '5'}", "resume=true", "steps=30"))
    assert alone["steps"] == 30
    results = train(make_config("seeds=[3,5]", "resume=true", "steps=30"))
    assert [results[str(seed)]["steps"] for seed in SEEDS] == [30, 30]


def test_agents_that_were_killed_at_different_steps_go_on_from_their_last_common_one(make_config, run):
    train(make_config("seeds=[3,5]"))
    undisturbed = train(make_config("seeds=[3,5]", "steps=30", f"out={run.with_name('undisturbed')}"))
    shutil.rmtree(run / "3/checkpoints/checkpoint-000000000020")
    results = train(make_config("seeds=[3,5]", "resume=true", "steps=30"))
    for seed in map(str, SEEDS):
        assert results[seed]["final"]["mean"] == pytest.approx(undisturbed[seed]["final"]["mean"], rel=1e-3)
    shutil.rmtree(run / "3/checkpoints/checkpoint-000000000020")
    shutil.rmtree(run / "5/checkpoints/checkpoint-000000000030")
    with pytest.raises(RunError, match="have no checkpoint of the same step"):
        train(make_config("seeds=[3,5]", "resume=true", "steps=40"))


def test_refusals(make_config, run, monkeypatch):
    for seeds in ("[]", "[1,1]"):
        with pytest.raises(RunError, match="expected different ones, at least one"):
            train(make_config(f"seeds={seeds}"))
    monkeypatch.setattr(job.processes, "several", lambda: True)
    with pytest.raises(RunError, match="leave one of them"):
        train(make_config("seeds=[3,5]"))


def test_an_agent_that_fails_leaves_the_others_results(make_config, run, monkeypatch):
    build = job.build

    def breaking(config, transitions, task):
        trainer = build(config, transitions, task)
        if config.seed == 3:
            with torch.no_grad():
                next(trainer.loss_module.parameters()).fill_(torch.nan)
        return trainer

    monkeypatch.setattr(job, "build", breaking)
    with pytest.raises(RunError, match=r"of 2 agents, \[0\] failed; the first one: vae_loss is nan"):
        train(make_config("seeds=[3,5]"))
    assert not (run / "3/results.json").exists()
    assert json.loads((run / "5/results.json").read_text())["steps"] == 20


def test_the_command_line_takes_seeds_and_plots_them(words, run, capsys):
    assert main(["train", *words("seeds=[3,5]")]) == 0
    assert main(["plot", str(run)]) == 0
    assert (run / "learning_curve.png").stat().st_size > 10_000
    log = (run / "train.log").read_text()
    for seed in SEEDS:
        assert f"{run / str(seed)}: 20 steps made" in log
        assert log.count(f"seed {seed}: step 20: ") == log.count("step 20: ") / len(SEEDS) > 0
