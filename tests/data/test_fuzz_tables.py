"""Malformed tables: each is refused by this package and leaves nothing on disk."""

from __future__ import annotations

import csv
import gzip
import io
import tempfile
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from hypothesis import given, settings, strategies as st
from pyarrow import parquet

from torchrl_bcq import load_table

SEEDS = st.integers(0, 2**32 - 1)
WIDE = {"observation": "o", "action": "a", "next_observation": "n"}
SINGLE = {name: name for name in ("reward", "terminated", "truncated", "episode", "step")}


class Table:
    """Rows of texts, and the roles of their columns."""

    def __init__(self, steps):
        self.rng = steps.rng
        self.named = dict(SINGLE)
        columns = {"reward": steps["rewards"], "episode": steps.episode, "step": steps.step}
        columns |= {name: steps[name].astype(int) for name in ("terminated", "truncated")}
        for field, letter in WIDE.items():
            values = steps[field + "s"]
            self.named[field] = [f"{letter}{i}" for i in range(values.shape[1])]
            columns |= dict(zip(self.named[field], values.T, strict=True))
        self.header = list(columns)
        self.rows = [[repr(value.item()) for value in row] for row in zip(*columns.values(), strict=True)]

    def place(self, column: str | None = None) -> tuple[int, int]:
        at = int(self.rng.integers(len(self.header))) if column is None else self.header.index(column)
        return int(self.rng.integers(len(self.rows))), at

    def put(self, *texts: str, column: str | None = None) -> None:
        row, at = self.place(column)
        self.rows[row][at] = str(self.rng.choice(texts))

    def text(self) -> str:
        file = io.StringIO()
        csv.writer(file, lineterminator="\n").writerows([self.header, *self.rows])
        return file.getvalue()

    def arrow(self) -> pyarrow.Table:
        columns = [np.array(column, dtype=float) for column in zip(*self.rows, strict=True)]
        return pyarrow.table(columns, self.header)


def numeric(table: Table) -> str:
    return str(table.rng.choice([name for name in table.header if name != "episode"]))


def ragged(table: Table) -> None:
    row = int(table.rng.integers(len(table.rows)))
    table.rows[row] = (
        table.rows[row][: table.rng.integers(1, len(table.header))] if row % 2 else [*table.rows[row], "1"]
    )


def long_enough(table: Table) -> None:
    """Two episodes of three steps, whose rows can be exchanged."""
    step, episode, ends = (table.header.index(name) for name in ("step", "episode", "terminated"))
    table.rows = [list(table.rows[0]) for _ in range(6)]
    for i, row in enumerate(table.rows):
        row[step], row[episode], row[ends] = str(i % 3), str(i // 3), "0"
        row[table.header.index("truncated")] = "0"


def reorder(*order: int):
    def apply(table: Table) -> None:
        long_enough(table)
        table.rows = [table.rows[i] for i in order]

    return apply


def ends_inside(table: Table) -> None:
    long_enough(table)
    table.rows[table.rng.choice([0, 1, 3, 4])][table.header.index(table.rng.choice(["terminated", "truncated"]))] = "1"


def rename(table: Table, *names: str) -> None:
    table.header[table.place()[1]] = str(table.rng.choice(names))


def repeat(table: Table) -> None:
    at = table.place()[1]
    table.header.append(table.header[at])
    table.rows = [[*row, row[at]] for row in table.rows]


def ask(table: Table, field: str, *names) -> None:
    table.named[field] = names[table.rng.integers(len(names))]


DEFECTS = {
    "no number": lambda t: t.put(
        "x", "1,5", "1.5.2", "--1", "1e", "\uff10", "\u00e9", "\U0001f600", "'1'", column=numeric(t)
    ),
    "empty": lambda t: t.put("", column=t.header[t.place()[1]]),
    "missing": lambda t: t.put("NA", "nan", "null", "NULL", "N/A", column=numeric(t)),
    "infinite": lambda t: t.put("inf", "-inf", "1e39", "1e999", "-1e300", column=t.header[t.place("reward")[1]]),
    "no flag": lambda t: t.put(
        "2", "-1", "yes", "0.5", "t", "01", column=str(t.rng.choice(["terminated", "truncated"]))
    ),
    "ragged": ragged,
    "other name": lambda t: rename(t, "", " ", "Reward ", "ö", "\U0001f600", "a" * 999, "a\nb", 'q"', "\u202e"),
    "twice": repeat,
    "zero rows": lambda t: t.rows.clear(),
    "torn episode": reorder(0, 3, 4, 5, 1, 2),
    "out of order": reorder(0, 2, 1, 3, 4, 5),
    "missing step": reorder(0, 2, 3, 4, 5),
    "repeated step": reorder(0, 1, 1, 2, 3),
    "ends inside": ends_inside,
    "wrong column": lambda t: ask(t, "reward", "REWARD", "r\u00e9ward", "\ud800", "", "rewards", "reward\0"),
    "no columns": lambda t: ask(t, "observation", [], ()),
    "no such column": lambda t: ask(t, "action", ["a0", "a7"], ["episodes"], "action", [""]),
    "no ends": lambda t: [t.named.pop(name) for name in ("truncated", "next_observation", "episode", "step")],
    "too few": lambda t: ask(t, "next_observation", ["n0"] * 9),
}


@settings(max_examples=400)
@given(seed=SEEDS, defect=st.sampled_from(sorted(DEFECTS)), packed=st.booleans())
def test_defects_of_tables(ledger, make_steps, seed, defect, packed):
    table = Table(make_steps(seed))
    DEFECTS[defect](table)
    content = table.text().encode("utf-8", "surrogateescape")
    with tempfile.TemporaryDirectory(dir=ledger.folder) as folder:
        file = Path(folder) / ("d.csv.gz" if packed else "d.csv")
        file.write_bytes(gzip.compress(content) if packed else content)
        ledger.refuse("tables", lambda root=None: load_table(file, **table.named, root=root))


ENCODINGS = {
    "utf-16": lambda text: text.encode("utf-16"),
    "utf-32": lambda text: text.encode("utf-32"),
    "latin-1": lambda text: text.replace("reward", "r\u00e9ward").encode("latin-1"),
    "nul": lambda text: text.replace(",", "\0").encode(),
    "semicolons": lambda text: text.replace(",", ";").encode(),
    "tabs": lambda text: text.replace(",", "\t").encode(),
    "decimal comma": lambda text: text.replace(".", ",").encode(),
    "open quote": lambda text: text.replace("\n", '\n"', 1).encode(),
    "no header": lambda text: text.split("\n", 1)[1].encode(),
    "html": lambda text: f"<html><body>{text}</body></html>".encode(),
    "json": lambda text: repr({"rows": text}).encode(),
    "comment": lambda text: f"# written today\n{text}".encode(),
    "null bytes": lambda text: bytes(len(text)),
    "lone surrogate": lambda text: text.replace("\n", "\n\ud800", 1).encode("utf-8", "surrogatepass"),
}


@settings(max_examples=60)
@given(seed=SEEDS, encoding=st.sampled_from(sorted(ENCODINGS)))
def test_other_encodings(ledger, make_steps, seed, encoding):
    table = Table(make_steps(seed))
    with tempfile.TemporaryDirectory(dir=ledger.folder) as folder:
        file = Path(folder) / "\u00e4 \U0001f600.csv"
        file.write_bytes(ENCODINGS[encoding](table.text()))
        ledger.refuse("encodings", lambda root=None: load_table(file, **table.named, root=root))


COLUMNS = {
    "texts": lambda values: pyarrow.array([str(value) for value in values]),
    "complex": lambda values: pyarrow.array([{"re": value, "im": 0.0} for value in values]),
    "decimals": lambda values: pyarrow.array([None for _ in values], pyarrow.decimal128(9)),
    "dates": lambda values: pyarrow.array(np.zeros(len(values), "M8[s]")),
    "nulls": lambda values: pyarrow.nulls(len(values)),
    "one null": lambda values: pyarrow.array([None, *values[1:]], pyarrow.float64()),
    "not a number": lambda values: pyarrow.array([*values[1:], float("nan")], pyarrow.float64()),
    "dictionary": lambda values: pyarrow.array(["x" for _ in values]).dictionary_encode(),
    "ragged": lambda values: pyarrow.array([[0.5] * (i % 3) for i in range(len(values))]),
    "null lists": lambda values: pyarrow.array(
        [None, *([value] for value in values[1:])], pyarrow.list_(pyarrow.float64())
    ),
    "nested": lambda values: pyarrow.array([[[value]] for value in values]),
    "null in list": lambda values: pyarrow.array([[None] for _ in values], pyarrow.list_(pyarrow.float32(), 1)),
    "binary": lambda values: pyarrow.array([b"\xff" for _ in values]),
}


@settings(max_examples=100)
@given(
    seed=SEEDS,
    kind=st.sampled_from(sorted(COLUMNS)),
    column=st.sampled_from(["reward", "o0", "a0", "terminated", "n0", "episode"]),
)
def test_columns_of_parquet_that_are_no_numbers(ledger, make_steps, seed, kind, column):
    table = Table(make_steps(seed))
    content = table.arrow()
    broken = COLUMNS[kind](content.column(column).to_pylist())
    if column == "episode" and kind in ("texts", "binary", "dates", "dictionary"):
        return  # names of episodes
    content = content.set_column(table.header.index(column), column, broken)
    with tempfile.TemporaryDirectory(dir=ledger.folder) as folder:
        file = Path(folder) / "d.parquet"
        parquet.write_table(content, file)
        ledger.refuse("parquet columns", lambda root=None: load_table(file, **table.named, root=root))


WRITERS = {
    "d.csv": lambda table: table.text().encode(),
    "d.csv.gz": lambda table: gzip.compress(table.text().encode()),
    "bom.csv": lambda table: table.text().encode("utf-8-sig"),
    "crlf.csv": lambda table: table.text().replace("\n", "\r\n").encode(),
    "quoted.csv": lambda table: ('"' + table.text().strip().replace(",", '","').replace("\n", '"\n"') + '"').encode(),
}


@pytest.mark.parametrize("name", [*WRITERS, "d.parquet"])
def test_good_tables_load(tmp_path, make_steps, same, name):
    file = tmp_path / name
    for seed in range(10):
        table = Table(steps := make_steps(seed))
        if name in WRITERS:
            file.write_bytes(WRITERS[name](table))
        else:
            parquet.write_table(table.arrow(), file)
        assert same(load_table(file, **table.named), steps.transitions())
        assert same(load_table(file, **table.named, root=tmp_path), steps.transitions())
