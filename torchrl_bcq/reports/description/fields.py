"""Reads the fields of transitions in chunks of rows, and computes their statistics."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import torch
from tensordict import TensorDictBase
from torch import Tensor

from torchrl_bcq.data.frame_stack import FrameStack
from torchrl_bcq.errors import DatasetError
from torchrl_bcq.functional import merge_moments

Key = tuple[str, ...]

CHUNK_BYTES = 8 * 2**20  # size of a chunk of rows, which fits the caches of a CPU
ACTION, REWARD, TERMINATED = ("action",), ("next", "reward"), ("next", "terminated")
SAMPLE_FRAMES, SAMPLE_BYTES = 1_000, 64 * 2**20  # limits of the sample of stored frames
_STEPS = ("steps_to_next_obs",)
_NAMES = {
    ("observation",): "observations",
    ("next", "observation"): "next_observations",
    ACTION: "actions",
    REWARD: "rewards",
}
_NOT_OBSERVED = {"action", "action_mask", "action_probability", "episode", "group", "next", "reward", "done",
                 "terminated", "truncated", "collector", "index", "is_init", *_STEPS}  # fmt: skip


def name_of(key: Key) -> str:
    """Return the name of a field for messages: ``actions`` for ``("action",)``, or its key with dots."""
    return _NAMES.get(key, ".".join(key))


class Reader:
    """Flattens the batch dimensions of transitions to rows, and reads the fields of these rows."""

    def __init__(self, transitions: TensorDictBase):
        if not transitions.batch_dims or 0 in transitions.batch_size:
            raise DatasetError(
                f"transitions have batch size {tuple(transitions.batch_size)}, expected [N] with N at least 1."
            )
        self.steps = transitions.batch_size[-1] if transitions.batch_dims > 1 else 0  # [B, T]: T rows are a rollout
        flat = transitions.reshape(-1)
        self.leaves: dict[Key, Tensor] = {}
        self.stored: dict[Key, FrameStack] = {}  # frames that are stored once; only a sample of these is read
        for key, leaf in flat.items(include_nested=True, leaves_only=True):
            key = (key,) if isinstance(key, str) else key
            if isinstance(leaf, FrameStack):
                self.stored[key] = leaf
            elif isinstance(leaf, Tensor):
                # convert memory-mapped tensors to plain tensors, because slices of plain tensors are faster
                self.leaves[key] = leaf.as_subclass(Tensor)
        missing = [".".join(key) for key in (ACTION, REWARD, TERMINATED) if key not in self.leaves]
        if missing:
            present = sorted(map(".".join, self.leaves))
            raise DatasetError(
                f"transitions lack {missing}; they have {present}. Rename your entries with rename_key_."
            )
        steps = int(self.leaves[_STEPS].max()) if _STEPS in self.leaves else 1
        if steps > 1:
            raise DatasetError(
                f"transitions span up to {steps} steps ({_STEPS[0]}), so the rewards are sums and the next "
                "observations are several steps later; describe the one-step transitions from which they were made."
            )
        self.rows = len(flat)
        stores = {id(leaf.frames): leaf.frames for leaf in self.stored.values()}
        numbers = [leaf.index for leaf in self.stored.values()]
        self.nbytes = sum(leaf.nbytes for leaf in (*self.leaves.values(), *stores.values(), *numbers))
        # Observations are the entries that also exist under "next". If no such entry exists, all entries except
        # actions, rewards, flags and the like are observations.
        observed = [key for key in self.leaves if key[0] not in _NOT_OBSERVED]
        if any(("next", *key) in self.leaves for key in observed):
            observed = [key for key in observed if ("next", *key) in self.leaves or key == ("observation",)]
        ranks = {key: self.leaves[key].ndim + (self.leaves[key].dtype == torch.uint8) for key in observed}
        images = [key for key in observed if ranks[key] > 2]  # a uint8 field [N, D] contains flattened images
        self.images = [key for image in images for key in (image, ("next", *image)) if key in self.leaves]
        self.vectors = [key for key in observed if ranks[key] <= 2 and self.leaves[key].numel()]
        self.successors = {key: ("next", *key) for key in self.vectors if ("next", *key) in self.leaves}

    def choices(self) -> Tensor | None:
        """Return the indices ``[N]`` of discrete actions, or None if the actions are continuous."""
        action = self.leaves[ACTION]
        if action.is_floating_point():
            return None
        values = self.entry(ACTION)
        if values.shape[1] == 1:
            return values[:, 0].long()
        is_one_hot = bool(((values != 0).sum(1) == 1).all())
        return values.to(torch.uint8).argmax(1) if is_one_hot else None

    def chunks(self, *keys: Key) -> Iterator[slice]:
        """Return slices of successive rows; a slice of the fields ``keys`` has about ``CHUNK_BYTES`` bytes."""
        leaves = [self.leaves[key] for key in keys] or self.leaves.values()
        size = max(1, CHUNK_BYTES * self.rows // max(1, sum(leaf.nbytes for leaf in leaves)))
        return (slice(start, min(start + size, self.rows)) for start in range(0, self.rows, size))

    def entry(self, key: Key, rows: slice | Tensor = slice(None)) -> Tensor:
        """Return rows of a field as a matrix ``[R, D]`` in the dtype of the field."""
        values = self.leaves[key][rows].detach().cpu()
        return values.flatten(1) if values.ndim > 1 else values[:, None]

    def matrix(self, key: Key, rows: slice | Tensor = slice(None)) -> Tensor:
        """Return rows of a field as a matrix ``[R, D]`` of floating-point numbers."""
        values = self.entry(key, rows)
        return values if values.dtype in (torch.float32, torch.float64) else values.float()

    def column(self, key: Key) -> Tensor | None:
        """Return a field of one number per row as a tensor ``[N]``, or None if there is no such field."""
        return self.leaves[key].detach().cpu().flatten() if key in self.leaves else None

    def flags(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``terminated``, ``truncated`` and ``done`` as booleans ``[N]``.

        A missing ``done`` is False. A missing ``truncated`` is True where ``done`` is True and ``terminated`` is False.
        """
        found = [self.column(key) for key in (TERMINATED, ("next", "truncated"), ("next", "done"))]
        terminated, truncated, done = (None if flag is None else flag.bool() for flag in found)
        assert terminated is not None  # the constructor raises an error if terminated is missing
        done = torch.zeros_like(terminated) if done is None else done
        return terminated, done & ~terminated if truncated is None else truncated, done


class ColumnStats:
    """Minimum, maximum, mean and std of the finite values in each column of a field, in float64."""

    def __init__(self, name: str, sample: Tensor) -> None:
        self.name = name
        self.sample = sample  # random rows [S, D], or all rows if there are few
        width = sample.shape[1]
        self.low, self.high = torch.tensor([[torch.inf], [-torch.inf]], dtype=torch.float64).expand(2, width)
        # square is the sum of squared deviations
        self.count, self.mean, self.square = torch.zeros(3, width, dtype=torch.float64)
        self.checksums = [0] * width  # one for each column, to find equal columns
        self.labels = [str(at) for at in range(width)]  # names of the columns, or their numbers
        self.whole = True  # whether all values are whole numbers

    @property
    def std(self) -> Tensor:
        """Standard deviation of each column; NaN for a column without finite values."""
        return (self.square / self.count).sqrt()

    @property
    def constant(self) -> Tensor:
        """Mask ``[D]`` of the columns whose finite values are all equal."""
        return self.low == self.high

    def add(self, values: Tensor, finite: Tensor) -> None:
        """Add a chunk of values ``[R, D]``; ``finite`` is the mask of its finite values."""
        low, high = (values if finite.all() else values.masked_fill(~finite, end) for end in (torch.inf, -torch.inf))
        self.low, self.high = torch.minimum(self.low, low.amin(0)), torch.maximum(self.high, high.amax(0))
        wide, count = values.double().masked_fill(~finite, 0), finite.sum(0)
        self.whole = self.whole and bool((wide == wide.round()).all())
        columns = (values + 0.0).T.contiguous().numpy()  # -0.0 + 0.0 is 0.0, so both zeros have one checksum
        self.checksums = [zlib.crc32(column, before) for column, before in zip(columns, self.checksums, strict=True)]
        mean = wide.sum(0) / count.clamp(min=1)
        square = (wide - mean).masked_fill_(~finite, 0).square_().sum(0)
        self.count, self.mean, self.square = merge_moments(self.count, self.mean, self.square, count, mean, square)


class Images:
    """Shape of one image, and the smallest and largest value, of a field that contains images."""

    def __init__(self, name: str, values: Tensor) -> None:
        self.name = name
        self.shape, self.dtype = tuple(values.shape[1:]), values.dtype
        self.low, self.high = float("inf"), float("-inf")
        self.note = ""  # how many images were read, if not all

    @classmethod
    def of_stored(cls, name: str, stack: FrameStack) -> Images:
        """Describe frames that are stored once, by a random sample of them."""
        count = max(1, min(SAMPLE_FRAMES, SAMPLE_BYTES // stack.frames[0].nbytes))
        rows = torch.randperm(len(stack), generator=torch.Generator().manual_seed(0))[:count].sort().values
        frames = stack.with_index(stack.index[rows, -1:]).gathered().cpu().flatten(1)
        found, constant = cls(name, stack), int((frames == frames[:, :1]).all(1).sum())
        found.low, found.high = float(frames.min()), float(frames.max())
        found.note = f"  ({len(frames):,} sampled frames, {constant:,} of one colour)"
        return found
