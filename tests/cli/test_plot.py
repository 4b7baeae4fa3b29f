"""``torchrl-bcq plot``: what is read, the numbers of the curves, and the command as a user types it."""

from __future__ import annotations

import argparse
import itertools
import json

import numpy as np
import pytest
import torch

from torchrl_bcq.cli.curves import Estimate, interval, make_curve
from torchrl_bcq.cli.errors import RunError
from torchrl_bcq.cli.logs import find_runs, group_runs, read_scalar
from torchrl_bcq.cli.pictures import Style, draw_losses, draw_metric, draw_values
from torchrl_bcq.cli.plot import _title, add_parser, choose_metric

RETURNS = ([1.0, 10.0], [2.0, 40.0], [6.0, 70.0])  # of three seeds, at steps 100 and 200
PNG = b"\x89PNG"


@pytest.fixture
def make_run(tmp_path):
    """A run folder with the given settings and scalars, ``{name: {step: value}}`` or the text of a file."""

    def make(name, settings="", behaviour=None, seed=0, **scalars):
        folder = tmp_path / name
        (folder / "log" / "scalars").mkdir(parents=True)
        (folder / "config.yaml").write_text(
            f"seed: {seed}\nenv: Pendulum-v1\ndataset: minari:swings\nout: {folder}\nloss:\n  gamma: 0.99\n{settings}\n"
        )
        for metric, rows in scalars.items():
            text = rows if isinstance(rows, str) else "".join(f"{step},{value}\n" for step, value in rows.items())
            (folder / "log" / "scalars" / f"{metric}.csv").write_text(text)
        if behaviour is not None:
            (folder / "results.json").write_text(json.dumps({"behaviour": {"mean": behaviour, "std": 1.0}}))
        return folder

    return make


@pytest.fixture
def seeds(make_run, tmp_path):
    """The folder of a multirun of three seeds."""
    for seed, values in enumerate(RETURNS):
        make_run(f"sweep/{seed}", seed=seed, **{"return": dict(zip((100, 200), values, strict=True))})
    return tmp_path / "sweep"


def curve_of(folders, metric="return", **estimate):
    (group,) = group_runs(find_runs(folders))
    return make_curve(group, metric, Estimate(**estimate))


def plot(*arguments):
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    args = parser.parse_args(["plot", *map(str, arguments)])
    args.run(args)


def legend_of(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


# what is read


def test_of_a_step_that_a_resumed_run_repeated_the_last_value_counts(make_run):
    run = make_run("run", loss_vae="100,1.0\n200,2.0\n300,3.0\n200,2.5\n300,3.5\n50,nan\n")
    values = read_scalar(run / "log/scalars/loss_vae.csv")
    assert list(values) == [50, 100, 200, 300]
    assert [values[step] for step in (100, 200, 300)] == [1.0, 2.5, 3.5]
    assert np.isnan(values[50])


@pytest.mark.parametrize("cut", ["", "3", "300", "300,", "300,3.", "300,3.5"])
def test_a_line_that_was_cut_off_is_ignored(make_run, cut, caplog):
    run = make_run("run", loss_vae=f"100,1.0\n200,2.0\n{cut}")
    assert read_scalar(run / "log/scalars/loss_vae.csv") == {100: 1.0, 200: 2.0}
    assert caplog.messages == []


@pytest.mark.parametrize("line", ["", "1001100,1.0,2.0", "100;1.0", "1e2,1.0", "100,one"])
def test_any_other_malformed_line_is_named(make_run, line):
    file = make_run("run", loss_vae=f"100,1.0\n{line}\n200,2.0\n") / "log/scalars/loss_vae.csv"
    with pytest.raises(RunError) as error:
        read_scalar(file)
    assert str(error.value).startswith(f"{file}, line 2: {line!r} is not STEP,VALUE; ")


def test_a_multirun_stands_for_its_runs_once(seeds, make_run):
    for index in (10, 9):
        make_run(f"sweep/{index}", seed=index)
    (seeds / ".hydra").mkdir()  # Hydra's own, whose config.yaml is that of the sweep
    (seeds / ".hydra" / "config.yaml").write_text("seed: 0")
    (seeds / "multirun.yaml").write_text("")
    assert [run.folder.name for run in find_runs([seeds, seeds / "1"])] == ["0", "1", "2", "9", "10"]
    assert [run.folder.name for run in find_runs([seeds / "1", seeds])] == ["1", "0", "2", "9", "10"]


def test_a_run_is_not_searched_for_others(make_run):
    outer = make_run("run")
    make_run("run/inner")
    assert [run.folder for run in find_runs([outer])] == [outer]


def test_groups_agree_on_all_but_the_seed_and_are_named_by_what_differs(make_run):
    optim = "optim:\n  betas: [0.9, 0.99]\n  lr: "
    folders = [
        make_run(f"{lr}-{seed}", f"{optim}{lr}\nlogger_kwargs:\n  wandb: {{name: {seed}}}\nresume: {seed}", seed=seed)
        for lr, seed in itertools.product(("3e-4", "0.001"), (0, 1))
    ]
    folders.append(make_run("other", f"{optim}0.001\n  clip: null"))
    groups = group_runs(find_runs(folders))
    assert [(group.label, [run.folder.name for run in group.runs]) for group in groups] == [
        ("optim.lr=0.0003, optim.clip=unset", ["3e-4-0", "3e-4-1"]),
        ("optim.lr=0.001, optim.clip=unset", ["0.001-0", "0.001-1"]),
        ("optim.lr=0.001, optim.clip=null", ["other"]),
    ]


def test_one_group_is_named_by_its_dataset(seeds):
    (group,) = group_runs(find_runs([seeds]))
    assert group.label == "minari:swings"


def test_labels_are_cut_where_that_keeps_them_apart(make_run):
    paths = [f"{part}{'/x' * 30}" for part in "ab"]
    same_end = group_runs(find_runs([make_run(f"{i}", f"reader: {path}") for i, path in enumerate(paths)]))
    assert [group.label for group in same_end] == [f"reader={path}" for path in paths]
    paths = [f"{'x/' * 30}{part}" for part in "ab"]
    same_start = group_runs(find_runs([make_run(f"{i + 2}", f"reader: {path}") for i, path in enumerate(paths)]))
    assert [group.label for group in same_start] == [f"reader=…{'x/' * 19}{part}" for part in "ab"]


def test_a_seed_that_was_run_twice_is_said(make_run, caplog):
    first, second = make_run("first"), make_run("second")
    group_runs(find_runs([first, second]))
    assert caplog.messages == [
        f"{first}, {second} have the same settings and the same seed, 0; each counts as a repetition."
    ]


# the numbers of a curve


def test_mean_and_middle_half_by_hand(seeds, make_run):
    curve = curve_of([seeds])
    assert curve.steps.tolist() == [100, 200]
    assert curve.seeds.tolist() == [list(values) for values in RETURNS]
    assert curve.center.tolist() == [3.0, 40.0]
    assert curve_of([seeds], statistic="iqm").center.tolist() == [3.0, 40.0]  # of three, none is cut
    fourth = make_run("fourth", seed=3, **{"return": {100: 100.0, 200: 20.0}})
    assert curve_of([seeds, fourth], statistic="iqm").center.tolist() == [4.0, 30.0]  # (2 + 6) / 2, (20 + 40) / 2


def test_band_covers_all_resamples_but_the_tails(seeds):
    """Of three seeds there are 27 resamples, equally likely; the band is between quantiles of their means."""
    curve = curve_of([seeds], confidence=0.8, resamples=50_000)
    for step in range(2):
        column = [values[step] for values in RETURNS]
        means = [np.mean(resample) for resample in itertools.product(column, repeat=3)]
        low, high = np.quantile(means, [0.1, 0.9], method="inverted_cdf")
        np.testing.assert_allclose(curve.band[:, step], [low, high], rtol=1e-12)


def test_band_of_the_middle_half_against_another_bootstrap():
    """Of many seeds, against resamples of our own, by an interquartile mean of our own."""
    seeds = np.random.default_rng(1).gamma(1.0, size=(40, 1))
    low, high = interval(seeds, Estimate(statistic="iqm", confidence=0.9, resamples=20_000))
    drawn = torch.randint(40, (20_000, 40), generator=torch.Generator().manual_seed(0))
    middle = torch.from_numpy(seeds[:, 0])[drawn].sort(-1).values[:, 10:30].mean(-1)
    expected = middle.quantile(torch.tensor([0.05, 0.95], dtype=torch.float64))
    np.testing.assert_allclose([low[0], high[0]], expected, atol=0.01)  # random states differ by 0.005
    assert high[0] - low[0] > 0.5


def test_band_is_the_same_for_each_call_and_in_chunks(monkeypatch):
    seeds = np.random.default_rng(0).normal(size=(5, 7))
    whole = interval(seeds, Estimate())
    np.testing.assert_array_equal(whole, interval(seeds, Estimate()))
    monkeypatch.setattr("torchrl_bcq.cli.curves._CHUNK", 3)
    np.testing.assert_array_equal(whole, interval(seeds, Estimate()))
    assert (interval(seeds, Estimate(random_state=1)) != whole).any()


def test_one_seed_has_no_band(seeds):
    curve = curve_of([seeds / "1"])
    assert curve.band is None
    assert curve.center.tolist() == [2.0, 40.0]
    assert legend_of(draw_metric([curve], {}, Style("", [curve.label], Estimate()))) == ["minari:swings (1 seed)"]


def test_only_steps_that_all_seeds_have_are_used(seeds, make_run, caplog):
    killed = make_run("killed", seed=3, **{"return": {50: 0.0, 100: 7.0}})
    crashed = make_run("crashed", seed=4, **{"return": "10"})
    curve = curve_of([seeds, killed, crashed])
    assert (curve.steps.tolist(), curve.seeds.tolist(), curve.left_out) == ([100], [[1.0], [2.0], [6.0], [7.0]], 2)
    plot(seeds, killed, crashed, "--out", seeds)
    assert caplog.messages[:2] == [
        "minari:swings: steps that not all of its runs have are left out: 2 of 3 of return.",
        f"{crashed} has no return; the lines are of the other runs.",
    ]


def test_what_is_not_finite_leaves_a_gap(seeds, make_run, caplog):
    broken = make_run("broken", seed=3, **{"return": {100: float("nan"), 200: 80.0}})
    curve = curve_of([seeds, broken])
    np.testing.assert_array_equal(curve.center, [np.nan, 50.0])
    np.testing.assert_array_equal(np.isnan(curve.band), [[True, False]] * 2)
    plot(seeds, broken, "--out", seeds)
    assert "minari:swings: steps that are not finite leave gaps: 1 of return." in caplog.messages


# the pictures


def test_learning_curve_shows_lines_seeds_and_the_dataset(seeds, make_run):
    other = make_run("other", "optim:\n  lr: 0.1", **{"return": {100: 5.0, 200: 5.5}})
    groups = group_runs(find_runs([seeds, other]))
    curves = [make_curve(group, "return", Estimate()) for group in groups]
    style = Style("a title", [group.label for group in groups], Estimate())
    figure = draw_metric(curves, {-3.0: groups[0].label}, style)
    assert legend_of(figure) == ["optim.lr=unset (3 seeds)", "optim.lr=0.1 (1 seed)", "mean return of the dataset"]
    assert figure.legends[0].get_title().get_text() == (
        "line: mean of the seeds, band: 95 % confidence interval of it, thin: each seed"
    )
    (axes,) = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("gradient steps", "return per episode (undiscounted)")
    assert [list(line.get_ydata()) for line in axes.lines] == [
        *map(list, RETURNS), [3.0, 40.0], [5.0, 5.5], [-3.0, -3.0],
    ]  # fmt: skip
    assert axes.lines[-1].get_linestyle() == "--"
    np.testing.assert_array_equal(axes.collections[0].get_paths()[0].vertices[1:3, 1], curves[0].band[0])


def test_values_that_diverge_do_not_hide_the_returns(make_run):
    run = make_run("run", value_estimate={1: 3.0, 2: 149.0}, discounted_return={1: 3.0, 2: 2.0})
    worse = make_run("worse", "phi: 1", value_estimate={1: 3.0, 2: 151.0}, discounted_return={1: 3.0, 2: 2.0})
    for folder, scale in ((run, "linear"), (worse, "symlog")):
        curves = [curve_of([folder], name) for name in ("value_estimate", "discounted_return")]
        figure = draw_values(curves[:1], curves[1:], Style("", [curves[0].label], Estimate()))
        assert figure.axes[0].get_yscale() == scale
        assert legend_of(figure) == ["critic's value (1 seed)", "discounted return obtained (1 seed)"]
    groups = group_runs(find_runs([run, worse]))
    both = [[make_curve(g, name, Estimate()) for g in groups] for name in ("value_estimate", "discounted_return")]
    assert legend_of(draw_values(*both, Style("", [group.label for group in groups], Estimate()))) == [
        "critic's value", "discounted return obtained", "phi=unset (1 seed)", "phi=1 (1 seed)",
    ]  # fmt: skip


def test_losses_are_logarithmic_where_positive(make_run):
    losses = {"loss_vae": {1: 1.0, 2: 0.1}, "loss_actor": {1: 1.0, 2: -9.0}, "td_error": {1: 0.3, 2: 0.2}}
    run = make_run("run", **losses)
    figure = draw_losses([[curve_of([run], name)] for name in losses], Style("", ["minari:swings"], Estimate()))
    assert [axes.get_title() for axes in figure.axes] == ["VAE loss", "actor's loss", "absolute TD error"]
    assert [axes.get_yscale() for axes in figure.axes] == ["log", "linear", "linear"]  # the last changes too little


@pytest.mark.parametrize("count", [2, 6, 9])
def test_groups_have_different_colors(count):
    style = Style("", [str(index) for index in range(count)], Estimate())
    assert len({style.color(label) for label in style.labels}) == count


# the command


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
        "no value_estimates.png: no run has both value_estimate and discounted_return, which need an env.",
        "no losses.png: no run has a loss.",
    ]
    plot(seeds, "--out", "new/folder", "--statistic", "iqm", "--confidence", "0.5", "--resamples", "10")
    assert (tmp_path / "new/folder/learning_curve.png").is_file()


def test_metric_that_is_drawn(make_run):
    blind = find_runs([make_run("blind", loss_qvalue={1: 1.0}, held_out_td_error={1: 1.0}, initial_value={1: 1.0})])
    assert choose_metric(blind, None) == "held_out_td_error"
    assert choose_metric(blind, "initial_value") == "initial_value"
    evaluated = find_runs([make_run("evaluated", **{"return": {1: 1.0}})])
    assert choose_metric([*blind, *evaluated], None) == "return"


def test_title_is_what_the_runs_share(make_run):
    auto = make_run("auto", "evaluation:\n  env: auto")
    named = make_run("named", "evaluation:\n  env: Swing-v2", seed=1)
    assert _title(find_runs([auto])) == "Pendulum-v1, minari:swings"
    assert _title(find_runs([named])) == "Pendulum-v1, Swing-v2, minari:swings"
    assert _title(find_runs([auto, named])) == "Pendulum-v1, minari:swings"


def test_metric_that_another_picture_shows_too_is_warned_of_once(make_run, caplog):
    runs = [make_run(f"{seed}", seed=seed, loss_qvalue={1: 1.0, 2 + seed: 1.0}) for seed in (0, 1)]
    plot(*runs, "--out", runs[0], "--metric", "loss_qvalue")
    assert caplog.messages[0] == (
        "minari:swings: steps that not all of its runs have are left out: 2 of 3 of loss_qvalue."
    )


def test_what_cannot_be_drawn_is_said(make_run, tmp_path):
    empty, silent = tmp_path / "empty", make_run("silent")
    empty.mkdir()
    early, late = make_run("early", **{"return": {1: 1.0}}), make_run("late", seed=1, **{"return": {2: 1.0}})
    odd, cut = make_run("odd", "a: [", loss_vae={1: 1.0}), make_run("cut", **{"return": "10"})
    vae = make_run("vae", loss_vae={1: 1.0}, **{"return": {1: 1.0}})
    results = make_run("results", **{"return": {1: 1.0}})
    (results / "results.json").write_text("{")
    for arguments, message in [
        ((tmp_path / "none",), f"there is no folder {tmp_path / 'none'}; pass one that torchrl-bcq train has made."),
        ((empty,), f"{empty} is no run: neither it nor a folder in it has a config.yaml; "),
        ((silent,), f"nothing was logged in {silent}: no log/scalars/*.csv; "),
        ((vae, "--metric", "retrun"), f"no retrun was logged in {vae}; choose a --metric of loss_vae, return."),
        (
            (early, late),
            f"the runs of minari:swings have no step of return in common ({early}: 1 from 1 to 1; {late}: ",
        ),
        ((odd,), f"{odd / 'config.yaml'} cannot be read as settings: "),
        ((cut,), "no line of return is complete yet; "),
        ((results,), f"{results / 'results.json'} is not what train writes ("),
    ]:
        with pytest.raises(RunError) as error:
            plot(*arguments)
        assert str(error.value).startswith(message)
    losses = find_runs([make_run("losses", loss_vae={1: 1.0})])
    with pytest.raises(
        RunError, match="no return, held_out_td_error or loss_qvalue was logged in .*; choose a --metric"
    ):
        choose_metric(losses, None)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--confidence", "95", "95 is not between 0 and 1, such as 0.95"),
        ("--resamples", "0", "0 is not 1 or more"),
        ("--statistic", "median", "invalid choice: 'median'"),
    ],
)
def test_options_are_checked(option, value, message, capsys):
    with pytest.raises(SystemExit):
        plot("run", option, value)
    assert message in capsys.readouterr().err
