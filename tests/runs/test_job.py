"""Runs and their baselines: the files they leave, and that they resume bit for bit."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
from filelock import FileLock
from omegaconf import OmegaConf
from torchrl.record.loggers.csv import CSVExperiment

from torchrl_bcq.errors import RunError
from torchrl_bcq.objectives import CloningLoss
from torchrl_bcq.runs.folder import find_checkpoint, read_metadata
from torchrl_bcq.runs.job import baseline_settings, train
from torchrl_bcq.runs.settings import compose, flat, load_settings, save_settings
from torchrl_bcq.trainers import OfflineTrainer

from .folders import assert_same, contents, scalars

SHARED = [  # of all that a checkpoint must hold
    "normalize=true",
    "held_out=0.3",
    "sampler=without_replacement",
    "optim.scheduler=CosineAnnealingLR",
    "optim.scheduler_kwargs.T_max=30",
]
THOROUGH = {
    "bcq": [
        *SHARED,
        "optim.vae.stop_after=15",
        "optim.qvalue.start_after=4",
        "optim.actor.start_after=4",
        "optim.actor.every=2",
        "early_stopping={monitor: loss_vae, patience: 1000}",
    ],
    "cloning": [
        *SHARED,
        "algorithm=cloning",
        "optim.actor.start_after=4",
        "optim.actor.every=2",
        "early_stopping={monitor: loss_actor, patience: 1000}",
    ],
}
BOTH = pytest.mark.parametrize("algorithm", THOROUGH)


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


def last_step(run) -> int:
    return read_metadata(find_checkpoint(run, "last"))[2]


# the files of a run


@BOTH
def test_results_are_those_of_the_log(make_settings, run, algorithm):
    results = train(make_settings(f"algorithm={algorithm}"))
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


@pytest.mark.parametrize(("algorithm", "losses"), [("bcq", {"loss_qvalue", "td_error"}), ("cloning", {"loss_actor"})])
def test_metrics_are_logged_at_every_interval_and_at_the_last_step(make_settings, run, algorithm, losses):
    train(make_settings(f"algorithm={algorithm}", "steps=23", "checkpoint.interval=20", "held_out=0.3"))
    steps = {
        file.stem: [int(line.split(",")[0]) for line in file.read_text().splitlines()]
        for file in (run / "log/scalars").iterdir()
    }
    assert [steps[name] for name in losses] == [[5, 10, 15, 20, 23]] * len(losses)
    measured = {"return", "action_distance", *(f"held_out_{name}" for name in losses)}
    assert [steps[name] for name in measured] == [[0, 10, 20, 23]] * len(measured)
    assert ("value_estimate" in steps) == ("initial_value" in steps) == (algorithm == "bcq")
    assert last_step(run) == 23


def test_without_an_environment_there_is_no_return(make_settings, run):
    results = train(make_settings("evaluation.env=null"))
    assert results.keys() == {"steps", "behaviour"}
    assert not (run / "best").exists()
    assert not (run / "log/scalars/return.csv").exists()


def test_the_number_of_threads_is_set(make_settings, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    train(make_settings("threads=3", "steps=1", "log_interval=1", "evaluation.env=null"))
    assert asked == [3]


def test_the_csv_files_are_closed_with_the_run(make_settings, monkeypatch):
    opened = set()
    add_scalar = CSVExperiment.add_scalar

    def remember(self, *arguments, **settings):
        add_scalar(self, *arguments, **settings)
        opened.update(self.files.values())

    monkeypatch.setattr(CSVExperiment, "add_scalar", remember)
    train(make_settings("evaluation.env=null"))
    assert len(opened) > 5
    assert all(file.closed for file in opened)


def test_two_runs_do_not_share_a_folder(make_settings, run):
    run.mkdir()
    with (
        FileLock(run / ".lock"),
        pytest.raises(RunError, match=rf"^another run is using {run}; wait, or choose another folder with out=FOLDER"),
    ):
        train(make_settings())
    assert not (run / "checkpoints").exists()
    train(make_settings())
    assert (run / "checkpoints").exists()


def test_a_run_in_the_folder_of_a_sweep_is_refused(make_settings, run):
    train(make_settings(f"out={run / '0'}", "steps=10"))
    with pytest.raises(RunError, match=rf"^{run} contains the runs 0; add -m to continue their sweep, or choose anoth"):
        train(make_settings("resume=true"))
    assert not (run / "config.yaml").exists()


# resumed runs


def test_results_of_an_earlier_step_are_not_the_last_ones(make_settings, run):
    """The run had stopped after its last step, before its results were written."""
    train(make_settings())
    earlier = (run / "results.json").read_text()
    train(make_settings("resume=true", "steps=30"))
    (run / "results.json").write_text(earlier)
    assert train(make_settings("resume=true", "steps=30"))["steps"] == 30


def test_a_return_that_was_measured_before_the_resume_is_not_the_last_one(make_settings):
    bounds = ["action_low=-2", "action_high=2"]
    assert "final" in train(make_settings(*bounds))
    assert "final" not in train(make_settings(*bounds, "resume=true", "steps=30", "evaluation.env=null"))


def test_commands_in_messages_are_quoted(make_settings, tmp_path):
    own = f"out={tmp_path / 'my run'}"
    train(make_settings(own))
    with pytest.raises(RunError) as error:
        train(make_settings(own, "resume=true", "seed=5"))
    assert f"torchrl-bcq train 'resume={tmp_path / 'my run'}'. Or" in str(error.value)


def test_a_dictionary_of_a_resumed_run_can_be_emptied(make_settings, run, caplog):
    train(make_settings("logger_kwargs.wandb.project=swings"))
    assert "logger_kwargs has ['wandb'], which have no effect: logger is ['csv']" in caplog.messages
    (settings,) = compose([f"resume={run}", "logger_kwargs={}", "evaluation={}"])
    assert settings.logger_kwargs == {}
    assert settings.evaluation.episodes == 2


def test_other_data_are_not_called_damage(make_settings, make_file, run):
    train(make_settings())
    make_file(seed=1)
    with pytest.raises(RunError) as error:
        train(make_settings("resume=true", "steps=30"))
    assert "cannot be resumed: " in str(error.value)
    assert "damaged" not in str(error.value)


@BOTH
def test_a_run_resumes_bit_for_bit(make_settings, tmp_path, algorithm):
    undisturbed, broken = tmp_path / "undisturbed", tmp_path / "broken"
    train(make_settings(*THOROUGH[algorithm], "steps=30", f"out={undisturbed}"))
    torch.manual_seed(1)
    for steps in (10, 20, 30):
        results = train(make_settings(*THOROUGH[algorithm], f"steps={steps}", f"out={broken}", "resume=true"))
    assert_same(undisturbed, broken)
    assert results == json.loads((undisturbed / "results.json").read_text())
    assert load_settings(broken).steps == 30


class Killed(BaseException):
    """As if by SIGKILL: nothing is tidied up."""


def killed_after(step, loss=object):
    """The method that logs losses, which ends the process after that step of a trainer of such a loss."""
    log = OfflineTrainer._log_losses

    def call(trainer, *arguments):
        if isinstance(trainer.loss_module, loss) and trainer._optim_count > step:
            raise Killed
        return log(trainer, *arguments)

    return call


@pytest.fixture
def kill(monkeypatch):
    """Make a run that is killed."""

    def call(settings, *when) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(OfflineTrainer, "_log_losses", killed_after(*when))
            with pytest.raises(Killed):
                train(settings)

    return call


@BOTH
def test_a_killed_run_resumes_bit_for_bit(make_settings, tmp_path, kill, algorithm):
    """It had logged and evaluated after its last checkpoint, and kept a best one."""
    undisturbed, broken = tmp_path / "undisturbed", tmp_path / "broken"
    thorough = [*THOROUGH[algorithm], "evaluation.interval=5", "steps=30"]
    train(make_settings(*thorough, f"out={undisturbed}"))
    kill(make_settings(*thorough, f"out={broken}"), 25)
    assert last_step(broken) == 20
    log = broken / "log/scalars/return.csv"
    assert log.read_text().splitlines()[-1].startswith("25,")
    log.write_text(log.read_text() + "30,0.")
    train(make_settings(*thorough, f"out={broken}", "resume=true"))
    assert_same(undisturbed, broken)
    assert find_checkpoint(undisturbed).relative_to(undisturbed) == find_checkpoint(broken).relative_to(broken)


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(make_settings, tmp_path, kill):
    settings = ["checkpoint.interval=1000", "checkpoint.monitor=null"]
    undisturbed, broken = tmp_path / "undisturbed", tmp_path / "broken"
    train(make_settings(*settings, f"out={undisturbed}"))
    kill(make_settings(*settings, f"out={broken}", "seed=1"), 10)
    train(make_settings(*settings, f"out={broken}"))
    assert_same(undisturbed, broken)


def test_a_run_with_nothing_but_a_best_checkpoint_resumes_from_it(make_settings, tmp_path, kill):
    settings = ["checkpoint.interval=1000", "checkpoint.monitor=loss_vae", "checkpoint.mode=max", "steps=30"]
    undisturbed, broken = tmp_path / "undisturbed", tmp_path / "broken"
    train(make_settings(*settings, f"out={undisturbed}"))
    kill(make_settings(*settings, f"out={broken}"), 20)
    assert not (broken / "checkpoints").exists()
    with pytest.raises(RunError, match=r"holds a run of \d+ steps; resume it with resume=true"):
        train(make_settings(*settings, f"out={broken}", "seed=1"))
    train(make_settings(*settings, f"out={broken}", "resume=true"))
    assert_same(undisturbed, broken)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("network.hidden=[9]", "network.hidden was [8] and is now [9]"),
        ("normalize=true", "normalize was False and is now True"),
        ("optim.optimizer=SGD", "optim.optimizer was 'Adam' and is now 'SGD'"),
        ("batch_size=9", "batch_size was 8 and is now 9"),
    ],
)
def test_a_run_is_not_resumed_with_other_settings(make_settings, run, setting, message):
    train(make_settings("steps=10"))
    before = contents(run)
    with pytest.raises(RunError) as error:
        train(make_settings("resume=true", setting))
    assert str(error.value).startswith(f"{run} cannot be resumed with changed settings: {message}. ")
    assert contents(run) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"seed": 1},
            "the dataset has changed since the checkpoint: it has the same number of transitions, but other values",
        ),
        (
            {"timeouts": np.arange(200) % 20 == 18},
            "the dataset has changed since the run began: it had 10 episodes, and now has 11 episodes, so",
        ),
    ],
)
def test_a_run_is_not_resumed_with_another_dataset(make_settings, make_file, run, change, message):
    train(make_settings("steps=10"))
    make_file(**change)
    before = contents(run)
    with pytest.raises(RunError) as error:
        train(make_settings("resume=true"))
    assert message in str(error.value)
    assert contents(run) == before


def test_early_stopping_that_is_new_in_a_resumed_run_is_refused(make_settings, run):
    train(make_settings("steps=10"))
    with pytest.raises(RunError, match="has no state of early_stopping, because the run began without it; resume"):
        train(make_settings("steps=20", "resume=true", "early_stopping.monitor=loss_vae"))
    assert train(make_settings("steps=20", "resume=true"))["steps"] == 20


def test_an_early_stop_with_a_threshold_can_be_switched_off(make_settings, run, caplog):
    words = ["early_stopping.monitor=loss_vae", "early_stopping.mode=max", "early_stopping.threshold=-1e9"]
    words += ["steps=100", "evaluation.interval=10", "checkpoint.interval=10"]
    assert "stopped_early" in train(make_settings(*words))
    caplog.set_level(logging.INFO)
    train(make_settings(*words, "resume=true"))
    (remedy,) = [text.partition(", set ")[2] for text in caplog.messages if "is complete; to train it further" in text]
    words[0], words[2] = remedy.split()
    assert train(make_settings(*words, "resume=true"))["steps"] == 100


def test_a_run_that_stopped_early_is_complete(make_settings, run, caplog):
    caplog.set_level(logging.INFO)
    words = ["steps=100", "evaluation.interval=10", "early_stopping={monitor: loss_vae, mode: max, patience: 10}"]
    words += ["optim.lr=0.01", "checkpoint.interval=10"]
    results = train(make_settings(*words))
    assert "loss_vae" in results["stopped_early"]
    stopped = last_step(run)
    assert stopped < 100
    assert train(make_settings(*words, "resume=true")) == results
    (remedy,) = [text.partition(", ")[2] for text in caplog.messages if "is complete; to train it further" in text]
    assert remedy == "set early_stopping.monitor=null"
    more = train(make_settings(*words[:2], *words[3:], "resume=true"))
    assert (more["steps"], last_step(run), "stopped_early" in more) == (100, 100, False)


def test_a_run_that_goes_on_after_an_early_stop_can_be_resumed_twice(make_settings, run):
    """If the second part was interrupted, results.json is still that of the early stop."""
    train(make_settings("steps=20"))
    results = json.loads((run / "results.json").read_text())
    (run / "results.json").write_text(json.dumps({**results, "steps": 10, "stopped_early": "loss_vae"}))
    assert train(make_settings("steps=40", "resume=true"))["steps"] == 40


def test_a_finished_run_returns_its_results(make_settings, run, file):
    results = train(make_settings())
    before = contents(run)
    file.unlink()  # nothing is read or made
    again = ["resume=true", "algorithm=bcq"]
    assert train(make_settings(*again)) == results
    with pytest.raises(RunError, match=f"the run in {run} has made 20 steps, but steps is 10; set a larger number"):
        train(make_settings(*again, "steps=10"))
    assert contents(run) == before


def test_files_that_are_not_of_a_run_are_not_replaced(make_settings, run):
    run.mkdir()
    for name in ("config.yaml", "results.json"):
        (run / name).write_text("mine: 1\n")
        with pytest.raises(RunError, match=f"{name} is not a file of a run, and a run would replace it; choose"):
            train(make_settings())
        assert (run / name).read_text() == "mine: 1\n"
        (run / name).unlink()
    assert [*run.iterdir()] == []
    train(make_settings())


def test_a_run_that_was_killed_at_its_end_writes_its_results(make_settings, run):
    results = train(make_settings())
    before = contents(run, "config.yaml", "components")
    (run / "results.json").unlink()
    assert train(make_settings("resume=true")) == results
    assert contents(run, "config.yaml", "components").keys() == before.keys()
    assert scalars(run) == {name.rpartition("/")[2]: value for name, value in before.items() if name.endswith(".csv")}


# baselines


WITH_BASELINE = [
    "baseline=cloning",
    "network.hidden=[7,6]",
    "batch_size=9",
    "held_out=0.3",
    "normalize=true",
    "sampler=without_replacement",
    "n_step=3",
    "seed=5",
    "evaluation.seed=7",
    "optim.lr=0.5",
    "checkpoint={monitor: loss_vae, keep: 9}",
    "early_stopping.monitor=loss_vae",
]
SAME = ["network.hidden=[7,6]", "batch_size=9", "held_out=0.3", "normalize=true", "sampler=without_replacement"]
SAME += ["seed=5", "evaluation.seed=7"]


@pytest.fixture
def with_baseline(make_settings, tmp_path):
    """A run with a baseline that nothing has disturbed."""
    train(make_settings(*WITH_BASELINE, f"out={tmp_path / 'undisturbed'}"))
    return tmp_path / "undisturbed"


def test_the_baseline_is_a_run_with_the_same_data_steps_batches_and_sizes(make_settings, tmp_path, with_baseline):
    alone = tmp_path / "alone"
    expected = make_settings("algorithm=cloning", *SAME, f"out={alone}")
    train(expected)
    assert_same(alone, with_baseline / "baseline")
    found = flat(load_settings(with_baseline / "baseline"))
    differing = {name for name, value in flat(expected).items() if found[name] != value}
    assert differing == {"out", "resume"}
    assert found["out"] == str(with_baseline / "baseline")
    assert load_settings(with_baseline).baseline == "cloning"


def test_a_baseline_changes_nothing_in_its_run(make_settings, tmp_path, with_baseline):
    train(make_settings(*WITH_BASELINE[1:], f"out={tmp_path / 'alone'}"))
    assert_same(tmp_path / "alone", with_baseline)
    results = [json.loads((run / "results.json").read_text()) for run in (tmp_path / "alone", with_baseline)]
    assert results[0] == results[1]


def test_a_run_with_a_baseline_resumes_wherever_it_was_killed(make_settings, run, kill, with_baseline):
    kill(make_settings(*WITH_BASELINE), 13)
    assert last_step(run) == 10
    assert not (run / "baseline").exists()
    kill(make_settings(*WITH_BASELINE, "resume=true"), 13, CloningLoss)
    assert (last_step(run), last_step(run / "baseline")) == (20, 10)
    results = train(make_settings(*WITH_BASELINE, "resume=true"))
    assert results == json.loads((run / "results.json").read_text())
    for one in ("", "baseline"):
        assert_same(with_baseline / one, run / one)
    before = contents(run)
    assert train(make_settings(*WITH_BASELINE, "resume=true")) == results
    assert contents(run) == before
    train(make_settings(*WITH_BASELINE, "resume=true", "steps=30"))
    assert (last_step(run), last_step(run / "baseline")) == (30, 30)


def test_a_baseline_may_be_added_later(make_settings, run, with_baseline):
    train(make_settings(*WITH_BASELINE[1:]))
    train(make_settings(*WITH_BASELINE, "resume=true"))
    assert_same(with_baseline / "baseline", run / "baseline")


def test_a_baseline_that_is_none_is_refused_before_anything_is_made(make_settings, run):
    with pytest.raises(RunError, match=r"'clonign', expected one of \['bcq', 'cloning', 'discrete_bcq', "):
        train(make_settings("baseline=clonign"))
    assert not run.exists()


def test_nothing_in_a_strangers_settings_is_looked_up_for_the_baseline(make_settings, run, monkeypatch):
    monkeypatch.setenv("SECRET", "swordfish")
    save_settings(make_settings("baseline=cloning"), run)
    file = run / "config.yaml"
    file.write_text(file.read_text().replace("reader: {}", "reader: {names: {rewards: '${oc.env:SECRET}'}}"))
    found = OmegaConf.to_container(baseline_settings(load_settings(run)), resolve=True)
    assert found["reader"] == {"names": {"rewards": "${oc.env:SECRET}"}}
