"""``torchrl-bcq plot``, as a user types it."""

from __future__ import annotations

import argparse
import sys
from types import SimpleNamespace

import pytest

import torchrl_bcq.runs.environment  # noqa: F401, first, so that it does not keep the replaced make_env
from torchrl_bcq.cli import plot as module
from torchrl_bcq.data.sources.environment import Environment
from torchrl_bcq.errors import RunError

from ..reports.conftest import write_run, write_seeds

PNG = b"\x89PNG"


@pytest.fixture
def make_run(tmp_path):
    return lambda name, *settings, **scalars: write_run(tmp_path / name, *settings, **scalars)


@pytest.fixture
def seeds(tmp_path):
    return write_seeds(tmp_path / "sweep")


def plot(*arguments):
    parser = argparse.ArgumentParser()
    module.add_parser(parser.add_subparsers())
    args = parser.parse_args(["plot", *map(str, arguments)])
    args.run(args)


def test_pictures_lie_in_the_run(make_run, capsys):
    values = {100: 1.0, 200: 2.0}
    run = make_run(
        "run", **dict.fromkeys(("return", "value_estimate", "discounted_return", "loss_vae"), values), behaviour=1.5
    )
    plot(run)
    assert capsys.readouterr().out == (
        f"The pictures are in {run}: learning_curve.png, value_estimates.png, losses.png.\n"
    )
    for name in ("learning_curve.png", "value_estimates.png", "losses.png"):
        assert (run / name).read_bytes().startswith(PNG)
    assert not list(run.glob(".*"))


def test_pictures_of_several_runs_lie_here_or_where_it_is_said(seeds, tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.chdir(tmp_path)
    plot(seeds / "0", seeds / "1")
    assert capsys.readouterr().out == "The pictures are in .: learning_curve.png.\n"
    assert (tmp_path / "learning_curve.png").is_file()
    assert caplog.messages == [
        "no value_estimates.png: no run logged both value_estimate and discounted_return, which need an environment.",
        "no losses.png: no run logged a loss.",
    ]
    plot(seeds, "--out", "new/folder", "--statistic", "iqm")
    assert (tmp_path / "new/folder/learning_curve.png").is_file()


def test_the_home_folder_is_found(seeds, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    plot(seeds, "--out=~/pictures")
    assert (tmp_path / "pictures/learning_curve.png").is_file()


def test_metric_that_another_picture_shows_too_is_warned_of_once(make_run, caplog):
    runs = [make_run(f"{seed}", seed=seed, loss_qvalue={1: 1.0, 2 + seed: 1.0}) for seed in (0, 1)]
    plot(*runs, "--out", runs[0], "--metric", "loss_qvalue")
    assert caplog.messages[0] == (
        "minari:swings: steps that only some runs logged are left out: 2 of 3 for loss_qvalue."
    )


def test_what_cannot_be_drawn_is_said(make_run, tmp_path):
    empty, silent = tmp_path / "empty", make_run("silent")
    empty.mkdir()
    early, late = make_run("early", **{"return": {1: 1.0}}), make_run("late", seed=1, **{"return": {2: 1.0}})
    odd, old = make_run("odd", {"a": 1}, loss_vae={1: 1.0}), make_run("old", {"version": "0.1.0"}, loss_vae={1: 1.0})
    cut = make_run("cut", **{"return": "10"})
    vae = make_run("vae", loss_vae={1: 1.0}, **{"return": {1: 1.0}})
    results = make_run("results", **{"return": {1: 1.0}})
    (results / "results.json").write_text("{")
    for arguments, message in [
        ((tmp_path / "none",), f"{tmp_path / 'none'} is not a run: there is no such folder; choose a folder that "),
        ((empty,), f"{empty} is not a run: it and its subfolders have no config.yaml; "),
        ((silent,), f"nothing was logged in {silent}: no log/scalars/*.csv; "),
        (
            (vae, "--metric", "retrun"),
            f"no retrun was logged in {vae}; use torchrl-bcq plot --metric with one of loss_vae, return.",
        ),
        (
            (early, late),
            f"the runs of minari:swings have no step of return in common ({early}: steps 1 to 1; {late}: ",
        ),
        ((odd,), f"{odd / 'config.yaml'} cannot be read: Key 'a' not in "),
        ((old,), f"{old / 'config.yaml'} was made by torchrl-bcq 0.1.0, but this is "),
        ((cut,), "the runs have no complete line of return in their logs yet; "),
        ((results,), f"{results / 'results.json'} was not written by torchrl-bcq train ("),
    ]:
        with pytest.raises(RunError) as error:
            plot(*arguments)
        assert str(error.value).startswith(message)


@pytest.fixture
def trained(monkeypatch):
    """Stands in for the loading of a run, its environment and its video; notes what was asked for."""
    asked, policy, env = [], object(), object()

    def load(run, which, device):
        asked.append((run.name, which, device))
        of_run = None if run.name == "blind" else Environment("Swing-v0", {"g": 1})
        return SimpleNamespace(task=SimpleNamespace(env=of_run), policy=policy, path=run)

    def make_env(asked_env, *, remedy, render_mode):
        assert (asked_env, render_mode) == (Environment("Swing-v0", {"g": 1}), "rgb_array")
        return env

    def record_video(*parts):
        assert parts[:2] == (env, policy)
        asked.append(parts[2].name)
        return parts[2]

    monkeypatch.setitem(sys.modules, "torchrl_bcq.runs.folder", SimpleNamespace(load=load))
    monkeypatch.setattr("torchrl_bcq.evaluation.environments.make_env", make_env)
    monkeypatch.setattr("torchrl_bcq.reports.video.record_video", record_video)
    return asked


def test_videos_are_of_the_best_policy_of_each_run(make_run, trained, capsys):
    runs = [make_run(name, **{"return": {1: 1.0}}) for name in ("one", "two")]
    plot(runs[0], "--video")
    assert capsys.readouterr().out.endswith(f"The video is {runs[0] / 'policy.mp4'}.\n")
    plot(*runs, "--video", "--out", runs[0].parent)
    one, two = ((name, "best", "cpu") for name in ("one", "two"))
    assert trained == [one, "policy.mp4", one, "one-policy.mp4", two, "two-policy.mp4"]
    sweeps = [make_run(f"{name}/0", **{"return": {1: 1.0}}) for name in ("a", "b")]
    plot(*sweeps, "--video", "--out", runs[0].parent)
    assert trained[-3::2] == ["a-0-policy.mp4", "b-0-policy.mp4"]
    with pytest.raises(RunError, match="blind has no environment to record a video in; leave out --video, or this run"):
        plot(make_run("blind", **{"return": {1: 1.0}}), "--video")


def test_another_statistic_is_refused(seeds, capsys):
    with pytest.raises(SystemExit):
        plot(seeds, "--statistic", "median")
    assert "invalid choice: 'median'" in capsys.readouterr().err
