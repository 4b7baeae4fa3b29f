"""Datasets by name: ``"hdf5:FILE"``, ``"minari:ID"`` ... here, and ``"bcq:hdf5:FILE"`` ... in TorchRL's registry."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

from tensordict import TensorDictBase
from torchrl.data import ReplayBuffer, TensorDictReplayBuffer, TensorSpec
from torchrl.data.datasets import load_dataset, register_dataset

from torchrl_bcq.data.buffer import make_replay_buffer
from torchrl_bcq.data.checks import Checks, DatasetError
from torchrl_bcq.data.rollouts import from_rollouts
from torchrl_bcq.data.sources.array_files import hdf5, npz
from torchrl_bcq.data.sources.conversion import load_memmap
from torchrl_bcq.data.sources.hubs import d4rl, minari
from torchrl_bcq.data.sources.source import Source
from torchrl_bcq.data.sources.tables import table

_ROWS = 65_536  # looked at together
_SOURCES: dict[str, Callable[..., Source]] = {
    "hdf5": hdf5,
    "npz": npz,
    "csv": table,
    "parquet": table,
    "minari": minari,
    "d4rl": d4rl,
}
_SUFFIXES = {
    ".hdf5": "hdf5",
    ".h5": "hdf5",
    ".npz": "npz",
    ".csv": "csv",
    ".gz": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
}


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
        action_spec: bounds that the actions must keep, if given.
        root: folder for a memory-mapped copy, made once and for data larger than memory.
        strict: whether bad rows are refused, rather than left for :func:`~torchrl_bcq.describe` to find.
        **settings: of the reader, such as ``names`` of :func:`~torchrl_bcq.load_hdf5`.

    Raises:
        FileNotFoundError: if there is no such file.
        DatasetError: if there is no such source, or its reader refuses it.
    """
    source = find_source(name, **settings)
    if source is not None:
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
    except Exception as error:  # of whoever registered it
        raise DatasetError(
            f"{name!r} is no file; sources are {[*_SOURCES, 'memmap']}, or TorchRL's: {error}"
        ) from error
    rollouts = dataset[:] if isinstance(dataset, ReplayBuffer) else dataset
    return from_rollouts(rollouts, action_spec=action_spec)


def _check_actions(name: str, transitions: TensorDictBase, action_spec: TensorSpec) -> None:
    """Bounds of a copy, which may have been made without them."""
    checks = Checks(action_spec)
    try:
        for start in range(0, len(transitions), _ROWS):
            rows = transitions[start : start + _ROWS]
            checks({"actions": rows.get("action", None), "rewards": rows.get(("next", "reward"), None)})
        checks.finish()
    except DatasetError as error:
        raise DatasetError(f"{name}: {error}") from None


def find_source(name: str, **settings: Any) -> Source | None:
    """The source that a name stands for; none for a memory-mapped copy, or what only TorchRL knows."""
    prefix, rest = _split(name)
    if prefix not in _SOURCES:
        return None
    taken = list(signature(_SOURCES[prefix]).parameters.values())[1:]  # the first is the path or id
    needed = [parameter.name for parameter in taken if parameter.default is parameter.empty]
    if missing := [setting for setting in needed if setting not in settings]:
        raise DatasetError(f"{name} is a {prefix} source, which also needs {missing}.")
    if unused := sorted(settings.keys() - {parameter.name for parameter in taken}):
        raise DatasetError(f"{name} is a {prefix} source, which has no use for {unused}.")
    return _SOURCES[prefix](rest, **settings)


def _split(name: str) -> tuple[str, str]:
    """Prefix and the rest, also of a bare path."""
    path = Path(name).expanduser()
    if path.is_dir():
        return "memmap", name
    prefix, colon, rest = name.partition(":")
    if path.is_file() or not colon:
        kind = _SUFFIXES.get(path.suffix.lower(), "")
        if path.is_file() and not kind:
            raise DatasetError(f"{name} does not end in {[*_SUFFIXES]}; say what it is, as in 'hdf5:{name}'.")
        return kind, name
    return prefix, rest


def open_replay_buffer(
    name: str,
    *,
    batch_size: int = 100,
    device: Any = None,
    seed: int | None = None,
    sampler: Any = "uniform",
    **reader: Any,
) -> TensorDictReplayBuffer:
    """The replay buffer of a dataset: ``torchrl.data.datasets.load_dataset("bcq:hdf5:FILE", batch_size=256)``.

    Args:
        name: as :func:`load_transitions` takes it.
        batch_size: of :func:`~torchrl_bcq.make_replay_buffer`, as ``device``, ``seed`` and ``sampler``.
        device: where the dataset lives.
        seed: of the order of rows.
        sampler: which rows to draw.
        **reader: whatever else :func:`load_transitions` takes.
    """
    transitions = load_transitions(name, **reader)
    return make_replay_buffer(transitions, batch_size=batch_size, device=device, seed=seed, sampler=sampler)


register_dataset("bcq", open_replay_buffer, replace=True)
