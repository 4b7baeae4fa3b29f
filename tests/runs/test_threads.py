"""The number of CPU threads: the faster one is taken, nothing else changes, and a resumed run keeps it."""

from __future__ import annotations

import logging
import os

import pytest
import torch
import torchrl

from torchrl_bcq.errors import RunError
from torchrl_bcq.runs import threads
from torchrl_bcq.runs.assembly import assemble, check_numbers
from torchrl_bcq.runs.dataset import open_dataset
from torchrl_bcq.runs.folder import find_checkpoint, read_metadata
from torchrl_bcq.runs.job import train
from torchrl_bcq.runs.settings import load_settings


@pytest.fixture
def timed(monkeypatch):
    """Let a pass take these milliseconds with 1 and with 2 threads; returns the numbers of threads that were timed."""

    def use(one: float, two: float, cpus: int = 4, default: int = 2) -> list[int]:
        seen: list[int] = []

        def step(loss, batch):
            seen.append(torch.get_num_threads())
            return {1: one, 2: two}[seen[-1]] / 1e3

        monkeypatch.setattr(threads, "_time_step", step)
        monkeypatch.setattr(threads, "usable_cpus", lambda: cpus)
        monkeypatch.setattr(torchrl, "_THREAD_POOL_INIT", default)
        torch.set_num_threads(default)
        return seen

    return use


@pytest.fixture
def trainer(make_settings):
    settings = make_settings("evaluation.env=null", "sampler=without_replacement")
    return assemble(settings, *open_dataset(settings))


@pytest.fixture
def rows(make_settings):
    return open_dataset(make_settings("evaluation.env=null"))[0][:8]


@pytest.mark.parametrize(("one", "two", "chosen"), [(10, 80, 1), (10, 5, 2), (10, 9.5, 1)])
def test_the_faster_number_is_taken(timed, trainer, rows, caplog, one, two, chosen):
    caplog.set_level(logging.INFO)
    seen = timed(one, two)
    assert threads.choose_threads(trainer.loss_module, rows) == chosen
    assert seen[:4] == [1, 2, 1, 2]
    assert torch.get_num_threads() == 2
    assert caplog.messages[-1] == (
        f"threads: {chosen}; the passes of a gradient step took {one} ms with 1 thread and {two} ms with 2 threads"
    )


def test_slow_passes_end_the_measurement_early(timed, trainer, rows):
    seen = timed(4000, 1000)
    threads.choose_threads(trainer.loss_module, rows)
    assert len(seen) == 2 * 4  # a warm-up and three rounds


@pytest.mark.parametrize(("cpus", "default"), [(1, 2), (4, 1)])
def test_nothing_is_timed_if_there_is_no_choice(timed, trainer, rows, cpus, default):
    seen = timed(1, 1, cpus, default)
    assert threads.choose_threads(trainer.loss_module, rows) == 1
    assert seen == []


@pytest.mark.parametrize("algorithm", ["bcq", "cloning"])
def test_measuring_changes_nothing(make_settings, monkeypatch, algorithm, rows):
    monkeypatch.setattr(threads, "usable_cpus", lambda: 2)
    more = ["loss.use_prioritized_weights=true"] if algorithm == "bcq" else []
    settings = make_settings(f"algorithm={algorithm}", "evaluation.env=null", *more)
    torch.set_num_threads(2)
    trainer = assemble(settings, *open_dataset(settings))
    before = {name: value.clone() for name, value in trainer.loss_module.state_dict().items()}
    random, sampler = torch.get_rng_state(), trainer._replay.replay_buffer._rng.get_state()
    assert threads.choose_threads(trainer.loss_module, rows) in (1, 2)
    after = trainer.loss_module.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert torch.equal(random, torch.get_rng_state())
    assert torch.equal(sampler, trainer._replay.replay_buffer._rng.get_state())
    assert all(parameter.grad is None for parameter in trainer.loss_module.parameters())


def test_a_resumed_run_keeps_its_number(make_settings, timed, tmp_path):
    seen = timed(10, 5)
    train(make_settings())
    assert load_settings(tmp_path / "run").threads == 2
    assert read_metadata(find_checkpoint(tmp_path / "run", "last"))[0].threads == 2
    seen = timed(5, 10)
    train(make_settings("resume=true", "steps=30"))
    assert seen == []
    assert read_metadata(find_checkpoint(tmp_path / "run", "last"))[0].threads == torch.get_num_threads() == 2
    train(make_settings("resume=true", "steps=40", "threads=1"))
    assert torch.get_num_threads() == 1


def test_a_number_and_null_keep_their_meanings(make_settings, timed, tmp_path):
    seen = timed(5, 10)
    for setting in ("null", "2"):
        train(make_settings(f"threads={setting}", f"out={tmp_path / setting}"))
        assert torch.get_num_threads() == 2
    assert seen == []
    for word in ("0", "many"):
        with pytest.raises(RunError, match=r"^threads is .*, expected auto, a number of at least 1, or null"):
            check_numbers(make_settings(f"threads={word}"))


@pytest.mark.parametrize(
    ("groups", "files", "quotas"),
    [
        ("0::/job", {"cpu.max": "max 100000", "job/cpu.max": "150000 100000"}, [1.5]),
        ("0::/job/step", {"job/cpu.max": "400000 100000", "job/step/cpu.max": "250000 100000"}, [2.5, 4]),
        ("0::/not/visible", {"cpu.max": "200000 100000"}, [2]),
        (
            "4:memory:/\n3:cpu,cpuacct:/a",
            {"cpu/a/cpu.cfs_quota_us": "50000", "cpu/a/cpu.cfs_period_us": "100000"},
            [0.5],
        ),
        ("3:cpu:/", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, []),
        ("0::/", {}, []),
    ],
)
def test_quotas_of_cgroups(tmp_path, groups, files, quotas):
    (tmp_path / "cgroup").write_text(groups + "\n")
    for name, text in files.items():
        file = tmp_path / "mounts" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert list(threads._quotas(tmp_path / "mounts", tmp_path / "cgroup")) == quotas


def test_a_quota_limits_the_usable_cpus(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    for quotas, cpus in {(): 8, (2.5, 4.0): 3, (0.2,): 1}.items():
        monkeypatch.setattr(threads, "_quotas", lambda quotas=quotas: iter(quotas))
        assert threads.usable_cpus() == cpus
