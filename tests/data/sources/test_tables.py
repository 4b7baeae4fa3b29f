"""Tables of logged decisions."""

from __future__ import annotations

import gzip
import re

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import csv, parquet
from torchrl.data import Bounded

from torchrl_bcq import from_arrays, load_table, load_transitions
from torchrl_bcq.data.sources import tables

from ...array_files import same

# a stay of 3 hours that ended, one of 4 that was cut off, one of 2 that just stops
EPISODE = ["ann", "ann", "ann", "bob", "bob", "bob", "bob", "cy", "cy"]
STEP = [0, 1, 2, 5, 6, 7, 8, 0, 1]  # bob's steps start at 5
PULSE = [60.0, 61, 62, 70, 71, 72, 73, 80, 81]
PRESSURE = [9.5, 8.5, 7.5, 6.5, 5.5, 4.5, 3.5, 2.5, 1.5]
DOSE = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
REWARD = [1.0, 2, 3, 4, 5, 6, 7, 8, 9]
DIED = [False, False, True, False, False, False, False, False, False]
CUT = [False, False, False, False, False, False, True, False, False]
COLUMNS = {"episode": EPISODE, "step": STEP, "pulse": PULSE, "pressure": PRESSURE, "dose": DOSE, "reward": REWARD}
COLUMNS |= {"died": DIED, "cut": CUT, "note": ["a, b"] * 9}
COLUMNS |= {"pulse2": [value + 1 for value in PULSE], "pressure2": [value - 1 for value in PRESSURE]}
ROLES = {"observation": ["pulse", "pressure"], "action": ["dose"], "reward": "reward", "terminated": "died"}

STATES = np.array([PULSE, PRESSURE]).T
ARRAYS = {"observations": STATES, "actions": np.array(DOSE)[:, None], "rewards": np.array(REWARD), "terminated": DIED}
FOLLOWING = STATES + np.array([1, -1])


def text(value) -> str:
    return "" if value is None else f'"{value}"' if isinstance(value, str) and "," in value else str(value)


def write_csv(path, columns):
    lines = [",".join(columns), *(",".join(map(text, row)) for row in zip(*columns.values(), strict=True))]
    content = "\n".join([*lines, ""]).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def write_parquet(path, columns):
    parquet.write_table(pa.table(columns), path)
    return path


FORMATS = {"d.csv": write_csv, "d.csv.gz": write_csv, "d.parquet": write_parquet}


@pytest.fixture(params=FORMATS)
def write(request, tmp_path):
    return lambda columns=COLUMNS, **changes: FORMATS[request.param](tmp_path / request.param, columns | changes)


@pytest.fixture(params=[1, 2, 4, 7, 1000])
def small_chunks(request, monkeypatch):
    """Read so many rows at a time, and CSV files in blocks of about as many."""
    monkeypatch.setattr(tables, "_ROWS", request.param)
    open_csv = csv.open_csv
    options = csv.ReadOptions(block_size=40 + 60 * request.param, use_threads=False)
    monkeypatch.setattr(csv, "open_csv", lambda path, **more: open_csv(path, read_options=options, **more))


def refusal(path, **roles) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011 (whole messages are compared)
        load_table(path, **{**ROLES, **roles})
    return str(error.value)


NEXT = ["pulse2", "pressure2"]
WAYS = {
    "truncated": ({"truncated": "cut"}, {"truncated": CUT}),
    "next": ({"next_observation": NEXT}, {"next_observations": FOLLOWING}),
    "truncated, next": (
        {"truncated": "cut", "next_observation": NEXT},
        {"truncated": CUT, "next_observations": FOLLOWING},
    ),
    "episode": ({"episode": "episode"}, {"truncated": [row in (6, 8) for row in range(9)]}),
    "episode, step, truncated, next": (
        {"episode": "episode", "step": "step", "truncated": "cut", "next_observation": NEXT},
        {"truncated": [row in (6, 8) for row in range(9)], "next_observations": FOLLOWING},
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.usefixtures("small_chunks")
def test_a_table_is_read_like_its_arrays(write, way):
    roles, arrays = WAYS[way]
    same(load_table(write(), **ROLES, **roles), from_arrays(**ARRAYS, **arrays))


def test_rows_by_hand(write):
    td = load_table(write(), **ROLES, episode="episode", step="step")
    assert td["observation"][:, 0].tolist() == [60, 61, 62, 70, 71, 72, 80]
    assert td["next", "observation"][:, 0].tolist() == [61, 62, 62, 71, 72, 73, 81]
    assert td["next", "observation"][:, 1].tolist() == [8.5, 7.5, 7.5, 5.5, 4.5, 3.5, 1.5]
    assert td["next", "reward"].flatten().tolist() == [1, 2, 3, 4, 5, 6, 8]
    assert td["episode"].tolist() == [0, 0, 0, 1, 1, 1, 2]


@pytest.mark.usefixtures("small_chunks")
def test_memory_mapped_copy_is_the_same(write, tmp_path):
    path = write()
    roles = {**ROLES, "episode": "episode", "step": "step"}
    td = load_table(path, **roles, root=tmp_path / "copies")
    assert td.is_memmap()
    same(td, load_table(path, **roles))


@pytest.mark.parametrize("flags", [("true", "false"), ("True", "False"), ("TRUE", "FALSE"), (1, 0), ("1.0", "0.0")])
def test_flags_in_csv(tmp_path, flags):
    columns = {name: [flags[0 if flag else 1] for flag in COLUMNS[name]] for name in ("died", "cut")}
    path = write_csv(tmp_path / "d.csv", COLUMNS | columns)
    same(load_table(path, **ROLES, truncated="cut"), from_arrays(**ARRAYS, truncated=CUT))


@pytest.mark.parametrize("kind", [pa.bool_(), pa.int8(), pa.uint64(), pa.float32(), pa.float64()])
def test_flags_in_parquet(tmp_path, kind):
    columns = {name: pa.array(COLUMNS[name]).cast(pa.int8()).cast(kind) for name in ("died", "cut")}
    path = write_parquet(tmp_path / "d.parquet", COLUMNS | columns)
    same(load_table(path, **ROLES, truncated="cut"), from_arrays(**ARRAYS, truncated=CUT))


LISTS = [pa.list_(pa.float64()), pa.large_list(pa.float32()), pa.list_(pa.float32(), 2)]


@pytest.mark.parametrize("kind", LISTS, ids=str)
@pytest.mark.usefixtures("small_chunks")
def test_columns_of_lists(tmp_path, kind):
    columns = {"state": pa.array(STATES.tolist(), kind), "after": pa.array(FOLLOWING.tolist(), kind)}
    path = write_parquet(tmp_path / "d.parquet", COLUMNS | columns)
    roles = {**ROLES, "observation": ["state"], "next_observation": ["after"]}
    same(load_table(path, **roles), from_arrays(**ARRAYS, next_observations=FOLLOWING))
    td = load_table(path, **{**roles, "observation": ["state", "dose"], "next_observation": ["after", "dose"]})
    assert td["observation"][3].tolist() == torch.tensor([70, 6.5, 0.4]).tolist()


@pytest.mark.parametrize("roles", [{"truncated": "cut"}, {"episode": "episode"}])
@pytest.mark.usefixtures("small_chunks")
def test_lists_of_different_lengths_are_refused(tmp_path, roles):
    message = "d.parquet: column 'state' holds lists that are empty or differ in length; use one length."
    for odd in ([1.0], [], None):
        states = [*STATES.tolist()[:-2], odd, [1.0, 2.0]]
        path = write_parquet(tmp_path / "d.parquet", COLUMNS | {"state": states})
        assert refusal(path, observation=["state"], **roles) in (
            message,
            "d.parquet: observations has 1 features from row 7 on, but 2 before; every row needs the same number.",
            "d.parquet: observations has lists of different lengths; make all lists equally long.",
        )


def test_a_column_may_serve_twice_and_order_is_the_users(write):
    td = load_table(write(), **{**ROLES, "observation": ["pressure", "dose", "pulse"]}, truncated="cut")
    assert td["observation"][1].tolist() == torch.tensor([8.5, 0.2, 61]).tolist()


@pytest.mark.parametrize("names", [list("aaabbbbcc"), [7, 7, 7, 3, 3, 3, 3, 5, 5], [2.5] * 3 + [1.5] * 4 + [0.5] * 2])
def test_names_of_episodes_need_no_order(write, names):
    td = load_table(write(episode=names), **ROLES, episode="episode")
    assert td["episode"].tolist() == [0, 0, 0, 1, 1, 1, 2]


def test_numbers_of_csv_episodes_are_compared_as_they_are_written(tmp_path):
    path = write_csv(tmp_path / "d.csv", COLUMNS | {"episode": ["1"] * 3 + ["01"] * 4 + ["1.0"] * 2})
    assert load_table(path, **ROLES, episode="episode")["episode"].max() == 2


def test_a_column_must_say_where_episodes_end(write):
    assert refusal(write()) == (
        "it is not known where episodes were cut off: set episode, truncated or next_observation to the name of "
        "its column, or max_episode_steps to the time limit."
    )
    assert refusal(write(), step="step").startswith("it is not known where episodes were cut off")


@pytest.mark.usefixtures("small_chunks")
def test_a_time_limit_ends_episodes(write):
    """Episodes end after row 2, where the patient died, and two rows later. A cut-off row has no next observation."""
    td = load_table(write(), **ROLES, max_episode_steps=2)
    assert td["observation"][:, 0].tolist() == [60, 62, 70, 72, 80]
    assert td["next", "observation"][:, 0].tolist() == [61, 62, 71, 73, 81]
    assert td["next", "terminated"].flatten().tolist() == [False, True, False, False, False]
    assert td["episode"].tolist() == [0, 1, 2, 3, 4]
    assert refusal(write(), max_episode_steps=0) == "max_episode_steps is 0, expected a whole number of at least 1."


def test_files_with_one_episode_each_need_only_a_time_limit(tmp_path):
    for name in ("one.csv", "two.csv"):
        write_csv(tmp_path / name, {column: values[3:7] for column, values in COLUMNS.items()})
    td = load_transitions(tmp_path, **ROLES, max_episode_steps=1000)
    assert td["next", "observation"][:, 0].tolist() == [71, 72, 73] * 2
    assert td["episode"].tolist() == [0] * 3 + [1] * 3


@pytest.mark.usefixtures("small_chunks")
def test_gaps_in_steps_are_refused(write):
    """Step 6 of bob is missing, and the two steps of cy are exchanged."""
    for roles in ({"episode": "episode"}, {"truncated": "cut"}):
        path = write(step=[0, 1, 2, 5, 7, 8, 9, 1, 0])
        assert refusal(path, step="step", **roles) == (
            f"{path.name}: step has 2 rows (first: 4) that are not 1 more than the row before; sort the table by "
            "episode and step, and start a new episode after each gap."
        )


@pytest.mark.usefixtures("small_chunks")
def test_torn_episodes_are_refused(write):
    path = write(episode=["ann", "ann", "ann", "bob", "ann", "bob", "cy", "cy", "bob"])
    assert refusal(path, episode="episode") == (
        f"{path.name}: episode has 3 rows (first: 4) where an earlier episode continues; sort the table by episode and "
        "step."
    )


@pytest.mark.usefixtures("small_chunks")
def test_ends_inside_an_episode_are_refused(write):
    path = write(died=[row in (1, 2, 4) for row in range(9)])
    assert refusal(path, episode="episode", truncated="cut") == (
        f"{path.name}: terminated or truncated is set in 2 rows (first: 1) before the last row of an episode; correct "
        "the flags, or renumber the episodes."
    )


@pytest.mark.usefixtures("small_chunks")
def test_episodes_without_a_name_are_refused(write):
    path = write(episode=["ann", "ann", "ann", "bob", None, None, "bob", "cy", "cy"])
    assert refusal(path, episode="episode").splitlines()[:2] == [
        f"{path.name}: 2 defects:",
        "- the episode column has 2 rows (first: 4) without a name or number; fill in the cells, or drop these rows.",
    ]


def test_nan_is_no_name_of_an_episode(tmp_path):
    path = write_parquet(tmp_path / "d.parquet", COLUMNS | {"episode": [1.0] * 3 + [2.0] * 4 + [np.nan] * 2})
    assert (
        refusal(path, episode="episode")
        .splitlines()[-1]
        .endswith(
            "the episode column has 2 rows (first: 7) without a name or number; fill in the cells, or drop these rows."
        )
    )


@pytest.mark.parametrize("unit", ["ns", "us", "s"])  # pandas writes nanoseconds
def test_times_are_names(tmp_path, unit):
    times = pa.array([day * 86_400 * 1_000_000 for day in [1] * 3 + [2] * 4 + [3] * 2], pa.timestamp("us"))
    path = write_parquet(tmp_path / "d.parquet", COLUMNS | {"day": times.cast(pa.timestamp(unit))})
    td = load_table(path, **ROLES, episode="day", group="day")
    assert td["episode"].tolist() == td["group"].tolist() == [0, 0, 0, 1, 1, 1, 2]


def test_times_that_differ_by_a_nanosecond_are_two_names(tmp_path):
    times = pa.array([1_700_000_000_000_000_001] * 3 + [1_700_000_000_000_000_002] * 6, pa.timestamp("ns"))
    path = write_parquet(tmp_path / "d.parquet", COLUMNS | {"day": times})
    assert load_table(path, **ROLES, truncated="cut", group="day")["group"].tolist() == [0, 0, 0, 1, 1, 1, 1]


def test_a_name_may_be_a_word_for_missing_numbers(tmp_path):
    """NA is Namibia, or North America."""
    path = write_csv(tmp_path / "d.csv", COLUMNS | {"region": ["NA"] * 3 + ["EU"] * 6})
    assert load_table(path, **ROLES, episode="region", group="region")["group"].tolist() == [0, 0, 0, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("length", [1, 2])
def test_lists_are_no_names(tmp_path, length):
    path = write_parquet(tmp_path / "d.parquet", COLUMNS | {"list": [[3] * length] * 9})
    message = "d.parquet: column 'list' holds list<item: int64>, expected names or numbers."
    assert re.sub("<.*?:", "<item:", refusal(path, episode="list")) == message
    assert re.sub("<.*?:", "<item:", refusal(path, group="list", truncated="cut")) == message


@pytest.mark.usefixtures("small_chunks")
def test_empty_cells_are_refused(write):
    rewards, pulses, died = REWARD.copy(), PULSE.copy(), DIED.copy()
    rewards[2] = rewards[8] = pulses[4] = died[5] = None
    path = write(reward=rewards, pulse=pulses, died=died)
    found = [
        "observations has 1 row (first: 4) that are not finite in float32, in column pulse; drop or repair them.",
        "rewards has 2 rows (first: 2) that are not finite in float32, in column reward; drop or repair them.",
        "terminated has 1 row (first: 5) that are neither 0 nor 1, such as nan, in column died; use only 0 (false) "
        "and 1 (true).",
    ]
    message = "\n- ".join([f"{path.name}: 3 defects:", *found])
    assert refusal(path, truncated="cut") == message
    assert refusal(path, episode="episode") == message


def test_flags_other_than_0_and_1_are_refused(tmp_path):
    path = write_parquet(tmp_path / "d.parquet", COLUMNS | {"died": [0, 0, 2, 0, 0, 3, 0, 0, 0]})
    assert refusal(path, truncated="cut") == (
        "d.parquet: terminated has 2 rows (first: 2) that are neither 0 nor 1, such as 2.0, in column died; "
        "use only 0 (false) and 1 (true)."
    )
    path = write_csv(tmp_path / "d.csv", COLUMNS | {"died": [0, 0, 2, 0, 0, 3, 0, 0, 0]})
    assert re.fullmatch(
        r"d.csv: it cannot be read \(.*invalid value '2'\)\. Cells must be numbers, or 0 and 1 for flags; the "
        r"delimiter is ',' and the decimal point is '\.'\. Correct the file, or pass delimiter= and decimal_point=\.",
        refusal(path, truncated="cut"),
    )


def test_words_in_place_of_numbers_are_refused(tmp_path):
    path = write_parquet(tmp_path / "d.parquet", COLUMNS)
    assert refusal(path, action=["note"], truncated="cut") == "d.parquet: column 'note' holds string, expected numbers."
    path = write_csv(tmp_path / "d.csv", COLUMNS)
    assert re.fullmatch(
        r"d.csv: it cannot be read \(.*invalid value 'a, b'\)\. Cells must be numbers, or 0 and 1 for flags; the "
        r"delimiter is ',' and the decimal point is '\.'\. Correct the file, or pass delimiter= and decimal_point=\.",
        refusal(path, action=["note"], truncated="cut"),
    )


def test_missing_and_repeated_columns_are_refused(write, tmp_path):
    path = write()
    assert refusal(path, action=["dose", "drug"], truncated="end") == (
        f"{path.name}: the table lacks the columns ['drug', 'end']; the table has {list(COLUMNS)}."
    )
    expected = "no columns are given for ['actions', 'rewards']; pass the names of these columns."
    assert refusal(path, action=[], reward="", truncated="cut") == expected
    names, values = list(COLUMNS), list(COLUMNS.values())
    names[names.index("pressure")] = "pulse"
    if path.suffix == ".parquet":
        parquet.write_table(pa.table(values, names), path)
    else:
        content = write().read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        content = content.replace(b"pressure", b"pulse", 1)
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    assert refusal(path, observation=["pulse"], truncated="cut") == (
        f"{path.name}: the table has the columns ['pulse'] more than once; rename these columns."
    )
    assert len(load_table(path, **{**ROLES, "observation": ["dose"]}, truncated="cut")) == 7  # others may be


def test_actions_are_checked(write):
    assert refusal(write(), truncated="cut", action_spec=Bounded(0, 0.75, (1,))).endswith(
        "actions has 2 rows (first: 7) outside the action bounds, in column dose: the actions span "
        "[0.10000000149011612] to [0.8999999761581421], the bounds are [0.0] to [0.75]; clip or rescale the actions."
    )


def test_tables_without_rows_are_refused(write):
    for roles in ({"truncated": "cut"}, {"episode": "episode", "step": "step"}):
        path = write({name: pa.array(values)[:0] for name, values in COLUMNS.items()})
        assert refusal(path, **roles) == f"{path.name}: the data has no rows; at least one row is needed."


def test_one_row(write):
    path = write({name: values[2:3] for name, values in COLUMNS.items()})
    assert load_table(path, **ROLES, episode="episode")["next", "terminated"].tolist() == [[True]]


def test_other_and_damaged_files(write, tmp_path):
    path = tmp_path / "d.txt"
    path.write_text("pulse\n1\n")
    assert refusal(path, truncated="cut") == "d.txt: only .csv, .csv.gz, .parquet and .pq files can be read as tables."
    with pytest.raises(FileNotFoundError, match="^there is no file .*none.csv.$"):
        load_table(tmp_path / "none.csv", **ROLES, truncated="cut")
    path = write()
    if path.suffix != ".csv":  # a text that ends after a line looks complete
        path.write_bytes(path.read_bytes()[:-20])
        message = (
            rf"{re.escape(path.name)}: the source cannot be read \(.*\) and may be damaged: copy or create the source "
            "again."
        )
        assert re.fullmatch(message, refusal(path, truncated="cut"), re.DOTALL)
    path.write_bytes(b"")
    damaged, unreadable = r"the source cannot be read \(.*\) and may be damaged: .*", r"it cannot be read \(.*\)\. .*"
    message = rf"{re.escape(path.name)}: {damaged if path.suffix == '.parquet' else unreadable}"
    assert re.fullmatch(message, refusal(path, truncated="cut"))


def test_endings_in_capitals(tmp_path):
    for name, write in FORMATS.items():
        path = write(tmp_path / name, COLUMNS)
        path = path.rename(tmp_path / name.upper())
        if name != "d.csv.gz":
            assert len(load_table(path, **ROLES, truncated="cut")) == 7


def test_other_delimiters_and_decimal_points(tmp_path):
    path = write_csv(tmp_path / "d.csv", COLUMNS | {"note": [0] * 9})
    expected = load_table(path, **ROLES, truncated="cut")
    path.write_text(path.read_text().replace(",", ";").replace(".", ","))
    found = load_table(path, **ROLES, truncated="cut", delimiter=";", decimal_point=",")
    same(found, expected)
    assert refusal(path, truncated="cut").startswith(
        "d.csv: it lacks the columns ['pulse', "
    ) or "delimiter=" in refusal(path, truncated="cut")


def test_step_alone_is_refused(write):
    assert refusal(write(), step="step", next_observation=NEXT) == (
        "the step column alone does not show where an episode ends: also set episode or truncated to the name of "
        "its column."
    )


def test_column_of_the_episode_is_no_number_of_a_step(write):
    assert refusal(write(), episode="pulse") == (
        "column 'pulse' names the episode, so it cannot also hold another field."
    )


WHOLE = [0, 1, 2, 24, 3, 4, 5, 6, 7]


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("cell", [int, float, "{:.2f}".format])
def test_whole_numbers_in_a_csv_may_be_choices(tmp_path, cell, caplog):
    """One number with a fraction makes the actions continuous; with most indices missing, the reader asks."""
    path = write_csv(tmp_path / "d.csv", COLUMNS | {"dose": [cell(value) for value in WHOLE]})
    roles = {**ROLES, "episode": "episode"}
    assert refusal(path, episode="episode") == (
        "d.csv: actions has only whole numbers in all 9 rows, in column dose, and only 9 of the numbers 0 to 24 occur. "
        "If the actions are continuous, such as doses in whole units, pass action_type='continuous'; if they are "
        "discrete actions, pass action_type='discrete'."
    )
    td = load_table(path, **roles, action_type="continuous")
    assert td["action"].flatten().tolist() == [0, 1, 2, 24, 3, 4, 6]  # the last rows of bob and cy are cut off
    assert load_table(path, **{**roles, "action": ["dose", "pressure"]})["action"][3].tolist() == [24, 6.5]
    td = load_table(path, **roles, action_type="discrete")
    assert td["action"].tolist() == [0, 1, 2, 24, 3, 4, 6]
    path = write_csv(tmp_path / "d.csv", COLUMNS | {"dose": [*WHOLE[:-1], 7.5]})
    assert load_table(path, **roles)["action"].shape == (7, 1)
    assert "discrete" not in caplog.text


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("root", [None, "copies"])
def test_indices_in_a_csv_are_discrete_actions(tmp_path, root, caplog):
    path = write_csv(tmp_path / "d.csv", COLUMNS | {"dose": [0, 1, 2, 4, 3, 4, 0, 1, 2]})
    root = root and tmp_path / root
    td = load_table(path, **{**ROLES, "episode": "episode"}, root=root)
    assert (td["action"].tolist(), td["action"].dtype) == ([0, 1, 2, 4, 3, 4, 1], torch.int64)
    assert (
        "d.csv: the actions are read as discrete actions (0 to 4), because all of them are whole numbers. If the "
        "actions are continuous, such as doses in whole units, pass action_type='continuous'."
    ) in caplog.messages


def test_one_hot_columns_are_discrete_actions(tmp_path):
    choices = np.eye(3, dtype=int)[[0, 1, 2, 2, 1, 0, 0, 1, 2]]
    columns = COLUMNS | {f"a{at}": choices[:, at].tolist() for at in range(3)}
    roles = {**ROLES, "episode": "episode", "action": ["a0", "a1", "a2"]}
    odd = {"a1": [1] * 9}
    for write, name, found in (
        (write_csv, "d.csv", "in columns a0, a1, a2, and 6 rows (first: 0) are no one-hot vectors, such as [1.0, 1.0"),
        (write_parquet, "d.parquet", "actions has 6 rows (first: 0) that are not one-hot vectors with a single 1"),
    ):
        assert load_table(write(tmp_path / name, columns), **roles)["action"].tolist() == [0, 1, 2, 2, 1, 0, 1]
        assert found in refusal(write(tmp_path / name, columns | odd), episode="episode", action=roles["action"])


@pytest.mark.parametrize("kind", [pa.int64(), pa.uint8(), pa.list_(pa.int32()), pa.list_(pa.int8(), 1), pa.bool_()])
def test_integers_in_parquet_are_choices(tmp_path, kind):
    values = [value % 2 == 1 for value in WHOLE] if kind == pa.bool_() else WHOLE
    cells = pa.array([[value] for value in values] if hasattr(kind, "value_type") else values, kind)
    path = write_parquet(tmp_path / "d.parquet", COLUMNS | {"choice": cells})
    held = str(getattr(kind, "value_type", kind))
    assert refusal(path, action=["dose", "choice"], truncated="cut") == (
        f"d.parquet: the action columns have the types {{'dose': 'double', 'choice': '{held}'}}; store all of them as "
        "floating-point numbers, or pass action_type='continuous'."
    )
    roles = {**ROLES, "action": ["choice"], "truncated": "cut"}
    for action_type, dtype in (("continuous", torch.float32), ("discrete", torch.int64), (None, torch.int64)):
        td = load_table(path, **roles, action_type=action_type)
        assert td["action"].flatten().tolist() == [*values[:6], values[7]]
        assert td["action"].dtype == dtype


@pytest.mark.parametrize("rows", [2, 3, 65_536])  # of a part; floats come after integers, before them, or alone
def test_empty_cells_among_integers_are_reported(tmp_path, rows, monkeypatch):
    monkeypatch.setattr("torchrl_bcq.data.sources.tables._ROWS", rows)
    cells = pa.array([1, 2, None, 0, 1, 2, 0, 1, 2], pa.int64())
    path = write_parquet(tmp_path / "d.parquet", COLUMNS | {"choice": cells})
    found = refusal(path, action=["choice"], truncated="cut")
    assert "actions has 1 row (first: 2) that are not finite in float32, in column choice" in found


def test_the_kind_of_the_actions(write):
    assert refusal(write(), truncated="cut", action_type="whole").endswith(
        "action_type is 'whole', expected one of ['continuous', 'discrete']."
    )
    found = refusal(write(), truncated="cut", action_type="discrete")
    assert "actions has 9 rows (first: 0) that are not whole numbers from 0, such as 0.1, in column dose" in found


def test_a_copy_of_whole_actions_needs_the_setting_again(tmp_path):
    path = write_csv(tmp_path / "d.csv", COLUMNS | {"dose": WHOLE})
    roles = {**ROLES, "truncated": "cut", "root": tmp_path / "copies"}
    load_table(path, **roles, action_type="continuous")
    with pytest.raises(ValueError, match="actions has only whole numbers"):
        load_table(path, **roles)


def test_masks_and_probabilities_are_columns(tmp_path):
    masks = {"m0": [1] * 9, "m1": [1, 0] * 4 + [1]}
    columns = COLUMNS | {"dose": [0, 0, 1, 0, 0, 0, 1, 0, 1], **masks, "p": np.linspace(0.1, 0.9, 9).round(2).tolist()}
    roles = {**ROLES, "episode": "episode", "action_mask": ["m0", "m1"], "action_probability": "p"}
    for write, name in ((write_csv, "d.csv"), (write_parquet, "d.parquet")):
        td = load_table(write(tmp_path / name, columns), **roles, action_type="discrete")
        assert td["action_mask"].tolist() == [[True, row % 2 == 0] for row in (0, 1, 2, 3, 4, 5, 7)]
        assert td["action_probability"].tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8])


def check_true_and_false(path):
    td = load_table(path, **{**ROLES, "observation": ["on", "pulse"]}, truncated="cut")
    assert td["observation"].tolist() == [[0, 60], [1, 61], [0, 62], [1, 70], [0, 71], [1, 72], [1, 80]]


def test_features_that_are_true_or_false(write):
    check_true_and_false(write(on=[row % 2 == 1 for row in range(9)]))


@pytest.mark.parametrize("words", [("true", "false"), ("TRUE", "FALSE")])
def test_other_words_for_true_and_false(tmp_path, words):
    on = [words[row % 2 == 0] for row in range(9)]
    check_true_and_false(write_csv(tmp_path / "d.csv", COLUMNS | {"on": on}))


@pytest.mark.parametrize("roles", [ROLES, {**ROLES, "observation": ["60.0"], "action": ["0.1"]}])
def test_a_csv_without_names_of_columns(tmp_path, roles):
    path = write_csv(tmp_path / "d.csv", COLUMNS)
    path.write_bytes(path.read_bytes().split(b"\n", 1)[1])
    message = refusal(path, **roles, truncated="cut")
    assert message.startswith("d.csv: the table lacks the columns [")
    assert message.endswith(" If these are numbers of the first step, add a first line with the column names.")


def test_text_that_is_not_utf8_is_refused(tmp_path):
    path = tmp_path / "d.csv"
    path.write_bytes("dose (µg),x,r,end,t\n0.5,1,1,0,1\n0.25,2,1,1,1\n".encode("cp1252"))
    columns = {"observation": ["x"], "action": ["dose (µg)"], "reward": "r", "terminated": "end", "episode": "t"}
    with pytest.raises(
        ValueError, match=r"^d\.csv: its text is not UTF-8 \(.*\); save the file again with the encoding"
    ):
        load_table(path, **columns)
    path.write_bytes(path.read_bytes().decode("cp1252").encode())
    assert load_table(path, **columns)["action"].squeeze(1).tolist() == [0.5, 0.25]
