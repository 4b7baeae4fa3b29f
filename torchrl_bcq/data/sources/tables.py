"""Tables of logged decisions: CSV and Parquet, with columns that the user names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tensordict import TensorDict
from torchrl.data import TensorSpec

from torchrl_bcq.data.checks import Columns, DatasetError, Rows, listed
from torchrl_bcq.data.sources.array_files import existing_file
from torchrl_bcq.data.sources.source import Source

_ROWS = 65_536  # read at a time, or fewer:
_CHUNK_BYTES = 8 << 20  # as stored
_TRUE, _FALSE = ("1", "1.0", "true", "True", "TRUE"), ("0", "0.0", "false", "False", "FALSE")


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
    """Read a table of logged decisions, one row for each step, in a CSV (also ``.csv.gz``) or Parquet file.

    Rows of one episode follow one another, in order. An episode ends where ``terminated`` or ``truncated`` is set, or
    ``episode`` changes: there it was cut off.

    Args:
        path: ``.csv``, ``.csv.gz`` or ``.parquet``.
        observation: columns of the state, numbers.
        action: columns of the action, numbers.
        reward: column of the reward that followed.
        terminated: column of flags: the episode ended in a final state.
        truncated: column of flags: the episode was cut off.
        next_observation: columns of the state that followed, in the order of ``observation``.
        episode: column of the episode's number or name.
        step: column of the step within the episode, in case rows are missing or out of order: that is refused.
        delimiter: between the cells of a CSV file, such as ``";"``.
        decimal_point: in the numbers of a CSV file, such as ``","``.
        action_spec: bounds that the actions must keep, if given.
        root: folder for a memory-mapped copy, made once and for data larger than memory.

    Returns:
        The transitions of :func:`~torchrl_bcq.from_arrays`.

    Raises:
        FileNotFoundError: if there is no such file.
        DatasetError: if it is no such table, a column is missing, empty in some rows or no numbers, episodes are torn
            apart or out of order, or it does not pass :func:`~torchrl_bcq.from_arrays`.
        OSError: if the copy cannot be written.
    """
    source = table(
        path,
        observation=observation,
        action=action,
        reward=reward,
        terminated=terminated,
        truncated=truncated,
        next_observation=next_observation,
        episode=episode,
        step=step,
        delimiter=delimiter,
        decimal_point=decimal_point,
    )
    return source.read(action_spec=action_spec, root=root)


def table(
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
) -> Source:
    """The source of :func:`load_table`."""
    path = existing_file(path)
    columns: dict[str, Sequence[str] | str | None] = {
        "observations": observation,
        "actions": action,
        "rewards": reward,
        "terminated": terminated,
        "truncated": truncated,
        "next_observations": next_observation,
        "episode": episode,
        "step": step,
    }
    named = {
        field: [names] if isinstance(names, str) else list(names)
        for field, names in columns.items()
        if names is not None and len(names)  # of a pandas index, too
    }
    if missing := [field for field in ("observations", "actions", "rewards", "terminated") if field not in named]:
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
    if episode in {name for field, names in named.items() if field != "episode" for name in names}:
        raise DatasetError(f"column {episode!r} names the episode and cannot be a number of its steps, too.")

    def chunks() -> Iterator[Columns]:
        steps = (_fields(batch, named) for batch in _batches(path, named, delimiter, decimal_point))
        return _in_order(steps) if named.keys() & {"episode", "step"} else steps

    settings = {**named, "delimiter": delimiter, "decimal_point": decimal_point}
    return Source(path.name, chunks, [path], settings=settings)


def _batches(path: Path, named: Mapping[str, list[str]], delimiter: str, decimal_point: str) -> Iterator[Any]:
    """Arrow record batches of the named columns."""
    from pyarrow import ArrowInvalid, parquet

    wanted = list(dict.fromkeys(name for names in named.values() for name in names))
    name = path.name.lower()
    if name.endswith((".parquet", ".pq")):
        # without these two, pyarrow holds row groups in memory, which may be the whole file
        flat = {"pre_buffer": False, "buffer_size": 1 << 20}
        with parquet.ParquetFile(path, page_checksum_verification=True, **flat) as file:
            _check_columns(file.schema_arrow.names, wanted)
            groups = (file.metadata.row_group(i) for i in range(file.metadata.num_row_groups))
            size = sum(group.total_byte_size for group in groups)
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

    parse = csv.ParseOptions(delimiter=delimiter)
    compression = "gzip" if path.name.lower().endswith(".gz") else None
    with csv.open_csv(pyarrow.input_stream(path, compression), parse_options=parse) as reader:
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
    stream = pyarrow.input_stream(path, compression)
    with csv.open_csv(stream, parse_options=parse, convert_options=convert) as reader:
        yield from reader


def _check_columns(found: Sequence[str], wanted: Sequence[str]) -> None:
    if missing := [name for name in wanted if name not in found]:
        raise DatasetError(f"it lacks the columns {missing}; it has {list(found)}.")
    if repeated := [name for name in wanted if list(found).count(name) > 1]:
        raise DatasetError(f"it has the columns {repeated} more than once; rename them.")


def _fields(batch: Any, named: Mapping[str, list[str]]) -> dict[str, np.ndarray]:
    fields = {}
    for field, names in named.items():
        if field == "episode":
            values = np.asarray(batch.column(names[0]).to_pylist(), dtype=object)
        else:
            values = np.concatenate([_numbers(batch.column(name), name) for name in names], axis=1)
        fields[field] = values
    return fields


def _numbers(column: Any, name: str) -> np.ndarray:
    """Numbers ``[n, 1]``, or ``[n, D]`` of a column of lists of the same length; an empty cell is NaN."""
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
    """Steps whose episodes are whole and in order, cut off where another one begins.

    Raises:
        DatasetError: after the last chunk, for rows that are not.
    """
    order = _Order()
    held: dict[str, np.ndarray] = {}  # the last row, of which the next one says whether it ends its episode
    for chunk in chunks:
        for field, values in held.items():
            if values.shape[1:] != chunk[field].shape[1:]:
                raise DatasetError(f"{field} has lists of different lengths; each row needs the same.")
        if held:
            chunk = {field: np.concatenate([held[field], values]) for field, values in chunk.items()}
        held = {field: values[-1:] for field, values in chunk.items()}
        if len(chunk["actions"]) > 1:
            yield order.close({field: values[:-1] for field, values in chunk.items()}, chunk)
    if held:
        yield order.close(held, None)
    order.finish()


class _Order:
    """Counts rows that are out of order, over all chunks."""

    def __init__(self) -> None:
        self._rows = 0
        self._seen: set[object] = set()
        self._nameless, self._torn, self._inside = Rows(), Rows(), Rows()
        self._stepless, self._jumps = Rows(), Rows()

    def close(self, fields: dict[str, np.ndarray], following: dict[str, np.ndarray] | None) -> Columns:
        """Rows with ``truncated`` where their episode was cut off.

        Args:
            fields: ``[n, ...]`` each.
            following: the same rows and the one after them, None after the last.
        """
        terminated = fields["terminated"][:, 0] == 1
        truncated = fields.get("truncated", np.zeros((len(terminated), 1)))
        last = done = terminated | (truncated[:, 0] == 1)
        if "episode" in fields:
            last = self._last_of_episode(fields["episode"], following)
            self._inside.add(done & ~last, self._rows)
            truncated = np.where((last & ~terminated)[:, None], 1, truncated)
        if "step" in fields:
            self._stepless.add(~np.isfinite(fields["step"][:, 0]), self._rows)
        if "step" in fields and following is not None:
            jumps = following["step"][1:, 0] != fields["step"][:, 0] + 1
            self._jumps.add(jumps & ~last, self._rows + 1)
        self._rows += len(done)
        closed = {field: values for field, values in fields.items() if field not in ("episode", "step")}
        return {**closed, "truncated": truncated} if fields.keys() & {"truncated", "episode"} else closed

    def _last_of_episode(self, episode: np.ndarray, following: dict[str, np.ndarray] | None) -> np.ndarray:
        """Which rows ``[n]`` are the last of their episode."""
        self._nameless.add(np.array([name is None or name != name for name in episode]), self._rows)  # or NaN
        if not self._rows:
            self._seen.add(episode[0])
        if following is None:
            return np.ones(len(episode), dtype=bool)
        successor = following["episode"][1:]
        last = (episode != successor).astype(bool)
        for row in last.nonzero()[0]:  # once an episode
            if successor[row] in self._seen:
                self._torn.add(np.ones(1, dtype=bool), self._rows + 1 + int(row))
            self._seen.add(successor[row])
        return last

    def finish(self) -> None:
        """Refuse what was counted.

        Raises:
            DatasetError: naming the column, the count and the first row.
        """
        remedies = {
            "episode has {} without a name or number; fill them in, or drop those rows.": self._nameless,
            "episode has {} where an earlier episode goes on; sort the table by episode and step.": self._torn,
            "terminated or truncated is set in {} before the last one of an episode; correct them, or number the "
            "episodes anew.": self._inside,
            "step has {} without a finite number; fill them in, or drop those rows.": self._stepless,
            "step has {} that do not follow the row before by 1; sort the table by episode and step, and give what "
            "comes after a gap another episode.": self._jumps,
        }
        found = [remedy.format(rows) for remedy, rows in remedies.items() if rows.count]
        if found:
            raise DatasetError(listed(found))
