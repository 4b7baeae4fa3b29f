"""Checkpoints that are complete or absent, and are read without unpickling."""

from __future__ import annotations

import glob
import hashlib
import io
import os
import shutil
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from tensordict import TensorDictBase
from torch.utils._pytree import tree_map_only
from torchrl.checkpoint import Checkpoint, StateDictCheckpointAdapter
from torchrl.data import PrioritizedSampler, ReplayBuffer, SamplerWithoutReplacement
from torchrl.data.replay_buffers.samplers import Sampler
from torchrl.record.loggers import Logger

_DIGEST_BYTES = 1 << 24  # hashed at a time


@runtime_checkable
class Stateful(Protocol):
    """Anything with a ``state_dict``."""

    def state_dict(self) -> Mapping[str, Any]:
        """State to save."""
        ...

    def load_state_dict(self, state_dict: Any) -> Any:
        """Restore the state."""
        ...


class WeightsOnlyAdapter(StateDictCheckpointAdapter):
    """One file for the state of each component, by :func:`torch.save`, read with ``weights_only=True``.

    TorchRL reads them too, ``Checkpoint(loss_module=loss).load(path)``. Its default, memory-mapped files, ends the
    process where the disk is full, and is read with pickles allowed.
    """

    def __init__(self) -> None:
        super().__init__(payload_format="torch")

    def save(self, component: Any, path: Path, *, args: Any, kwargs: Any) -> Any:
        """Write the state; it has reached the disk before the checkpoint gets its name."""
        path.mkdir(parents=True, exist_ok=True)
        state = component.state_dict(*args, **kwargs)
        content = io.BytesIO()  # torch's own writer gives no OSError
        written = tree_map_only(torch.Tensor, _own_memory, state)
        if hasattr(state, "_metadata"):  # a module's, which the new dict lacks
            written._metadata = state._metadata
        torch.save(written, content)
        with open(path / self.state_torch, "wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        return state

    def load(self, component: Any, path: Path, *, map_location: Any, args: Any, kwargs: Any, **ignored: Any) -> None:
        """Read the state; other arguments of ``torch.load`` are ignored."""
        file = path / self.state_torch
        if not file.is_file():
            raise FileNotFoundError(f"there is no {file}.")
        component.load_state_dict(torch.load(file, map_location=map_location, weights_only=True), *args, **kwargs)


def _own_memory(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without the rest of its storage, which would be written too."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def make_checkpoint(**components: Any) -> Checkpoint:
    """A :class:`torchrl.checkpoint.Checkpoint` of these components that never unpickles."""
    return Checkpoint(**components).register_adapter(Stateful, WeightsOnlyAdapter())


def tidy(path: Path) -> None:
    """Remove the temporary files of a run that was killed while it wrote the checkpoint ``path``.

    A good checkpoint that was being replaced gets its name back. No other process may be writing there.
    """
    for aside in sorted(path.parent.glob(f".{glob.escape(path.name)}.*-*")):
        kind = aside.name[len(path.name) + 2 :].partition("-")[0]
        if kind == "backup" and not path.exists():
            aside.replace(path)
        elif kind in ("stage", "archive", "backup", "delete"):
            shutil.rmtree(aside) if aside.is_dir() else aside.unlink()


def tidy_rotation(directory: Path, prefix: str = "checkpoint") -> None:
    """The same for all checkpoints of a :class:`torchrl.checkpoint.CheckpointRotation`."""
    names = {aside.name[1:].rpartition(".")[0] for aside in directory.glob(f".{glob.escape(prefix)}-*.*-*")}
    for name in names:
        tidy(directory / name)


class LoggerState:
    """State that a logger needs to resume, such as the id of a W&B run, without the scalars that it has written."""

    def __init__(self, logger: Logger) -> None:
        self._logger = logger

    def state_dict(self) -> dict[str, Any]:
        """The logger's state, without what TorchRL's CSVLogger collects for ever."""
        state = dict(self._logger.state_dict())
        local = {name: value for name, value in state.get("local", {}).items() if name != "scalars"}
        return {**state, "local": local}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the state."""
        self._logger.load_state_dict(state_dict)


class SamplerState:
    """State from which a replay buffer draws the same rows again: sampler, generator, and a digest of the data."""

    def __init__(self, replay_buffer: ReplayBuffer) -> None:
        self._buffer = replay_buffer

    def state_dict(self) -> dict[str, Any]:
        """State of sampler and generator, and the digest of the data."""
        generator = self._buffer._rng
        return {
            "class": self._sampler_class,
            "rows": len(self._buffer),
            "dataset": self._digest,
            "sampler": _sampler_state(self._buffer.sampler),
            "generator": None if generator is None else generator.get_state(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the state; raises a ValueError if data or sampler differ, or only one of the buffers has a seed."""
        self._check(state_dict)
        sampler = self._buffer.sampler
        _load_sampler_state(sampler, state_dict["sampler"])
        if isinstance(sampler, SamplerWithoutReplacement) and sampler._sample_list is not None:
            # TorchRL leaves the rest of the round on the CPU, and would draw the next one there, too
            sampler._sample_list = sampler._sample_list.to(self._buffer.storage.device)
        if (generator := self._buffer._rng) is not None:
            generator.set_state(state_dict["generator"].cpu())

    def _check(self, saved: Mapping[str, Any]) -> None:
        before, kind, rows = "the checkpoint's replay buffer", self._sampler_class, len(self._buffer)
        seeded = saved["generator"] is not None
        if saved["class"] != kind:
            raise ValueError(f"{before} drew with a {saved['class']}, this one with a {kind}; make it alike.")
        if saved["rows"] != rows:
            found = f"{before} had {saved['rows']} transitions, this one has {rows}"
            raise ValueError(f"{found}; resume with the same dataset.")
        if saved["dataset"] != self._digest:
            raise ValueError(
                "the dataset has changed since the checkpoint: as many transitions, other values. Resume with the same "
                "one, or start a new run from the networks alone: Checkpoint(loss_module=loss).load(path)."
            )
        if seeded != (self._buffer._rng is not None):
            made = "with" if seeded else "without"
            raise ValueError(f"{before} was made {made} a seed, this one was not; make it alike.")

    @cached_property
    def _digest(self) -> str:
        return dataset_digest(self._buffer.storage[:])

    @property
    def _sampler_class(self) -> str:
        return type(self._buffer.sampler).__name__


def dataset_digest(data: TensorDictBase) -> str:
    """A digest of the names, dtypes, shapes and values of all tensors; memory-mapped ones are read a part at a time."""
    digest = hashlib.sha256()
    for key, value in sorted(data.items(True, True), key=lambda item: str(item[0])):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        rows = max(1, _DIGEST_BYTES * len(value) // max(value.nbytes, 1))
        for part in value.split(rows) if value.numel() else ():
            digest.update(part.contiguous().view(-1).view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


def _sampler_state(sampler: Sampler) -> dict[str, Any]:
    """The sampler's own state, where the trees of priorities become tensors."""
    state = dict(sampler.state_dict())
    if isinstance(sampler, PrioritizedSampler):
        rows = torch.arange(sampler._max_capacity)
        state |= {name: torch.as_tensor(state[name][rows]) for name in ("_sum_tree", "_min_tree")}
    return state


def _load_sampler_state(sampler: Sampler, state: Mapping[str, Any]) -> None:
    state = dict(state)
    if isinstance(sampler, PrioritizedSampler):
        rows = torch.arange(sampler._max_capacity)
        for name in ("_sum_tree", "_min_tree"):
            tree = getattr(sampler, name)
            tree[rows] = state[name]
            state[name] = tree
    sampler.load_state_dict(state)
