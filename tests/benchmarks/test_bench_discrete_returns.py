"""Data, evaluation, statistics and a small run of the benchmark of returns."""

from __future__ import annotations

import json
from pathlib import Path

import gymnasium
import h5py
import numpy as np
import pytest


@pytest.fixture
def file(tmp_path) -> Path:
    """Episodes of 3, 2 and 5 rows; a time limit cut off the second one."""
    rng, path = np.random.default_rng(0), tmp_path / "poles.hdf5"
    with h5py.File(path, "w") as file:
        file["observations"], file["next_observations"] = rng.normal(size=(2, 10, 4)).astype(np.float32)
        file["actions"], file["rewards"] = rng.integers(0, 2, 10), np.arange(10, dtype=np.float32)
        file["terminals"], file["timeouts"] = np.isin(np.arange(10), [2, 9]), np.arange(10) == 4
        file.attrs.update(env_id="CartPole-v1", n_actions=2)
    return path


def test_episodes_side_by_side_equal_episodes_one_after_another(load):
    command = load("bench_discrete_returns")

    def act(states: np.ndarray) -> np.ndarray:
        return (states[:, 2] + states[:, 3] > 0).astype(np.int64)

    returns = command.evaluate(act, "CartPole-v1", 3)
    for number in range(3):
        env = gymnasium.make("CartPole-v1")
        state, ended, steps = env.reset(seed=command.FIRST_SEED + number)[0], False, 0
        while not ended:
            state, _, terminated, truncated, _ = env.step(int(act(state[None])[0]))
            ended, steps = terminated or truncated, steps + 1
        assert returns[number] == steps


def test_run_adds_what_is_missing_and_report_compares(load, file, tmp_path, capsys):
    command, results = load("bench_discrete_returns"), tmp_path / "results.jsonl"
    run = ["run", str(file), "--steps", "4", "--episodes", "2", "--evaluations", "2", "--results", str(results)]
    command.main([*run, "--only", "BCQ", "--seeds", "0"])
    command.main([*run, "--only", "cloning", "BCQ", "--seeds", "0", "1"])
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    found = [(line["contender"], line["seed"]) for line in lines]
    assert found == [("behaviour", None), ("BCQ", 0), ("cloning", 0), ("cloning", 1), ("BCQ", 1)]
    assert lines[0]["return"] == 15
    assert list(lines[1]["curve"]) == ["2", "4"]
    assert lines[1]["curve"]["4"] == round(lines[1]["return"], 2)
    capsys.readouterr()
    command.main(["report", "--results", str(results)])
    out = capsys.readouterr().out
    assert "| behaviour |  | 15.0 |  |" in out
    assert out.count("| BCQ - ") == 2


def test_report_by_hand(load):
    command = load("bench_discrete_returns")
    each = {"behaviour": [10], "BCQ": [20, 24], "cloning": [22, 22], "tianshou": [0, 2], "d3rlpy": [2, 4]}
    lines = [
        {"dataset": "poles", "contender": name, "seed": seed, "return": value}
        for name, values in each.items()
        for seed, value in enumerate(values)
    ]
    rows = command.report("poles", lines).splitlines()
    assert "| BCQ | 2 | 22.0 ± 2.0 | 20.0, 24.0 |" in rows
    # drawn with replacement, means of BCQ are 20, 22 or 24, and those of d3rlpy 2, 3 or 4, all often
    assert rows[-3:] == [
        "| BCQ - d3rlpy | | +19.0 | 95 % interval +16.0 to +22.0 |",
        "| BCQ - cloning | | +0.0 | 95 % interval -2.0 to +2.0 |",
        "| BCQ - behaviour | | +12.0 | 95 % interval +10.0 to +14.0 |",
    ]


def test_report_of_the_hospital_by_hand(load, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")
    settings = {"masked": False, "gamma": 1.0, "steps": 4}
    lines = [
        {**settings, "threshold": None, "seed": 0, "value": 0.7, "admissible_share": 1.0},
        {**settings, "threshold": 0.3, "seed": 0, "value": 0.75, "admissible_share": 0.5},
        {**settings, "threshold": 0.3, "seed": 1, "value": 0.77, "admissible_share": 0.7},
    ]
    rows = load("bench_hospital").report(lines).splitlines()
    assert rows[2] == "| cloning | 0.7000 (100%) |  |  |"
    assert rows[5] == "| BCQ, threshold 0.3 | 0.7600 ± 0.0100 (60%) |  |  |"
    assert rows[-1] == "Training seeds: [0, 1]"
