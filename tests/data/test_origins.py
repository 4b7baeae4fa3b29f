"""Row numbers are those of the file: in the checks of the readers and in descriptions."""

from __future__ import annotations

import csv

import gymnasium
import h5py
import minari
import numpy as np
import pyarrow
import pytest
from minari.data_collector import EpisodeBuffer
from pyarrow import parquet

from torchrl_bcq import DatasetError, describe, load_transitions
from torchrl_bcq.__main__ import main
from torchrl_bcq.data.defects import Rows
from torchrl_bcq.data.origins import Origins

from ..array_files import write_arrays

# episodes of 5, 1, 4 and 6 steps, each of them cut off: rows 4, 5, 9 and 15 have no next observation
LENGTHS = (5, 1, 4, 6)
STOPS = np.cumsum(LENGTHS)
ROWS, BAD = 16, 13
COLUMNS = ["reader={observation: [x], action: [a], reward: r, terminated: end, truncated: cut}"]


def steps() -> dict[str, np.ndarray]:
    """The steps, with a reward in row 13 that is not finite, and an action in row 14 outside the bounds."""
    rng = np.random.default_rng(0)
    fields = {"observations": rng.normal(size=(ROWS, 1)), "actions": rng.uniform(-1, 1, (ROWS, 1))}
    fields |= {"rewards": rng.normal(size=ROWS), "terminals": np.zeros(ROWS), "timeouts": np.zeros(ROWS)}
    fields["timeouts"][STOPS - 1] = 1
    fields["rewards"][BAD], fields["actions"][BAD + 1] = np.nan, 3
    return fields


def table() -> dict[str, list]:
    return dict(
        zip(["x", "a", "r", "end", "cut"], (np.ravel(values).tolist() for values in steps().values()), strict=True)
    )


def write_hdf5(name: str) -> list[str]:
    return [str(write_arrays(f"{name}.hdf5", steps()))]


def write_episodes(name: str) -> list[str]:
    """One HDF5 group for each episode, without the observation after the last step."""
    with h5py.File(f"{name}.hdf5", "w") as file:
        for number, (start, stop) in enumerate(zip([0, *STOPS[:-1]], STOPS, strict=True)):
            for field, values in steps().items():
                file[f"demo_{number}/{field}"] = values[start:stop]
    return [f"{name}.hdf5"]


def write_npz(name: str) -> list[str]:
    np.savez(f"{name}.npz", **steps())
    return [f"{name}.npz"]


def write_csv(name: str) -> list[str]:
    with open(f"{name}.csv", "w", newline="") as file:
        csv.writer(file).writerows([table(), *zip(*table().values(), strict=True)])
    return [f"{name}.csv", *COLUMNS]


def write_parquet(name: str) -> list[str]:
    parquet.write_table(pyarrow.table(table()), f"{name}.parquet")
    return [f"{name}.parquet", *COLUMNS]


def write_minari(name: str) -> list[str]:
    fields, episodes = steps(), []
    for number, (start, stop) in enumerate(zip([0, *STOPS[:-1]], STOPS, strict=True)):
        columns = {field: list(values[start:stop]) for field, values in fields.items()}
        columns["observations"] += columns["observations"][-1:]  # Minari also holds the observation after the last step
        ends = {"terminations": columns.pop("terminals"), "truncations": columns.pop("timeouts")}
        episodes.append(EpisodeBuffer(id=number, **columns, **ends))
    box = gymnasium.spaces.Box(-9, 9, (1,), np.float64)
    minari.create_dataset_from_buffers(f"test/{name}-v0", episodes, observation_space=box, action_space=box)
    return [f"minari:test/{name}-v0"]


WRITERS = [write_hdf5, write_episodes, write_npz, write_csv, write_parquet, write_minari]


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))


@pytest.fixture
def told(capsys):
    """What a command prints, on one line."""

    def call(*words: str, rc: int) -> str:
        capsys.readouterr()
        assert main([*words, "--action-low", "-2", "--action-high", "2"]) == rc
        out, err = capsys.readouterr()
        return " ".join((err if rc else out).split())

    return call


@pytest.mark.filterwarnings("ignore::UserWarning:minari")
@pytest.mark.parametrize("write", WRITERS)
def test_checks_and_description_show_the_same_row(told, write):
    source, *columns = write("d")
    refused = told("convert", source, "copies", *columns, rc=1)
    assert "rewards has 1 row (first: 13) that are not finite" in refused
    assert "actions has 1 row (first: 14) outside the action bounds" in refused
    for root in ([], ["--root", "copies"], ["--root", "copies"]):  # the third one uses the copy of the second one
        shown = told("describe", source, *columns, *root, rc=0)
        assert "rewards has 1 row (first: 13) that are not finite; drop" in shown
        assert "actions has 1 row (first: 14) outside the action bounds" in shown
        dropped = "dropped 4 rows (first: 4) without a next observation or action mask"
        assert (dropped in shown) == (write is not write_minari)
        assert shown.startswith("16 tran" if write is write_minari else "12 tran")


@pytest.mark.filterwarnings("ignore::UserWarning:minari")
@pytest.mark.parametrize("write", WRITERS)
def test_rows_of_several_files(told, write):
    """The first file has no bad row; so the first bad row is row 13 of the second file."""
    one, *columns = write("one")
    two = write("two")[0]
    if write is write_npz:
        np.savez(one, **{**steps(), "rewards": np.ones(ROWS), "actions": np.full((ROWS, 1), 0.5)})
    first = two if write is write_npz else one
    refused = told("convert", one, two, "copies", *columns, rc=1)
    assert f"- {first}: rewards has 1 row (first: 13) that are not finite" in refused
    shown = told("describe", one, two, *columns, rc=0)
    count = "1 row" if write is write_npz else "2 rows"
    assert f"rewards has {count} (first: 13 of {first}) that are not finite; drop" in shown
    assert f"actions has {count} (first: 14 of {first}) outside the action bounds" in shown
    assert (f"dropped 8 rows (first: 4 of {one}) without" in shown) == (write is not write_minari)


def test_a_file_without_any_next_observation(told):
    """Both files of one step are dropped whole; the bad row is still row 13 of its file."""
    for name in ("a", "c"):
        np.savez(f"{name}.npz", **{field: values[4:5] for field, values in steps().items()})
    write_npz("b")
    shown = told("describe", "a.npz", "b.npz", "c.npz", rc=0)
    assert "dropped 6 rows (first: 0 of a.npz) without a next observation or action mask" in shown
    assert "rewards has 1 row (first: 13 of b.npz) that are not finite; drop" in shown


@pytest.mark.parametrize("field", ["observations", "actions", "rewards"])
def test_bad_values_in_dropped_rows_are_found(told, field):
    """Row 9 is the last row of its episode, so it is dropped; the reader refuses it, and describe must find it."""
    fields = {**steps(), "rewards": np.ones(ROWS), "actions": np.full((ROWS, 1), 0.5)}
    np.savez("c.npz", **fields)  # without bad values
    fields[field][9] = np.nan
    np.savez("d.npz", **fields)
    assert f"{field} has 1 row (first: 9) that are not finite in float32" in told("convert", "d.npz", "copies", rc=1)
    shown = told("describe", "d.npz", rc=0)
    assert "values that are not finite are also in 1 row (first: 9) that the reader drops" in shown
    np.savez("e.npz", **fields)
    assert "are also in 2 rows (first: 9 of d.npz) that the reader drops" in told("describe", "d.npz", "e.npz", rc=0)
    assert "are also in 1 row (first: 9 of d.npz) that the reader drops" in told("describe", "c.npz", "d.npz", rc=0)


def test_findings_of_observations_show_the_row_of_the_file(told):
    """Episodes of 1, 3, 1, 4, 4 and 3 rows; the first three are cut off, so rows 0, 3 and 4 are dropped."""
    rows, fields = np.arange(ROWS), steps()
    fields["terminals"], fields["timeouts"] = np.isin(rows, [8, 12, 15]), np.isin(rows, [0, 3, 4])
    fields["observations"][9:12] = 0
    np.savez("d.npz", **{**fields, "observations": np.repeat(fields["observations"], 2, 1)})
    shown = told("describe", "d.npz", rc=0)
    assert "dropped 3 rows (first: 0) without a next observation or action mask" in shown
    assert "observations has only zeros in 3 rows (first: 9); drop" in shown
    assert "next_observations has only zeros in 2 rows (first: 9)" in shown  # row 8 is terminated
    assert "observations has equal values in columns 0 and 1, in all 13 rows (first: 1)" in shown


def test_in_python_rows_are_those_of_the_transitions_unless_origins_are_given():
    write_npz("d")
    origins = Origins()
    transitions = load_transitions("d.npz", strict=False, origins=origins)
    rows = {name: {f.kind: f.first for f in describe(transitions, **given).findings}["not finite"]
            for name, given in {"plain": {}, "origins": {"origins": origins}}.items()}  # fmt: skip
    assert rows == {"plain": 10, "origins": 13}  # three rows before row 13 were dropped
    assert (origins.rows, origins.dropped) == (16, Rows(4, 4))
    with pytest.raises(DatasetError, match=r"^d.npz: rewards has 1 row \(first: 13\)"):
        load_transitions("d.npz")


def test_rows_by_hand():
    """Sources of 2, 1, 3 and 2 rows; rows 0 | 0 | 1, 2 | 1 of them are dropped."""
    origins = Origins()
    for name, keep in {"a": [0, 1], "b": [0], "c": [1, 0, 0], "d": [1, 0]}.items():
        origins.begin(name)
        origins.add(np.array(keep[:1], dtype=bool), {})
        origins.add(np.array(keep[1:], dtype=bool), {})
    located = [origins.locate(Rows(1, row)) for row in range(8)]
    assert [rows.first for rows in located] == [0, 1, 0, 0, 1, 2, 0, 1]
    assert [rows.where for rows in located] == [f" of {name}" for name in "aabcccdd"]
    kept = [origins.locate_kept(Rows(1, row, example="e")) for row in range(3)]
    assert [str(rows) for rows in kept] == ["1 row (first: 1 of a)", "1 row (first: 0 of c)", "1 row (first: 0 of d)"]
    assert {rows.example for rows in kept} == {"e"}
    assert str(origins.dropped) == "5 rows (first: 0 of a)"
    assert Origins().locate_kept(Rows(2, 7)) == Rows(2, 7)
    assert Origins().dropped == Rows()
