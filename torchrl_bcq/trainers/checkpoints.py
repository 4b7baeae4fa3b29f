"""Writes checkpoints that are always complete, and reads them without pickle."""

from __future__ import annotations

import glob
import hashlib
import io
import logging
import os
import shutil
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from tensordict import TensorDictBase
from torch.utils._pytree import tree_map_only
from torchrl.checkpoint import Checkpoint, StateDictCheckpointAdapter
from torchrl.data import PrioritizedSampler, ReplayBuffer, SamplerWithoutReplacement
from torchrl.data.replay_buffers.samplers import Sampler
from torchrl.record.loggers import Logger

from torchrl_bcq.data.frame_stack import FrameStack
from torchrl_bcq.errors import remedy

_logger = logging.getLogger(__name__)
_DIGEST_BYTES = 1 << 24  # number of bytes that are hashed at a time


@runtime_checkable
class Stateful(Protocol):
    """Type of the objects that have the methods ``state_dict`` and ``load_state_dict``."""

    def state_dict(self) -> Mapping[str, Any]:
        """Return the state to save."""
        ...

    def load_state_dict(self, state_dict: Any) -> Any:
        """Restore the state."""
        ...


class WeightsOnlyAdapter(StateDictCheckpointAdapter):
    """Writes each component's state to a file with ``torch.save``, and reads it with ``weights_only=True``.

    TorchRL can read these files without this adapter: ``Checkpoint(loss_module=loss).load(path)``. TorchRL's default
    format is memory-mapped files. This adapter avoids them for two reasons: on a full disk, writing a memory-mapped
    file kills the process; and TorchRL reads this format with pickle.
    """

    def __init__(self) -> None:
        super().__init__(payload_format="torch")

    def save(self, component: Any, path: Path, *, args: Any, kwargs: Any) -> Any:
        """Write the component's state to ``path``, a temporary folder that TorchRL renames at the end."""
        path.mkdir(parents=True, exist_ok=True)
        state = component.state_dict(*args, **kwargs)
        content = io.BytesIO()  # save to memory first: on a full disk, torch.save to a file raises no OSError
        written = tree_map_only(torch.Tensor, _own_memory, state)
        written = tree_map_only(np.generic, lambda number: number.item(), written)  # their pickles cannot be loaded
        if hasattr(state, "_metadata"):  # copy the attribute that PyTorch adds to a module's state dict
            written._metadata = state._metadata
        torch.save(written, content)
        content.seek(0)
        if unsafe := torch.serialization.get_unsafe_globals_in_checkpoint(content):
            found = f"the state of {type(component).__name__} holds objects of {unsafe}"
            raise TypeError(f"{found}, which a checkpoint cannot restore; use numbers, texts and tensors.")
        with open(path / self.state_torch, "wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        return state

    def load(self, component: Any, path: Path, *, map_location: Any, args: Any, kwargs: Any, **ignored: Any) -> None:
        """Read the component's state from ``path`` and load it; ``ignored`` arguments have no effect."""
        file = path / self.state_torch
        if not file.is_file():
            raise FileNotFoundError(f"there is no file {file}; load a checkpoint that was made with make_checkpoint.")
        component.load_state_dict(torch.load(file, map_location=map_location, weights_only=True), *args, **kwargs)


def _own_memory(tensor: torch.Tensor) -> torch.Tensor:
    """Return a clone if the tensor is only a part of its storage: ``torch.save`` writes whole storages."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def make_checkpoint(**components: Any) -> Checkpoint:
    """Return a ``torchrl.checkpoint.Checkpoint`` that saves ``components`` and loads them without pickle."""
    return Checkpoint(**components).register_adapter(Stateful, WeightsOnlyAdapter())


def tidy(path: Path) -> None:
    """Remove the temporary files of a run that was killed while it wrote the checkpoint ``path``.

    If the killed run had already moved the old checkpoint away, this function moves it back to ``path``. While
    this function runs, no other process may write to ``path``.
    """
    for aside in sorted(path.parent.glob(f".{glob.escape(path.name)}.*-*")):
        kind = aside.name[len(path.name) + 2 :].partition("-")[0]
        if kind == "backup" and not path.exists():
            aside.replace(path)
        elif kind in ("stage", "archive", "backup", "delete"):
            shutil.rmtree(aside) if aside.is_dir() else aside.unlink()


def tidy_rotation(directory: Path, prefix: str = "checkpoint") -> None:
    """Call ``tidy`` for each checkpoint in the folder of a ``torchrl.checkpoint.CheckpointRotation``."""
    names = {aside.name[1:].rpartition(".")[0] for aside in directory.glob(f".{glob.escape(prefix)}-*.*-*")}
    for name in names:
        tidy(directory / name)


def damaged_checkpoints(directory: Path, after: str = "") -> list[str]:
    """Return the names, above ``after``, of the checkpoints in the folder of a rotation that cannot be read."""
    names = sorted(path.name for path in directory.glob("checkpoint-*") if not Checkpoint.is_checkpoint(path))
    return [name for name in names if name > after]


class LastMetrics:
    """Saves the last value of each metric of a trainer; hooks such as ``EarlyStopping`` need them."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def state_dict(self) -> dict[str, float]:
        """Return the last values by name."""
        return self._trainer.metrics

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Restore the values."""
        for name, value in state_dict.items():
            self._trainer._log_dict[name].append(value)


class LoggerState:
    """Saves what a logger needs in a resumed run, such as the id of a W&B run, but no logged scalars."""

    def __init__(self, logger: Logger) -> None:
        self._logger = logger

    def state_dict(self) -> dict[str, Any]:
        """Return the logger's state without logged scalars; a CSVLogger's own state contains all of them."""
        state = dict(self._logger.state_dict())
        local = {name: value for name, value in state.get("local", {}).items() if name != "scalars"}
        return {**state, "local": local}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the state."""
        self._logger.load_state_dict(state_dict)


class SamplerState:
    """Saves the sampler, random generator and data digest of a replay buffer, for an exact resume."""

    def __init__(self, replay_buffer: ReplayBuffer) -> None:
        self._buffer = replay_buffer

    def state_dict(self) -> dict[str, Any]:
        """Return the sampler's state, the random generator's state, and a digest of the dataset."""
        generator = self._buffer._rng
        return {
            "class": self._sampler_class,
            "rows": len(self._buffer),
            "dataset": self._digest,
            "sampler": _sampler_state(self._buffer.sampler),
            "generator": None if generator is None else generator.get_state(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore a saved state; raise a ValueError if dataset, sampler class or use of a seed has changed."""
        self._check(state_dict)
        sampler = self._buffer.sampler
        _load_sampler_state(sampler, state_dict["sampler"])
        if isinstance(sampler, SamplerWithoutReplacement) and sampler._sample_list is not None:
            # the loaded order of the rows is on the CPU; move it to the buffer's device
            sampler._sample_list = sampler._sample_list.to(self._buffer.storage.device)
        if (generator := self._buffer._rng) is not None:
            saved = state_dict["generator"].cpu()
            if saved.numel() == generator.get_state().numel():
                generator.set_state(saved)
            else:
                _logger.warning("the checkpoint is from another kind of device, so training draws other rows from now")
                generator.manual_seed(int(hashlib.sha256(saved.numpy().tobytes()).hexdigest()[:15], 16))

    def _check(self, saved: Mapping[str, Any]) -> None:
        before, kind, rows = "the checkpoint's replay buffer", self._sampler_class, len(self._buffer)
        seeded = saved["generator"] is not None
        if saved["class"] != kind:
            raise ValueError(f"{before} used a {saved['class']}, but this one uses a {kind}; use the same sampler.")
        if saved["rows"] != rows:
            found = f"{before} had {saved['rows']} transitions, but this one has {rows}"
            new = remedy("", ", or start a new run with the networks of this run: init_from=RUN out=FOLDER")
            raise ValueError(f"{found}; resume with the same dataset{new}.")
        if saved["dataset"] != self._digest:
            raise ValueError(
                "the dataset has changed since the checkpoint: it has the same number of transitions, but other "
                "values. Resume with the same dataset, or "
                + remedy(
                    "load only the networks: Checkpoint(loss_module=loss).load(path).",
                    "start a new run with the networks of this run: init_from=RUN out=FOLDER.",
                )
            )
        if seeded != (self._buffer._rng is not None):
            made, other = ("with", "without") if seeded else ("without", "with")
            raise ValueError(f"{before} was made {made} a seed, but this one {other} a seed; make it {made} a seed.")

    @cached_property
    def _digest(self) -> str:
        rows = self._buffer.storage[:]
        return dataset_digest(torch.stack(rows) if isinstance(rows, list) else rows)  # ListStorage gives a list

    @property
    def _sampler_class(self) -> str:
        return type(self._buffer.sampler).__name__


def dataset_digest(data: TensorDictBase) -> str:
    """Return a digest of the names, dtypes, shapes and values of all tensors; large tensors are read in parts."""
    digest = hashlib.sha256()
    known: dict[int, torch.Tensor] = {}  # digests of stored frames
    for key, value in sorted(data.items(True, True), key=lambda item: str(item[0])):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        value = value.digests(known) if isinstance(value, FrameStack) else value
        rows = max(1, _DIGEST_BYTES * len(value) // max(value.nbytes, 1))
        for part in value.split(rows) if value.numel() else ():
            digest.update(part.contiguous().view(-1).view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


def _sampler_state(sampler: Sampler) -> dict[str, Any]:
    """Return the sampler's state; convert the sum tree and min tree of a prioritized sampler to tensors."""
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
