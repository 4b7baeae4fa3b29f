"""Chooses the entries of a Dict observation that are joined to one vector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def entries_of(space: Any) -> dict[str, Any]:
    """Return the space of each entry of a Gymnasium ``Dict``; ``a/b`` is the entry ``b`` of the entry ``a``."""
    from gymnasium.spaces import Dict

    found: dict[str, Any] = {}
    for name, entry in space.spaces.items():
        if isinstance(entry, Dict):
            found |= {f"{name}/{inner}": leaf for inner, leaf in entries_of(entry).items()}
        else:
            found[name] = entry
    return found


def check_entries(space: Any, names: Sequence[str] | None) -> list[str]:
    """Return the names of the entries to join: ``names``, or all entries in the order of the space.

    Raises:
        ValueError: if an entry does not exist, occurs twice, or is not a ``Box`` of real numbers with at most one
            dimension.
    """
    from gymnasium.spaces import Box

    found = entries_of(space)
    chosen = list(found) if names is None else list(names)
    if absent := [name for name in chosen if name not in found]:
        raise ValueError(f"the observation has no entries {absent}; its entries are {list(found)}")
    if not chosen or len({*chosen}) < len(chosen):
        raise ValueError(f"{chosen} is empty or names an entry twice; the entries of the observation are {list(found)}")
    odd = {name: found[name] for name in chosen if not isinstance(found[name], Box) or len(found[name].shape) > 1}
    if odd:
        vectors = [name for name in found if name not in odd]
        raise ValueError(f"only entries that are vectors (Box) can be joined, but {odd} are not; choose from {vectors}")
    return chosen
