"""Metrics during training: when they are logged, and that they do not change the run."""

from __future__ import annotations

import logging

import pytest
import torch
from torchrl.record.loggers import CSVLogger

from torchrl_bcq import (
    BCQPolicy,
    DatasetMetrics,
    EnvironmentMetrics,
)

from ..trainers.conftest import assert_same_run, logged, make_trainer
from .conftest import Watching, stairs


def run_with(make_batch, tmp_path, name: str, hook=None, total_steps: int = 25, start=None, **settings):
    """A training run with a hook that is made from the trainer, and the lines that it logs."""
    torch.manual_seed(0)
    trainer = make_trainer(
        make_batch(50), total_steps, logger=CSVLogger(name, log_dir=str(tmp_path)), log_interval=5, **settings
    )
    if hook is not None:
        hook(trainer).register(trainer)
    if start is not None:
        trainer.load_from_file(start)
    trainer.train()
    return trainer, logged(tmp_path / name)


def policy_of(trainer) -> BCQPolicy:
    return BCQPolicy(*trainer.loss_module.networks, num_action_samples=5)


def environment_metrics(trainer) -> EnvironmentMetrics:
    settings = {"value": trainer.loss_module.value, "reference_scores": (0, 10), "gamma": 0.5}
    return EnvironmentMetrics(stairs(1, 3, 4), policy_of(trainer), interval=10, **settings)


def test_environment_metrics_at_the_start_at_multiples_and_at_the_end(make_batch, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="torchrl_bcq"):
        _, lines = run_with(make_batch, tmp_path, "log", environment_metrics)
    mean = (1 + 6 + 10) / 3
    for name, expected in {
        "return": mean,
        "normalized_score": 10 * mean,
        "return_std": (((1 - mean) ** 2 + (6 - mean) ** 2 + (10 - mean) ** 2) / 3) ** 0.5,
        "episode_length": 8 / 3,
        "discounted_return": (1 + 2.75 + 3.25) / 3,
    }.items():
        rows = [line.split(",") for line in lines[name]]
        assert [int(step) for step, _ in rows] == [0, 10, 20, 25]
        assert [float(value) for _, value in rows] == pytest.approx([expected] * 4)
    estimates = [float(line.split(",")[1]) for line in lines["value_estimate"]]
    assert len(set(estimates)) == 4  # the critics learn
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("torchrl_bcq")]
    assert [message.split(":")[0] for message in messages] == ["step 0", "step 10", "step 20", "step 25"]
    assert messages[0].startswith("step 0: return 5.667, normalized_score 56.67, ")


def dataset_metrics(trainer) -> DatasetMetrics:
    return DatasetMetrics(trainer.loss_module, policy_of(trainer), trainer._replay.replay_buffer[:], interval=10)


@pytest.mark.parametrize("hook", [environment_metrics, dataset_metrics])
def test_measuring_does_not_change_the_run(make_batch, tmp_path, hook):
    plain, plain_lines = run_with(make_batch, tmp_path, "plain")
    measured, measured_lines = run_with(make_batch, tmp_path, "measured", hook)
    assert_same_run(measured, plain)
    assert measured_lines.keys() > plain_lines.keys()
    assert {name: measured_lines[name] for name in plain_lines} == plain_lines
    assert all(not parameter.isnan().any() for parameter in measured.loss_module.parameters())


@pytest.mark.parametrize("hook", [environment_metrics, dataset_metrics])
def test_a_resumed_run_logs_the_same_metrics(make_batch, tmp_path, hook):
    _, whole = run_with(make_batch, tmp_path, "whole", hook, 30)
    run_with(make_batch, tmp_path, "broken", hook, 20, save_trainer_file=tmp_path / "checkpoint")
    _, broken = run_with(make_batch, tmp_path, "broken", hook, 30, start=tmp_path / "checkpoint")
    assert broken == whole


def test_an_evaluation_that_is_stopped_logs_nothing(make_batch, tmp_path):
    def stopping(trainer) -> EnvironmentMetrics:
        def rule(observation):
            if trainer.collected_frames == 10:
                trainer.request_stop("a test")
            return observation[..., :2]

        return EnvironmentMetrics(stairs(3), Watching(rule), interval=10)

    trainer, lines = run_with(make_batch, tmp_path, "log", stopping)
    assert trainer.collected_frames == 10
    assert [line.split(",")[0] for line in lines["return"]] == ["0"]


@pytest.mark.parametrize("scores", [(5, 5), (100, 0)])
def test_reference_scores_that_do_not_rise_are_refused(policy, scores):
    with pytest.raises(ValueError, match=r"reference_scores is .*, expected \(random, expert\) with random < expert"):
        EnvironmentMetrics(stairs(1), policy, interval=10, reference_scores=scores)


@pytest.mark.parametrize("kind", ["environment", "dataset"])
def test_intervals_that_do_not_fit_are_refused(make_batch, policy, kind):
    trainer = make_trainer(make_batch(50))  # log intervals of 10

    def make(interval: int):
        if kind == "environment":
            return EnvironmentMetrics(stairs(1), policy, interval=interval)
        return DatasetMetrics(trainer.loss_module, policy, make_batch(5), interval=interval)

    name = f"{kind.capitalize()}Metrics"
    with pytest.raises(
        ValueError, match=f"the interval of {name} is 25, which is not a multiple of log_interval 10; change one"
    ):
        make(25).register(trainer)
    make(30).register(trainer)
    with pytest.raises(ValueError, match="interval is 0, expected at least 1 gradient step"):
        make(0)


def test_metrics_fall_while_the_networks_learn(make_batch, tmp_path):
    """The VAE learns to imitate a constant action: its loss and the policy's distance fall."""

    def hook(trainer) -> DatasetMetrics:
        held_out = make_batch(50)
        held_out["action"][:] = torch.tensor([0.5, 1.0])
        return DatasetMetrics(trainer.loss_module, policy_of(trainer), held_out, interval=50)

    torch.manual_seed(0)
    transitions = make_batch(200)
    transitions["action"][:] = torch.tensor([0.5, 1.0])
    trainer = make_trainer(transitions, 300, logger=CSVLogger("log", log_dir=str(tmp_path)))
    hook(trainer).register(trainer)
    trainer.train()
    lines = logged(tmp_path / "log")
    for name in ("held_out_loss_vae", "action_distance"):
        values = [float(line.split(",")[1]) for line in lines[name]]
        assert len(values) == 7
        assert values[-1] < 0.5 * values[0]


def test_a_resumed_run_measures_what_a_stop_prevented(make_batch, tmp_path):
    """A stop in the step of an evaluation: the resumed run measures first, and logs the same."""
    transitions, data = make_batch(50), make_batch(30)
    data["episode"] = torch.arange(30) // 10
    settings = {"save_trainer_file": tmp_path / "checkpoint"}

    def watched(total_steps, folder, stop_at=None, **more):
        trainer = make_trainer(transitions, total_steps, logger=CSVLogger(folder, log_dir=str(tmp_path)), **more)
        DatasetMetrics(trainer.loss_module, policy_of(trainer), data, interval=10).register(trainer)
        step = trainer.optimization_stepper.step

        def stopping(*args):
            logs = step(*args)
            if trainer._optim_count == stop_at:
                trainer.request_stop()
            return logs

        trainer.optimization_stepper.step = stopping
        return trainer

    undisturbed = watched(30, "undisturbed")
    undisturbed.train()
    watched(30, "broken", stop_at=20, **settings).train()
    second = watched(30, "broken").load_from_file(tmp_path / "checkpoint")
    assert second.collected_frames == 20
    second.train()
    for name in ("held_out_td_error", "held_out_loss_vae", "initial_value", "action_distance"):
        logs = [(tmp_path / run / "scalars" / f"{name}.csv").read_text() for run in ("undisturbed", "broken")]
        assert logs[0] == logs[1]
        assert [int(line.split(",")[0]) for line in logs[0].splitlines()] == [0, 10, 20, 30]
