"""Chooses the entries of a Dict observation: vectors, which are joined to one vector, and one image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

MASK = "action_mask"  # entry of an observation that tells which discrete actions are available, as in PettingZoo


def holds_mask(space: Any) -> bool:
    """Return whether a Gymnasium space is a ``Dict`` with the entry ``action_mask``."""
    return MASK in getattr(space, "spaces", ())


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
    """Return the names of the entries to join: ``names``, or all entries except the mask, in the order of the space.

    Raises:
        ValueError: if an entry does not exist, occurs twice, or is neither a ``Box`` of real numbers with at most one
            dimension nor an image, or if there are several images.
    """
    found = entries_of(space)
    chosen = [name for name in found if name != MASK] if names is None else list(names)
    if absent := [name for name in chosen if name not in found]:
        raise ValueError(f"the observation has no entries {absent}; its entries are {list(found)}")
    if not chosen or len({*chosen}) < len(chosen):
        raise ValueError(f"{chosen} is empty or names an entry twice; the entries of the observation are {list(found)}")
    images = [name for name in chosen if is_image(found[name])]
    odd = {name: found[name] for name in chosen if name not in images and not _is_vector(found[name])}
    if odd or len(images) > 1:
        vectors = [name for name in found if _is_vector(found[name])]
        one = [name for name in found if is_image(found[name])]
        choice = f"choose from the vectors {vectors}" + (f", and one of the images {one}" if one else "")
        raise ValueError(
            f"only vectors (Box) and one image (Box of uint8, 2 or 3 dimensions) can be read, but {odd or images} are "
            f"chosen; {choice}"
        )
    return chosen


def split_image(space: Any, names: Sequence[str]) -> tuple[list[str], str | None]:
    """Return the vectors among ``names``, and the image, if there is one."""
    found = entries_of(space)
    image = next((name for name in names if is_image(found[name])), None)
    return [name for name in names if name != image], image


def is_image(space: Any) -> bool:
    """Return whether a space is a ``Box`` of bytes with two or three dimensions."""
    return _is_box(space) and space.dtype == "uint8" and len(space.shape) in (2, 3)


def _is_vector(space: Any) -> bool:
    return _is_box(space) and len(space.shape) <= 1


def _is_box(space: Any) -> bool:
    from gymnasium.spaces import Box

    return isinstance(space, Box)
