"""Several processes make one run, of which the first one alone writes and speaks."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist

from torchrl_bcq.__main__ import main
from torchrl_bcq.cli import processes, train as module
from torchrl_bcq.cli.build import build
from torchrl_bcq.cli.errors import RunError
from torchrl_bcq.cli.run import find_checkpoint, open_dataset, read_metadata
from torchrl_bcq.cli.train import train
from torchrl_bcq.trainers.distributed import PeerError

from .conftest import assert_same, contents

PATIENCE = 120  # seconds, after which they wait for one another in vain
QUIET = [
    "evaluation.env=null",
    "sampler=without_replacement",
    "held_out=0.3",
    "checkpoint.monitor=held_out_td_error",
    "checkpoint.mode=min",
    "checkpoint.keep=1",
]


def torchrun(*arguments: str) -> subprocess.Popen:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*launch, "-m", "torchrl_bcq", "train", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
    )


def finish(*started: subprocess.Popen) -> list[tuple[int, str]]:
    """Exit codes and outputs."""
    try:
        outputs = [process.communicate(timeout=PATIENCE)[0] for process in started]
    finally:
        for process in started:
            process.terminate()  # and with it those that it has started
    return [(process.returncode, output) for process, output in zip(started, outputs, strict=True)]


def test_two_processes_make_one_run_that_a_signal_stops_and_that_goes_on_bit_by_bit(words, make_config, run, tmp_path):
    process = torchrun(*words(*QUIET, "steps=1000000", "checkpoint.interval=100000"))
    loss = run / "log" / "scalars" / "loss_vae.csv"
    deadline = time.monotonic() + PATIENCE
    while not loss.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)  # which torchrun hands on
    ((_, output),) = finish(process)
    assert output.count("SIGTERM: saving after these steps; once more to leave at once") == 1, output
    (steps,) = map(int, re.findall(rf"SIGTERM after (\d+) steps; go on with: torchrl-bcq train resume={run}\n", output))
    assert steps > 0
    assert steps % 5 == 0  # a log_interval
    assert read_metadata(find_checkpoint(run, "last"))[2] == steps
    assert not (run / "results.json").exists()

    before = contents(run)
    ((code, output),) = finish(torchrun(*words(*QUIET)))
    assert code == 1
    assert output.count(f"{run} holds a run of {steps} steps; go on with it by resume=true") == 1, output
    assert contents(run) == before

    more = ["checkpoint.interval=100000", f"steps={steps + 7}"]
    clock = f"out={tmp_path}/undisturbed-${{now:%f}}"  # another one in each process
    ends = finish(torchrun(*words(*QUIET, *more, "resume=true")), torchrun(*words(*QUIET, *more, clock)))
    for code, output in ends:
        assert code == 0, output
        assert output.count(f" to {steps + 7} on cpu") == output.count(f"{steps + 7} steps made") == 1
        assert output.count("ERROR") == 0
    (undisturbed,) = tmp_path.glob("undisturbed-*")
    assert_same(run, undisturbed)
    log = (undisturbed / "train.log").read_text()
    assert log.count(f"{steps + 7} steps made") == 1
    assert {path.name for path in undisturbed.rglob(".*")} == {".lock"}

    more[1] = f"steps={steps + 12}"
    assert train(make_config(*QUIET, *more, "resume=true"))["steps"] == steps + 12  # one process


@pytest.fixture
def second_of_two(monkeypatch):
    """As if another process had been started before this one, on a machine with two GPUs."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")


@pytest.mark.parametrize(("variables", "joins"), [({}, 0), ({"WORLD_SIZE": "1"}, 0), ({"WORLD_SIZE": "2"}, 1)])
@pytest.mark.parametrize(("gpus", "backend", "device"), [(0, "gloo", []), (4, "cpu:gloo,cuda:nccl", [1])])
def test_joins_what_torchrun_has_started(monkeypatch, variables, joins, gpus, backend, device):
    calls, devices = [], []
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **settings: calls.append(backend))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: calls.append("destroyed"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    if variables:
        variables = {**variables, "TORCHELASTIC_RUN_ID": "1", "LOCAL_RANK": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(KeyError, match="within"), processes.joined():
        raise KeyError("within")
    assert calls == [backend, "destroyed"] * joins
    assert devices == device * joins


def test_a_single_process_asks_nobody():
    assert processes.is_first()
    assert not processes.several()
    assert processes.own_seed(7) == 7
    assert processes.from_first(lambda: "value") == "value"
    processes.check_device("cuda:0")


@pytest.mark.usefixtures("second_of_two")
def test_the_second_of_two_is_another():
    assert not processes.is_first()
    assert processes.own_seed(7) not in range(1_000)
    for device in ("auto", "cuda", "cpu"):
        processes.check_device(device)


@pytest.fixture
def not_the_first(monkeypatch):
    monkeypatch.setattr(processes, "is_first", lambda: False)


@pytest.mark.usefixtures("not_the_first")
def test_the_others_make_no_folder_and_say_nothing_but_what_went_wrong_there(words, run, monkeypatch, capsys):
    def run_into(error: Exception | None) -> int:
        def train(config):
            logging.getLogger("train").info("on the way")
            if error is not None:
                raise error

        monkeypatch.setattr(module, "train", lambda config: train(config) or {})
        return main(["train", *words()])

    assert run_into(None) == 0
    assert run_into(PeerError("told by the first")) == run_into(FloatingPointError("told by the first")) == 1
    assert capsys.readouterr() == ("", "")
    assert run_into(RunError("no such file here")) == 1
    assert capsys.readouterr().err.endswith("[torchrl_bcq.cli.train][ERROR] - no such file here\n")
    assert not run.exists()


def test_the_others_neither_log_nor_evaluate(make_config, run, request):
    built = []
    for fixture in (None, "not_the_first"):
        if fixture:
            request.getfixturevalue(fixture)
        config = make_config("logger=[csv]", "evaluation.env=null", "checkpoint.monitor=loss_vae")
        built.append(build(config, *open_dataset(config)))
    assert [trainer.logger is None for trainer in built] == [False, True]
    assert [len(trainer._post_steps_log_ops) for trainer in built] == [2, 0]  # metrics, and the best checkpoint


@pytest.mark.usefixtures("second_of_two")
@pytest.mark.parametrize(
    ("device", "gpus", "message"),
    [
        ("cuda:1", 2, "device=cuda:1 is one device for 2 processes; device=cuda gives each its own"),
        ("auto", 1, "there are 2 processes for 1 GPUs; start as many by torchrun --nproc-per-node, or choose dev"),
        ("cuda", 0, "there are 2 processes for 0 GPUs"),
    ],
)
def test_a_device_for_several_is_refused(monkeypatch, device, gpus, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(RunError, match=message):
        processes.check_device(device)


@pytest.mark.usefixtures("second_of_two")
def test_a_sweep_of_several_processes_is_refused(words, run, monkeypatch, capsys):
    monkeypatch.setattr(processes, "joined", nullcontext)
    assert main(["train", "-m", *words("seed=0,1")]) == 1
    assert capsys.readouterr().err == "torchrl-bcq: torchrun makes one run; start those of -m one after the other.\n"
    assert not run.exists()
