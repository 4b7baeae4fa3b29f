"""``torchrl-bcq train`` as a process, and as several that ``torchrun`` starts: signals, exit codes, messages."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from torchrl_bcq.__main__ import main
from torchrl_bcq.cli import train as module
from torchrl_bcq.errors import RunError
from torchrl_bcq.objectives import CloningLoss
from torchrl_bcq.runs import processes
from torchrl_bcq.runs.folder import find_checkpoint, read_metadata
from torchrl_bcq.runs.job import train
from torchrl_bcq.trainers import OfflineTrainer
from torchrl_bcq.trainers.distributed import PeerError

from ..runs.folders import assert_same, contents, state

PATIENCE = 120  # seconds that tests wait for a process
QUIET = [
    "evaluation.env=null",
    "sampler=without_replacement",
    "held_out=0.3",
    "checkpoint.monitor=held_out_td_error",
    "checkpoint.mode=min",
    "checkpoint.keep=1",
]
ENDLESS = ["steps=1000000", "checkpoint.interval=100000"]


def start(*arguments: str, launch: tuple[str, ...] = ()) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *launch, "-m", "torchrl_bcq", "train", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
    )


def torchrun(*arguments: str) -> subprocess.Popen:
    return start(*arguments, launch=("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"))


def interrupt(process: subprocess.Popen, number: signal.Signals, run: Path) -> None:
    """Send a signal once the run has logged a loss."""
    loss, deadline = run / "log" / "scalars" / "loss_vae.csv", time.monotonic() + PATIENCE
    while not loss.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)


def finish(*started: subprocess.Popen) -> list[tuple[int, str]]:
    """Exit codes and outputs."""
    try:
        outputs = [process.communicate(timeout=PATIENCE)[0] for process in started]
    finally:
        for process in started:
            process.terminate()  # torchrun ends the processes that it has started
    return [(process.returncode, output) for process, output in zip(started, outputs, strict=True)]


# one process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_a_checkpoint_that_resumes_bit_for_bit(words, make_settings, run, tmp_path, number, code):
    own = ["normalize=true", "evaluation.env=null", "optim.actor.every=2", "optim.vae.stop_after=7"]
    process = start(*words(*own, *ENDLESS))
    interrupt(process, number, run)
    ((found, output),) = finish(process)
    assert found == code, output
    name = signal.Signals(number).name
    assert f"{name}: the run stops after this gradient step or measurement and saves a checkpoint; " in output
    resume = re.search(rf"{name} after (\d+) steps; resume with: torchrl-bcq train resume={run}\n", output)
    steps = int(resume[1])
    assert read_metadata(find_checkpoint(run, "last"))[2] == steps
    assert not (run / "results.json").exists()
    assert "Traceback" not in output

    more = [*own, f"steps={steps + 7}", "checkpoint.interval=100000"]
    train(make_settings(*more, "resume=true"))
    train(make_settings(*more, f"out={tmp_path / 'undisturbed'}"))
    for key, value in state(tmp_path / "undisturbed").items():
        assert torch.equal(state(run)[key], value), key


@pytest.fixture
def send(monkeypatch):
    """Send signals to this process after step 10 of a baseline."""
    log = OfflineTrainer._log_losses

    def call(*numbers: signal.Signals) -> None:
        def log_losses(trainer, *arguments):
            if isinstance(trainer.loss_module, CloningLoss) and trainer._optim_count == 10:
                for number in numbers:
                    signal.raise_signal(number)
            return log(trainer, *arguments)

        monkeypatch.setattr(OfflineTrainer, "_log_losses", log_losses)

    return call


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_baseline_which_resumes_bit_for_bit(words, run, tmp_path, send, capsys, number, code):
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    assert main(["train", *words("baseline=cloning", f"out={tmp_path / 'undisturbed'}")]) == 0
    send(number)
    with pytest.raises(SystemExit) as end:
        main(["train", *words("baseline=cloning")])
    assert end.value.code == code
    assert f"{number.name} after 10 steps; resume with: torchrl-bcq train resume={run}/baseline" in (
        capsys.readouterr().err
    )
    assert (run / "results.json").exists()
    assert not (run / "baseline" / "results.json").exists()
    send()
    assert main(["train", f"resume={run}"]) == 0
    for folder in ("", "baseline"):
        assert_same(tmp_path / "undisturbed" / folder, run / folder)
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_run_without_a_checkpoint_cannot_be_resumed(words, run, monkeypatch, capsys):
    def interrupted(settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "train", interrupted)
    with pytest.raises(SystemExit):
        main(["train", *words()])
    assert "no new checkpoint was saved; the run has no checkpoint yet; if you repeat" in capsys.readouterr().err


def test_for_several_processes_a_repetition_is_no_second_signal(monkeypatch):
    """torchrun passes on a signal that its workers also get from a cluster."""
    reasons, trainer = [], SimpleNamespace(request_stop=lambda reason: reasons.append(reason))
    monkeypatch.setattr(processes, "several", lambda: True)
    monkeypatch.setattr(processes, "is_first", lambda: False)
    with processes.stoppable(trainer):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        later = time.monotonic() + 5
        monkeypatch.setattr(time, "monotonic", lambda: later)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert reasons == ["SIGTERM"]


def test_a_second_signal_leaves_the_baseline_at_once(words, run, send, capsys):
    send(signal.SIGINT, signal.SIGINT)
    with pytest.raises(SystemExit) as end:
        main(["train", *words("baseline=cloning")])
    assert end.value.code == 130
    assert "; to resume from the last one: torchrl-bcq train resume=" in capsys.readouterr().err
    assert (run / "results.json").exists()
    assert list((run / "baseline").glob("*/checkpoint-*")) == []
    send()
    assert main(["train", *words("baseline=cloning", "resume=true")]) == 0
    assert read_metadata(find_checkpoint(run / "baseline", "last"))[2] == 20


def test_a_signal_ends_a_sweep(words, run, send):
    send(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        main(["train", "-m", *words("baseline=cloning", "seed=0,1")])
    assert end.value.code == 143
    assert sorted(path.name for path in run.iterdir()) == ["0"]


# several processes


def test_only_the_process_that_fails_reports_an_error(words):
    ((code, output),) = finish(torchrun(*words("sed=1")))
    assert code == 1
    assert output.count("torchrl-bcq: there is no setting sed; ") == 1
    assert "PeerError" not in output


def test_two_processes_make_one_run_that_a_signal_stops_and_that_resumes_bit_for_bit(
    words, make_settings, run, tmp_path
):
    process = torchrun(*words(*QUIET, *ENDLESS))
    interrupt(process, signal.SIGTERM, run)  # torchrun passes it on
    ((_, output),) = finish(process)
    assert output.count("SIGTERM: the run stops after this log interval and saves a checkpoint; ") == 1, output
    command = f"torchrun --nproc-per-node 2 -m torchrl_bcq train resume={run}"
    (steps,) = map(int, re.findall(rf"SIGTERM after (\d+) steps; resume with: {command}\n", output))
    assert steps > 0
    assert steps % 5 == 0  # a log_interval
    assert read_metadata(find_checkpoint(run, "last"))[2] == steps
    assert not (run / "results.json").exists()

    before = contents(run)
    ((code, output),) = finish(torchrun(*words(*QUIET)))
    assert code == 1
    assert output.count(f"{run} holds a run of {steps} steps; resume it with resume=true") == 1, output
    assert contents(run) == before

    more = ["checkpoint.interval=100000", f"steps={steps + 7}"]
    clock = f"out={tmp_path}/undisturbed-${{now:%f}}"  # another one in each process
    resumed, undisturbed = [*more, "resume=true"], [*more, clock, "baseline=cloning", "checkpoint.monitor=null"]
    for words_of_it, runs in ((resumed, 1), (undisturbed, 2)):
        ((code, output),) = finish(torchrun(*words(*QUIET, *words_of_it)))
        assert code == 0, output
        assert output.count(f" to {steps + 7} on cpu") == output.count(f"the run has made {steps + 7} steps; ") == runs
        assert output.count("ERROR") == 0
    (undisturbed,) = tmp_path.glob("undisturbed-*")
    assert_same(run, undisturbed)
    assert read_metadata(find_checkpoint(undisturbed / "baseline"))[2] == steps + 7
    log = (undisturbed / "train.log").read_text()
    assert log.count(f"the run has made {steps + 7} steps; ") == 2
    assert {path.name for path in undisturbed.rglob(".*")} == {".lock"}

    more[1] = f"steps={steps + 12}"
    assert train(make_settings(*QUIET, *more, "resume=true"))["steps"] == steps + 12  # one process


def test_only_the_first_process_makes_the_folder_and_others_log_their_own_errors_alone(words, run, monkeypatch, capsys):
    monkeypatch.setattr(processes, "is_first", lambda: False)

    def run_into(error: Exception | None) -> int:
        def train(settings):
            logging.getLogger("train").info("on the way")
            if error is not None:
                raise error
            return {}

        monkeypatch.setattr(module, "train", train)
        return main(["train", *words()])

    assert run_into(None) == 0
    assert run_into(PeerError("the first one failed")) == run_into(FloatingPointError("logged by the first")) == 1
    assert capsys.readouterr() == ("", "")
    assert run_into(RunError("no such file here")) == 1
    assert capsys.readouterr().err.endswith("[torchrl_bcq.cli.train][ERROR] - no such file here\n")
    assert not run.exists()


def test_a_sweep_of_several_processes_is_refused(words, run, monkeypatch, capsys):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    for name in ("joined", "first_goes_first"):
        monkeypatch.setattr(processes, name, nullcontext)
    assert main(["train", "-m", *words("seed=0,1")]) == 1
    assert (
        capsys.readouterr().err
        == "torchrl-bcq: torchrun cannot start several runs with -m; start them one after another without -m.\n"
    )
    assert not run.exists()
