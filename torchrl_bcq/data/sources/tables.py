"""CSV and Parquet tables of logged decisions; the user names their columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tensordict import TensorDict
from torchrl.data import TensorSpec

from torchrl_bcq.data.checks import FIELDS, Columns, DatasetError, Rows, listed
from torchrl_bcq.data.sources.array_files import existing_file
from torchrl_bcq.data.sources.source import Source
from torchrl_bcq.data.transitions import with_successors

_ROWS, _CHUNK_BYTES = 65_536, 8 << 20  # read at a time, at most; bytes as stored
_TRUE, _FALSE = ("1", "1.0", "true", "True", "TRUE"), ("0", "0.0", "false", "False", "FALSE")
_ARGUMENTS = ("observation", "action", "reward", "terminated", "truncated", "next_observation")  # fields in FIELDS
# defects of the order of rows, and what to do
_NAMELESS = "episode has {} without a name or number; fill them in, or drop those rows."
_TORN = "episode has {} where an earlier episode continues; sort the table by episode and step."
_INSIDE = (
    "terminated or truncated is set in {} before the last one of an episode; correct them, or renumber the episodes."
)
_STEPLESS = "step has {} without a finite number; fill them in, or drop those rows."
_JUMPS = (
    "step has {} that do not follow the row before by 1; sort the table by episode and step, and give what comes after "
    "a gap another episode."
)


def load_table(
    path: str | Path,
    *,
    observation: Sequence[str],
    action: Sequence[str],
    reward: str,
    terminated: str,
    truncated: str | None = None,
    next_observation: Sequence[str] | None = None,
    episode: str | None = None,
    step: str | None = None,
    delimiter: str = ",",
    decimal_point: str = ".",
    action_spec: TensorSpec | None = None,
    root: str | Path | None = None,
) -> TensorDict:
    """Read a table with one row for each step into the transitions of :func:`~torchrl_bcq.from_arrays`.

    Rows of one episode follow one another, in order. An episode ends where ``terminated`` or ``truncated`` is set, and
    is cut off where ``episode`` changes.

    Args:
        path: ``.csv``, ``.csv.gz`` or ``.parquet``.
        observation, action: columns of the state and of the action, numbers.
        reward: column of the reward that followed.
        terminated, truncated: columns of flags: the episode ended in a final state, or was cut off.
        next_observation: columns of the state that followed, in the order of ``observation``.
        episode: column of the episode's number or name.
        step: column of the step within the episode; rows that are missing or out of order are then refused.
        delimiter, decimal_point: of a CSV file, such as ``";"`` and ``","``.
        action_spec, root: as :func:`~torchrl_bcq.load_hdf5` takes them.

    Raises:
        FileNotFoundError: if there is no such file.
        DatasetError: if it is no such table, a column is missing, does not hold numbers or has empty cells, episodes
            are not together or out of order, or :func:`~torchrl_bcq.from_arrays` refuses it.
        OSError: if the copy cannot be written.
    """
    given = (observation, action, reward, terminated, truncated, next_observation)
    columns = {**dict(zip(_ARGUMENTS, given, strict=True)), "episode": episode, "step": step}
    source = table(path, delimiter=delimiter, decimal_point=decimal_point, **columns)
    return source.read(action_spec=action_spec, root=root)


def table(
    path: str | Path, *, delimiter: str = ",", decimal_point: str = ".", **columns: Sequence[str] | str | None
) -> Source:
    """The source of :func:`load_table`, with the same columns."""
    path, fields = existing_file(path), dict(zip(_ARGUMENTS, FIELDS, strict=True))
    named = {
        fields.get(name, name): [names] if isinstance(names, str) else list(names)
        for name, names in columns.items()
        if names is not None and len(names)  # of a pandas index, too
    }
    if missing := [field for field in FIELDS[:4] if field not in named]:
        raise DatasetError(f"no columns are named for {missing}.")
    if not named.keys() & {"truncated", "next_observations", "episode"}:
        raise DatasetError(
            "nothing says where an episode was cut off and the next one began; name the column of truncated, of "
            "episode, or those of next_observation."
        )
    if "step" in named and not named.keys() & {"truncated", "episode"}:
        raise DatasetError(
            "step alone does not say where an episode ends; name the column of episode or truncated, too."
        )
    episode = named.get("episode", [])
    if repeated := [name for field, names in named.items() for name in names if field != "episode" and name in episode]:
        raise DatasetError(f"column {repeated[0]!r} names the episode and cannot be a number of its steps, too.")

    def chunks() -> Iterator[Columns]:
        steps = (_fields(batch, named) for batch in _batches(path, named, delimiter, decimal_point))
        return _in_order(steps) if named.keys() & {"episode", "step"} else steps

    return Source(path.name, chunks, [path], {**named, "delimiter": delimiter, "decimal_point": decimal_point})


def _batches(path: Path, named: Mapping[str, list[str]], delimiter: str, decimal_point: str) -> Iterator[Any]:
    from pyarrow import ArrowInvalid, parquet

    wanted = list(dict.fromkeys(name for names in named.values() for name in names))
    name = path.name.lower()
    if name.endswith((".parquet", ".pq")):
        # without these two options, pyarrow holds row groups in memory, which may be the whole file
        flat = {"pre_buffer": False, "buffer_size": 1 << 20}
        with parquet.ParquetFile(path, page_checksum_verification=True, **flat) as file:
            _check_columns(file.schema_arrow.names, wanted)
            size = sum(file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups))
            rows = _CHUNK_BYTES * file.metadata.num_rows // max(1, size)
            yield from file.iter_batches(min(max(1, rows), _ROWS), columns=wanted)
    elif name.endswith((".csv", ".csv.gz")):
        try:
            yield from _csv_batches(path, wanted, named, delimiter, decimal_point)
        except ArrowInvalid as error:
            raise DatasetError(
                f"it cannot be read ({error}); cells must be numbers, or 0 and 1 for flags, with {delimiter!r} between "
                f"them and the decimal point {decimal_point!r}: correct it, or pass delimiter= and decimal_point=."
            ) from error
    else:
        raise DatasetError("only .csv, .csv.gz and .parquet files are read as tables.")


def _csv_batches(
    path: Path, wanted: list[str], named: Mapping[str, list[str]], delimiter: str, decimal_point: str
) -> Iterator[Any]:
    import pyarrow
    from pyarrow import csv

    def open_csv(**options: Any) -> Any:
        stream = pyarrow.input_stream(path, "gzip" if path.name.lower().endswith(".gz") else None)
        return csv.open_csv(stream, parse_options=csv.ParseOptions(delimiter=delimiter), **options)

    with open_csv() as reader:
        _check_columns(reader.schema.names, wanted)
    numbers = {name: pyarrow.float64() for field, names in named.items() if field != "episode" for name in names}
    flags = {name: pyarrow.bool_() for field in ("terminated", "truncated") for name in named.get(field, ())}
    texts = {name: pyarrow.string() for name in named.get("episode", ())}
    convert = csv.ConvertOptions(
        include_columns=wanted,
        column_types={**numbers, **flags, **texts},
        strings_can_be_null=True,
        true_values=_TRUE,
        false_values=_FALSE,
        decimal_point=decimal_point,
    )
    with open_csv(convert_options=convert) as reader:
        yield from reader


def _check_columns(found: Sequence[str], wanted: Sequence[str]) -> None:
    if missing := [name for name in wanted if name not in found]:
        raise DatasetError(f"it lacks the columns {missing}; it has {list(found)}.")
    if repeated := [name for name in wanted if list(found).count(name) > 1]:
        raise DatasetError(f"it has the columns {repeated} more than once; rename them.")


def _fields(batch: Any, named: Mapping[str, list[str]]) -> dict[str, np.ndarray]:
    return {
        field: np.asarray(batch.column(names[0]).to_pylist(), dtype=object)
        if field == "episode"
        else np.concatenate([_numbers(batch.column(name), name) for name in names], axis=1)
        for field, names in named.items()
    }


def _numbers(column: Any, name: str) -> np.ndarray:
    """Numbers ``[n, 1]``, or ``[n, D]`` of a column of lists of one length; an empty cell is NaN."""
    from pyarrow import compute, float64, types

    width = 1
    if types.is_list(column.type) or types.is_fixed_size_list(column.type) or types.is_large_list(column.type):
        lengths = set(compute.list_value_length(column).to_pylist())
        if len(lengths) != 1 or not (width := lengths.pop()):
            raise DatasetError(f"column {name!r} holds lists of different or no lengths; each row needs the same.")
        column = compute.list_flatten(column)
    if not (types.is_integer(column.type) or types.is_floating(column.type) or types.is_boolean(column.type)):
        raise DatasetError(f"column {name!r} holds {column.type}, expected numbers.")
    return column.cast(float64(), safe=False).to_numpy(zero_copy_only=False).reshape(-1, width)


def _in_order(chunks: Iterator[dict[str, np.ndarray]]) -> Iterator[Columns]:
    """Set ``truncated`` where another episode begins; defects of the order are refused after the last chunk."""
    start = 0
    seen: set[object] = set()  # names of episodes
    defects = {remedy: Rows() for remedy in (_NAMELESS, _TORN, _INSIDE, _STEPLESS, _JUMPS)}
    for fields, is_end in with_successors(chunks):
        chunk = {field: values[:-1] for field, values in fields.items() if field not in ("episode", "step")}
        terminated = chunk["terminated"][:, 0] == 1
        truncated = chunk.get("truncated", np.zeros((len(terminated), 1)))
        last = done = terminated | (truncated[:, 0] == 1)
        if "episode" in fields:
            names = fields["episode"]
            last = (names[:-1] != names[1:]).astype(bool) | is_end
            defects[_NAMELESS].add(np.array([name is None or name != name for name in names[:-1]]), start)  # or NaN
            defects[_INSIDE].add(done & ~last, start)
            defects[_TORN].add(_returning(names, last & (not is_end), seen), start + 1)
            chunk["truncated"] = np.where((last & ~terminated)[:, None], 1, truncated)
        if "step" in fields:
            step = fields["step"][:, 0]
            defects[_STEPLESS].add(~np.isfinite(step[:-1]), start)
            defects[_JUMPS].add((step[1:] != step[:-1] + 1) & ~(last | is_end), start + 1)
        start += len(done)
        yield chunk
    if found := [remedy.format(rows) for remedy, rows in defects.items() if rows.count]:
        raise DatasetError(listed(found))


def _returning(names: np.ndarray, last: np.ndarray, seen: set[object]) -> np.ndarray:
    """Whether another episode follows each row ``[n]`` that was seen before; adds its ``names [n + 1]`` to ``seen``."""
    found = np.zeros(len(last), dtype=bool)
    seen.add(names[0])
    for row in last.nonzero()[0]:  # once an episode
        found[row] = names[row + 1] in seen
        seen.add(names[row + 1])
    return found
