"""Reads datasets of Minari and D4RL by their ids."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torchrl.data import Bounded, Categorical, TensorSpec

from torchrl_bcq.data.checks import Columns
from torchrl_bcq.data.sources.array_files import hdf5
from torchrl_bcq.data.sources.dict_spaces import MASK, check_entries, holds_mask, split_image
from torchrl_bcq.data.sources.entries import Joined
from torchrl_bcq.data.sources.environment import recorded_environment, recorded_in_minari
from torchrl_bcq.data.sources.hdf5_storage import check_hdf5
from torchrl_bcq.data.sources.layouts import joined
from torchrl_bcq.data.sources.source import Source, scores_or_none
from torchrl_bcq.errors import DatasetError, remedy
from torchrl_bcq.files import home, write_whole

_MINARI_NAMES = {name: name for name in ("observations", "actions", "rewards")}
_MINARI_NAMES |= {"terminated": "terminations", "truncated": "truncations"}
# D4RL's Gym tasks: environment id, and mean returns of a random and an expert policy (arXiv:2004.07219, d4rl/infos.py).
# The ids are of -v5 environments: D4RL's need mujoco-py, which Gymnasium no longer supports. Returns in Gymnasium's -v5
# environments are close, but not equal, to D4RL's returns. Ant has no environment id, because observations have 105
# features in Ant-v5 and 111 features in D4RL.
_D4RL_TASKS: dict[str, tuple[str | None, tuple[float, float]]] = {
    "ant": (None, (-325.6, 3879.7)),
    "halfcheetah": ("HalfCheetah-v5", (-280.178953, 12135.0)),
    "hopper": ("Hopper-v5", (-20.272305, 3234.3)),
    "walker2d": ("Walker2d-v5", (1.629008, 4592.3)),
}
_D4RL_TIME_LIMIT = 1000  # steps; used for D4RL's -v0 files, which do not record where the time limit ended an episode


def load_minari(
    dataset_id: str,
    *,
    observation: Sequence[str] | None = None,
    action_spec: TensorSpec | None = None,
    root: str | Path | None = None,
) -> TensorDict:
    """Download a Minari dataset if needed, and return it as transitions in the layout of ``from_arrays``.

    Args:
        dataset_id: Minari id, such as ``"mujoco/hopper/medium-v0"``. The action space of the dataset must be a ``Box``
            or ``Discrete``; the observation space must be a ``Box`` of vectors or frames of bytes, or a ``Dict`` of
            such spaces.
        observation: names of the entries of a ``Dict`` observation. Vectors are joined to one vector in this order,
            such as ``["observation", "desired_goal"]``; ``"a/b"`` is the entry ``b`` of the entry ``a``. One entry may
            be frames; beside vectors, they become the entry ``pixels``. By default, all entries are read, in the order
            of the space, except ``action_mask``: this entry holds the masks of the available discrete actions.
        action_spec: spec of one action, as for ``load_hdf5``. By default, that of the dataset's action space.
        root: as for ``load_hdf5``.

    Raises:
        DatasetError: if the dataset cannot be opened or downloaded, a space is not one of these, or a check of
        ``from_arrays`` fails.
        OSError: if the memory-mapped copy cannot be written.

    Example:
        >>> load_minari("mujoco/hopper/medium-v0")["observation"].shape[-1]
        11

    Source: Minari, https://minari.farama.org. TorchRL's ``MinariExperienceReplay`` is not used, because in TorchRL 0.14
    its samples contain only zeros.
    """
    return minari(dataset_id, observation=observation).read(action_spec=action_spec, root=root)


def load_d4rl(
    dataset_id: str,
    *,
    max_episode_steps: int | None = None,
    action_spec: TensorSpec | None = None,
    root: str | Path | None = None,
) -> TensorDict:
    """Return a D4RL dataset as transitions in the layout of ``from_arrays``. ``d4rl`` and ``mujoco_py`` are not needed.

    Args:
        dataset_id: D4RL id, such as ``"hopper-medium-v2"``. The file is downloaded once to ``$D4RL_DATASET_DIR``, by
            default ``~/.d4rl/datasets``.
        max_episode_steps: number of steps after which episodes were cut off, used if the file has no ``timeouts``. For
            D4RL's Gym tasks, the default is 1000.
        action_spec, root: as for ``load_hdf5``.

    Raises:
        DatasetError: if D4RL has no dataset with this id, the download fails, or a check of ``load_hdf5`` fails.
        OSError: if a file cannot be written.

    Example:
        >>> load_d4rl("hopper-medium-v2")["observation"].shape[-1]
        11

    Source: D4RL, arXiv:2004.07219. TorchRL 0.14's ``D4RLExperienceReplay`` is not used, because it sets the next
    observation to zero where an episode was cut off.
    """
    return d4rl(dataset_id, max_episode_steps=max_episode_steps).read(action_spec=action_spec, root=root)


def minari(dataset_id: str, *, observation: Sequence[str] | None = None) -> Source:
    """Open a Minari dataset, after a download if needed, and return it as a ``Source``."""
    from gymnasium.spaces import Discrete

    dataset = _open_minari(dataset_id)
    entries, masked = _joined_entries(dataset, observation), holds_mask(dataset.observation_space)

    vectors, image = ([], None) if entries is None else split_image(dataset.observation_space, entries)

    def read(episode: Any) -> Columns:
        fields = {field: getattr(episode, name) for field, name in _MINARI_NAMES.items()}
        if entries is None:
            return fields
        parts = {entry: reduce(getitem, entry.split("/"), fields["observations"]) for entry in entries}
        fields |= {"action_masks": episode.observations[MASK]} if masked else {}
        fields |= {"frames" if vectors else "observations": parts.pop(image)} if image else {}
        return fields | ({"observations": Joined(parts)[()]} if vectors else {})

    def chunks() -> Iterator[Columns]:
        for file in files:
            if file.suffix == ".hdf5":
                check_hdf5(file, _MINARI_NAMES.values())
        return joined(map(read, dataset.iterate_episodes()))

    space, spec = dataset.action_space, None
    if isinstance(space, Discrete):
        spec = Categorical(int(space.n))
    elif len(space.shape) == 1:
        low, high = torch.tensor(space.low), torch.tensor(space.high)
        spec = Bounded(low, high, space.shape, dtype=low.dtype)
    files = sorted(path for path in Path(dataset.storage.data_path).rglob("*") if path.is_file())
    metadata = dataset.storage.metadata
    env = recorded_in_minari(metadata)
    return Source(
        dataset_id,
        chunks,
        files,
        {"observation": entries},
        spec,
        env if env is None or entries is None else replace(env, observation=tuple(entries)),
        reference_scores=scores_or_none(metadata.get(name) for name in ("ref_min_score", "ref_max_score")),
    )


def _open_minari(dataset_id: str) -> Any:
    import minari
    from gymnasium.spaces import Box, Discrete

    try:
        dataset = minari.load_dataset(dataset_id, download=True)
    except Exception as error:  # Minari and its download clients raise various exceptions
        raise DatasetError(
            f"Minari dataset {dataset_id!r} can be neither opened nor downloaded ({error}). Use an id such as "
            "'mujoco/hopper/medium-v0'; `minari list local` and `minari list remote` show all ids. If a download was "
            f"interrupted, repeat it with `minari download --force {dataset_id}`."
        ) from error
    space = dataset.action_space
    first = getattr(space, "start", 0)
    if not isinstance(space, (Box, Discrete)) or first != 0 or (isinstance(space, Box) and space.dtype.kind != "f"):
        found = f"{dataset_id} has action space {space}"
        raise DatasetError(f"{found}; only Box of floats, and Discrete whose first action is 0, can be read.")
    if not dataset.total_episodes:
        raise DatasetError(f"{dataset_id} holds no episodes; choose another dataset.")
    return dataset


def _joined_entries(dataset: Any, names: Sequence[str] | None) -> list[str] | None:
    """Return the entries of a Dict observation that are joined, or None if the observation is one vector."""
    from gymnasium.spaces import Box, Dict

    name, space = dataset.spec.dataset_id, dataset.observation_space
    if isinstance(space, Dict):
        try:
            return check_entries(space, [names] if isinstance(names, str) else names)
        except ValueError as error:
            setting = remedy("pass observation=[...]", "set reader.observation=[...]")
            raise DatasetError(f"{name}: {error}; {setting} with the entries to join.") from None
    if not isinstance(space, Box):
        how = remedy("pass vectors to from_arrays.", "write its vectors to an HDF5 file, and read this file.")
        raise DatasetError(f"{name} has observation space {space}; only Box, and Dict of Box, can be read; {how}")
    if names is not None:
        raise DatasetError(f"{name} has observations of one vector, without the entries {names}; leave them out.")
    return None


def d4rl(dataset_id: str, *, max_episode_steps: int | None = None) -> Source:
    """Return a D4RL dataset as a ``Source``. Download its file first if the file is missing."""
    from torchrl.data.datasets.d4rl_infos import D4RL_DATASETS

    task = dataset_id.split("-")[0]
    if dataset_id not in D4RL_DATASETS:
        alike = [name for name in sorted(D4RL_DATASETS) if name.startswith(task)] or sorted(D4RL_DATASETS)
        raise DatasetError(f"D4RL has no dataset {dataset_id!r}; available datasets are {', '.join(alike)}.")
    url = D4RL_DATASETS[dataset_id]
    folder = home(os.environ.get("D4RL_DATASET_DIR") or Path.home() / ".d4rl" / "datasets")
    file = folder / url.rpartition("/")[2]
    if not file.is_file():
        _download(url, file)
    env_id, scores = _D4RL_TASKS.get(task, (None, None))
    limit = _D4RL_TIME_LIMIT if max_episode_steps is None and scores is not None else max_episode_steps
    source = hdf5(file, max_episode_steps=limit, report_limit=max_episode_steps is not None)
    return replace(source, env=recorded_environment(env_id), reference_scores=scores)


def _download(url: str, file: Path) -> None:
    """Download an HDF5 file from ``url`` to ``file``. After an error, no partial file remains."""
    import h5py

    try:
        with write_whole(file) as aside:
            torch.hub.download_url_to_file(url, str(aside), progress=sys.stderr.isatty())
            h5py.File(aside, "r").close()  # raises an error if the file is incomplete
    except Exception as error:
        raise DatasetError(f"{url} cannot be downloaded ({error}); try again, or save it as {file}.") from error
