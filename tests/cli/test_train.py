"""``torchrl-bcq train``, as a user types it: files of a run, messages, sweeps, default settings."""

from __future__ import annotations

import gc
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from filelock import FileLock

from torchrl_bcq import load_policy
from torchrl_bcq.__main__ import main
from torchrl_bcq.cli import train as module
from torchrl_bcq.data import make_replay_buffer
from torchrl_bcq.errors import RunError
from torchrl_bcq.evaluation.environments import make_env
from torchrl_bcq.evaluation.recording import DATASET_ID
from torchrl_bcq.runs.dataset import open_dataset
from torchrl_bcq.runs.folder import find_checkpoint, read_metadata
from torchrl_bcq.runs.settings import load_settings

from ..runs.folders import assert_same, contents, equal, state

DEFAULT = f"minari:{DATASET_ID}"

# the files of a run


def test_a_run_leaves_the_files_that_help_lists(words, run, capsys):
    assert main(["train", *words("baseline=cloning")]) == 0
    listed = module.HELP.partition("The folder of a run holds ")[2].partition(";")[0].replace(" and", ",")
    files = r"(checkpoints|best)/checkpoint-\d{12}/(manifest\.json|components/.*/state\.pt)"
    files += r"|log/scalars/\w+\.csv|config\.yaml|results\.json"
    found = set()
    for name in contents(run):
        assert re.fullmatch(rf"(baseline/)?({files})", name), name
        found.add(name.split("/")[0] + ("/" if "/" in name else ""))
    found.add("train.log" * (run / "train.log").is_file())
    found = {"log/scalars/*.csv" if name == "log/" else name for name in found}
    assert found == set(re.split(r",\s+", listed)) == {
        "config.yaml", "train.log", "log/scalars/*.csv", "checkpoints/", "best/", "results.json", "baseline/",
    }  # fmt: skip
    assert {path.name for path in run.rglob(".*")} == {".lock"}
    for folder in (run, run / "baseline"):
        kept = [f"checkpoint-{step:012}" for step in (10, 20)]
        assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == kept
    log = (run / "train.log").read_text()
    data = run.parent / "swings.hdf5"
    assert f"{run}: bcq on {data}, evaluated in Swing-v0, steps 0 to 20 on cpu" in log
    assert f"{run}/baseline: cloning on {data}, evaluated in Swing-v0, steps 0 to 20 on cpu" in log
    assert f"torchrl-bcq evaluate {run}; torchrl-bcq plot {run}" in log
    assert load_settings(run).steps == 20


def test_cloning_is_trained_resumed_evaluated_plotted_and_loaded_like_any_algorithm(words, run, capsys, tmp_path):
    assert main(["train", *words(algorithm="cloning")]) == 0
    assert main(["train", f"resume={run}", "steps=30"]) == 0
    assert main(["train", *words("steps=30", f"out={tmp_path / 'alone'}", algorithm="cloning")]) == 0
    assert_same(tmp_path / "alone", run)
    capsys.readouterr()
    assert main(["evaluate", str(run), "--episodes", "2"]) == 0
    rows = capsys.readouterr().out.partition("policy  ")[2].splitlines()[1:4]
    assert [row[:20].strip() for row in rows] == ["recorded behaviour", "random", "cloning"]
    assert main(["plot", str(run)]) == 0
    assert (run / "learning_curve.png").stat().st_size > 10_000
    steps = make_env("Swing-v0").rollout(5, load_policy(run))
    assert steps["action"].abs().max() <= 2


@pytest.mark.parametrize(
    ("algorithm", "setting", "message"),
    [
        ("cloning", "loss.lmbda=1", "loss.lmbda is a setting of bcq, but this run has algorithm=cloning; leave"),
        ("cloning", "optim.vae.lr=1", "optim.vae.lr is a setting of bcq, but this run has algorithm=cloning; leave"),
        ("bcq", "optim.policy.lr=1", "there is no setting optim.policy.lr"),
    ],
)
def test_settings_of_another_algorithm_are_refused(words, run, capsys, algorithm, setting, message):
    assert main(["train", *words(setting, algorithm=algorithm)]) == 1
    assert capsys.readouterr().err.startswith(f"torchrl-bcq: {message}")
    assert not run.exists()


def test_resume_takes_the_settings_of_the_named_run(words, run, tmp_path, monkeypatch):
    own = ["seed=7", "optim.kwargs.eps=1e-3", "held_out=0.3", f"out={tmp_path / 'undisturbed'}", "steps=40"]
    assert main(["train", *words(*own)]) == 0
    assert main(["train", *words(*own[:3], "steps=20")]) == 0
    monkeypatch.chdir(tmp_path)
    assert main(["train", "resume=run", "steps=40", "evaluation.max_rows=1500"]) == 0
    assert_same(tmp_path / "undisturbed", run)
    settings = load_settings(run)
    assert (settings.seed, settings.steps, settings.out, settings.resume) == (7, 40, "run", True)
    assert (settings.optim.kwargs, settings.evaluation.max_rows) == ({"eps": 1e-3}, 1500)


def test_a_second_start_is_refused_and_changes_nothing(words, run, capsys):
    assert main(["train", *words()]) == 0
    before = contents(run)
    capsys.readouterr()
    for changed in ([], ["seed=1"], ["network.hidden=[9]"], ["steps=40"]):
        assert main(["train", *words(*changed)]) == 1
        assert contents(run) == before
        assert (
            f"{run} holds a run of 20 steps; resume it with resume=true, or start a new one in another folder with "
            "out=FOLDER."
        ) in capsys.readouterr().err
    with FileLock(run / ".lock"):
        assert main(["train", *words("resume=true")]) == 1
    assert f"another run is using {run}" in capsys.readouterr().err


# several runs


def test_a_sweep_makes_a_folder_for_each(words, tmp_path, run):
    assert main(["train", "-m", *words("seed=0,1", "steps=10")]) == 0
    assert sorted(path.name for path in run.iterdir() if path.is_dir()) == ["0", "1"]
    assert [load_settings(run / str(seed)).seed for seed in (0, 1)] == [0, 1]
    assert [load_settings(run / str(seed)).out for seed in (0, 1)] == [str(run / "0"), str(run / "1")]
    assert main(["train", *words("seed=1", "steps=10", f"out={tmp_path / 'alone'}")]) == 0
    assert_same(tmp_path / "alone", run / "1")
    assert not equal(state(run / "0"), state(run / "1"))
    assert main(["train", "--multirun", *words("seed=0,1", "resume=true")]) == 0
    assert [read_metadata(find_checkpoint(run / str(seed), "last"))[2] for seed in (0, 1)] == [20, 20]
    with pytest.raises(RunError, match=r"It contains the runs \['0', '1'\]; choose one of them"):
        module.main([f"resume={run}"])


@pytest.mark.parametrize("order", ["Adam,Nonsense", "Nonsense,Adam"])
def test_a_run_that_fails_does_not_stop_the_others(words, run, capsys, order):
    assert main(["train", "-m", *words(f"optim.optimizer={order}", "steps=10")]) == 1
    results = {order.split(",")[int(path.parent.name)] for path in run.glob("*/results.json")}
    assert results == {"Adam"}
    assert "the optimizer 'Nonsense' (optim.optimizer or optim.vae.optimizer) does not exist" in capsys.readouterr().err


def test_an_unexpected_error_of_a_run_does_not_stop_the_others(words, run, capsys, monkeypatch):
    trained = []

    def fail_once(settings):
        trained.append(settings.seed)
        if settings.seed == 1:
            raise AssertionError("the simulator is unstable")
        return {}

    monkeypatch.setattr("torchrl_bcq.cli.train.train", fail_once)
    assert main(["train", "-m", *words("seed=1,2")]) == 1
    assert trained == [1, 2]
    assert "this run of the sweep failed" in capsys.readouterr().err
    with pytest.raises(AssertionError, match="the simulator is unstable"):
        main(["train", *words("seed=1")])


# refusals


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("sed=1", "there is no setting sed; "),
        ("steps=many", "steps is 'many', expected a whole number."),
        ("loss.gamma=high", "loss.gamma is 'high', expected a number."),
        ("seed=0,1", "seed=0,1 has 2 values; add -m to make a run for each value"),
        ("algorithm=bqc", "algorithm is 'bqc', expected one of ['bcq', 'cloning', "),
        ("algorithm=bcq dataset=???", "dataset has no value; set it with dataset=VALUE."),
        (
            "--multi",
            "there is no flag --multi; write a setting as NAME=VALUE without dashes; see ",
        ),
        ("hopper.hdf5", "hopper.hdf5 is not a setting; write a setting as NAME=VALUE."),
        ("_target_=os.system", "there is no setting _target_"),
        ("reader._target_=os.system", "reader._target_ is refused, because names of the form _NAME_ can run code"),
    ],
)
def test_words_that_are_no_settings_are_refused_before_anything_is_made(words, run, capsys, word, message):
    assert main(["train", *words(), *word.split()]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"torchrl-bcq: {message}")
    assert error.count("\n") == 1
    assert not run.exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("dataset=none.hdf5", "there is no file none.hdf5 in /"),
        ("device=abacus", "device=abacus cannot be used: "),
        ("log_interval=3", "not a positive multiple of log_interval 3"),
        ("evaluation.reference_scores=[2,1]", "expected [random, expert], where expert is higher."),
        ("logger=[disk]", "there is no logger 'disk'"),
        ("optim.vae.start_after=-1", "optim.vae: start_after is -1"),
        ("optim.actor.every=0", "optim.actor: start_after is 0 and every 0; start_after must be at least 0, and every"),
        ("precision=half", "precision is 'half', expected null or one of ['highest', "),
        ("baseline=clonign", "'clonign', expected one of ['bcq', 'cloning', "),
    ],
)
def test_values_that_do_not_fit_are_refused_in_a_line(words, run, capsys, setting, message):
    assert main(["train", *words(setting)]) == 1
    *_, line = (run / "train.log").read_text().splitlines()
    assert message in line
    assert "Traceback" not in "".join(capsys.readouterr())
    assert contents(run) == {}


def test_the_whole_traceback_is_shown_on_request(words, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(FileNotFoundError):
        module.main(words("dataset=none.hdf5"))


def test_a_file_is_no_folder_of_a_run(words, file, capsys):
    before = file.read_bytes()
    assert main(["train", *words(f"out={file}")]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"torchrl-bcq: {file} is a file; choose a folder")
    assert error.endswith("; choose a folder with out=FOLDER.\n")
    assert file.read_bytes() == before


def test_a_run_that_does_not_exist_is_not_resumed(tmp_path, capsys):
    assert main(["train", f"resume={tmp_path / 'none'}"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"torchrl-bcq: {tmp_path / 'none'} is not a run of torchrl-bcq train")
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_is_not_finite_ends_the_run(make_file, make_settings, words, run, capsys):
    """The reward of a row that is drawn in step 13 is too large to be squared."""
    own = ["evaluation.env=null", "sampler=without_replacement"]
    transitions, _ = open_dataset(make_settings(*own))
    buffer = make_replay_buffer(transitions, batch_size=8, seed=0, sampler="without_replacement")
    rows = [buffer.sample()["index"].tolist() for _ in range(13)][-1]
    rewards = np.zeros(200)
    rewards[rows[3]] = 1e30
    make_file(rewards=rewards)
    assert main(["train", *words(*own)]) == 1
    shown = ", ".join(map(str, rows))
    (error,) = (line for line in (run / "train.log").read_text().splitlines() if "ERROR" in line)
    assert (
        f"qvalue_loss is inf in gradient step 13, on the 8 rows {shown} of the replay buffer; {run}/not-finite-13.pt "
        "holds these rows; torchrl-bcq describe lists defects of a dataset. The last good checkpoint is "
        f"{run}/checkpoints/checkpoint-000000000010."
    ) in error
    batch = torch.load(run / "not-finite-13.pt", weights_only=True)
    assert batch["index"].tolist() == rows
    assert batch["next"]["reward"].flatten().tolist() == pytest.approx([0, 0, 0, 1e30, 0, 0, 0, 0])
    assert read_metadata(find_checkpoint(run, "last"))[2] == 10
    assert not (run / "results.json").exists()
    assert "Traceback" not in "".join(capsys.readouterr())


# help, settings shown, and the run without a dataset


def test_help_shows_every_setting(capsys):
    for word in ("-h", "--help"):
        assert main(["train", word]) == 0
        assert module.YAML in capsys.readouterr().out
    assert main(["train", "steps=3", "--help"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 130
    for word in (
        "checkpoints",
        "resume=runs/hopper",
        "-m",
        "--cfg",
        "algorithms: bcq, cloning (continuous actions); discrete_bcq, discrete_cloning (discrete actions)",
    ):
        assert word in shown


def shown_settings(capsys, *words: str) -> dict:
    assert main(["train", "--cfg", *words]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_without_a_dataset_the_default_run_is_made_with_its_baseline(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    shown = shown_settings(capsys, "seed=3")
    assert (shown["dataset"], shown["steps"], shown["seed"]) == (DEFAULT, 3500, 3)
    assert (shown["network"]["hidden"], shown["network"]["vae_hidden"]) == ([256, 256], [256, 256])
    assert (shown["algorithm"], shown["baseline"]) == ("bcq", "cloning")
    assert (shown["loss"]["gamma"], shown["loss"]["tau"], shown["normalize"]) == (0.95, 0.02, True)
    assert shown_settings(capsys, "loss.gamma=0.9", "normalize=false")["loss"]["gamma"] == 0.9
    shown = shown_settings(capsys, "algorithm=cloning", "steps=7", "baseline=null")
    assert (shown["dataset"], shown["steps"], shown["network"]) == (DEFAULT, 7, {"hidden": [256, 256]})
    assert shown["baseline"] is None
    shown = shown_settings(capsys, "dataset=other.hdf5", "algorithm=bcq")
    assert (shown["dataset"], shown["steps"]) == ("other.hdf5", 1_000_000)
    assert (shown["network"]["hidden"], shown["baseline"]) == ([400, 300], None)
    assert (shown["loss"]["gamma"], shown["loss"]["tau"], shown["normalize"]) == (0.99, 0.005, False)
    assert list(tmp_path.iterdir()) == []
    assert main(["train", "-m", "algorithm=bcq,cloning"]) == 1
    assert "algorithm=bcq,cloning needs dataset=...; " in capsys.readouterr().err


def test_the_default_dataset_is_recorded_first(monkeypatch, tmp_path, file, words):
    calls = []
    monkeypatch.setattr(module, "record_default", lambda: calls.append("recorded"))
    monkeypatch.setattr(module, "train", lambda settings: calls.append(settings.dataset) or {})
    assert main(["train", f"out={tmp_path / 'run'}"]) == 0
    assert calls == ["recorded", DEFAULT]
    assert main(["train", *words(f"out={tmp_path / 'run'}")]) == 0
    assert calls[2:] == [str(file)]


def test_it_prints_its_settings():
    command = [sys.executable, "-W", "ignore", "-m", "torchrl_bcq", "train", "--cfg"]
    settings = ["dataset=hopper.hdf5", "algorithm=bcq", "loss.gamma=0.5", "out=run"]
    shown = subprocess.run([*command, *settings], capture_output=True, text=True, check=True).stdout
    expected = yaml.safe_load(module.YAML)
    expected["loss"]["gamma"] = 0.5
    assert yaml.safe_load(shown) == {**expected, "dataset": "hopper.hdf5", "out": "run"}


def test_a_damaged_checkpoint_is_reported(words, run, capsys, caplog):
    """With the newest one damaged, the run resumes from the one before; with all of them, it does not start anew."""
    assert main(["train", *words()]) == 0
    manifests = sorted(run.glob("*/checkpoint-*/manifest.json"))
    (run / "checkpoints" / "checkpoint-000000000020" / "manifest.json").write_text("")
    assert main(["train", f"resume={run}", "steps=20"]) == 0
    assert "['checkpoint-000000000020'] in" in caplog.text
    assert "so the run resumes from the earlier checkpoint" in caplog.text
    assert "steps 10 to 20" in caplog.text
    for manifest in manifests:
        manifest.write_text("{")
    assert main(["train", f"resume={run}", "steps=30"]) == 1
    assert "cannot be read, so the run cannot be resumed" in capsys.readouterr().err
    assert main(["evaluate", str(run)]) == 1
    assert f"{run} has only damaged checkpoints" in capsys.readouterr().err


def test_a_sweep_in_the_folder_of_a_run_without_a_checkpoint_is_refused(words, run, capsys):
    assert main(["train", *words()]) == 0
    shutil.rmtree(run / "checkpoints")
    shutil.rmtree(run / "best")
    assert main(["train", "-m", *words("seed=0,1")]) == 1
    assert f"{run} is the folder of a run; choose another folder for the sweep" in capsys.readouterr().err


def test_each_run_of_a_sweep_begins_with_the_same_number_of_threads(words, monkeypatch):
    gc.collect()  # the end of another test's environments sets the number of threads too
    asked, default = [], torch.get_num_threads()
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    assert main(["train", "-m", *words("threads=7,null", "steps=5", "evaluation.env=null")]) == 0
    assert asked == [default, 7, default]


def test_a_sweep_in_the_folder_of_a_run_is_refused(words, run, capsys):
    assert main(["train", *words()]) == 0
    assert main(["train", "-m", *words("seed=0,1")]) == 1
    assert f"{run} is the folder of a run; choose another folder for the sweep" in capsys.readouterr().err
    assert not (run / "0").exists()


def test_files_of_others_are_not_replaced(words, run, capsys):
    run.mkdir()
    (run / "config.yaml").write_text("mine: 1\n")
    assert main(["train", *words()]) == 1
    assert f"{run}/config.yaml is not a file of a run, and a run would replace it" in capsys.readouterr().err
    assert [path.name for path in run.iterdir()] == ["config.yaml"]
    assert main(["train", *words(f"out={run / 'config.yaml'}")]) == 1
    assert "config.yaml is a file; choose a folder with out=FOLDER." in capsys.readouterr().err


def test_a_missing_package_and_its_remedy_are_named(words, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    assert main(["train", *words()]) == 1
    assert "h5py" in (message := capsys.readouterr().err)
    assert "install" in message


def test_paths_are_shown_as_they_were_typed(words, run, monkeypatch, capsys):
    assert main(["train", *words()]) == 0
    monkeypatch.chdir(run.parent)
    assert main(["evaluate", run.name, "--episodes", "2"]) == 0
    assert capsys.readouterr().out.startswith(f"{run.name}/best/checkpoint-")
