"""Data parallelism: replicas stay equal, and begin, stop, fail and save together."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .conftest import logged, random_state, weights
from .replica_scenarios import CLIPPED, make, make_transitions, one_step_without_noise, watched

ROOT = Path(__file__).parents[2]
PATIENCE = 300  # seconds that all scenarios may take
SAME = {"rtol": 0, "atol": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The results of all scenarios, which three processes have run."""
    folder = tmp_path_factory.mktemp("replicas")
    processes = []
    for rank in range(3):
        command = [sys.executable, "-m", "tests.trainers.replica_scenarios", str(rank), str(folder)]
        with (folder / f"errors{rank}").open("w") as errors:
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            processes.append(subprocess.Popen(command, cwd=ROOT, stdout=errors, stderr=errors, env=env))
    try:
        codes = [process.wait(PATIENCE) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert codes == [0, 0, 0], [(folder / f"errors{rank}").read_text()[-2000:] for rank in range(3)]
    return folder


@pytest.fixture(scope="module")
def results(folder):
    """Results of a scenario, by rank."""

    def read(name: str, processes: int = 2) -> list[dict]:
        return [torch.load(folder / f"{name}-{processes}.{rank}", weights_only=True) for rank in range(processes)]

    return read


@pytest.fixture(scope="module")
def alone() -> dict:
    """A single process with the seed of the first of several."""
    return watched(make(make_transitions(), 0, 100, sampler="uniform", data_parallel=False))


def assert_same(found: dict, expected: dict, *names: str) -> None:
    for name in names:
        torch.testing.assert_close(found[name], expected[name], **SAME)


def assert_different(one: dict, other: dict) -> None:
    learned = [name for name in one["weights"] if name.endswith(("weight", "bias"))]
    assert not any(torch.equal(one["weights"][name], other["weights"][name]) for name in learned)


def assert_other_noise(*found: dict) -> None:
    assert len({tuple(each["next noise"].tolist()) for each in found}) == len(found)


def assert_a_round(rows: list[list[int]]) -> None:
    """The first batches hold each of the hundred rows once."""
    assert sorted(row for batch in rows[:7] for row in batch) == [*range(100)]


# learning


def test_replicas_are_equal_after_a_hundred_steps(results, alone):
    first, second = results("a_hundred_steps")
    assert first["error"] is second["error"] is None
    assert first["steps"] == second["steps"] == [100] * 3
    assert_same(first, second, "weights", "optimizers", "metrics")
    assert_different(first, alone)


def test_the_first_process_draws_as_a_single_one_and_the_second_other_rows_and_noise(results, alone):
    first, second = results("a_hundred_steps")
    assert_same(first, alone, "rows", "next rows", "next noise")
    assert_same(first["logs"][0], alone["logs"][0], "loss_vae")  # before anything was learned
    shared = [len({*one} & {*other}) for one, other in zip(first["rows"], second["rows"], strict=True)]
    assert sum(shared) / 100 < 5  # 16 of 100 rows, twice: 2.2 are expected
    assert_other_noise(first, second)


def test_two_batches_count_as_one_of_twice_the_size(results):
    """Without noise, by SGD; the mean of the gradients is clipped, not each gradient."""
    joined = make(make_transitions()[:32], 0, 1, data_parallel=False, **CLIPPED)
    joined._replay.replay_buffer._batch_size = 32
    before, expected = weights(joined), one_step_without_noise(joined)
    moved = {name: expected[name] - before[name] for name in before}
    assert sum(value.square().sum() for name, value in moved.items() if name.startswith("vae")).sqrt() == pytest.approx(
        0.1 * 0.05, rel=1e-3
    )
    for found in results("half_a_batch_each"):
        torch.testing.assert_close({n: found[n] - before[n] for n in before}, moved, rtol=1e-4, atol=1e-7)


def test_logs_are_means_over_processes(results, folder):
    both = results("a_hundred_steps")
    last = [torch.stack([logs["td_error"] for logs in each["logs"][90:]]).mean() for each in both]
    assert last[0] != last[1]
    for each in both:
        assert each["metrics"]["td_error"] == pytest.approx(sum(last).item() / 2, rel=1e-4)
    assert logged(folder / "log0")["td_error"][-1].split(",")[0] == "100"
    assert logged(folder / "log1") == {}


# resuming


def test_two_processes_resume_bit_for_bit(results):
    """Networks, optimizers, and the sampler, generator and random state of each process."""
    for found, expected in zip(results("second_half"), results("undisturbed"), strict=True):
        assert found["error"] is None
        assert_same(found, expected, "weights", "optimizers", "next rows", "next noise")
        assert found["rows"] == expected["rows"][20:]


def test_two_processes_resume_from_the_best_checkpoint(results, folder):
    kept = sorted(path.name for path in (folder / "undisturbed" / "best").iterdir())
    assert kept == ["checkpoint-000000000020"]
    for found, expected in zip(results("from_the_best"), results("undisturbed"), strict=True):
        assert_same(found, expected, "weights", "optimizers", "next rows", "next noise")
        assert found["rows"] == expected["rows"][20:]


def test_one_process_resumes_from_two(results):
    (found,), both = results("second_half", 1), results("undisturbed")
    assert found["steps"] == [40] * 3
    assert found["rows"] == both[0]["rows"][20:]
    assert_different(found, both[0])


def test_three_processes_resume_from_one(results):
    """The new ones begin rounds that follow from the checkpoint, not from their seeds."""
    three, again = results("second_half_of_one", 3), results("second_half_of_one_again", 3)
    undisturbed = watched(make(make_transitions(), 0, data_parallel=False))
    assert three[0]["rows"] == undisturbed["rows"][20:]
    for other in three[1:]:
        assert_a_round(other["rows"])
        assert_same(other, three[0], "weights", "optimizers")
    assert len({str(rows[:7]) for rows in (undisturbed["rows"], three[1]["rows"], three[2]["rows"])}) == 3
    assert_other_noise(*three)
    for found, expected in zip(again, three, strict=True):
        assert_same(found, expected, "weights", "optimizers", "rows", "next rows", "next noise")


def test_three_processes_resume_from_two(results):
    three, two = results("second_half", 3), results("undisturbed")
    for found, expected in zip(three, two, strict=False):
        assert found["rows"] == expected["rows"][20:]
    assert_a_round(three[2]["rows"])
    assert_other_noise(*three)
    for each in three:
        assert_same(each, three[0], "weights", "optimizers")


def test_a_checkpoint_holds_the_states_of_other_processes_without_a_pickle(folder):
    two, one = random_state(folder / "checkpoint"), random_state(folder / "alone")
    assert two.keys() == one.keys()
    assert one["ranks"] == {}
    assert two["ranks"].keys() == {"1"}
    assert two["ranks"]["1"].keys() == {"sampler", "random_state"}
    assert not torch.equal(two["torch_cpu"], two["ranks"]["1"]["random_state"]["torch_cpu"])
    assert {file.suffix for file in (folder / "checkpoint").rglob("*") if file.is_file()} == {".json", ".pt"}


# stops and errors


@pytest.mark.parametrize(
    ("name", "step", "reason"),
    [
        ("a_stop_in_the_second", 20, "enough"),  # asked for in step 17
        ("a_stop_before_the_first_step", 0, None),
        ("early_stopping_in_the_first", 30, "Monitored metric 'score' did not improve for 20 frames."),
    ],
)
def test_all_processes_stop_at_the_same_step(results, name, step, reason):
    for found in results(name):
        assert (found["steps"], found["stop"], found["error"]) == ([step] * 3, reason, None)


def test_a_stop_leaves_a_checkpoint_of_its_step(folder):
    assert make(make_transitions(), 0, data_parallel=False).load_from_file(folder / "stopped").collected_frames == 20


def test_a_loss_that_is_not_finite_in_one_process_ends_all(results, folder):
    both = results("not_finite_in_the_second")
    shown = ", ".join(map(str, both[1]["rows"][12][:10]))
    file = folder / "nan" / "not-finite-13.pt"
    message = f"FloatingPointError: in process 1: qvalue_loss is nan in gradient step 13, on the 16 rows {shown} ... of"
    for found in both:
        assert found["error"].startswith(message)
        assert f"torch.load({str(file)!r})" in found["error"]
    assert torch.load(file, weights_only=True)["index"].tolist() == both[1]["rows"][12]
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_process_with_finite_losses_ends_too(results):
    for found in results("not_finite_in_the_last_loss"):
        assert found["error"].startswith("FloatingPointError: in process 1: actor_loss is nan in gradient step 10,")
        assert found["steps"] == [10] * 3


def test_a_checkpoint_that_cannot_be_written_ends_all_processes(results):
    first, second = (found["error"] for found in results("a_full_disk"))
    assert first.startswith("OSError: the checkpoint after 10 gradient steps cannot be written")
    assert second == f"PeerError: in process 0: {first.partition(': ')[2]}"


@pytest.mark.parametrize(
    ("name", "error"),
    [
        (
            "one_leaves_an_interval",
            "RuntimeError: a hook has ended the log interval 8 gradient steps early, but ",
        ),
        ("one_raises", "KeyError: 'of its own'"),
    ],
)
def test_no_process_waits_for_one_that_has_ended(results, name, error):
    first, second = (found["error"] for found in results(name))
    assert second.startswith(error)
    assert first.startswith("PeerError: process 0 of 2 waited for another process, which has ended or does not answer")


# refused settings


def test_the_same_seed_in_two_buffers_is_refused(results):
    for found in results("the_same_seed"):
        assert found["error"] == (
            "ValueError: the replay buffers of processes 0 and 1 would draw the same rows; give each buffer a "
            "different seed: make_replay_buffer(..., seed=seed + rank)."
        )
        assert found["steps"] == [0] * 3


def test_trainers_with_different_log_intervals_are_refused(results):
    for found in results("other_log_intervals"):
        assert found["error"] == (
            "ValueError: the processes differ in log_interval: [10, 11]; make the same trainer in each of them."
        )
