"""Runs: what they leave, that they go on where they were, and how they end."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from torchrl.record.loggers.csv import CSVExperiment

from torchrl_bcq.__main__ import main
from torchrl_bcq.cli import train as module
from torchrl_bcq.cli.config import YAML, load_config
from torchrl_bcq.cli.errors import RunError
from torchrl_bcq.cli.run import find_checkpoint, open_dataset, read_metadata
from torchrl_bcq.cli.train import train
from torchrl_bcq.data import make_replay_buffer

from .conftest import assert_same, contents, equal, state

# what a run leaves


def test_a_run_leaves_what_help_promises(words, run, capsys):
    assert main(["train", *words()]) == 0
    promised = module.HELP.partition("The folder of a run holds\n")[2].partition(";")[0]
    found = set()
    for name in contents(run):
        assert re.fullmatch(r"(checkpoints|best)/checkpoint-\d{12}/(manifest\.json|components/.*/state\.pt)"
                            r"|log/scalars/\w+\.csv|config\.yaml|results\.json", name), name  # fmt: skip
        found.add(name.split("/")[0] + ("/" if "/" in name else ""))
    found.add("train.log" * (run / "train.log").is_file())
    found = {"log/scalars/*.csv" if name == "log/" else name for name in found}
    assert found == set(promised.replace(" and", ",").split(", ")) == {
        "config.yaml", "train.log", "log/scalars/*.csv", "checkpoints/", "best/", "results.json",
    }  # fmt: skip
    assert {path.name for path in run.rglob(".*")} == {".lock"}
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "checkpoint-000000000010", "checkpoint-000000000020",
    ]  # fmt: skip
    log = (run / "train.log").read_text()
    assert f"{run}: {run.parent / 'swings.hdf5'}, evaluated in Swing-v0, steps 0 to 20 on cpu" in log
    assert f"torchrl-bcq evaluate {run}; torchrl-bcq plot {run}" in log
    assert load_config(run).steps == 20


def test_results_are_the_logs(make_config, run):
    results = train(make_config())
    assert json.loads((run / "results.json").read_text()) == results
    returns = dict(line.split(",") for line in (run / "log/scalars/return.csv").read_text().splitlines())
    returns = {int(step): float(value) for step, value in returns.items()}
    deviations = (run / "log/scalars/return_std.csv").read_text().splitlines()
    assert list(returns) == [0, 10, 20]
    assert results["steps"] == 20
    assert results["final"] == {"mean": returns[20], "std": float(deviations[-1].split(",")[1]), "step": 20}
    best = max((10, 20), key=returns.get)
    assert results["best"] == {"mean": returns[best], "step": best, "metric": "return"}
    assert results["behaviour"] == read_metadata(find_checkpoint(run))[1].behaviour


def test_lines_are_of_every_interval_and_of_the_last_step(make_config, run):
    train(make_config("steps=23", "checkpoint.interval=20"))
    steps = {
        file.stem: [int(line.split(",")[0]) for line in file.read_text().splitlines()]
        for file in (run / "log/scalars").iterdir()
    }
    assert steps["loss_qvalue"] == steps["td_error"] == [5, 10, 15, 20, 23]
    assert steps["return"] == steps["action_distance"] == [0, 10, 20, 23]
    assert read_metadata(find_checkpoint(run, "last"))[2] == 23


def test_without_an_environment_there_is_no_return(make_config, run):
    results = train(make_config("evaluation.env=null"))
    assert results.keys() == {"steps", "behaviour"}
    assert not (run / "best").exists()
    assert not (run / "log/scalars/return.csv").exists()


def test_threads_are_what_was_asked_for(make_config, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    train(make_config("threads=3", "steps=1", "log_interval=1", "evaluation.env=null"))
    assert asked == [3]


# several runs


def test_a_sweep_makes_a_folder_for_each(words, tmp_path, run, capsys):
    assert main(["train", "-m", *words("seed=0,1", "steps=10")]) == 0
    assert sorted(path.name for path in run.iterdir() if path.is_dir()) == ["0", "1"]
    assert [load_config(run / str(seed)).seed for seed in (0, 1)] == [0, 1]
    assert [load_config(run / str(seed)).out for seed in (0, 1)] == [str(run / "0"), str(run / "1")]
    assert main(["train", *words("seed=1", "steps=10", f"out={tmp_path / 'alone'}")]) == 0
    assert_same(tmp_path / "alone", run / "1")
    assert not equal(state(run / "0"), state(run / "1"))
    assert main(["train", "-m", *words("seed=0,1", "resume=true")]) == 0
    assert [read_metadata(find_checkpoint(run / str(seed), "last"))[2] for seed in (0, 1)] == [20, 20]
    with pytest.raises(RunError, match=r"It holds the runs \['0', '1'\]; name one of them"):
        module.main([f"resume={run}"])


@pytest.mark.parametrize("order", ["Adam,Nonsense", "Nonsense,Adam"])
def test_a_run_that_fails_does_not_stop_the_others(words, run, capsys, order):
    assert main(["train", "-m", *words(f"optim.optimizer={order}", "steps=10")]) == 1
    results = {order.split(",")[int(path.parent.name)] for path in run.glob("*/results.json")}
    assert results == {"Adam"}
    assert "optim.vae is 'Nonsense', expected one of torch.optim" in capsys.readouterr().err


# what is refused


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("sed=1", "Could not override 'sed'"),
        ("steps=many", "Value 'many' of type 'str' could not be converted to Integer"),
        ("loss.gamma=high", "could not be converted to Float"),
    ],
)
def test_a_setting_that_is_none_is_refused_before_anything_is_made(words, run, capsys, monkeypatch, setting, message):
    # Hydra takes coverage for a debugger, to which it leaves its errors
    monkeypatch.setattr("hydra._internal.utils.is_under_debugger", lambda: False)
    with pytest.raises(SystemExit) as end:
        main(["train", *words(setting)])
    assert end.value.code == 1
    assert message in capsys.readouterr().err
    assert not run.exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("dataset=none.hdf5", "there is no file none.hdf5."),
        ("device=abacus", "device=abacus cannot be used: "),
        ("log_interval=3", "no multiple of log_interval 3"),
        ("evaluation.reference_scores=[2,1]", "expected [random, expert], the second one higher."),
        ("logger=[disk]", "there is no logger 'disk'"),
        ("optim.vae_warmup_steps=-1", "vae_warmup_steps is -1"),
        ("precision=half", "precision is 'half', expected null or one of ['highest', "),
    ],
)
def test_a_value_that_is_none_is_refused_in_a_line(words, run, capsys, setting, message):
    assert main(["train", *words(setting)]) == 1
    (line,) = (run / "train.log").read_text().splitlines()
    assert message in line
    assert "Traceback" not in "".join(capsys.readouterr())
    assert contents(run) == {}


def test_the_whole_traceback_is_there_for_who_wants_it(words, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(FileNotFoundError):
        module.main(words("dataset=none.hdf5"))


def test_a_file_is_no_folder_of_a_run(words, file, capsys):
    before = file.read_bytes()
    assert main(["train", *words(f"out={file}")]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"torchrl-bcq: {file} cannot be the folder of a run: ")
    assert error.endswith("; choose another with out=FOLDER\n")
    assert file.read_bytes() == before


def test_a_run_that_is_not_there_is_not_resumed(tmp_path, capsys):
    assert main(["train", f"resume={tmp_path / 'none'}"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"torchrl-bcq: {tmp_path / 'none'} is no run of torchrl-bcq train")
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_is_not_finite_ends_the_run(make_file, make_config, words, run, capsys):
    """The reward of a row that is drawn in step 13 is too large to be squared."""
    own = ["evaluation.env=null", "sampler=without_replacement"]
    transitions, _ = open_dataset(make_config(*own))
    buffer = make_replay_buffer(transitions, batch_size=8, seed=0, sampler="without_replacement")
    rows = [buffer.sample()["index"].tolist() for _ in range(13)][-1]
    rewards = np.zeros(200)
    rewards[rows[3]] = 1e30
    make_file(rewards=rewards)
    assert main(["train", *words(*own)]) == 1
    shown = ", ".join(map(str, rows))
    (error,) = (line for line in (run / "train.log").read_text().splitlines() if "ERROR" in line)
    assert error.endswith(
        f"qvalue_loss is inf in gradient step 13, on the 8 rows {shown} of the replay buffer, kept for inspection: "
        f"torch.load('{run}/not-finite-13.pt'). The last good checkpoint is "
        f"{run}/checkpoints/checkpoint-000000000010. If the dataset is finite, lower the learning rate, set clip_norm, "
        "or scale the rewards."
    )
    batch = torch.load(run / "not-finite-13.pt", weights_only=True)
    assert batch["index"].tolist() == rows
    assert batch["next"]["reward"].flatten().tolist() == pytest.approx([0, 0, 0, 1e30, 0, 0, 0, 0])
    assert read_metadata(find_checkpoint(run, "last"))[2] == 10
    assert not (run / "results.json").exists()
    assert "Traceback" not in "".join(capsys.readouterr())


# what is told


def test_help_shows_every_setting(capsys):
    for word in ("-h", "--help"):
        assert main(["train", word]) == 0
        assert YAML in capsys.readouterr().out
    assert main(["train", "steps=3", "--help"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 130
    for kind in ("checkpoints", "resume=runs/hopper", "-m", "--cfg job"):
        assert kind in shown


def test_without_a_dataset_it_is_the_default_task(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    main(["train", "--cfg", "job", "seed=3"])
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["dataset"] == "minari:torchrl-bcq/pendulum/swing-up-v0"
    assert (shown["steps"], shown["network"]["hidden"], shown["seed"]) == (3500, [256, 256], 3)
    main(["train", "--cfg", "job", "dataset=other.hdf5"])
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["dataset"], shown["steps"], shown["network"]["hidden"]) == ("other.hdf5", 1_000_000, [400, 300])


def test_the_default_dataset_is_recorded_first(monkeypatch, tmp_path, file, words):
    calls = []
    monkeypatch.setattr(module, "record_default", lambda: calls.append("recorded"))
    monkeypatch.setattr(module, "train", lambda config: calls.append(config.dataset) or {})
    default = "minari:torchrl-bcq/pendulum/swing-up-v0"
    assert main(["train", f"out={tmp_path / 'run'}"]) == 0
    assert calls == ["recorded", default]
    assert main(["train", *words(f"out={tmp_path / 'run'}")]) == 0
    assert calls[2:] == [str(file)]


def test_the_csv_files_are_closed_with_the_run(make_config, monkeypatch):
    files = []
    closed = CSVExperiment.__del__

    def remember(self):
        files.extend(self.files.values())
        closed(self)

    monkeypatch.setattr(CSVExperiment, "__del__", remember)
    train(make_config("evaluation.env=null"))
    __import__("gc").collect()
    assert len(files) > 5
    assert all(file.closed for file in files)


# as processes


def test_it_prints_its_settings():
    command = [sys.executable, "-W", "ignore", "-m", "torchrl_bcq", "train", "--cfg", "job"]
    settings = ["dataset=hopper.hdf5", "loss.gamma=0.5", "out=run"]
    shown = subprocess.run([*command, *settings], capture_output=True, text=True, check=True).stdout
    expected = yaml.safe_load(YAML)
    expected["loss"]["gamma"] = 0.5
    assert yaml.safe_load(shown) == {**expected, "dataset": "hopper.hdf5", "out": "run"}
