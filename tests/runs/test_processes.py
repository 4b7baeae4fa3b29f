"""The processes of a run: who joins, who writes, and on which device."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from torchrl_bcq.errors import RunError
from torchrl_bcq.runs import processes
from torchrl_bcq.runs.assembly import assemble
from torchrl_bcq.runs.dataset import open_dataset


@pytest.fixture
def second_of_two(monkeypatch):
    """As if another process had been started before this one, on a machine with two GPUs."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")


@pytest.mark.parametrize(("variables", "joins"), [({}, 0), ({"WORLD_SIZE": "1"}, 0), ({"WORLD_SIZE": "2"}, 1)])
@pytest.mark.parametrize(("gpus", "backend", "device"), [(0, "gloo", []), (4, "cpu:gloo,cuda:nccl", [1])])
def test_processes_that_torchrun_has_started_are_joined(monkeypatch, variables, joins, gpus, backend, device):
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


def test_a_single_process_is_the_first_one():
    assert processes.is_first()
    assert not processes.several()
    assert processes.own_seed(7) == 7
    assert processes.from_first(lambda: "value") == "value"
    processes.check_device("cuda:0")


@pytest.mark.usefixtures("second_of_two")
def test_the_second_process_is_not_the_first():
    assert not processes.is_first()
    assert processes.own_seed(7) not in range(1_000)
    for device in ("auto", "cuda", "cpu"):
        processes.check_device(device)


def test_only_the_first_process_logs_and_evaluates(make_settings, monkeypatch):
    built = []
    for is_first in (True, False):
        monkeypatch.setattr(processes, "is_first", lambda is_first=is_first: is_first)
        settings = make_settings("logger=[csv]", "evaluation.env=null", "checkpoint.monitor=loss_vae")
        built.append(assemble(settings, *open_dataset(settings)))
    assert [trainer.logger is None for trainer in built] == [False, True]
    assert [len(trainer._post_steps_log_ops) for trainer in built] == [2, 0]  # metrics, and the best checkpoint


@pytest.mark.usefixtures("second_of_two")
@pytest.mark.parametrize(
    ("device", "gpus", "message"),
    [
        ("cuda:1", 2, "device=cuda:1 is one GPU for 2 processes; with device=cuda, each process has its own"),
        ("auto", 1, "there are 2 processes, but the number of GPUs is 1; start one process for each GPU "),
        ("cuda", 0, "there are 2 processes, but the number of GPUs is 0"),
    ],
)
def test_a_device_for_several_is_refused(monkeypatch, device, gpus, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(RunError, match=message):
        processes.check_device(device)
