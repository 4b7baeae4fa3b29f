"""Arithmetic of the benchmark of returns, and a small matrix that is continued."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import gymnasium
import h5py
import numpy as np
import pytest

from torchrl_bcq.evaluation.environments import make_envs
from torchrl_bcq.runs.settings import compose

HERE = Path(__file__).parent
SMALL = [
    "network.hidden=[8]",
    "log_interval=5",
    "evaluation.interval=5",
    "evaluation.episodes=1",
    "checkpoint.interval=5",
]


@pytest.fixture
def bench(load):
    return load("bench_returns")


def lines(scores: dict[int, list[float]], setting: str = "paper") -> list[dict]:
    shared = {"dataset": "cart", "setting": setting, "steps": 100_000, "overrides": [], "seconds": 3600, "return": 0.0}
    shared |= {"behaviour_score": 2.5, "commit": "abc", "device": "a CPU"}
    return [
        {**shared, "seed": seed, "step": step, "normalized_score": score}
        for seed, curve in scores.items()
        for step, score in enumerate(curve)
    ]


def test_scores_of_a_run(bench):
    """The step 0 is left out; the lowest of the last five evaluations is not the lowest of all."""
    found = bench.scores(lines({0: [99, 1, 9, 5, 6, 7, 8], 1: [0, 2, 3, 4, 5, 6, 7]}), "cart")
    assert found == {"paper": {"last": [8, 7], "best": [9, 7], "lowest": [5, 3]}}


def test_runs_of_other_lengths_and_overrides_have_their_own_rows(bench):
    short = [line | {"steps": 20_000} for line in lines({0: [0, 5]})]
    compiled = [line | {"overrides": ["compile=true"]} for line in lines({0: [0, 7]})]
    found = bench.scores([*lines({0: [0, 9]}), *short, *compiled], "cart")
    assert {name: row["last"] for name, row in found.items()} == {
        "paper": [9],
        "paper (20,000 steps)": [5],
        "paper (compile=true)": [7],
    }
    assert bench.folder_of("paper (20,000 steps, a.b=[1,2])") == "paper-20-000-steps-a.b=-1-2"
    with pytest.raises(ValueError, match="cart, paper, seed 0 has two lines for step 1"):
        bench.scores([*lines({0: [0, 9]})] * 2, "cart")


def test_interquartile_mean_and_its_interval(bench):
    assert bench.interquartile_mean(np.array([0.0, 1.0, 2.0, 99.0])) == 1.5
    mean, ends = bench.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == "3.0"
    low, high = (float(end) for end in ends.strip("()").split(" to "))
    assert 1 <= low < 3 < high <= 5
    assert bench.interval([4.0]) == ("4.0", "")


def test_a_run_that_another_command_has_finished_is_not_written_twice(bench, tmp_path, monkeypatch):
    results = tmp_path / "results.jsonl"
    words = [
        "run",
        str(tmp_path),
        "--datasets",
        "cart",
        "--settings",
        "paper",
        "--seeds",
        "0",
        "--results",
        str(results),
    ]

    def train(run, args):
        found = lines({0: [0, 1]})
        results.write_text("".join(json.dumps(line) + "\n" for line in found))
        return found

    monkeypatch.setattr(bench, "train", train)
    bench.main(words)
    assert len(results.read_text().splitlines()) == 2


def test_report_and_picture(bench):
    found = bench.report("cart", [*lines({0: [0, 1], 1: [0, 1]}), *lines({0: [0, 7]}, "flow")]).splitlines()
    assert found[2:] == [
        "| recorded behaviour |  | 2.5 |  |  |  |",
        "| paper | 2 | 1.0 (1.0 to 1.0) | 1.0 (1.0 to 1.0) | 1.0 (1.0 to 1.0) | 1.00 |",
        "| flow | 1 | 7.0  | 7.0  | 7.0  | 1.00 |",
        "",
        "Commits: abc; machines: a CPU.",
    ]
    (axes,) = bench.draw(lines({0: [0, 1], 1: [0, 3]})).axes
    assert axes.lines[0].get_ydata().tolist() == [0, 2]


def test_settings_exist_and_have_their_own_folders(bench):
    for words in bench.SETTINGS.values():
        compose(["dataset=a.hdf5", "algorithm=bcq", "out=b", *words])
    assert len({bench.folder_of(name) for name in bench.SETTINGS}) == len(bench.SETTINGS)


def write_swing(path: Path, env_id: str = "Pendulum-v1") -> float:
    """Write three episodes of a pendulum, and return the normalized score of the recorded behaviour."""
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        for name, width in (("observations", 3), ("next_observations", 3), ("actions", 1)):
            file[name] = rng.uniform(-1, 1, (60, width)).astype(np.float32)
        file["rewards"] = rng.normal(size=60)
        file["terminals"], file["timeouts"] = np.zeros(60), np.arange(60) % 20 == 19
        file.attrs.update(env_id=env_id, ref_min_score=-1200.0, ref_max_score=-100.0)
        return (np.sum(file["rewards"][:]) / 3 + 1200) / 11


def test_another_library_is_evaluated_as_this_package(bench, tmp_path, monkeypatch):
    """The initial states are those of ``torchrl-bcq train``; a policy that does nothing has Gymnasium's returns."""
    peers = importlib.import_module("peer_returns")
    score, made, given, seen = write_swing(tmp_path / "swing.hdf5"), [], [], []

    def act(states):
        seen.append(states)
        return np.zeros((len(states), 1), np.float32)

    def library(data, sizes, seed, out):
        given.append((len(data), sizes.observations, sizes.actions, sizes.bound, seed))
        return lambda: made.append(1), lambda: act

    monkeypatch.setattr(peers, "CONTENDERS", {"tianshou": library})
    run = {"dataset": "swing", "setting": "tianshou", "seed": 3, "steps": 10}
    args = bench.parse(["run", str(tmp_path), "--settings", "tianshou"])
    script, *words = bench.peer_command(run, args, tmp_path / "swing.hdf5", tmp_path / "out")
    assert Path(script).name == "peer_returns.py"
    peers.main([*words, "--interval", "5", "--episodes", "2"])
    assert (len(made), given) == (10, [(60, 3, 1, 2.0, 3)])
    envs = make_envs("Pendulum-v1", 2)
    envs.set_seed(compose(["dataset=a.hdf5", "algorithm=bcq", "out=b"])[0].evaluation.seed)
    assert np.array_equal(seen[0], envs.reset()["observation"])
    env, returns = gymnasium.make("Pendulum-v1"), []
    for cosine, sine, speed in seen[0]:
        env.reset()
        env.unwrapped.state = np.array([np.arctan2(sine, cosine), speed])
        returns.append(sum(env.step([0.0])[1] for _ in range(200)))
    found = bench.read_metric(tmp_path / "out" / "log" / "scalars" / "return.csv")
    assert found == dict.fromkeys((0, 5, 10), pytest.approx(np.mean(returns), rel=1e-3))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (results["behaviour"]["mean"] + 1200) / 11 == pytest.approx(score)


def test_a_matrix_continues_where_it_was(tmp_path):
    found_score = write_swing(tmp_path / "swing.hdf5")
    (tmp_path / "bad.hdf5").write_bytes(b"")
    write_swing(tmp_path / "unknown.hdf5", env_id="NoSuch-v1")
    with h5py.File(tmp_path / "plain.hdf5", "w"):
        pass
    results = tmp_path / "results.jsonl"

    def run(seeds: list[int], *datasets: str) -> subprocess.CompletedProcess:
        words = [tmp_path, "--datasets", *datasets, "--settings", "cloning", "--steps", 10, "--out", tmp_path / "runs"]
        words += ["--results", results, "--commit", "abc", "--seeds", *seeds, "--overrides", *SMALL]
        command = [sys.executable, "-W", "ignore", HERE / "bench_returns.py", "run", *words]
        return subprocess.run([*map(str, command)], capture_output=True, text=True)

    for seeds in ([0], [0, 1]):
        assert (done := run(seeds, "swing")).returncode == 0, done.stderr
    failed = run([2], "bad", "swing", "unknown", "plain")
    assert failed.returncode == 1
    assert "3 of 4 runs failed" in failed.stderr
    assert "`NoSuch` doesn't exist" in failed.stdout
    assert "plain.hdf5 lacks the attributes ['env_id', 'ref_max_score', 'ref_min_score']" in failed.stdout
    assert {file.name for file in (tmp_path / "runs").iterdir()} == {"swing"}
    found = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(line["seed"], line["step"]) for line in found] == [(s, t) for s in (0, 1, 2) for t in (0, 5, 10)]
    for line in found:
        assert line["behaviour_score"] == pytest.approx(found_score, abs=1e-3)
        assert line["normalized_score"] == pytest.approx((line["return"] + 1200) / 11, abs=1e-2)
