"""Fields of transitions, read a chunk of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from tensordict import TensorDictBase
from torch import Tensor

from torchrl_bcq.data.checks import DatasetError

CHUNK_BYTES = 8 * 2**20  # read at a time: the caches like it, and memory stays flat however many rows there are

Key = str | tuple[str, ...]

_STEPS = "steps_to_next_obs"
_NOT_OBSERVED = {
    *("action", "episode", "next", "reward", "done", "terminated", "truncated", "collector"),
    *("index", "is_init", _STEPS),
}


def name_of(key: Key, following: bool = False) -> str:
    """The readers' name of a field: ``observations``, ``next_observations``; others by their key, with dots."""
    parts = (key,) if isinstance(key, str) else key
    if parts == ("observation",):
        return "next_observations" if following else "observations"
    return ".".join(("next", *parts) if following else parts)


def next_key(key: Key) -> tuple[str, ...]:
    """The same entry under "next"."""
    return ("next", key) if isinstance(key, str) else ("next", *key)


class Reader:
    """Fields of flat transitions, and chunks of rows of them."""

    def __init__(self, transitions: TensorDictBase):
        if not transitions.batch_dims or 0 in transitions.batch_size:
            raise DatasetError(
                f"transitions have batch size {tuple(transitions.batch_size)}, expected [N] with N at least 1."
            )
        self.steps = transitions.batch_size[-1] if transitions.batch_dims > 1 else 0  # [B, T]: each B begins anew
        flat = transitions.reshape(-1)
        self.leaves = {
            key: leaf.as_subclass(Tensor)  # slices of a memory-mapped one are then plain and fast
            for key, leaf in flat.items(include_nested=True, leaves_only=True)
            if isinstance(leaf, Tensor)
        }
        missing = [key for key in ("action", ("next", "reward"), ("next", "terminated")) if key not in self.leaves]
        if missing:
            raise DatasetError(
                f"transitions lack {missing}; they hold {sorted(map(str, self.leaves))}. Rename yours with rename_key_."
            )
        self._refuse_several_steps()
        self.rows = len(flat)
        self.nbytes = sum(leaf.numel() * leaf.element_size() for leaf in self.leaves.values())
        observed = self._observed()
        vectors = [key for key in observed if self._is_vector(self.leaves[key])]
        self.vectors = [key for key in vectors if self.leaves[key].numel()]
        self.images = [key for key in observed if key not in vectors]

    def _refuse_several_steps(self) -> None:
        steps = int(self.leaves[_STEPS].max()) if _STEPS in self.leaves else 1
        if steps > 1:
            raise DatasetError(
                f"transitions span up to {steps} steps ({_STEPS}), so their rewards are sums and their next "
                "observations lie further on; describe those of one step, from which they were made."
            )

    def _observed(self) -> list[Key]:
        """Keys of observations: those that stand under "next" too, or else all that are not known to be others."""
        keys = [key for key in self.leaves if (key if isinstance(key, str) else key[0]) not in _NOT_OBSERVED]
        shared = [key for key in keys if next_key(key) in self.leaves]
        return [key for key in keys if key in shared or key == "observation"] if shared else keys

    @staticmethod
    def _is_vector(leaf: Tensor) -> bool:
        return leaf.ndim <= 2 and not (leaf.ndim == 2 and leaf.dtype == torch.uint8)  # that is a flattened image

    def chunks(self, *keys: Key) -> Iterator[tuple[int, int]]:
        """First row and end of each chunk, small enough for the given fields (all without any)."""
        leaves = [self.leaves[key] for key in keys] or list(self.leaves.values())
        row_bytes = sum(leaf.numel() * leaf.element_size() for leaf in leaves) // self.rows
        size = max(1, CHUNK_BYTES // max(1, row_bytes))
        return ((start, min(start + size, self.rows)) for start in range(0, self.rows, size))

    def matrix(self, key: Key, start: int, stop: int) -> Tensor:
        """Rows of a field as ``[R, D]`` real numbers."""
        chunk = self.leaves[key][start:stop].detach().cpu()
        chunk = chunk if chunk.dtype in (torch.float32, torch.float64) else chunk.float()
        return chunk.flatten(1) if chunk.ndim > 1 else chunk[:, None]

    def flag(self, name: str, start: int, stop: int) -> Tensor | None:
        """``("next", name)`` as booleans ``[R]``, None where there is no such entry."""
        if ("next", name) not in self.leaves:
            return None
        return self.leaves["next", name][start:stop].detach().cpu().reshape(stop - start).bool()

    def number(self, start: int, stop: int) -> Tensor | None:
        """Number of each row's episode ``[R]``, None where there is none."""
        if "episode" not in self.leaves:
            return None
        return self.leaves["episode"][start:stop].detach().cpu().flatten()
