"""What is read from run folders, and how runs are grouped."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from torchrl_bcq.errors import RunError
from torchrl_bcq.reports.logs import (
    choose_metric,
    dataset_returns,
    group_runs,
    loss_metrics,
    shared_title,
)

from .conftest import find


def test_of_a_step_that_a_resumed_run_repeated_the_last_value_counts(make_run):
    run = make_run("run", loss_vae="100,1.0\n200,2.0\n300,3.0\n200,2.5\n300,3.5\n50,nan\n")
    values = find([run])[0].read("loss_vae")
    assert list(values) == [50, 100, 200, 300]
    assert [values[step] for step in (100, 200, 300)] == [1.0, 2.5, 3.5]
    assert np.isnan(values[50])


@pytest.mark.parametrize("cut", ["", "3", "300", "300,", "300,3.", "300,3.5"])
def test_a_line_that_was_cut_off_is_ignored(make_run, cut, caplog):
    run = make_run("run", loss_vae=f"100,1.0\n200,2.0\n{cut}")
    assert find([run])[0].read("loss_vae") == {100: 1.0, 200: 2.0}
    assert caplog.messages == []


@pytest.mark.parametrize("line", ["", "1001100,1.0,2.0", "100;1.0", "1e2,1.0", "100,one"])
def test_any_other_malformed_line_is_named(make_run, line):
    folder = make_run("run", loss_vae=f"100,1.0\n{line}\n200,2.0\n")
    with pytest.raises(RunError) as error:
        find([folder])[0].read("loss_vae")
    assert str(error.value).startswith(f"{folder}/log/scalars/loss_vae.csv, line 2: {line!r} is not STEP,VALUE; ")


def test_a_multirun_stands_for_its_runs_once(seeds, make_run):
    for index in (10, 9):
        make_run(f"sweep/{index}", seed=index)
    (seeds / ".hydra").mkdir()  # Hydra's own, whose config.yaml is that of the sweep
    (seeds / ".hydra" / "config.yaml").write_text("seed: 0")
    (seeds / "multirun.yaml").write_text("")
    assert [run.folder.name for run in find([seeds, seeds / "1"])] == ["0", "1", "2", "9", "10"]
    assert [run.folder.name for run in find([seeds / "1", seeds])] == ["1", "0", "2", "9", "10"]


def test_a_run_is_not_searched_for_others(make_run):
    outer = make_run("run")
    make_run("run/inner")
    assert [run.folder for run in find([outer])] == [outer]


def test_groups_agree_on_all_but_the_seed_and_are_named_by_what_differs(make_run):
    settings = {"optim.betas": [0.9, 0.99], "optim.clip": 1.0}
    folders = [
        make_run(
            f"{lr}-{seed}",
            {"optim.lr": lr, **settings, "logger_kwargs": {"name": seed}, "resume": seed, "baseline": seed or None},
            seed=seed,
        )
        for lr, seed in itertools.product((3e-4, 1e-3), (0, 1))
    ]
    folders.append(make_run("other", {"optim.lr": 1e-3, **settings, "optim.clip": None}))
    groups = group_runs(find(folders))
    assert [(group.label, [run.folder.name for run in group.runs]) for group in groups] == [
        ("optim.lr=0.0003, optim.clip=1.0", ["0.0003-0", "0.0003-1"]),
        ("optim.lr=0.001, optim.clip=1.0", ["0.001-0", "0.001-1"]),
        ("optim.lr=0.001, optim.clip=null", ["other"]),
    ]


def test_settings_of_one_algorithm_alone_do_not_name_another(make_run):
    settings = {
        "bcq": {"algorithm": "bcq", "lr": 1, "phi": 1},
        "far": {"algorithm": "bcq", "lr": 1, "phi": 2},
        "cloning": {"algorithm": "cloning", "lr": 2, "depth": 3},
    }
    groups = group_runs(find([make_run(name, own) for name, own in settings.items()]))
    assert [group.label for group in groups] == [
        "algorithm=bcq, lr=1, phi=1", "algorithm=bcq, lr=1, phi=2", "algorithm=cloning, lr=2, phi=unset",
    ]  # fmt: skip


def test_one_group_is_named_by_its_dataset(seeds):
    (group,) = group_runs(find([seeds]))
    assert group.label == "minari:swings"


def test_labels_are_cut_where_that_keeps_them_apart(make_run):
    paths = [f"{part}{'/x' * 30}" for part in "ab"]
    same_end = group_runs(find([make_run(f"{i}", {"reader": path}) for i, path in enumerate(paths)]))
    assert [group.label for group in same_end] == [f"reader={path}" for path in paths]
    paths = [f"{'x/' * 30}{part}" for part in "ab"]
    same_start = group_runs(find([make_run(f"{i + 2}", {"reader": path}) for i, path in enumerate(paths)]))
    assert [group.label for group in same_start] == [f"reader=…{'x/' * 19}{part}" for part in "ab"]


def test_a_seed_that_was_run_twice_is_said(make_run, caplog):
    first, second = make_run("first"), make_run("second")
    group_runs(find([first, second]))
    assert caplog.messages == [
        f"{first}, {second} have the same settings and the same seed, 0; each of them counts as one repetition."
    ]


def test_metric_that_is_drawn(make_run):
    blind = find([make_run("blind", loss_b={1: 1.0}, held_out_td_error={1: 1.0}, initial_value={1: 1.0})])
    assert choose_metric(blind, None) == "held_out_td_error"
    assert choose_metric(blind, "initial_value") == "initial_value"
    evaluated = find([make_run("evaluated", **{"return": {1: 1.0}})])
    assert choose_metric([*blind, *evaluated], None) == "return"
    assert choose_metric(find([make_run("cloned", loss_b={1: 1.0}, loss_a={1: 1.0})]), None) == "loss_a"
    silent = find([make_run("silent", initial_value={1: 1.0})])
    with pytest.raises(
        RunError,
        match="no return, held_out_td_error, td_error or loss was logged in .*; use torchrl-bcq plot --metric with",
    ):
        choose_metric(silent, None)


def test_losses_come_first_then_td_errors_then_those_on_held_out_episodes(make_run):
    names = ["held_out_loss_a", "td_error", "loss_b", "return", "held_out_td_error", "loss_a", "held_out_kl_divergence"]
    halves = {"run": names[:4], "other": names[3:]}
    runs = [make_run(run, **dict.fromkeys(metrics, "1,1.0\n")) for run, metrics in halves.items()]
    assert loss_metrics(find(runs)) == ["loss_a", "loss_b", "td_error", "held_out_loss_a", "held_out_td_error"]


def test_mean_returns_of_datasets_are_named_by_a_group(make_run):
    runs = [
        make_run("one", {"phi": 0}, behaviour=1.5),
        make_run("two", {"phi": 0}, behaviour=1.5, seed=1),
        make_run("three", {"phi": 1}, behaviour=2.0),
        make_run("four", {"phi": 2}, behaviour=1.5),
        make_run("none", {"phi": 3}),
    ]
    assert dataset_returns(group_runs(find(runs))) == {1.5: "phi=0", 2.0: "phi=1"}


def test_title_is_what_the_runs_share(make_run):
    auto = make_run("auto", {"evaluation.env": "auto"})
    named = make_run("named", {"evaluation.env": "Swing-v2"}, seed=1)
    assert shared_title(find([auto])) == "minari:swings"
    assert shared_title(find([named])) == "Swing-v2, minari:swings"
    assert shared_title(find([auto, named])) == "minari:swings"
