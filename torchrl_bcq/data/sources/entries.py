"""Finds the entries of a file that hold each field. Several entries can be joined to one field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any

import numpy as np

from torchrl_bcq.data.checks import FIELDS, FRAMES
from torchrl_bcq.data.sources.hdf5_storage import check_stored
from torchrl_bcq.errors import DatasetError, remedy

Names = Mapping[str, str | Sequence[str]]  # maps fields to the entry that holds the field, or to entries to join

# common names of each field in D4RL, Gymnasium, Minari, TorchRL, Tianshou, d3rlpy and others
NAMES = {
    "observations": ("observations", "observation", "obs", "states", "state"),
    "actions": ("actions", "action", "act"),
    "rewards": ("rewards", "reward", "rew"),
    "terminated": ("terminals", "terminal", "terminations", "terminated"),
    "truncated": ("timeouts", "timeout", "truncations", "truncated"),
    "next_observations": ("next_observations", "next_observation", "obs_next", "next_obs", "next_states", "next_state"),
    "groups": (),
    "action_masks": ("action_masks", "action_mask", "infos/action_mask"),
    "next_action_masks": ("next_action_masks", "next_action_mask"),
    "action_probabilities": ("action_probabilities", "action_probability", "infos/action_probability"),
    **dict.fromkeys(FRAMES, ()),
    # fields that replace truncated: flags of the last row or of the first row of each episode, or numbers of steps
    "episode_terminals": ("episode_terminals",),
    "episode_starts": ("episode_starts",),
    "lengths": ("lengths", "episode_lengths", "traj_lengths"),
}
_REQUIRED = FIELDS[:4]
# fields after each step
LATER = {"observations": "next_observations", "frames": "next_frames", "action_masks": "next_action_masks"}
_JOINABLE = ("observations", "actions", "next_observations", "action_masks", "next_action_masks")
WAYS = ("truncated", "episode_terminals", "episode_starts")
_NO_KIND = ("dones", "done", "episode_starts")  # entries that people take for terminated


class Joined:
    """Several entries as one field, which holds the features of the entries one after the other.

    The entries have the same first dimensions. An entry with one dimension less than the others, such as ``[N]`` beside
    ``[N, D]``, holds one feature. If all entries are ``[N]``, each of them holds one feature.
    """

    def __init__(self, entries: Mapping[str, Any]) -> None:
        self._entries = list(entries.values())
        shapes = {name: tuple(entry.shape) for name, entry in entries.items()}
        rank = max(2, *map(len, shapes.values()))
        wide = [shape if len(shape) == rank else (*shape, 1) for shape in shapes.values()]
        if {len(shape) for shape in wide} != {rank} or len({shape[:-1] for shape in wide}) > 1:
            raise DatasetError(f"entries with the shapes {shapes} cannot be joined; each needs one row for each step.")
        kinds = {name: str(entry.dtype) for name, entry in entries.items() if entry.dtype.kind not in "fiub"}
        if kinds:
            raise DatasetError(f"entries with the dtypes {kinds} cannot be joined; they need real numbers.")
        if rank > 2 and all(entry.dtype == np.uint8 for entry in self._entries):
            raise DatasetError(f"entries with the shapes {shapes} hold frames, which cannot be joined; choose one.")
        self.shape = (*wide[0][:-1], sum(shape[-1] for shape in wide))
        self.dtype = np.result_type(*(entry.dtype for entry in self._entries))

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        """Read ``rows``: slices or numbers for the first dimensions."""
        parts = ((np.asarray(entry[rows]), len(entry.shape) < len(self.shape)) for entry in self._entries)
        return np.concatenate([part[..., None] if is_single else part for part, is_single in parts], axis=-1)


def is_group(item: Any) -> bool:
    """Return whether an item of a file is a group of entries."""
    return hasattr(item, "values")


def find_fields(found: Sequence[str], names: Names | None = None) -> dict[str, list[str]]:
    """Find the entries of each field among ``found``. A missing or ambiguous field raises ``DatasetError``."""
    given = as_lists(names)
    if absent := sorted({entry for entries in given.values() for entry in entries} - set(found)):
        raise DatasetError(f"names refers to the entries {absent}, but the file holds only {sorted(found)}.")
    fields = {}
    for field, known in NAMES.items():
        matches = [name for name in known if name in found]
        if field not in given and len(matches) > 1:
            raise DatasetError(f"{matches} could all be {field}; choose one with {naming(field, matches[:1])}.")
        if entries := given.get(field, matches):
            fields[field] = entries
    if missing := [field for field in _REQUIRED if field not in fields]:
        unclear = next((name for name in _NO_KIND if name in found), None)
        hint = f" {unclear} does not say whether an episode was terminated or truncated." if unclear else ""
        raise DatasetError(
            f"it lacks {missing}; it holds {sorted(found)}.{hint} Name the entries with {naming(missing[0])}."
        )
    # a file may show in several ways where episodes end: read the way in names, or the first one
    ways = sorted((field for field in WAYS if field in fields), key=lambda field: field not in given)
    ways = ["lengths", *ways] if "lengths" in given else ways
    if len(ways) > 1 and ways[1] in given:
        raise DatasetError(f"names has {ways}, which all show where episodes end; name only one of them.")
    for way in ways[1:]:
        del fields[way]
    return fields


def as_lists(names: Names | None) -> dict[str, list[str]]:
    """Return ``names`` with a list of entries for each field."""
    given = {}
    if not isinstance(names, (Mapping, NoneType)):
        raise DatasetError(f"names is {names!r}, expected a dictionary from fields to entries: {{'actions': 'u'}}.")
    if unknown := sorted(set(names or ()) - NAMES.keys(), key=str):
        raise DatasetError(f"names has the unknown fields {unknown}; the known fields are {list(NAMES)}.")
    for field, value in (names or {}).items():
        entries = [value] if isinstance(value, str) else list(value) if isinstance(value, Sequence) else []
        if not entries or len({_plain(entry) for entry in entries if isinstance(entry, str)}) < len(entries):
            raise DatasetError(
                f"names has {value!r} for {field}, expected the name of an entry, or a list of different names."
            )
        if len(entries) > 1 and field not in _JOINABLE:
            raise DatasetError(f"names has {entries} for {field}; only the entries of {list(_JOINABLE)} can be joined.")
        given[field] = entries
    return given


def _plain(entry: str) -> str:
    """Return the name of an entry in one spelling: HDF5 reads ``/a//b`` as ``a/b``, and NumPy ``a.npy`` as ``a``."""
    return "/".join(part for part in entry.removesuffix(".npy").split("/") if part not in ("", "."))


def open_fields(group: Any, names: Names | None) -> dict[str, Any]:
    """Return each field, without reading it. A group in place of a field raises ``DatasetError``.

    If the next observations are a group, and ``names`` does not name entries of this group, the entries with the same
    names as those of the observations, and of the frames, are read: ``next_obs/arm`` for ``obs/arm``.
    """
    given = as_lists(names)
    named = [entry for entries in given.values() for entry in entries]
    nested = [name for names in NAMES.values() for name in names if "/" in name]
    found = dict.fromkeys([*group, *(entry for entry in [*named, *nested] if entry in group)])
    opened: dict[str, Any] = {}
    fields = find_fields([*found], names)
    after = "" if "next_observations" in given else fields.get("next_observations", [""])[0]
    for field, later in LATER.items() if after and is_group(group[after]) else ():
        tails = [name.partition("/")[2] for name in given.get(field, [])]
        if tails and later not in given and all(tail in group[after] for tail in tails):
            fields[later] = [f"{after}/{tail}" for tail in tails]
    for field, entries in fields.items():
        items = {entry: group[entry] for entry in entries}
        for entry, item in items.items():
            if not hasattr(item, "shape"):
                parts = [f"{entry}/{part}" for part in item]
                raise DatasetError(f"{field} is the group {entry!r}; choose from it, as in {naming(field, parts)}.")
            if hasattr(item, "is_virtual"):
                check_stored(entry, item)
        if field == "actions" and len({item.dtype.kind in "biu" for item in items.values()}) > 1:
            dtypes = {entry: str(item.dtype) for entry, item in items.items()}
            raise DatasetError(f"actions has the dtypes {dtypes}; store all of them as floating-point numbers.")
        opened[field] = Joined(items) if len(items) > 1 else items[entries[0]]
    return opened


def naming(field: str, entries: Sequence[str] = ()) -> str:
    """Return the argument, or the setting, that says which entries of the file hold a field."""
    if len(entries) > 1:
        return remedy(f"names={{{field!r}: {list(entries)}}}", f"reader.names.{field}=[{','.join(entries)}]")
    shown = repr(entries[0]) if entries else "..."
    return remedy(f"names={{{field!r}: {shown}}}", f"reader.names.{field}={entries[0] if entries else 'ENTRY'}")
