"""Reads CSV and Parquet tables with one row per step. The caller names the columns to read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tensordict import TensorDict
from torchrl.data import TensorSpec

from torchrl_bcq.data.checks import FIELDS, Columns
from torchrl_bcq.data.sources.order import check_limit, cut_at_limit, in_order
from torchrl_bcq.data.sources.source import Source, existing_file
from torchrl_bcq.errors import DatasetError, remedy

_ROWS, _CHUNK_BYTES = 65_536, 8 << 20  # largest number of rows, and approximate size in bytes, of one Parquet batch
_TRUE, _FALSE = ("1", "1.0", "true", "True", "TRUE"), ("0", "0.0", "false", "False", "FALSE")
# arguments of load_table, in the same order as FIELDS, the arguments of from_arrays
_ARGUMENTS = ("observation", "action", "reward", "terminated", "truncated", "next_observation", "group",
              "action_mask", "next_action_mask", "action_probability")  # fmt: skip
_FLAGS = ("terminated", "truncated", "action_masks", "next_action_masks")
_NAMES = ("episode", "groups")  # fields whose columns hold names or numbers
_NANOSECONDS = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}  # of each unit of a timestamp


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
    group: str | None = None,
    step: str | None = None,
    action_mask: Sequence[str] | None = None,
    next_action_mask: Sequence[str] | None = None,
    action_probability: str | None = None,
    action_type: str | None = None,
    delimiter: str = ",",
    decimal_point: str = ".",
    max_episode_steps: int | None = None,
    action_spec: TensorSpec | None = None,
    root: str | Path | None = None,
) -> TensorDict:
    """Read a table with one row for each step. Return transitions in the layout of ``from_arrays``.

    The rows of an episode must follow each other in order of time. An episode ends where ``terminated`` or
    ``truncated`` is set. Where the ``episode`` column changes, the row before the change is marked as truncated, unless
    it is terminated.

    Args:
        path: file that ends in ``.csv``, ``.csv.gz``, ``.parquet`` or ``.pq``.
        observation, action: names of the columns that hold the observation before the step, and of those that hold the
            action. All of them hold numbers.
        reward: name of the column with the reward of the step.
        terminated: name of a column of flags. A flag is set if the step led to a final state.
        truncated: name of a column of flags. A flag is set if the episode was cut off after the step.
        next_observation: names of the columns with the observation after the step, in the order of ``observation``.
        episode: name of the column with the number or name of the episode.
        group: name of the column with the number or name of a group, such as a patient or a user. See ``groups`` of
            ``from_arrays``.
        step: name of the column with the step number in the episode. If given, rows out of order, and rows that are
            missing between two rows of an episode, raise a ``DatasetError``.
        action_mask, next_action_mask: names of the ``K`` columns of flags that tell which discrete actions were
            available before and after the step. See ``action_masks`` of ``from_arrays``.
        action_probability: name of the column with the probability with which the recorded policy chose the action.
        action_type: ``"discrete"`` if the action column holds the index of a discrete action, from 0 on, or if the
            action columns hold one-hot vectors; ``"continuous"`` if whole numbers are amounts, such as doses. By
            default, actions are discrete in a Parquet file if their columns hold integers, and in a CSV file if all
            actions are whole numbers.
        delimiter, decimal_point: column separator and decimal separator of a CSV file, such as ``";"`` and ``","``.
        max_episode_steps, action_spec, root: as for ``load_hdf5``. ``max_episode_steps`` is for tables without
            ``truncated`` and ``episode``.

    Raises:
        FileNotFoundError: if the file does not exist.
        DatasetError: if the file is not a table; if a column is missing, does not hold numbers or has empty cells; if
            the rows of an episode are out of order or mixed with other episodes; or if a check of ``from_arrays``
            fails.
        OSError: if the memory-mapped copy cannot be written.

    Example:
        >>> path = Path("trips.csv")
        >>> lines = ["trip,x,v,force,r,crashed", "a,0,1,0.5,1,0", "a,1,1,0.5,1,1", "b,0,2,0.1,1,0", "b,2,2,0.2,1,1"]
        >>> _ = path.write_text("\\n".join(lines))
        >>> columns = {"observation": ["x", "v"], "action": ["force"], "reward": "r", "terminated": "crashed"}
        >>> load_table(path, **columns, episode="trip")["episode"].tolist()
        [0, 0, 1, 1]
    """
    given = (observation, action, reward, terminated, truncated, next_observation, group)
    masks = (action_mask, next_action_mask, action_probability)
    columns: dict[str, Any] = dict(zip(_ARGUMENTS, (*given, *masks), strict=True))
    columns |= {"episode": episode, "step": step}
    csv: dict[str, Any] = {"delimiter": delimiter, "decimal_point": decimal_point}
    source = table(path, action_type=action_type, max_episode_steps=max_episode_steps, **csv, **columns)
    return source.read(action_spec=action_spec, root=root)


def table(
    path: str | Path,
    *,
    action_type: str | None = None,
    delimiter: str = ",",
    decimal_point: str = ".",
    max_episode_steps: int | None = None,
    **columns: Sequence[str] | str | None,
) -> Source:
    """Return the table at ``path`` as a ``Source``. The arguments are the same as in ``load_table``."""
    path, fields = existing_file(path), dict(zip(_ARGUMENTS, FIELDS, strict=True))
    named = {fields.get(name, name): given for name, names in columns.items() if (given := _as_list(names))}
    if odd := {name: given for name, given in named.items() if not all(isinstance(each, str) for each in given)}:
        raise DatasetError(f"the columns are {odd}, expected texts: the names of columns.")
    for name, sign in (("delimiter", delimiter), ("decimal_point", decimal_point)):
        if not isinstance(sign, str) or len(sign) != 1 or not sign.isascii():
            how = remedy(f"{name}=';'", f"reader.{name}=';', or with a tab, reader.{name}=$'\\t'")
            raise DatasetError(f"{name} is {sign!r}, expected one ASCII character, as in {how}.")
    if missing := [field for field in FIELDS[:4] if field not in named]:
        how = remedy("pass", "set in reader")
        raise DatasetError(f"no columns are given for {missing}; {how} the names of these columns.")
    check_limit(max_episode_steps)
    if max_episode_steps is None and not named.keys() & {"truncated", "next_observations", "episode"}:
        raise DatasetError(
            "it is not known where episodes were cut off: set "
            + remedy("episode, truncated or ", "reader.episode, reader.truncated or reader.")
            + "next_observation to the name of its column, or "
            + remedy("", "reader.")
            + "max_episode_steps to the time limit."
        )
    if "step" in named and not named.keys() & {"truncated", "episode"}:
        alone = "the step column alone does not show where an episode ends"
        raise DatasetError(f"{alone}: also set episode or truncated to the name of its column.")
    for field in named.keys() & set(_NAMES):
        _check_name_column(field, named)

    is_csv = path.name.lower().endswith((".csv", ".csv.gz"))

    def chunks() -> Iterator[Columns]:
        batches = _csv_batches(path, named, delimiter, decimal_point) if is_csv else _parquet_batches(path, named)
        fields = (_fields(batch, named, whole=action_type is None and not is_csv) for batch in batches)
        steps = in_order(fields) if named.keys() & {"episode", "step"} else fields
        return steps if max_episode_steps is None else cut_at_limit(steps, max_episode_steps)

    settings = {**named, "action_type": action_type, "delimiter": delimiter, "decimal_point": decimal_point}
    limit = {} if max_episode_steps is None else {"max_episode_steps": max_episode_steps}
    kind: dict[str, Any] = {"action_type": action_type, "typed": not is_csv}
    return Source(path.name, chunks, [path], {**settings, **limit}, **kind, columns=named)


def _check_name_column(field: str, named: Mapping[str, list[str]]) -> None:
    """Check that ``episode`` or ``groups`` is a single column, and that no numbers are read from this column."""
    what, (name, *others) = field.removesuffix("s"), named[field]
    if others:
        raise DatasetError(f"{what} is {named[field]}, expected the name of one column.")
    if any(name in names for other, names in named.items() if other not in _NAMES):
        raise DatasetError(f"column {name!r} names the {what}, so it cannot also hold another field.")


def _parquet_batches(path: Path, named: Mapping[str, list[str]]) -> Iterator[Any]:
    """Yield parts of a Parquet file."""
    from pyarrow import parquet

    if not path.name.lower().endswith((".parquet", ".pq")):
        raise DatasetError("only .csv, .csv.gz, .parquet and .pq files can be read as tables.")
    wanted = _wanted(named)
    # stop pyarrow from keeping a whole row group in memory, because it may be as large as the file
    flat = {"pre_buffer": False, "buffer_size": 1 << 20}
    with parquet.ParquetFile(path, page_checksum_verification=True, **flat) as file:
        _check_columns(file.schema_arrow.names, wanted)
        size = sum(file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups))
        rows = _CHUNK_BYTES * file.metadata.num_rows // max(1, size)
        yield from file.iter_batches(min(max(1, rows), _ROWS), columns=wanted)


def _csv_batches(path: Path, named: Mapping[str, list[str]], delimiter: str, decimal_point: str) -> Iterator[Any]:
    import pyarrow
    from pyarrow import csv

    def open_csv(**options: Any) -> Any:
        stream = pyarrow.input_stream(path, "gzip" if path.name.lower().endswith(".gz") else None)
        return csv.open_csv(stream, parse_options=csv.ParseOptions(delimiter=delimiter), **options)

    try:
        with open_csv() as reader:
            _check_columns(reader.schema.names, _wanted(named))
            guessed = {field.name: field.type for field in reader.schema}
        numbers = {name: pyarrow.float64() for field, names in named.items() if field not in _NAMES for name in names}
        # cells such as True and False become 1 and 0, as in Parquet
        flags = {name: pyarrow.bool_() for name in numbers if _holds(guessed[name], "boolean")}
        flags |= {name: pyarrow.bool_() for field in _FLAGS for name in named.get(field, ())}
        texts = {name: pyarrow.string() for field in _NAMES for name in named.get(field, ())}
        convert = csv.ConvertOptions(
            include_columns=_wanted(named),
            column_types={**numbers, **flags, **texts},
            true_values=_TRUE,
            false_values=_FALSE,
            decimal_point=decimal_point,
        )
        with open_csv(convert_options=convert) as reader:
            yield from reader
    except UnicodeDecodeError as error:
        raise DatasetError(f"its text is not UTF-8 ({error}); save the file again with the encoding UTF-8.") from error
    except pyarrow.ArrowInvalid as error:
        raise DatasetError(
            f"it cannot be read ({error}). Cells must be numbers, or 0 and 1 for flags; the delimiter is "
            f"{delimiter!r} and the decimal point is {decimal_point!r}. Correct the file, or "
            + remedy("pass delimiter= and decimal_point=.", "set reader.delimiter=';' or reader.decimal_point=','.")
        ) from error


def _as_list(names: Any) -> list[Any]:
    """Return the names of columns as a list, which is empty if none are given."""
    if names is None or isinstance(names, str):
        return [names] if names else []
    return list(names) if isinstance(names, Iterable) else [names]


def _wanted(named: Mapping[str, list[str]]) -> list[str]:
    return list(dict.fromkeys(name for names in named.values() for name in names))


def _holds(kind: Any, *families: str) -> bool:
    """Return whether a data type of pyarrow belongs to one of the families, such as ``"integer"``."""
    from pyarrow import types

    return any(getattr(types, f"is_{family}")(kind) for family in families)


def _check_columns(found: Sequence[str], wanted: Sequence[str]) -> None:
    if missing := [name for name in wanted if name not in found]:
        is_data = any(re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?", name, re.IGNORECASE) for name in found)
        hint = " If these are numbers of the first step, add a first line with the column names." if is_data else ""
        raise DatasetError(f"the table lacks the columns {missing}; the table has {list(found)}.{hint}")
    if repeated := [name for name in wanted if list(found).count(name) > 1]:
        raise DatasetError(f"the table has the columns {repeated} more than once; rename these columns.")


def _fields(batch: Any, named: Mapping[str, list[str]], whole: bool) -> dict[str, np.ndarray]:
    """Return the fields of a batch. If ``whole`` is true, integers in the action columns remain integers."""
    fields = {
        field: _names(batch.column(names[0]), names[0])
        if field in _NAMES
        else np.concatenate([_numbers(batch.column(name), name) for name in names], axis=1)
        for field, names in named.items()
    }
    kinds = {name: batch.schema.field(name).type for name in named["actions"]} if whole else {}
    kinds = {name: getattr(kind, "value_type", kind) for name, kind in kinds.items()}  # of the numbers in lists
    integers = [_holds(kind, "integer", "boolean") for kind in kinds.values()]
    if any(integers) and not all(integers):
        found = f"the action columns have the types { {name: str(kind) for name, kind in kinds.items()} }"
        how = remedy("pass action_type='continuous'", "set reader.action_type=continuous")
        raise DatasetError(f"{found}; store all of them as floating-point numbers, or {how}.")
    if any(integers) and np.isfinite(fields["actions"]).all():
        fields["actions"] = fields["actions"].astype(np.int64)
    return fields


def _names(column: Any, name: str) -> np.ndarray:
    """Return the names or numbers in a column, ``[n]``. Empty cells become None."""
    from pyarrow import int64

    if _holds(column.type, "nested"):
        raise DatasetError(f"column {name!r} holds {column.type}, expected names or numbers.")
    if _holds(column.type, "timestamp"):  # without pandas, pyarrow cannot convert nanoseconds to Python objects
        unit = _NANOSECONDS[column.type.unit]
        return np.asarray([time and time * unit for time in column.cast(int64()).to_pylist()], dtype=object)
    return np.asarray([None if name == "" else name for name in column.to_pylist()], dtype=object)


def _numbers(column: Any, name: str) -> np.ndarray:
    """Convert a column to floats ``[n, 1]``, or ``[n, D]`` if cells are lists. Empty cells become NaN."""
    from pyarrow import compute, float64

    width = 1
    if _holds(column.type, "list", "fixed_size_list", "large_list"):
        lengths = set(compute.list_value_length(column).to_pylist())
        if len(lengths) != 1 or not (width := lengths.pop()):
            raise DatasetError(f"column {name!r} holds lists that are empty or differ in length; use one length.")
        column = compute.list_flatten(column)
    if not _holds(column.type, "integer", "floating", "boolean"):
        raise DatasetError(f"column {name!r} holds {column.type}, expected numbers.")
    return column.cast(float64(), safe=False).to_numpy(zero_copy_only=False).reshape(-1, width)
