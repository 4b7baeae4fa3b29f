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
from torchrl.data import Bounded, TensorSpec

from torchrl_bcq.data.checks import Columns, DatasetError
from torchrl_bcq.data.sources.array_files import hdf5
from torchrl_bcq.data.sources.dict_spaces import check_entries
from torchrl_bcq.data.sources.entries import Joined
from torchrl_bcq.data.sources.environment import recorded_environment, recorded_in_minari
from torchrl_bcq.data.sources.hdf5_storage import check_hdf5
from torchrl_bcq.data.sources.layouts import joined
from torchrl_bcq.data.sources.source import Source, scores_or_none
from torchrl_bcq.errors import remedy
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
        dataset_id: Minari id, such as ``"mujoco/hopper/medium-v0"``. The action space of the dataset must be a ``Box``;
            the observation space must be a ``Box``, or a ``Dict`` of ``Box`` spaces.
        observation: names of the entries of a ``Dict`` observation, which are joined to one vector in this order, such
            as ``["observation", "desired_goal"]``; ``"a/b"`` is the entry ``b`` of the entry ``a``. By default, all
            entries are joined, in the order of the space.
        action_spec: bounded spec of one action; all actions must lie within its bounds. By default, the bounds of the
            dataset's action space are used.
        root: as for ``load_hdf5``.

    Raises:
        DatasetError: if the dataset cannot be opened or downloaded, a space is not one of these, or a check of
        ``from_arrays`` fails. OSError: if the memory-mapped copy cannot be written.

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
    dataset = _open_minari(dataset_id)
    entries = _joined_entries(dataset, observation)

    def read(episode: Any, name: str) -> Any:
        values = getattr(episode, name)
        if name != "observations" or entries is None:
            return values
        return Joined({entry: reduce(getitem, entry.split("/"), values) for entry in entries})[()]

    def chunks() -> Iterator[Columns]:
        for file in files:
            if file.suffix == ".hdf5":
                check_hdf5(file, _MINARI_NAMES.values())
        yield from joined(
            {field: read(episode, name) for field, name in _MINARI_NAMES.items()}
            for episode in dataset.iterate_episodes()
        )

    box, spec = dataset.action_space, None
    if len(box.shape) == 1 and box.dtype.kind == "f":
        low, high = torch.tensor(box.low), torch.tensor(box.high)
        spec = Bounded(low, high, box.shape, dtype=low.dtype)
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
    from gymnasium.spaces import Box

    try:
        dataset = minari.load_dataset(dataset_id, download=True)
    except Exception as error:  # Minari and its download clients raise various exceptions
        raise DatasetError(
            f"Minari dataset {dataset_id!r} can be neither opened nor downloaded ({error}). Use an id such as "
            "'mujoco/hopper/medium-v0'; `minari list local` and `minari list remote` show all ids."
        ) from error
    if not isinstance(space := dataset.action_space, Box):
        found = f"{dataset_id} has action space {space}"
        raise DatasetError(f"{found}; only Box can be read; discrete actions are not supported yet.")
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
    if max_episode_steps is None and scores is not None:
        max_episode_steps = _D4RL_TIME_LIMIT
    env = recorded_environment(env_id)
    return replace(hdf5(file, max_episode_steps=max_episode_steps), env=env, reference_scores=scores)


def _download(url: str, file: Path) -> None:
    """Download an HDF5 file from ``url`` to ``file``. After an error, no partial file remains."""
    import h5py

    try:
        with write_whole(file) as aside:
            torch.hub.download_url_to_file(url, str(aside), progress=sys.stderr.isatty())
            h5py.File(aside, "r").close()  # raises an error if the file is incomplete
    except Exception as error:
        raise DatasetError(f"{url} cannot be downloaded ({error}); try again, or save it as {file}.") from error
