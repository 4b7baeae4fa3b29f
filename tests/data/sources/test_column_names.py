"""Messages about bad values name the columns of the table."""

from __future__ import annotations

import pyarrow
import pytest
from pyarrow import parquet
from torchrl.data import Bounded

from torchrl_bcq import DatasetError, load_table
from torchrl_bcq.data.sources import tables

NAN = float("nan")
NUMBERS = [1.0, 2.5, 3.0, 4.5, 5.0, 6.5, 7.0, 8.5, 9.0]
COLUMNS = dict.fromkeys(("x", "y", "z", "r"), NUMBERS)
COLUMNS |= {"a": [number / 10 for number in NUMBERS], "b": [0.5] * 9, "end": [0.0] * 9, "cut": [0.0] * 8 + [1.0]}
ROLES = {"action": ["a"], "reward": "r", "terminated": "end", "truncated": "cut"}


@pytest.fixture(params=["d.csv", "d.parquet"])
def refusal(request, tmp_path):
    """The message about a table with these columns, after the name of the file."""

    def read(columns, observation, name=request.param, **roles) -> str:
        path = tmp_path / name
        if path.suffix == ".csv":
            rows = [columns, *zip(*columns.values(), strict=True)]
            path.write_text("\n".join(",".join(map(str, row)) for row in rows))
        else:
            parquet.write_table(pyarrow.table(columns), path)
        with pytest.raises(DatasetError) as error:
            load_table(path, observation=observation, **{**ROLES, **roles})
        return str(error.value).removeprefix(f"{path.name}: ")

    return read


def put(name: str, row: int, value: float) -> dict[str, list[float]]:
    return {name: [*COLUMNS[name][:row], value, *COLUMNS[name][row + 1 :]]}


def test_values_that_are_not_finite(refusal):
    columns = {**COLUMNS, **put("y", 4, NAN)}
    bad = "observations has 1 row (first: 4) that are not finite in float32, in column y; drop or repair them."
    assert refusal(columns, ["x", "y", "z"]) == bad
    assert refusal(columns, ["y"]) == bad
    assert refusal({**columns, **put("x", 7, NAN)}, ["x", "y", "z"]) == (
        "observations has 2 rows (first: 4) that are not finite in float32, in columns x, y; drop or repair them."
    )
    assert refusal(columns, ["x", "z"], next_observation=["x", "y"]) == f"next_{bad}"
    assert refusal(columns, ["x"], reward="y") == bad.replace("observations", "rewards")


def test_actions_outside_the_spec_and_flags(refusal):
    """Actions above 0.75 are those of rows 7 and 8 in column a; column b is within the spec."""
    found = refusal(COLUMNS, ["x"], action=["b", "a"], action_spec=Bounded(0, 0.75, (2,)))
    assert found.startswith("actions has 2 rows (first: 7) outside the action bounds, in column a: the actions span [")
    found = refusal({**COLUMNS, "end": [None] * 8 + [1]}, ["x"], name="d.parquet")
    assert found == (
        "terminated has 8 rows (first: 0) that are neither 0 nor 1, such as nan, in column end; use only 0 (false) and "
        "1 (true)."
    )


def test_fields_of_zeros_and_whole_actions(refusal):
    zeros = {"x": [0.0] * 9, "y": [0.0] * 9}
    assert refusal({**COLUMNS, **zeros}, ["x", "y"]) == (
        "observations is zero in all 9 rows, in columns x, y; check that it was written and read correctly."
    )
    whole = refusal({**COLUMNS, "a": [1.0, 20.0, 3.0] * 3}, ["x"], name="d.csv")
    assert whole.startswith("actions has only whole numbers in all 9 rows, in column a, and only 3 of the numbers 0 to")


def test_many_columns_are_counted(refusal):
    columns = {f"x{at}": [NAN if row == at else 1.0 for row in range(9)] for at in range(5)}
    assert refusal({**COLUMNS, **columns}, [*columns]) == (
        "observations has 5 rows (first: 0) that are not finite in float32, in columns x0, x1, x2 and 2 more; drop or "
        "repair them."
    )


def test_columns_of_lists_are_named_if_that_is_certain(refusal):
    """A cell of column v holds two numbers; with a second column, the field has more numbers than columns."""
    columns = {**COLUMNS, "v": [[1.0, NAN if row == 5 else 2.0] for row in range(9)]}
    bad = "observations has 1 row (first: 5) that are not finite in float32"
    assert refusal(columns, ["v"], name="d.parquet") == f"{bad}, in column v; drop or repair them."
    assert refusal(columns, ["v", "x"], name="d.parquet") == f"{bad}; drop or repair them."


def test_other_widths_are_refused_after_a_bad_value(monkeypatch, refusal):
    """Lists of two numbers in the first chunk, of which one is not finite, and of three numbers in the second chunk."""
    monkeypatch.setattr(tables, "_ROWS", 4)
    columns = {**COLUMNS, "v": [[NAN, 1.0]] * 4 + [[1.0, 2.0, 3.0]] * 5}
    found = refusal(columns, ["v"], name="d.parquet")
    assert "observations has 3 features from row 4 on, but 2 before" in found


def test_columns_with_defects_in_different_parts(refusal, monkeypatch):
    monkeypatch.setattr(tables, "_ROWS", 3)
    columns = {**COLUMNS, **put("y", 1, NAN), **put("x", 7, NAN)}
    assert refusal(columns, ["x", "y"], name="d.parquet") == (
        "observations has 2 rows (first: 1) that are not finite in float32, in columns x, y; drop or repair them."
    )
