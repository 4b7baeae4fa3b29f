"""Reads datasets by name, such as ``"hdf5:FILE"``, and adds the prefix ``"bcq:"`` to TorchRL's dataset registry."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from glob import escape, glob, has_magic
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

from tensordict import TensorDictBase
from torchrl.data import ReplayBuffer, TensorDictReplayBuffer, TensorSpec
from torchrl.data.datasets import load_dataset, register_dataset

from torchrl_bcq.data.buffer import make_replay_buffer
from torchrl_bcq.data.checks import Checks
from torchrl_bcq.data.origins import Origins
from torchrl_bcq.data.rollouts import from_rollouts
from torchrl_bcq.data.sources.array_files import hdf5, load_hdf5, load_npz, npz
from torchrl_bcq.data.sources.conversion import load_memmap
from torchrl_bcq.data.sources.hubs import d4rl, load_d4rl, load_minari, minari
from torchrl_bcq.data.sources.joined import join
from torchrl_bcq.data.sources.source import Source, existing_file
from torchrl_bcq.data.sources.tables import load_table, table
from torchrl_bcq.errors import DatasetError, remedy
from torchrl_bcq.files import home

_SOURCES: dict[str, tuple[Any, Any]] = {  # prefix: (function that makes the Source, reader that users call)
    "hdf5": (hdf5, load_hdf5),
    "npz": (npz, load_npz),
    "csv": (table, load_table),
    "parquet": (table, load_table),
    "minari": (minari, load_minari),
    "d4rl": (d4rl, load_d4rl),
}
NOT_SETTINGS = ("action_spec", "root")  # arguments of readers that are no settings of ``reader``
_ENDINGS = {f".{kind}": kind for kind in ("hdf5", "npz", "csv", "parquet")}
_ENDINGS |= {".h5": "hdf5", ".gz": "csv", ".pq": "parquet"}
Name = str | os.PathLike[str]


def load_transitions(
    name: Name | Sequence[Name],
    *,
    action_spec: TensorSpec | None = None,
    root: str | Path | None = None,
    strict: bool = True,
    origins: Origins | None = None,
    **settings: Any,
) -> TensorDictBase:
    """Read a dataset by its name, or several datasets as one.

    The last row of each file ends an episode: it is marked as truncated, unless it is terminated. So no episode
    continues in another file, even if the files use the same episode numbers.

    Args:
        name: ``"hdf5:FILE"``, ``"npz:FILE"``, ``"csv:FILE"``, ``"parquet:FILE"``, ``"minari:ID"``, ``"d4rl:ID"`` or
            ``"memmap:FOLDER"``. The prefix can be left out for folders and for files with a known ending, such as
            ``.npz``. Names that were registered with TorchRL's ``torchrl.data.datasets.register_dataset`` also work.
            To read several files or ids as one dataset, pass a list of names, a pattern such as ``"data/*.parquet"`` or
            ``"data/**/*.hdf5"``, or a folder of files of one format. Files are read in alphabetical order.
        action_spec, root: as for ``load_hdf5``. With several files, ``root`` holds one copy of all of them.
        strict: if true, bad rows raise a ``DatasetError``. If false, bad rows are kept, so that ``describe`` can report
            the bad rows.
        origins: if given, gets the row numbers of the files, so that ``describe`` can report them. See ``Origins``.
        **settings: further arguments of the function that reads the source, such as ``names`` of ``load_hdf5``.

    Raises:
        FileNotFoundError: if the file or folder does not exist.
        DatasetError: if the name matches no source, a source has a defect, or several sources do not fit together.

    Example:
        >>> import numpy as np
        >>> ones = np.ones((3, 1))
        >>> for name in ("one.npz", "two.npz"):
        ...     np.savez(name, obs=ones, actions=ones, rewards=ones, terminals=[0, 0, 1], timeouts=np.zeros(3))
        >>> load_transitions(["one.npz", "two.npz"])["episode"].tolist()
        [0, 0, 0, 1, 1, 1]
    """
    if source := find_source(name, **settings):
        return source.read(action_spec=action_spec, root=root, strict=strict, origins=origins)
    (name,) = _single_names(name)  # several names always have a source
    prefix, rest = _split(name)
    if prefix == "memmap":
        transitions = load_memmap(rest)
        if root is not None or settings:
            why = f"{name} is already a memory-mapped copy"
            raise DatasetError(f"{why}; use it as it is, without {', '.join(settings) or 'a folder for copies'}.")
        _check_copy(rest, transitions, action_spec if strict else None)
        return transitions
    try:
        dataset = load_dataset(name, **settings)
    except Exception as error:  # loaders of other packages may raise any exception
        raised = f" TorchRL's load_dataset raised: {error}" if ":" in name else ""
        raise DatasetError(
            f"{name!r} is not a file, folder or known source; the known sources are {[*_SOURCES, 'memmap']}.{raised}"
        ) from error
    if root is not None:
        raise DatasetError(
            f"{name} cannot be copied to {root}: only files, Minari and D4RL datasets can be copied; leave out root."
        )
    rollouts = dataset[:] if isinstance(dataset, ReplayBuffer) else dataset
    return from_rollouts(rollouts, action_spec=action_spec)


def _check_copy(name: str, transitions: TensorDictBase, action_spec: TensorSpec | None) -> None:
    """Check the entries of a memory-mapped copy, and that its actions are within the bounds of ``action_spec``."""
    needed = ("observation", "action", ("next", "reward"))
    try:
        if missing := [key for key in needed if key not in transitions.keys(True)]:
            how = "rename them in Python: load_memmap(FOLDER).unlock_().rename_key_(OLD, NEW)"
            how += ".memmap(OTHER, copy_existing=True)"
            raise DatasetError(f"it lacks the entries {missing}; {how}.")
        if action_spec is not None:
            Checks(action_spec).check_all({"actions": transitions["action"], "rewards": transitions["next", "reward"]})
    except DatasetError as error:
        raise DatasetError(f"{name}: {error}") from None


def find_source(name: Name | Sequence[Name], **settings: Any) -> Source | None:
    """Return the ``Source`` of one or several datasets, or ``None`` for a memory-mapped copy or an unknown prefix."""
    names = _single_names(name)
    if len(names) == 1:
        return _find_one(names[0], settings)
    sources = [(name, _find_one(name, settings)) for name in names]
    if odd := [name for name, source in sources if source is None]:
        raise DatasetError(
            f"{odd[0]} cannot be joined with other datasets: only files and the sources {[*_SOURCES]} can be. Instead "
            "of a memory-mapped copy, name the files from which the copy was made."
        )
    return join([replace(source, name=name) for name, source in sources if source is not None])


def _single_names(names: Name | Sequence[Name]) -> list[str]:
    """Return the names of the single datasets, after lists, patterns and folders of files are expanded."""
    if isinstance(names, (str, os.PathLike)):
        names = [names]
    if not isinstance(names, Sequence) or not all(isinstance(name, (str, os.PathLike)) for name in names):
        raise DatasetError(f"the dataset is {names!r}, expected a name or a list of names.")
    if not names:
        raise DatasetError("the list of datasets is empty; name at least one.")
    texts = [os.fspath(name) for name in names]
    if not all(texts):
        raise DatasetError(f"a name in {texts} is empty; name a file, or '.' for this folder.")
    return [single for name in texts for single in _expanded(name)]


def _expanded(name: str) -> list[str]:
    """Return the files that match a pattern, the files in a folder, or the name itself."""
    path = home(name)
    if path.is_dir() and not (path / "meta.json").is_file():
        files = [file for file in sorted(path.glob("[!.]*")) if file.suffix.lower() in _ENDINGS and file.is_file()]
        if len(kinds := sorted({file.suffix for file in files})) > 1:
            choice = f"choose one of them, such as '{Path(escape(str(path))) / '*'}{kinds[0]}'"
            raise DatasetError(f"{name} holds files with the endings {kinds}; {choice}.")
        return [str(file) for file in files] or [name]  # without files, load_memmap reports the contents of the folder
    prefix = next((f"{kind}:" for kind in (*_SOURCES, "memmap") if name.startswith(f"{kind}:")), "")
    pattern = name.removeprefix(prefix)
    if path.exists() or home(pattern).exists() or not has_magic(pattern) or prefix in ("minari:", "d4rl:", "memmap:"):
        return [name]
    found = sorted(glob(os.path.expanduser(pattern), recursive=True))
    if not found and not prefix and ":" in name:
        return [name]  # a name that is registered with TorchRL
    if not found:
        raise FileNotFoundError(f"no file matches {pattern}.")
    return [f"{prefix}{file}" for file in found]


def _find_one(name: str, settings: dict[str, Any]) -> Source | None:
    """Return the ``Source`` of one dataset, or ``None``."""
    prefix, rest = _split(name)
    if prefix not in _SOURCES:
        return None
    open_source, read = _SOURCES[prefix]
    _, *parameters = signature(read).parameters.values()  # the first parameter is the path or id
    taken = {parameter.name: parameter for parameter in parameters if parameter.name not in NOT_SETTINGS}
    if missing := [key for key in taken if taken[key].default is Parameter.empty and key not in settings]:
        if prefix in _ENDINGS.values():
            existing_file(rest)  # before the user looks for the names of columns
        columns = " ".join(f"reader.{key}=COLUMN" for key in missing)
        ends = {"episode", "truncated", "next_observation", "max_episode_steps"}
        if "episode" in taken and not settings.keys() & ends:
            columns += ", and one of reader.episode=COLUMN reader.truncated=COLUMN reader.next_observation=COLUMN "
            columns += "reader.max_episode_steps=N"
        also = remedy(f"the arguments {missing}", f"the names of columns: {columns}")
        zeros = " Without final states, add a column of zeros as terminated." if missing == ["terminated"] else ""
        raise DatasetError(f"{name} is a {prefix} source, which also needs {also}.{zeros}")
    if unused := sorted(settings.keys() - taken.keys()):
        raise DatasetError(
            f"{name} is a {prefix} source, which does not take the {remedy('arguments', 'settings')} {unused}."
        )
    return open_source(rest, **settings)


def has_discrete_actions(name: Name | Sequence[Name], **settings: Any) -> bool:
    """Return whether the actions of a dataset are discrete. Arguments and errors: as for ``load_transitions``."""
    if source := find_source(name, **settings):
        return source.has_discrete_actions()
    return not load_transitions(name, **settings)["action"].is_floating_point()


def find_reader(name: Name | Sequence[Name]) -> Callable | None:
    """Return the function that reads the first dataset, such as ``load_hdf5``, or ``None`` as ``find_source`` does."""
    return _SOURCES.get(_split(_single_names(name)[0])[0], (None, None))[1]


def _split(name: str) -> tuple[str, str]:
    """Split a name into prefix and rest. A path without a prefix gets the prefix of its file type."""
    path = home(name)
    if path.is_dir():
        return "memmap", name
    prefix, colon, rest = name.partition(":")
    if colon and not path.is_file():
        return prefix, rest
    kind = _ENDINGS.get(path.suffix.lower(), "")
    if path.is_file() and not kind:
        raise DatasetError(f"{name} has none of the endings {[*_ENDINGS]}; give it the ending of its format.")
    return kind, name


def open_replay_buffer(name: str, **settings: Any) -> TensorDictReplayBuffer:
    """Read a dataset into a replay buffer, for TorchRL's call ``load_dataset("bcq:hdf5:FILE")``.

    Args:
        name: name of the dataset, as for ``load_transitions``.
        **settings: arguments of ``make_replay_buffer`` and ``load_transitions``.
    """
    own = {key: settings.pop(key) for key in settings.keys() & signature(make_replay_buffer).parameters.keys()}
    return make_replay_buffer(load_transitions(name, **settings), **own)


register_dataset("bcq", open_replay_buffer, replace=True)
