"""A run goes on where it was, bit by bit, or it is said why it cannot."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from filelock import FileLock

from torchrl_bcq.__main__ import main
from torchrl_bcq.cli.config import load_config
from torchrl_bcq.cli.errors import RunError
from torchrl_bcq.cli.run import find_checkpoint, read_metadata
from torchrl_bcq.cli.train import train
from torchrl_bcq.trainers import BCQTrainer

from .conftest import assert_same, contents, scalars, state

THOROUGH = [  # all that a checkpoint must hold
    "normalize=true",
    "held_out=0.3",
    "sampler=without_replacement",
    "optim.scheduler=CosineAnnealingLR",
    "optim.scheduler_kwargs.T_max=30",
    "optim.vae_warmup_steps=4",
    "optim.freeze_vae_after=15",
    "optim.actor_update_interval=2",
    "early_stopping={monitor: loss_vae, patience: 1000}",
]


def test_a_second_start_is_refused_and_changes_nothing(words, run, capsys):
    assert main(["train", *words()]) == 0
    before = contents(run)
    capsys.readouterr()
    for changed in ([], ["seed=1"], ["network.hidden=[9]"], ["steps=40"]):
        assert main(["train", *words(*changed)]) == 1
        assert contents(run) == before
        assert (
            f"{run} holds a run of 20 steps; go on with it by resume=true, or begin anew in another folder with "
            in (capsys.readouterr().err)
        )


def test_a_run_goes_on_bit_by_bit(make_config, tmp_path):
    undisturbed, broken = tmp_path / "undisturbed", tmp_path / "broken"
    train(make_config(*THOROUGH, "steps=30", f"out={undisturbed}"))
    torch.manual_seed(1)
    for steps in (10, 20, 30):
        results = train(make_config(*THOROUGH, f"steps={steps}", f"out={broken}", "resume=true"))
    assert_same(undisturbed, broken)
    assert results == json.loads((undisturbed / "results.json").read_text())
    assert load_config(broken).steps == 30


def test_a_run_that_was_killed_goes_on_bit_by_bit(make_config, tmp_path, monkeypatch):
    """It had logged and evaluated beyond its last checkpoint, and kept a best one."""
    undisturbed, broken = tmp_path / "undisturbed", tmp_path / "broken"
    thorough = [*THOROUGH, "evaluation.interval=5", "steps=30"]
    train(make_config(*thorough, f"out={undisturbed}"))
    with monkeypatch.context() as patched:
        patched.setattr(BCQTrainer, "_log_losses", killed_after(25, BCQTrainer._log_losses))
        with pytest.raises(Killed):
            train(make_config(*thorough, f"out={broken}"))
    assert read_metadata(find_checkpoint(broken, "last"))[2] == 20
    log = broken / "log/scalars/td_error.csv"
    assert log.read_text().splitlines()[-1].startswith("25,")
    log.write_text(log.read_text() + "30,0.")
    train(make_config(*thorough, f"out={broken}", "resume=true"))
    assert_same(undisturbed, broken)
    best = [[path.name for path in (run / "best").iterdir()] for run in (undisturbed, broken)]
    assert best[0] == best[1]


class Killed(BaseException):
    """As if by SIGKILL: nothing is tidied up."""


def killed_after(step, method):
    def call(trainer, *arguments):
        if trainer._optim_count > step:
            raise Killed
        return method(trainer, *arguments)

    return call


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(make_config, tmp_path, monkeypatch):
    settings = ["checkpoint.interval=1000", "checkpoint.monitor=null"]
    undisturbed, broken = tmp_path / "undisturbed", tmp_path / "broken"
    train(make_config(*settings, f"out={undisturbed}"))
    with monkeypatch.context() as patched:
        patched.setattr(BCQTrainer, "_log_losses", killed_after(10, BCQTrainer._log_losses))
        with pytest.raises(Killed):
            train(make_config(*settings, f"out={broken}", "seed=1"))
    train(make_config(*settings, f"out={broken}"))
    assert_same(undisturbed, broken)


def test_a_run_that_kept_only_a_best_checkpoint_goes_on_from_that(make_config, tmp_path, monkeypatch):
    settings = ["checkpoint.interval=1000", "checkpoint.monitor=loss_vae", "checkpoint.mode=max", "steps=30"]
    undisturbed, broken = tmp_path / "undisturbed", tmp_path / "broken"
    train(make_config(*settings, f"out={undisturbed}"))
    with monkeypatch.context() as patched:
        patched.setattr(BCQTrainer, "_log_losses", killed_after(20, BCQTrainer._log_losses))
        with pytest.raises(Killed):
            train(make_config(*settings, f"out={broken}"))
    assert not (broken / "checkpoints").exists()
    with pytest.raises(RunError, match=r"holds a run of \d+ steps; go on with it by resume=true"):
        train(make_config(*settings, f"out={broken}", "seed=1"))
    train(make_config(*settings, f"out={broken}", "resume=true"))
    assert_same(undisturbed, broken)


def test_resume_names_a_run_and_takes_its_settings(words, run, tmp_path, monkeypatch, capsys):
    own = ["seed=7", "optim.kwargs.eps=1e-3", "held_out=0.3", f"out={tmp_path / 'undisturbed'}", "steps=40"]
    assert main(["train", *words(*own)]) == 0
    assert main(["train", *words(*own[:3], "steps=20")]) == 0
    monkeypatch.chdir(tmp_path)
    assert main(["train", "resume=run", "steps=40", "evaluation.max_rows=1500"]) == 0
    assert_same(tmp_path / "undisturbed", run)
    config = load_config(run)
    assert (config.seed, config.steps, config.out, config.resume) == (7, 40, "run", True)
    assert (config.optim.kwargs, config.evaluation.max_rows) == ({"eps": 1e-3}, 1500)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("network.hidden=[9]", "network.hidden is [8] in it and [9] now"),
        ("normalize=true", "normalize is False in it and True now"),
        ("optim.optimizer=SGD", "optim.optimizer is 'Adam' in it and 'SGD' now"),
        ("batch_size=9", "batch_size is 8 in it and 9 now"),
    ],
)
def test_a_run_does_not_go_on_as_another(make_config, run, setting, message):
    train(make_config("steps=10"))
    before = contents(run)
    with pytest.raises(RunError) as error:
        train(make_config("resume=true", setting))
    assert str(error.value).startswith(f"{run} cannot go on with other settings: {message}. ")
    assert contents(run) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "the dataset has changed since the checkpoint: as many transitions, other values"),
        ({"timeouts": np.arange(200) % 20 == 18}, "the dataset has changed since the checkpoint"),
    ],
)
def test_a_run_does_not_go_on_with_another_dataset(make_config, make_file, run, change, message):
    train(make_config("steps=10"))
    make_file(**change)
    before = contents(run)
    with pytest.raises(RunError) as error:
        train(make_config("resume=true"))
    assert message in str(error.value)
    assert contents(run) == before


def test_a_finished_run_gives_its_results(make_config, run, file):
    results = train(make_config())
    before = contents(run)
    file.unlink()  # nothing is read or made
    assert train(make_config("resume=true")) == results
    assert train(make_config("resume=true", "steps=10")) == results
    assert contents(run) == before


def test_a_run_that_was_killed_at_its_very_end_writes_its_results(make_config, run):
    results = train(make_config())
    before = contents(run, "config.yaml", "components")  # resume, and what Hydra's clock writes
    (run / "results.json").unlink()
    assert train(make_config("resume=true")) == results
    assert contents(run, "config.yaml", "components").keys() == before.keys()
    assert scalars(run) == {name.rpartition("/")[2]: value for name, value in before.items() if name.endswith(".csv")}


def test_two_runs_do_not_share_a_folder(make_config, words, run, capsys):
    run.mkdir()
    with FileLock(run / ".lock"):
        with pytest.raises(RunError, match=rf"^another run is at work in {run}; choose another folder with out=FOLDER"):
            train(make_config())
        assert main(["train", *words("resume=true")]) == 1
    assert not (run / "checkpoints").exists()
    train(make_config())
    assert (run / "checkpoints").exists()


def start(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "torchrl_bcq", "train", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_what_goes_on_bit_by_bit(words, make_config, run, tmp_path, number, code):
    process = start(*words("evaluation.env=null", "steps=1000000", "checkpoint.interval=100000", *THOROUGH))
    loss = run / "log" / "scalars" / "loss_vae.csv"
    deadline = time.monotonic() + 60
    while not loss.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code, output
    name = signal.Signals(number).name
    assert f"{name}: saving after this step; once more to leave at once" in output
    found = re.search(rf"{name} after (\d+) steps; go on with: torchrl-bcq train resume={run}\n", output)
    steps = int(found[1])
    assert read_metadata(find_checkpoint(run, "last"))[2] == steps
    assert not (run / "results.json").exists()
    assert "Traceback" not in output

    more = ["evaluation.env=null", f"steps={steps + 7}", "checkpoint.interval=100000", *THOROUGH]
    train(make_config(*more, "resume=true"))
    train(make_config(*more, f"out={tmp_path / 'undisturbed'}"))
    for name, value in state(tmp_path / "undisturbed").items():
        assert torch.equal(state(run)[name], value), name
