"""A tensor of joined frames that holds each frame once."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakIdKeyDictionary

_aten = torch.ops.aten
_BY_ROW = {  # operations that choose rows if their dimension is 0, with the position of this argument
    _aten.slice.Tensor: 1,
    _aten.select.int: 1,
    _aten.index_select.default: 1,
    _aten.split.Tensor: 2,
    _aten.split_with_sizes.default: 2,
}
_COPY_BYTES = 2**26  # number of bytes that are gathered at a time where all rows are copied
# copies of stored frames on other devices, so that the observation and the next observation move their frames once
_moved: Mapping[Any, dict[torch.device, Any]] = WeakIdKeyDictionary()


class FrameStack(Tensor):
    """Read-only tensor ``[*B, k * C, H, W]`` that joins ``k`` stored frames for each row, oldest first.

    The tensor keeps a reference to the frames and the numbers of the frames of each row. Choosing rows and
    ``clone`` choose or copy only these numbers; the frames are shared. A move to another device moves the stored frames
    once. If the chosen rows need at most half as many frames as are stored, the move copies only their frames and
    returns an ordinary tensor. Almost all other operations copy the frames of all rows and return ordinary tensors.

    Args:
        frames: stored frames, ``[F, C, H, W]``, in memory or memory-mapped.
        index: numbers of the frames of each row, ``[*B, k]``, of dtype int64.
    """

    frames: Any
    index: Any

    @staticmethod
    def __new__(cls, frames: Tensor, index: Tensor) -> FrameStack:
        """Make a tensor that refers to ``frames``."""
        *batch, number = index.shape
        shape = (*batch, number * frames.shape[1], *frames.shape[2:])
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=frames.dtype, device=frames.device)
        made.frames, made.index = frames, index.as_subclass(Tensor)
        return made

    def gathered(self) -> Tensor:
        """Return an ordinary tensor with a copy of the frames of all rows."""
        chosen = self.frames.as_subclass(Tensor).index_select(0, self.index.flatten())
        return chosen.reshape(self.shape)  # [B * k, C, H, W] -> [*B, k * C, H, W]

    def digests(self, known: dict[int, Tensor]) -> Tensor:
        """Return digests of the frames of each row, ``[*B, k, 16]``, without a copy of the frames.

        ``known`` holds the digests of stored frames, by the id of their tensor; each stored frame is hashed once.
        """
        if id(self.frames) not in known:
            step = max(1, _COPY_BYTES * len(self.frames) // max(1, self.frames.numel()))
            parts = (part.as_subclass(Tensor).cpu().numpy() for part in self.frames.split(step))
            hashed = b"".join(hashlib.sha256(frame).digest()[:16] for part in parts for frame in part)
            known[id(self.frames)] = torch.frombuffer(bytearray(hashed), dtype=torch.uint8).view(-1, 16)
        return known[id(self.frames)][self.index.cpu()]

    def with_index(self, index: Tensor) -> FrameStack:
        """Return a tensor of other rows, or of other numbers of frames, that refers to the same stored frames."""
        return FrameStack(self.frames, index)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Apply an operation to the numbers of the frames if possible, else to the gathered frames."""
        stack, kwargs = args[0], kwargs or {}
        if not isinstance(stack, FrameStack):
            if func is _aten.copy_.default:
                return _copy_in_parts(stack, args[1])
            if func is _aten.cat.default and _share_frames(stack) and not (args[1:] and args[1] % stack[0].ndim):
                return stack[0].with_index(torch.cat([part.index for part in stack]))
        elif func in (_aten.detach.default, _aten.alias.default):
            return stack.with_index(stack.index)
        elif func is _aten.clone.default:
            return stack.with_index(stack.index.clone())
        elif func is _aten._to_copy.default and kwargs.get("dtype") in (None, stack.dtype):
            return stack._to(kwargs.get("device") or stack.device)
        elif func is _aten.index.Tensor and len(args[1]) < stack.index.ndim:
            return stack.with_index(func(stack.index, args[1]))
        elif func in _BY_ROW and stack.index.ndim > 1 and not (args[_BY_ROW[func] :] or (0,))[0] % stack.ndim:
            return tree_map(stack.with_index, func(stack.index, *args[1:], **kwargs))
        elif func._schema.is_mutable:
            raise TypeError(_READ_ONLY)
        return func(*tree_map(_ready, args), **tree_map(_ready, kwargs))

    def _to(self, device: torch.device) -> Tensor:
        if device != self.device and 2 * self.index.numel() <= len(self.frames):
            return self.gathered().to(device)
        return FrameStack(_on(self.frames, device), self.index.to(device))

    def __setitem__(self, rows: Any, value: Any) -> None:
        """Refuse changes: the rows share their frames."""
        raise TypeError(_READ_ONLY)

    def numpy(self, *, force: bool = False) -> np.ndarray:
        """Return an array with a copy of the frames of all rows."""
        return self.gathered().numpy(force=force)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Return an array with a copy of the frames of all rows."""
        return np.asarray(self.numpy(), dtype)

    def tolist(self) -> list:
        """Return nested lists of the numbers of all rows."""
        return self.gathered().tolist()

    def share_memory_(self) -> FrameStack:
        """Move the stored frames and their numbers to memory that processes share."""
        self.frames.share_memory_()
        self.index.share_memory_()
        return self

    def is_shared(self) -> bool:
        """Whether other processes can read the stored frames without a copy."""
        return self.frames.is_shared() and self.index.is_shared()

    def __deepcopy__(self, memo: dict[int, Any]) -> FrameStack:
        """Copy the numbers of the frames; the frames are shared."""
        return memo.setdefault(id(self), self.clone())

    def __repr__(self, **settings: Any) -> str:  # type: ignore[override]
        """Show shape and device; the frames are not read."""
        return f"FrameStack(shape={tuple(self.shape)}, frames={len(self.frames)}, device={self.device})"

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        """Return the names of the inner tensors, for PyTorch and tensordict."""
        return ["frames", "index"], None

    @staticmethod
    def __tensor_unflatten__(inner: Mapping[str, Tensor], context: None, size: Any, stride: Any) -> FrameStack:
        """Make a tensor from its inner tensors."""
        return FrameStack(inner["frames"], inner["index"])


_READ_ONLY = (
    "frames of a dataset cannot be changed, because the rows share them; make an ordinary tensor with .gathered()."
)


def gather_frames(batch: TensorDictBase) -> TensorDictBase:
    """Return the batch with an ordinary tensor in place of each ``FrameStack``."""
    batch = batch.copy()  # buffer[:] passes the TensorDict of the storage itself
    for key, value in list(batch.items(True, True)):
        if isinstance(value, FrameStack):
            batch.set(key, value.gathered())
    return batch


def _ready(value: Any) -> Any:
    return value.gathered() if isinstance(value, FrameStack) else value


def _share_frames(parts: Sequence[Any]) -> bool:
    """Whether all tensors are stacks of the same number of the same stored frames."""
    return all(
        isinstance(part, FrameStack) and part.frames is parts[0].frames and part.shape[1:] == parts[0].shape[1:]
        for part in parts
    )


def _copy_in_parts(target: Tensor, stack: FrameStack) -> Tensor:
    """Copy the frames of all rows to an ordinary tensor of the same shape, without a second copy in memory."""
    if target.shape != stack.shape or stack.index.ndim < 2:
        return target.copy_(stack.gathered())
    step = max(1, _COPY_BYTES * len(stack) // max(1, stack.numel()))
    for start in range(0, len(stack), step):
        rows = slice(start, start + step)
        target[rows].copy_(stack.with_index(stack.index[rows]).gathered())
    return target


def _on(frames: Tensor, device: torch.device) -> Tensor:
    """Return ``frames`` on a device; frames that were moved before, and still exist there, are not moved again."""
    if frames.device == device:
        return frames
    copies = _moved.setdefault(frames, {})  # type: ignore[attr-defined]
    found = copies[device]() if device in copies else None
    if found is None:
        found = frames.as_subclass(Tensor).to(device)
        copies[device] = weakref.ref(found)
    return found
