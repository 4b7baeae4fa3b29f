"""Arithmetic of the benchmark of returns, and a small matrix that is continued."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

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
def bench(monkeypatch):
    monkeypatch.syspath_prepend(HERE)
    return importlib.import_module("bench_returns")


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
        compose(["dataset=a.hdf5", "out=b", *words])
    assert len({bench.folder_of(name) for name in bench.SETTINGS}) == len(bench.SETTINGS)


def test_a_matrix_continues_where_it_was(tmp_path):
    rng = np.random.default_rng(0)
    with h5py.File(tmp_path / "swing.hdf5", "w") as file:
        for name, width in (("observations", 3), ("next_observations", 3), ("actions", 1)):
            file[name] = rng.uniform(-1, 1, (60, width)).astype(np.float32)
        file["rewards"], file["terminals"], file["timeouts"] = (
            rng.normal(size=60),
            np.zeros(60),
            np.arange(60) % 20 == 19,
        )
        file.attrs.update(env_id="Pendulum-v1", ref_min_score=-1200.0, ref_max_score=-100.0)
        found_score = (np.sum(file["rewards"][:]) / 3 + 1200) / 11  # three episodes
    (tmp_path / "bad.hdf5").write_bytes(b"")
    results = tmp_path / "results.jsonl"

    def run(seeds: list[int], *datasets: str) -> subprocess.CompletedProcess:
        words = [tmp_path, "--datasets", *datasets, "--settings", "cloning", "--steps", 10, "--out", tmp_path / "runs"]
        words += ["--results", results, "--commit", "abc", "--seeds", *seeds, "--overrides", *SMALL]
        command = [sys.executable, "-W", "ignore", HERE / "bench_returns.py", "run", *words]
        return subprocess.run([*map(str, command)], capture_output=True, text=True)

    for seeds in ([0], [0, 1]):
        assert (done := run(seeds, "swing")).returncode == 0, done.stderr
    failed = run([2], "bad", "swing")
    assert failed.returncode == 1
    assert "1 of 2 runs failed" in failed.stderr
    found = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(line["seed"], line["step"]) for line in found] == [(s, t) for s in (0, 1, 2) for t in (0, 5, 10)]
    for line in found:
        assert line["behaviour_score"] == pytest.approx(found_score, abs=1e-3)
        assert line["normalized_score"] == pytest.approx((line["return"] + 1200) / 11, abs=1e-2)
