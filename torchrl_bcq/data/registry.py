"""Datasets by name, such as ``"hdf5:FILE"`` or ``"minari:ID"``; ``"bcq:hdf5:FILE"`` in TorchRL's registry."""

from __future__ import annotations

from inspect import Parameter, signature
from pathlib import Path
from typing import Any

from tensordict import TensorDictBase
from torchrl.data import ReplayBuffer, TensorDictReplayBuffer, TensorSpec
from torchrl.data.datasets import load_dataset, register_dataset

from torchrl_bcq.data.buffer import make_replay_buffer
from torchrl_bcq.data.checks import Checks, DatasetError
from torchrl_bcq.data.rollouts import from_rollouts
from torchrl_bcq.data.sources.array_files import hdf5, load_hdf5, load_npz, npz
from torchrl_bcq.data.sources.conversion import load_memmap
from torchrl_bcq.data.sources.hubs import d4rl, load_d4rl, load_minari, minari
from torchrl_bcq.data.sources.source import Source
from torchrl_bcq.data.sources.tables import load_table, table

_SOURCES: dict[str, tuple[Any, Any]] = {  # makes the source; reads it, with the same settings
    "hdf5": (hdf5, load_hdf5),
    "npz": (npz, load_npz),
    "csv": (table, load_table),
    "parquet": (table, load_table),
    "minari": (minari, load_minari),
    "d4rl": (d4rl, load_d4rl),
}
_ENDINGS = {f".{kind}": kind for kind in ("hdf5", "npz", "csv", "parquet")}
_ENDINGS |= {".h5": "hdf5", ".gz": "csv", ".pq": "parquet"}


def load_transitions(
    name: str,
    *,
    action_spec: TensorSpec | None = None,
    root: str | Path | None = None,
    strict: bool = True,
    **settings: Any,
) -> TensorDictBase:
    """Read a dataset by its name.

    Args:
        name: ``"hdf5:FILE"``, ``"npz:FILE"``, ``"csv:FILE"``, ``"parquet:FILE"``, ``"minari:ID"``, ``"d4rl:ID"``,
            ``"memmap:FOLDER"``, a file with one of their endings, a folder of a memory-mapped copy, or any prefix of
            TorchRL's :func:`~torchrl.data.datasets.register_dataset`.
        action_spec, root: as :func:`~torchrl_bcq.load_hdf5` takes them.
        strict: whether bad rows are refused; if not, :func:`~torchrl_bcq.describe` can report them.
        **settings: of the reader, such as ``names`` of :func:`~torchrl_bcq.load_hdf5`.

    Raises:
        FileNotFoundError: if there is no such file.
        DatasetError: if there is no such source, or its reader refuses it.
    """
    if source := find_source(name, **settings):
        return source.read(action_spec=action_spec, root=root, strict=strict)
    prefix, rest = _split(name)
    if prefix == "memmap":
        if root is not None or settings:
            raise DatasetError(f"{name} is a memory-mapped copy already; it has no use for {[*settings] or 'root'}.")
        transitions = load_memmap(rest)
        if strict and action_spec is not None:
            _check_actions(rest, transitions, action_spec)
        return transitions
    try:
        dataset = load_dataset(name, **settings)
    except Exception as error:  # loaders registered by others raise any kind
        raise DatasetError(
            f"{name!r} is no file; sources are {[*_SOURCES, 'memmap']}, or TorchRL's: {error}"
        ) from error
    rollouts = dataset[:] if isinstance(dataset, ReplayBuffer) else dataset
    return from_rollouts(rollouts, action_spec=action_spec)


def _check_actions(name: str, transitions: TensorDictBase, action_spec: TensorSpec) -> None:
    """Check the bounds of a copy, which may have been made without them."""
    try:
        if missing := [key for key in ("action", ("next", "reward")) if key not in transitions.keys(True)]:
            raise DatasetError(f"it lacks {missing}; rename its entries with rename_key_.")
        Checks(action_spec).check_all({"actions": transitions["action"], "rewards": transitions["next", "reward"]})
    except DatasetError as error:
        raise DatasetError(f"{name}: {error}") from None


def find_source(name: str, **settings: Any) -> Source | None:
    """The source of a name; None for a memory-mapped copy and for datasets that only TorchRL knows."""
    prefix, rest = _split(name)
    if prefix not in _SOURCES:
        return None
    open_source, read = _SOURCES[prefix]
    _, *parameters = signature(read).parameters.values()  # the first is the path or id
    taken = {parameter.name: parameter for parameter in parameters if parameter.name not in ("action_spec", "root")}
    if missing := [key for key in taken if taken[key].default is Parameter.empty and key not in settings]:
        raise DatasetError(f"{name} is a {prefix} source, which also needs {missing}.")
    if unused := sorted(settings.keys() - taken.keys()):
        raise DatasetError(f"{name} is a {prefix} source, which has no use for {unused}.")
    return open_source(rest, **settings)


def _split(name: str) -> tuple[str, str]:
    """Prefix and rest of a name; the prefix of a bare path follows from its ending."""
    path = Path(name).expanduser()
    if path.is_dir():
        return "memmap", name
    prefix, colon, rest = name.partition(":")
    if colon and not path.is_file():
        return prefix, rest
    kind = _ENDINGS.get(path.suffix.lower(), "")
    if path.is_file() and not kind:
        raise DatasetError(f"{name} does not end in {[*_ENDINGS]}; give its kind, as in 'hdf5:{name}'.")
    return kind, name


def open_replay_buffer(name: str, **settings: Any) -> TensorDictReplayBuffer:
    """Make the buffer for TorchRL's ``load_dataset("bcq:hdf5:FILE", batch_size=256)``.

    Args:
        name: as :func:`load_transitions` takes it.
        **settings: those of :func:`~torchrl_bcq.make_replay_buffer` and :func:`load_transitions`.
    """
    own = {key: settings.pop(key) for key in settings.keys() & signature(make_replay_buffer).parameters.keys()}
    return make_replay_buffer(load_transitions(name, **settings), **own)


register_dataset("bcq", open_replay_buffer, replace=True)
