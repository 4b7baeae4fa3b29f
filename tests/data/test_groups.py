"""Groups of episodes, such as patients: they are read from every format, numbered, and never split."""

from __future__ import annotations

import csv
import datetime
import gzip
import json
import logging
from pathlib import Path

import h5py
import numpy as np
import pyarrow
import pytest
import torch
from hypothesis import given, settings, strategies as st
from pyarrow import parquet
from tensordict import TensorDict

from torchrl_bcq import (
    DatasetError,
    describe,
    from_arrays,
    from_rollouts,
    load_hdf5,
    load_memmap,
    load_npz,
    load_table,
    load_transitions,
    make_replay_buffer,
    multi_step,
    split_episodes,
)
from torchrl_bcq.data.groups import _names

from ..array_files import write_arrays

# seven episodes of two steps; the second step of each is terminated, so no row is dropped
PATIENTS = ["bo", "bo", "al", "al", "bo", "bo", "cy", "cy", "al", "al", "di", "di", "al", "al"]
NUMBERS = [0, 0, 1, 1, 0, 0, 2, 2, 1, 1, 3, 3, 1, 1]  # in order of first appearance
ROWS = len(PATIENTS)
ENDS = np.arange(ROWS) % 2 == 1
FIELDS = {
    "observations": np.arange(1.0, ROWS + 1)[:, None],
    "actions": np.linspace(0.1, 0.9, ROWS)[:, None],
    "rewards": np.arange(1.0, ROWS + 1),
    "terminated": ENDS,
    "truncated": np.zeros(ROWS),
}
TABLE = {"observation": ["observations"], "action": ["actions"], "reward": "rewards", "terminated": "terminated"}
CODES = {"bo": 7, "al": 3, "cy": 11, "di": -2}


def grouped(groups=PATIENTS, **changes) -> TensorDict:
    return from_arrays(**{**FIELDS, **changes}, groups=groups)


def write_csv(path: Path, groups, **changes) -> Path:
    columns = {name: np.ravel(values).tolist() for name, values in {**FIELDS, **changes}.items()}
    columns |= {"terminated": list(map(int, columns["terminated"])), "who": list(groups)}
    return write_rows(path, columns)


def write_rows(path: Path, columns: dict) -> Path:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", newline="") as file:
        csv.writer(file).writerows([columns, *zip(*columns.values(), strict=True)])
    return path


def write_parquet(path: Path, groups, **changes) -> Path:
    columns = {name: np.ravel(values) for name, values in {**FIELDS, **changes}.items()}
    parquet.write_table(pyarrow.table({**columns, "who": groups}), path)
    return path


def write_hdf5(path: Path, groups, **changes) -> Path:
    return write_arrays(path, {**FIELDS, **changes, "who": groups})


def write_npz(path: Path, groups, **changes) -> Path:
    np.savez(path, **{**FIELDS, **changes, "who": groups})
    return path


ARRAYS = {"names": {"groups": "who"}}
COLUMNS = {**TABLE, "truncated": "truncated", "group": "who"}
FORMATS = {
    "d.csv": (write_csv, load_table, COLUMNS),
    "d.csv.gz": (write_csv, load_table, COLUMNS),
    "d.parquet": (write_parquet, load_table, COLUMNS),
    "d.hdf5": (write_hdf5, load_hdf5, ARRAYS),
    "d.npz": (write_npz, load_npz, ARRAYS),
}


@pytest.mark.parametrize("root", [None, "copies"])
@pytest.mark.parametrize("kind", ["names", "numbers", "floats"])
@pytest.mark.parametrize("name", FORMATS)
def test_groups_are_numbered_in_order_of_first_appearance(tmp_path, monkeypatch, name, kind, root):
    monkeypatch.chdir(tmp_path)
    write, load, settings = FORMATS[name]
    groups = PATIENTS if kind == "names" else [CODES[who] for who in PATIENTS]
    write(Path(name), [float(code) for code in groups] if kind == "floats" else groups)
    td = load(name, **settings, root=root)
    assert (td["group"].tolist(), td["group"].dtype) == (NUMBERS, torch.int64)
    assert td["episode"].tolist() == [row // 2 for row in range(ROWS)]
    if root:
        assert td.is_memmap()
        (copy,) = [path for path in Path(root).iterdir() if path.is_dir()]
        assert load_memmap(copy)["group"].tolist() == NUMBERS
    ungrouped = {key: value for key, value in settings.items() if key not in ("names", "group")}
    assert "group" not in load(name, **ungrouped).keys()


def test_groups_in_a_csv_are_compared_as_they_are_written(tmp_path):
    path = write_csv(tmp_path / "d.csv", ["007", "007", "7", "7"] + ["007"] * 10)
    assert load_table(path, **COLUMNS)["group"].tolist() == [0, 0, 1, 1] + [0] * 10


@pytest.mark.parametrize(
    "groups",
    [
        PATIENTS,
        np.array(PATIENTS, dtype=object),
        np.array(PATIENTS, dtype="S9")[:, None],
        [CODES[who] for who in PATIENTS],
        torch.tensor([CODES[who] for who in PATIENTS]),
        np.array([CODES[who] for who in PATIENTS], dtype=">i2"),
        torch.tensor([CODES[who] for who in PATIENTS], dtype=torch.bfloat16),
        [CODES[who] / 10 for who in PATIENTS],
        [CODES[who] if row % 2 else str(CODES[who]) for row, who in enumerate(PATIENTS)],  # 7 and "7"
        np.array([CODES[who] if row % 2 else f"{CODES[who]}.0" for row, who in enumerate(PATIENTS)], dtype=object),
        [datetime.date(2020, 1, 2 + abs(CODES[who])) for who in PATIENTS],
        np.array(["2020-01-01"] * ROWS, dtype="M8[D]") + [CODES[who] for who in PATIENTS],
    ],
)
def test_groups_of_many_types(groups):
    assert grouped(groups)["group"].tolist() == NUMBERS


class Unknown:
    """A missing value that cannot be compared, such as pandas.NA."""

    def __eq__(self, other):
        raise TypeError("boolean value of NA is ambiguous")

    __hash__ = None

    def __repr__(self):
        return "<NA>"


def test_names_of_groups():
    """Numbers and texts of one number are one group; missing values have no name."""
    values = [7, 7.0, "7", "7.0", b"7", np.float32(7), 7.5, "7.5", "007", " 7", True, 1, 1e16, 10**16, -0.0]
    named = ["7", "7", "7", "7", "7", "7", "7.5", "7.5", "007", " 7", "True", "1", *["1" + 16 * "0"] * 2, "0"]
    assert _names(np.array(values, dtype=object)).tolist() == named
    for value in (None, float("nan"), np.nan, Unknown(), "", "  ", b"", "nan", "None", float("inf")):
        assert _names(np.array([value, "x"], dtype=object)).tolist() == [None, "x"]
    assert _names(np.array([2.0, np.nan, 2.5, np.nan])).tolist() == ["2", None, "2.5", None]
    assert _names(np.array(["NaT", "2020-01-01"], dtype="M8[D]")).tolist() == [None, "2020-01-01"]


def test_dropped_rows_do_not_count():
    """Without next observations, each truncated row is dropped: rows 1, 2 and 4; then group b has no rows."""
    td = from_arrays(FIELDS["observations"][:5], FIELDS["actions"][:5], np.ones(5), np.zeros(5), [0, 1, 1, 0, 1],
                     groups=["a", "a", "b", "c", "c"])  # fmt: skip
    assert (td["group"].tolist(), td["episode"].tolist()) == ([0, 1], [0, 2])


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 100])
def test_chunks_change_nothing(tmp_path, monkeypatch, chunk):
    from torchrl_bcq.data.sources import layouts

    monkeypatch.setattr(layouts, "CHUNK_BYTES", chunk * 8)
    path = write_npz(tmp_path / "d.npz", [CODES[who] for who in PATIENTS])
    assert load_npz(path, **ARRAYS)["group"].tolist() == NUMBERS
    mixed = [CODES[who] for who in PATIENTS]
    mixed[3] = mixed[9] = 99
    path = write_npz(tmp_path / "d.npz", mixed)
    with pytest.raises(DatasetError, match=r"same episode, in 2 rows \(first: 3\); correct the groups"):
        load_npz(path, **ARRAYS)


@pytest.mark.parametrize("root", [None, "copies"])
def test_a_name_in_two_files_is_one_group(tmp_path, monkeypatch, root):
    """7 in a Parquet file of integers, 7.0 in one of floats and "7" in one of texts are the same patient."""
    monkeypatch.chdir(tmp_path)
    write_parquet(Path("a.parquet"), [7] * 8 + [8] * 6)
    write_parquet(Path("b.parquet"), [9.0] * 4 + [7.0] * 10)
    write_parquet(Path("c.parquet"), ["8"] * 8 + ["x"] * 6)
    write_csv(Path("d.csv"), ["9"] * 12 + ["7"] * 2)
    td = load_transitions(["a.parquet", "b.parquet", "c.parquet", "d.csv"], root=root, **COLUMNS)
    assert td["group"].tolist() == [0] * 8 + [1] * 6 + [2] * 4 + [0] * 10 + [1] * 8 + [3] * 6 + [2] * 12 + [0] * 2
    assert td["episode"].tolist() == [row // 2 for row in range(4 * ROWS)]
    train, held_out = split_episodes(td, 0.5)
    assert not set(td["group"][train].tolist()) & set(td["group"][held_out].tolist())


def per_episode(file, name, whole, shape=None):
    """Five episodes of two steps in HDF5 groups, with the observation after the last step."""
    for number, who in enumerate(["b", "a", "b", "c", "a"]):
        group = file.create_group(f"{name}{number}")
        group["obs"], group["actions"] = np.arange(1.0, 4)[:, None], np.full((2, 1), 0.5)
        group["rewards"], group["terminals"] = np.ones(2), [0, 1]
        group["who"] = who if whole else [who, who]


@pytest.mark.parametrize("whole", [False, True])
def test_hdf5_groups_of_episodes(tmp_path, whole):
    with h5py.File(tmp_path / "d.hdf5", "w") as file:
        per_episode(file, "demo_", whole)
    td = load_hdf5(tmp_path / "d.hdf5", **ARRAYS)
    assert td["group"].tolist() == [0, 0, 1, 1, 0, 0, 2, 2, 1, 1]


@pytest.mark.parametrize("groups", [["b", "a", "b"], ["b"] * 3 + ["a"] + ["b"] * 2])
def test_lengths_of_episodes(tmp_path, groups):
    """Episodes of 3, 1 and 2 steps, with one group for each episode or step."""
    lengths, six = np.array([3, 1, 2]), {name: values[:6] for name, values in FIELDS.items() if name != "truncated"}
    six["terminated"] = [0, 0, 1, 1, 0, 1]
    np.savez(tmp_path / "d.npz", **six, lengths=lengths, who=groups)
    assert load_npz(tmp_path / "d.npz", **ARRAYS)["group"].tolist() == [0, 0, 0, 1, 0, 0]


@pytest.mark.parametrize("groups", [["b", "a", "b"], [["b"] * 3, ["a"] * 3, ["b"] * 3]])
def test_padded_episodes(tmp_path, groups):
    padded = {"observations": np.ones((3, 3, 1)), "actions": np.full((3, 3, 1), 0.5), "rewards": np.ones((3, 3))}
    ends = [[0, 0, 1], [1, 0, 0], [0, 1, 0]]
    np.savez(tmp_path / "d.npz", **padded, terminated=ends, lengths=np.array([3, 1, 2]), who=groups)
    assert load_npz(tmp_path / "d.npz", **ARRAYS)["group"].tolist() == [0, 0, 0, 1, 0, 0]


# splits


@pytest.mark.parametrize(("fraction", "held"), [(0.01, 1), (0.25, 1), (0.5, 2), (0.7, 3), (0.99, 3)])
def test_a_split_keeps_groups_whole(fraction, held):
    td = grouped()
    chosen = set()
    for seed in range(20):
        train, held_out = split_episodes(td, fraction, seed)
        sides = [set(td["group"][mask].tolist()) for mask in (train, held_out)]
        assert (len(sides[1]), sides[0] & sides[1], sides[0] | sides[1]) == (held, set(), {0, 1, 2, 3})
        assert torch.equal(held_out, ~train)
        chosen.add(frozenset(sides[1]))
    assert len(chosen) > 1


def test_groups_of_other_origin_are_split_too():
    """Any integers, as ``[N]`` or ``[N, 1]``, also without episode numbers; without groups, nothing changes."""
    td = grouped().exclude("episode")
    td["group"] = torch.tensor([50, -3, 8, 10])[td["group"]][:, None]
    assert torch.equal(split_episodes(td, 0.5)[0], split_episodes(grouped().set("group", td["group"]), 0.5)[0])
    plain = grouped().exclude("group")
    assert len(plain["episode"][split_episodes(plain, 0.5)[1]].unique()) == 4  # round(0.5 * 7)


def test_splits_that_are_impossible():
    td = grouped()
    with pytest.raises(ValueError, match=r"^the transitions are one group; a split by group needs at least two gro"):
        split_episodes(td[td["group"] == 1])
    with pytest.raises(DatasetError, match=r"group differs from the row before, .* in 2 rows \(first: 5\)"):
        split_episodes(td.clone().set("group", torch.tensor([0] * 5 + [1] * 6 + [2] * 3)))
    for odd in (torch.zeros(ROWS), torch.zeros(ROWS, 2, dtype=torch.long), torch.zeros(ROWS, dtype=torch.complex64)):
        with pytest.raises(DatasetError, match=r"group has shape .*expected \(14,\), one integer for each row"):
            split_episodes(td.clone().set("group", odd))


def test_groups_stay_in_what_is_made_of_transitions():
    td = grouped()
    assert multi_step(td, 2, 0.9)["group"].tolist() == NUMBERS
    assert torch.cat([td, td])["group"].tolist() == NUMBERS * 2
    assert from_rollouts(td.exclude("episode"))["group"].tolist() == NUMBERS
    train, held_out = split_episodes(td, 0.25)
    for drawing in ({"weights": train}, {"sampler": "without_replacement"}, {}):
        batch = make_replay_buffer(td, batch_size=64, seed=0, **drawing).sample()
        assert batch["group"].tolist() == [NUMBERS[row] for row in batch["index"].tolist()]
    assert td[held_out]["group"].unique().numel() == 1


def test_describe_counts_groups():
    assert str(describe(grouped())).startswith("14 transitions in 7 episodes of 4 groups, ")
    assert str(describe(grouped(["x"] * ROWS))).startswith("14 transitions in 7 episodes of 1 group, ")
    assert str(describe(grouped().exclude("group"))).startswith("14 transitions in 7 episodes, ")
    (field,) = describe(grouped()).survey.observations
    assert field.name == "observations"
    mixed = grouped().set("group", torch.tensor([0] * 5 + [1] * 6 + [2] * 3))
    found = {finding.kind: finding for finding in describe(mixed).findings}
    assert (found["several groups"].rows, found["several groups"].first) == (2, 5)


# malformed groups


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", FORMATS)
def test_missing_groups_are_refused(tmp_path, monkeypatch, name, strict):
    monkeypatch.chdir(tmp_path)
    write, _, settings = FORMATS[name]
    groups = [*PATIENTS]
    groups[2:4] = groups[12:] = ["", ""]
    write(Path(name), groups)
    with pytest.raises(DatasetError) as error:
        load_transitions(name, strict=strict, **settings)
    assert str(error.value) == (
        f"{name}: the group is missing in 4 rows (first: 2); fill in the groups, or drop these rows."
    )


@pytest.mark.parametrize("name", FORMATS)
def test_an_episode_has_one_group(tmp_path, monkeypatch, name):
    """Row 5 belongs to a different patient than row 4, and row 13 to none."""
    monkeypatch.chdir(tmp_path)
    write, load, settings = FORMATS[name]
    groups = [*PATIENTS]
    groups[5], groups[13] = "al", ""
    write(Path(name), groups)
    with pytest.raises(DatasetError) as error:
        load(name, **settings)
    assert str(error.value) == (
        f"{name}: 2 defects:\n"
        "- the group is missing in 1 row (first: 13); fill in the groups, or drop these rows.\n"
        "- the group differs from the row before, in the same episode, in 1 row (first: 5); correct the groups, or the "
        "ends or names of the episodes: an episode belongs to one group."
    )


def test_defects_name_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_npz(Path("a.npz"), PATIENTS)
    write_npz(Path("b.npz"), [*PATIENTS[:3], "x", *PATIENTS[4:]])
    with pytest.raises(DatasetError, match=r"^2 sources: the group differs .* in 1 row \(first: 3 of b.npz\); correct"):
        load_transitions(["a.npz", "b.npz"], **ARRAYS)


def test_a_dropped_row_may_not_change_the_group():
    with pytest.raises(DatasetError, match=r"in the same episode, in 1 row \(first: 3\)"):
        from_arrays(FIELDS["observations"][:4], FIELDS["actions"][:4], np.ones(4), np.zeros(4), [0, 0, 0, 1],
                    groups=["a", "a", "a", "b"])  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group": "patient"}, r"the table lacks the columns \['patient'\]; the table has"),
        ({"group": "observations"}, "column 'observations' names the group, so it cannot also hold another field"),
        ({"group": ["who", "rewards"]}, r"group is \['who', 'rewards'\], expected the name of one column"),
        ({"episode": ["who", "rewards"]}, r"episode is \['who', 'rewards'\], expected the name of one column"),
    ],
)
@pytest.mark.parametrize("name", ["d.csv", "d.parquet"])
def test_columns_that_hold_no_groups(tmp_path, name, settings, message):
    FORMATS[name][0](tmp_path / name, PATIENTS)
    with pytest.raises(DatasetError, match=message):
        load_table(tmp_path / name, **{**COLUMNS, **settings})


def test_the_episode_may_be_the_group(tmp_path):
    path = write_csv(tmp_path / "d.csv", [f"trip {row // 2}" for row in range(ROWS)])
    td = load_table(path, **TABLE, episode="who", group="who")
    assert torch.equal(td["group"], td["episode"])


BAD = {
    "too few": lambda g: g[:-1],
    "too many": lambda g: [*g, "x"],
    "empty": lambda g: [],
    "one text": lambda g: "patient",
    "two columns": lambda g: [[who, who] for who in g],
    "complex": lambda g: np.ones(len(g)) * 1j,
    "records": lambda g: np.zeros(len(g), dtype=[("x", "f4"), ("y", "i8")]),
    "bytes": lambda g: np.zeros(len(g), dtype="V8"),
    "lists": lambda g: np.array([None, *([who] for who in g[1:])], dtype=object),
    "dicts": lambda g: [{"who": who} for who in g],
    "sets": lambda g: [{who, "x"} for who in g],
    "none": lambda g: [None] * len(g),
    "nan": lambda g: np.full(len(g), np.nan),
    "one nan": lambda g: [*g[:-1], float("nan")],
    "inf": lambda g: np.full(len(g), np.inf),
    "unknown": lambda g: np.array([Unknown(), *g[1:]], dtype=object),
    "masked": lambda g: np.ma.masked_array(np.ones(len(g)), mask=[True] * len(g)),
    "each its own": lambda g: range(len(g)),
    "iterator": iter,
}


@settings(max_examples=len(BAD) * 4, deadline=None)
@given(kind=st.sampled_from(sorted(BAD)), name=st.sampled_from(["memory", "d.parquet", "d.hdf5", "d.npz"]))
def test_malformed_groups(ledger, tmp_path_factory, kind, name):
    if kind in ("masked", "iterator") and name != "memory":
        return None  # files hold no masks, and the writers read an iterator
    groups = BAD[kind](PATIENTS)
    if name == "memory":
        return ledger.refuse("groups", lambda: grouped(groups))
    write, load, reading = FORMATS[name]
    path = tmp_path_factory.mktemp("groups") / name
    try:
        write(path, groups)
    except Exception:  # this format cannot hold such values
        return None
    return ledger.refuse("groups", lambda root=None: load(path, **reading, root=root))


# runs


def test_a_run_holds_out_whole_groups(tmp_path, monkeypatch, caplog):
    """12 groups of 2 episodes: 3 groups are held out, and both commands leave them on one side."""
    from torchrl_bcq.__main__ import main
    from torchrl_bcq.runs.assembly import split
    from torchrl_bcq.runs.dataset import open_dataset
    from torchrl_bcq.runs.settings import load_settings

    monkeypatch.chdir(tmp_path)
    rng, rows = np.random.default_rng(0), 24 * 5
    columns = {"x": rng.normal(size=rows), "a": rng.uniform(-1, 1, rows), "r": rng.normal(size=rows)}
    episode = np.arange(rows) // 5
    columns |= {"end": (np.arange(rows) % 5 == 4).astype(int), "stay": episode, "who": [f"p{e % 12}" for e in episode]}
    write_rows(Path("stays.csv"), {name: np.asarray(values).tolist() for name, values in columns.items()})
    reader = "reader={observation: [x], action: [a], reward: r, terminated: end, episode: stay, group: who}"
    sizes = [
        "network.hidden=[4]",
        "network.vae_hidden=[4]",
        "log_interval=5",
        "evaluation.interval=5",
        "threads=null",
        "batch_size=8",
    ]
    words = ["train", "dataset=stays.csv", reader, "out=run", "steps=5", "held_out=0.25", *sizes, "baseline=null"]
    with caplog.at_level(logging.INFO):
        assert main(words) == 0
    assert "held_out: 6 of 24 episodes (3 of 12 groups) are used for metrics and not for training" in caplog.text
    settings = load_settings(Path("run"))
    transitions, _ = open_dataset(settings)
    learned = split(settings, transitions)
    assert not set(transitions["group"][learned].tolist()) & set(transitions["group"][~learned].tolist())
    assert main(["evaluate", "run"]) == 0
    assert json.loads(Path("run/results.json").read_text())["steps"] == 5
