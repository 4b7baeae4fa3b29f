"""Run folders with made-up settings and scalars."""

from __future__ import annotations

import json

import pytest

from torchrl_bcq.reports.curves import make_curve
from torchrl_bcq.reports.logs import find_runs, group_runs
from torchrl_bcq.version import __version__

RETURNS = ([1.0, 10.0], [2.0, 40.0], [6.0, 70.0])  # of three seeds, at steps 100 and 200


def write_run(folder, settings=None, behaviour=None, seed=0, **scalars):
    """Write a run folder with the given settings and scalars: ``{step: value}`` or the text of a file."""
    (folder / "log" / "scalars").mkdir(parents=True)
    shared = {"version": __version__, "algorithm": "bcq", "dataset": "minari:swings"}
    written = {**shared, "seed": seed, "out": str(folder), **(settings or {})}
    (folder / "config.yaml").write_text(json.dumps(written))  # YAML, too
    for metric, rows in scalars.items():
        text = rows if isinstance(rows, str) else "".join(f"{step},{value}\n" for step, value in rows.items())
        (folder / "log" / "scalars" / f"{metric}.csv").write_text(text)
    if behaviour is not None:
        (folder / "results.json").write_text(json.dumps({"behaviour": {"mean": behaviour, "std": 1.0}}))
    return folder


def find(folders):
    """The runs, with their settings as they were written: by dotted name."""
    return find_runs(folders, lambda folder: json.loads((folder / "config.yaml").read_text()))


def write_seeds(folder):
    """Write a multirun of three seeds."""
    for seed, values in enumerate(RETURNS):
        write_run(folder / str(seed), seed=seed, **{"return": dict(zip((100, 200), values, strict=True))})
    return folder


@pytest.fixture
def make_run(tmp_path):
    return lambda name, *settings, **scalars: write_run(tmp_path / name, *settings, **scalars)


@pytest.fixture
def seeds(tmp_path):
    return write_seeds(tmp_path / "sweep")


def curve_of(folders, metric="return", statistic="mean"):
    (group,) = group_runs(find(folders))
    return make_curve(group, metric, statistic)


def legend_of(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]
