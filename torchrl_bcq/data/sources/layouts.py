"""Recognises the layout of recorded steps in HDF5 and NPZ files, and reads the steps in chunks."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from typing import Any

import numpy as np

from torchrl_bcq.data.arrays import check_lengths
from torchrl_bcq.data.checks import Columns
from torchrl_bcq.data.defects import Rows
from torchrl_bcq.data.sources.entries import LATER, NAMES, WAYS, Names, as_lists, is_group, naming, open_fields
from torchrl_bcq.errors import DatasetError, remedy

_logger = logging.getLogger(__name__)
CHUNK_BYTES = 16 << 20  # limit in bytes for the largest field of a chunk, or for a chunk of whole episodes


def read_steps(file: Any, names: Names | None) -> Iterator[Columns]:
    """Yield the steps of an HDF5 or NPZ file in chunks of arguments of ``from_arrays``, and ``incomplete``."""
    if hasattr(file, "attrs"):  # only HDF5 files hold attributes and groups
        if is_group(file.get("_meta")) and "maxsize" in file.attrs:
            return _tianshou_buffer(file, names)
        if "columns" in file and ("observations_0" in file or "observations_0_0" in file):
            return joined(_d3rlpy_episodes(file, names))
        if groups := _episode_groups(file, names):
            parts = (open_fields(group, names) for group in groups)
            return joined({name: field[()] for name, field in part.items()} for part in parts)
    fields = open_fields(file, names)
    shape, is_padded = fields["actions"].shape, _is_padded(fields)
    if not is_padded:
        _check_ends(file, fields, names)
    if is_padded and "lengths" not in fields:
        raise DatasetError(
            f"actions has shape {shape}. If this is [episode, step, feature], add an entry lengths with the number of "
            "steps of each episode; if it is [step, environment, feature], swap the first two dimensions before that."
        )
    lengths = fields.pop("lengths", None)
    if is_padded or "lengths" in as_lists(names) or (lengths is not None and not fields.keys() & set(WAYS)):
        return joined(_episodes_of_lengths(fields, np.asarray(lengths[()])))
    return _slices(fields, range(shape[0] if shape else 0))


def _is_padded(fields: Mapping[str, Any]) -> bool:
    """Return whether the actions are ``[E, T, A]``, or the indices ``[E, T]`` of discrete actions."""
    shape = fields["actions"].shape
    if len(shape) != 2 or "lengths" not in fields:
        return len(shape) == 3
    return fields["lengths"].shape == shape[:1] and fields["rewards"].shape[:2] == shape and shape[1] > 1


def _slices(fields: Mapping[str, Any], rows: range) -> Iterator[Columns]:
    """Yield ``rows`` of the fields in chunks. If there are no rows, yield one empty chunk."""
    check_lengths({name: field.shape[0] if field.shape else 0 for name, field in fields.items()})
    widest = max(field.dtype.itemsize * prod(field.shape[1:]) for field in fields.values())
    step = max(1, CHUNK_BYTES // max(1, widest))
    for start in range(rows.start, max(rows.stop, rows.start + 1), step):
        stop = min(start + step, rows.stop)
        chunk = {name: field[start:stop] if field.shape else field[()] for name, field in fields.items()}
        ends = chunk.pop("episode_terminals", None)
        if chunk.pop("episode_starts", None) is not None and rows:
            ends = fields["episode_starts"][start + 1 : stop + 1]  # a row is the last if the next row is the first
            ends = np.concatenate([ends, np.zeros((stop - start - len(ends), *ends.shape[1:]), ends.dtype)])
        if ends is not None:
            ended = np.asarray(chunk["terminated"]) == 1
            # a row that terminated is not cut off; if the shapes do not fit together, the checks refuse the chunk
            chunk["truncated"] = np.where(ended.reshape(ends.shape), 0, ends) if ended.size == ends.size else ends
        yield chunk


def _tianshou_buffer(file: Any, names: Names | None) -> Iterator[Columns]:
    """Yield the steps of Tianshou's ``ReplayBuffer.save_hdf5``: the rows of each ring, oldest row first.

    A ``VectorReplayBuffer`` has one ring for each environment. Slots that were never written are not read.
    """
    fields = open_fields(
        file["_meta"],
        {field: [entry.removeprefix("_meta/") for entry in entries] for field, entries in as_lists(names).items()},
    )
    if "truncated" not in fields:
        lacks = "it lacks ['truncated'] in _meta, so it is unknown where episodes were cut off"
        raise DatasetError(f"{lacks}; add this entry.")
    if (frames := int(file.attrs.get("stack_num", 1))) > 1:
        how = remedy(f"call stack_observations(transitions, {frames})", f"set stack={frames}")
        _logger.warning("Tianshou joins %d observations when it samples this buffer; to do the same, %s.", frames, how)
    for start, stop, count, newest in _rings(file, len(fields["actions"])):
        oldest = newest + 1 if count == stop - start else start
        read = 0
        for rows in (range(oldest, start + count), range(start, oldest)):
            for chunk in _slices(fields, rows) if rows else ():
                read += len(chunk["actions"])
                yield chunk if read < count else {**chunk, "truncated": _cut_off(chunk)}


def _rings(file: Any, rows: int) -> list[tuple[int, int, int, int]]:
    """Return first slot, stop, number of written slots and newest slot of each ring of a Tianshou buffer."""
    size = int(file.attrs["maxsize"])
    if "_offset" in file:
        starts, counts, newest = (file[name][()].tolist() for name in ("_offset", "_lengths", "last_index"))
    else:
        inserted = int(file.attrs["_insertion_idx" if "_insertion_idx" in file.attrs else "_index"])
        starts, counts = [0], [int(file.attrs["_size"])]
        newest = [(inserted - 1) % size]
    rings = list(zip(starts, [*starts[1:], size], counts, newest, strict=True))
    for start, stop, count, last in rings:
        written = 0 <= count <= stop - start and start <= last < stop
        # in a ring with free slots, the newest step is in the last written slot
        if size != rows or not written or (0 < count < stop - start and last != start + count - 1):
            raise DatasetError(
                f"the buffer has {count} steps in its slots {start} to {stop - 1} of {rows}, with the newest step in "
                f"slot {last}, but maxsize {size}. These numbers do not fit together; save the buffer again."
            )
    return rings


def _d3rlpy_episodes(file: Any, names: Names | None) -> Iterator[Columns]:
    """Yield the episodes of d3rlpy's ``ReplayBuffer.dump``, which stores ``terminated`` once for each episode."""
    columns = [name.decode() for name in file["columns"][()]]
    numbers = {int(match[1]) for name in file if (match := re.fullmatch(r"\D+_(\d+)(_\d+)?", name))}
    held = {name for name in file if re.fullmatch(r"\D+_\d+(_\d+)?", name)}
    expected = {f"{column}_{number}" for column in columns for number in range(len(numbers))}
    counted = next((int(file[name][()]) for name in ("num_episodes", "total_size") if name in file), len(numbers))
    if counted != len(numbers) or held != expected:
        raise DatasetError(
            f"it holds {counted} episodes with {columns}, but the entries {sorted(held ^ expected)[:5]} are missing or "
            "left over. Only observations, actions and rewards of one array each can be read; save the dataset again."
        )
    for number in range(len(numbers)):
        episode = {column: file[f"{column}_{number}"] for column in columns}
        part = {name: field[()] for name, field in open_fields(episode, names).items()}
        terminated = np.zeros(len(part["actions"]))
        terminated[-1:] = part["terminated"]
        yield {**part, "terminated": terminated}


def _episodes_of_lengths(fields: Mapping[str, Any], lengths: np.ndarray) -> Iterator[Columns]:
    """Yield episodes of ``lengths [E]`` steps, stored one after another, or in padded arrays ``[E, T, ...]``."""
    # groups may also hold one group for each episode
    whole = {name for name, field in fields.items() if name == "groups" and field.shape == lengths.shape}
    shapes = {name: field.shape for name, field in fields.items() if name not in whole}
    padded = _is_padded({**fields, "lengths": lengths})
    if lengths.ndim != 1 or lengths.dtype.kind not in "iu":
        found = f"shape {lengths.shape} and dtype {lengths.dtype}"
        raise DatasetError(f"lengths has {found}, expected one integer for each episode.")
    if padded:
        steps = shapes["actions"][1]
        stored = (len(lengths), steps)
        # observations may also hold the observation after the last step
        last = dict.fromkeys(LATER, (len(lengths), steps + 1))
        if any(shape[:2] not in (stored, last.get(name)) for name, shape in shapes.items()):
            raise DatasetError(f"lengths has {len(lengths)} episodes, but the fields have the shapes {shapes}.")
    else:
        check_lengths({name: shape[0] if shape else 0 for name, shape in shapes.items()})
        steps = shapes["actions"][0] if shapes["actions"] else 0
    odd = Rows()
    odd.add((lengths < 0) | (lengths > steps))
    if odd.count:
        raise DatasetError(f"lengths has {odd} outside 0 to {steps}, the number of stored steps; correct lengths.")
    if not padded and int(lengths.sum()) != steps:
        raise DatasetError(
            f"lengths adds up to {lengths.sum()} steps, but there are {steps} rows; correct lengths, or add timeouts."
        )
    stops = lengths.cumsum().tolist()
    for episode, length in enumerate(lengths.tolist()):
        own = {name: fields[name][episode] for name in whole}
        if padded and length:  # an episode without steps is an unused slot
            rows = {name: length + (shape[1] > steps) for name, shape in shapes.items()}
            yield own | {name: fields[name][episode, : rows[name]] for name in shapes}
        elif length:
            yield own | {name: fields[name][stops[episode] - length : stops[episode]] for name in shapes}


def _episode_groups(file: Any, names: Names | None) -> list[Any]:
    """Return the HDF5 groups of the episodes, or ``[]``.

    The groups are in the file, or one level below. Their names end in a number, by which they are sorted. Entries
    beside them, such as metadata, are not read.
    """
    rewards = as_lists(names).get("rewards", NAMES["rewards"])
    found: dict[str, list[Any]] = {}
    for parent in [file, *filter(is_group, file.values())]:
        numbers = {
            name: int(match[1])
            for name, item in parent.items()
            if is_group(item) and (match := re.search(r"(\d+)$", name))
        }
        if len(numbers) < len(parent) or (parent is not file and not all(map(is_group, file.values()))):
            # other entries are beside them
            numbers = {name: n for name, n in numbers.items() if any(entry in parent[name] for entry in rewards)}
            if beside := sorted(parent.keys() - numbers.keys()) if numbers else []:
                _logger.info("%s: the entries %s are not read; they are no episodes", parent.name, beside)
        if numbers:
            found[parent.name] = [parent[name] for name in sorted(numbers, key=numbers.__getitem__)]
        if parent is file and numbers:
            break
    if len(found) > 1:
        _logger.info("the file has episodes in the groups %s; all are read", [*found])
    return [group for groups in found.values() for group in groups]


def _check_ends(file: Any, fields: Mapping[str, Any], names: Names | None) -> None:
    """Raise a DatasetError if a file shows in several ways where episodes end, and they disagree."""
    entries = {way: name for way in (*WAYS, "lengths") for name in NAMES[way] if name in file}
    if len(entries) < 2 or entries.keys() & as_lists(names).keys():
        return
    ended = np.ravel(fields["terminated"][()]) == 1
    first = None
    for way, name in entries.items():
        values = np.ravel(file[name][()]) if hasattr(file[name], "shape") else np.zeros(0)
        if way == "lengths":
            last = np.isin(np.arange(len(ended)), values.cumsum() - 1)
        elif values.shape != ended.shape:
            return  # the checks refuse other numbers of rows
        elif way == "truncated":
            last = ended | (values == 1)
        else:
            last = np.roll(values == 1, -1 if way == "episode_starts" else 0)
        ends = way, name, last[:-1]  # the last row ends an episode in any case
        first = first or ends
        if len(apart := (first[2] != ends[2]).nonzero()[0]):
            choice = f"{naming(first[0], [first[1]])} or {naming(way, [name])}"
            raise DatasetError(
                f"{first[1]} and {name} disagree on whether row {apart[0]} ends an episode; correct them, or choose "
                f"{choice}."
            )


def _cut_off(steps: Columns) -> np.ndarray:
    """Return ``truncated``. The last row becomes truncated if it has no flag."""
    truncated = np.array(steps.get("truncated", np.zeros(len(steps["actions"]), dtype=bool)))
    if not np.any(steps["terminated"][-1:]) and not np.any(truncated[-1:]):
        truncated[-1:] = True
    return truncated


def _end_episode(episode: Columns, number: int) -> Columns:
    """Return the episode with one state per step, and whether each step has no next state."""
    fields = {name: values for name, values in episode.items() if name not in WAYS[1:] and name != "lengths"}
    if single := [name for name, values in fields.items() if name != "groups" and not np.ndim(values)]:
        raise DatasetError(f"episode {number} (counted from 0): {single[0]} is one value, expected one for each step.")
    steps = len(fields["actions"])
    ends = {"episode_terminals": slice(-1), "episode_starts": slice(1, None)}
    inside = [name for name, rows in ends.items() if name in episode and np.any(np.ravel(episode[name])[rows] == 1)]
    if inside or np.size(episode.get("lengths", 0)) > 1:
        shows = [*inside, "lengths"][0]
        raise DatasetError(
            f"episode {number} (counted from 0) holds several episodes, as its entry {shows} shows; store each episode "
            "in a group of its own, or all steps outside of groups."
        )
    if "groups" in fields:  # one group for each step, or one for the whole episode
        groups = np.ravel(fields["groups"]).astype(object)
        fields["groups"] = np.repeat(groups, steps) if len(groups) == 1 else groups
    is_short = False
    for name, later in LATER.items():
        if name in fields and later not in fields and len(states := fields[name]) == steps + 1:
            fields[name], fields[later] = states[:-1], states[1:]
        is_short |= name in fields and later not in fields and name != "action_masks"
    lengths = {name: len(values) for name, values in fields.items()}
    if not steps:
        raise DatasetError(f"episode {number} (counted from 0) has no steps; leave it out.")
    if len(set(lengths.values())) > 1:
        raise DatasetError(
            f"episode {number} (counted from 0) has fields of different lengths: {lengths}; each field needs one row "
            "per step, and observations and frames may have one more."
        )
    fields["truncated"] = _cut_off(fields)
    fields["incomplete"] = np.zeros(steps, dtype=bool)
    if is_short:
        fields |= {LATER[name]: np.r_[fields[name][1:], fields[name][-1:]] for name in LATER.keys() & fields.keys()}
        ended, cut = (np.reshape(fields[name], -1) == 1 for name in ("terminated", "truncated"))
        fields["incomplete"] = cut & ~ended if cut.shape == ended.shape else cut
    return fields


def joined(episodes: Iterable[Columns]) -> Iterator[Columns]:
    """Join consecutive episodes with the same widths and dtypes into chunks."""
    held: list[Columns] = []
    kind: object = None
    size = 0
    for number, episode in enumerate(episodes):
        fields = _end_episode(episode, number)
        own = {name: (values.shape[1:], values.dtype) for name, values in fields.items()}
        if held and (own != kind or size > CHUNK_BYTES):
            yield {name: np.concatenate([part[name] for part in held]) for name in held[0]}
            held, size = [], 0
        held.append(fields)
        kind, size = own, size + sum(values.nbytes for values in fields.values())
    if held:
        yield {name: np.concatenate([part[name] for part in held]) for name in held[0]}
