"""Rewards that are shifted, scaled and clipped for training; returns remain those of the environment."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch

from torchrl_bcq.__main__ import main
from torchrl_bcq.errors import RunError
from torchrl_bcq.runs.assembly import assemble, change_rewards
from torchrl_bcq.runs.dataset import open_dataset
from torchrl_bcq.runs.folder import load
from torchrl_bcq.runs.job import train

CHANGE = ["reward.shift=1", "reward.scale=10", "reward.clip=15"]  # -3, -1.25, 0.25, 1.5 become -15, -2.5, 12.5, 15
REWARDS = np.resize([-3, -1.25, 0.25, 1.5], 200)
EXPECTED = np.resize([-15, -2.5, 12.5, 15], 200).tolist()


@pytest.mark.parametrize("root", [True, False])
def test_rewards_are_shifted_then_scaled_then_clipped(make_settings, make_file, tmp_path, root):
    make_file(rewards=REWARDS)
    settings = make_settings(*CHANGE, *([f"root={tmp_path / 'copies'}"] if root else []))
    transitions, task = open_dataset(settings)
    changed = change_rewards(settings, transitions)
    assert changed["next", "reward"].flatten().tolist() == EXPECTED
    assert transitions["next", "reward"].flatten().tolist() == REWARDS.tolist()
    assert task.behaviour["mean"] == -12.5  # five times the sum of the four rewards
    buffer = assemble(settings, transitions, task)._replay.replay_buffer
    assert buffer[:]["next", "reward"].flatten().tolist() == EXPECTED


def test_sums_of_several_steps_are_of_changed_rewards(make_settings, make_file):
    make_file(rewards=REWARDS)
    settings = make_settings(*CHANGE, "n_step=2", "loss.gamma=0.5", "evaluation.env=null")
    buffer = assemble(settings, *open_dataset(settings))._replay.replay_buffer
    assert buffer[:]["next", "reward"].flatten()[:3].tolist() == [-15 - 1.25, -2.5 + 6.25, 12.5 + 7.5]


def test_weights_follow_the_returns_of_the_environment(make_settings, make_file):
    """All changed rewards are 1, so weights from them would be equal."""
    make_file(rewards=np.repeat(np.arange(2, 12), 20).astype(float))
    settings = make_settings("reward.clip=1", "weights=return", "evaluation.env=null")
    buffer = assemble(settings, *open_dataset(settings))._replay.replay_buffer
    drawn = torch.cat([buffer.sample()["index"] for _ in range(100)])
    assert (drawn >= 100).float().mean() > 0.6


def first(file) -> float:
    """The first value that was logged."""
    return float(file.read_text().splitlines()[0].split(",")[1])


def test_the_estimate_is_compared_with_the_discounted_return_of_changed_rewards(make_settings, tmp_path, caplog):
    """At step 0 both runs have the same policy, so the rewards of their environments are equal."""
    caplog.set_level(logging.INFO)
    found = {}
    for name, change in {"plain": [], "changed": ["reward.shift=2", "reward.scale=3"]}.items():
        train(make_settings(*change, f"out={tmp_path / name}"))
        metrics = ("return", "discounted_return", "value_estimate")
        found[name] = {metric: first(tmp_path / name / f"log/scalars/{metric}.csv") for metric in metrics}
    plain, changed = found["plain"], found["changed"]
    assert changed["return"] == pytest.approx(plain["return"])
    steps = 51  # 0.9 ** 51 is the first power below 0.005, so an episode has 51 steps
    shift = 2 * (1 - 0.9**steps) / (1 - 0.9)
    assert changed["discounted_return"] == pytest.approx(3 * (plain["discounted_return"] + shift), rel=1e-4)
    out = tmp_path / "changed"
    assert (
        f"{out}: rewards are changed to (reward + 2) * 3; values, TD errors and discounted returns are of the changed "
        "rewards, but return is the environment's"
    ) in caplog.messages
    assert not [message for message in caplog.messages if message.startswith(f"{tmp_path / 'plain'}: rewards")]


def test_evaluate_says_that_values_are_of_changed_rewards(make_settings, tmp_path, capsys):
    train(make_settings("reward.scale=0.1", "reward.clip=2"))
    assert load(tmp_path / "run").settings.reward == {"shift": 0, "scale": 0.1, "clip": 2}
    assert main(["evaluate", str(tmp_path / "run"), "--episodes", "2"]) == 0
    out = capsys.readouterr().out
    assert "in at most 51 steps, without the time limit (both with" in out
    assert "the rewards of training, clip((reward + 0) * 0.1, -2, 2))." in out
    numbers = json.loads((tmp_path / "run" / "evaluation.json").read_text())["BCQ"]
    assert abs(numbers["discounted_return"]) <= 2 * 10  # at most 2 in each step, and sum of 0.9 ** t below 10


def test_held_out_metrics_are_of_changed_rewards(make_settings, make_file, tmp_path, capsys):
    make_file(env_id=None)
    train(make_settings("reward.scale=1000", "held_out=0.3"))
    error = float((tmp_path / "run/log/scalars/held_out_td_error.csv").read_text().splitlines()[-1].split(",")[1])
    assert error > 100
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "Metrics on held-out episodes, with the rewards of training, (reward + 0) * 1000:" in out
    line = next(line for line in out.splitlines() if line.startswith("held_out_td_error "))
    assert float(line.split()[1]) == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize(
    "word", ["reward.scale=0", "reward.scale=-1", "reward.scale=inf", "reward.clip=0", "reward.shift=nan"]
)
def test_changes_that_lose_the_reward_are_refused(make_settings, word):
    name, _, _ = word.partition("=")
    with pytest.raises(RunError, match=rf"^{name} is .*, expected a (positive|finite) number"):
        train(make_settings(word))


def test_a_resumed_run_keeps_its_rewards(make_settings):
    train(make_settings("reward.scale=0.1"))
    with pytest.raises(RunError, match=r"reward.scale was 0.1 and is now 1.0"):
        train(make_settings("resume=true", "steps=30"))
    assert train(make_settings("resume=true", "steps=30", "reward.scale=0.1"))["steps"] == 30


def test_all_weights_are_finite_with_a_clip_of_rewards(make_settings):
    settings = make_settings("reward.clip=0.5", "normalize=true")
    trainer = assemble(settings, *open_dataset(settings))
    trainer.train()
    assert all(torch.isfinite(value).all() for value in trainer.loss_module.state_dict().values())
