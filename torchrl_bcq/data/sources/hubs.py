"""Datasets of Minari and D4RL, by their ids."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torchrl.data import Bounded, TensorSpec

from torchrl_bcq.data.checks import Columns, DatasetError
from torchrl_bcq.data.sources.array_files import check_hdf5, hdf5, joined
from torchrl_bcq.data.sources.source import Source, env_id_or_none, scores_or_none
from torchrl_bcq.files import write_whole

_MINARI_NAMES = {name: name for name in ("observations", "actions", "rewards")}
_MINARI_NAMES |= {"terminated": "terminations", "truncated": "truncations"}
# D4RL's Gym tasks: environment, and mean returns of a random and of an expert policy (arXiv:2004.07219, d4rl/infos.py).
# D4RL recorded -v2 with mujoco-py, which Gymnasium no longer supports: returns in -v5 are close, but not equal. Ant has
# no environment: Ant-v5 has 105 observations, D4RL's has 111.
_D4RL_TASKS: dict[str, tuple[str | None, tuple[float, float]]] = {
    "ant": (None, (-325.6, 3879.7)),
    "halfcheetah": ("HalfCheetah-v5", (-280.178953, 12135.0)),
    "hopper": ("Hopper-v5", (-20.272305, 3234.3)),
    "walker2d": ("Walker2d-v5", (1.629008, 4592.3)),
}
_D4RL_TIME_LIMIT = 1000  # of these tasks, as registered in D4RL; their -v0 files do not record time-outs


def load_minari(
    dataset_id: str, *, action_spec: TensorSpec | None = None, root: str | Path | None = None
) -> TensorDict:
    """Read a Minari dataset into the transitions of :func:`~torchrl_bcq.from_arrays`; it is downloaded if needed.

    Args:
        dataset_id: such as ``"mujoco/hopper/medium-v0"``; observations and actions must be boxes.
        action_spec: bounds that the actions must keep; those of the dataset's action space if not given.
        root: as :func:`load_hdf5` takes it.

    Raises:
        DatasetError: if there is no such dataset, a space is not a box, or ``from_arrays`` refuses it.
        OSError: if the copy cannot be written.

    Source: Minari, https://minari.farama.org. TorchRL 0.14's own ``MinariExperienceReplay`` returns zeros.
    """
    return minari(dataset_id).read(action_spec=action_spec, root=root)


def load_d4rl(
    dataset_id: str,
    *,
    max_episode_steps: int | None = None,
    action_spec: TensorSpec | None = None,
    root: str | Path | None = None,
) -> TensorDict:
    """Read a D4RL dataset as :func:`load_hdf5` does; neither ``d4rl`` nor ``mujoco_py`` is needed.

    Args:
        dataset_id: such as ``"hopper-medium-v2"``; downloaded once, to ``$D4RL_DATASET_DIR`` or ``~/.d4rl/datasets``.
        max_episode_steps: time limit in steps, for files without ``timeouts``; those of the Gym tasks are known.
        action_spec, root: as :func:`load_hdf5` takes them.

    Raises:
        DatasetError: if there is no such dataset, it cannot be downloaded, or ``load_hdf5`` refuses it.
        OSError: if a file cannot be written.

    Source: D4RL, arXiv:2004.07219. TorchRL 0.14's own ``D4RLExperienceReplay`` sets the next observation to zero where
    an episode was cut off.
    """
    return d4rl(dataset_id, max_episode_steps=max_episode_steps).read(action_spec=action_spec, root=root)


def minari(dataset_id: str) -> Source:
    """The source of :func:`load_minari`."""
    dataset = _open_minari(dataset_id)

    def chunks() -> Iterator[Columns]:
        for file in files:
            if file.suffix == ".hdf5":
                check_hdf5(file, _MINARI_NAMES.values())
        yield from joined(
            {field: getattr(episode, name) for field, name in _MINARI_NAMES.items()}
            for episode in dataset.iterate_episodes()
        )

    box, spec = dataset.action_space, None
    if box.is_bounded() and len(box.shape) == 1 and (box.low < box.high).all():
        spec = Bounded(torch.tensor(box.low), torch.tensor(box.high), box.shape, dtype=torch.float32)
    files = sorted(path for path in Path(dataset.storage.data_path).rglob("*") if path.is_file())
    metadata, made = dataset.storage.metadata, dataset.env_spec
    return Source(
        dataset_id,
        chunks,
        files,
        action_spec=spec,
        env_id=env_id_or_none(made and made.id),  # not made from its entry point, which could run any code
        reference_scores=scores_or_none(metadata.get(name) for name in ("ref_min_score", "ref_max_score")),
    )


def _open_minari(dataset_id: str) -> Any:
    import minari
    from gymnasium.spaces import Box

    try:
        dataset = minari.load_dataset(dataset_id, download=True)
    except Exception as error:  # Minari and its download clients raise many kinds
        raise DatasetError(
            f"Minari dataset {dataset_id!r} can be neither opened nor downloaded: {error} "
            "Ids look like 'mujoco/hopper/medium-v0'; `minari list local` and `minari list remote` show them."
        ) from error
    for name, space in (("observation", dataset.observation_space), ("action", dataset.action_space)):
        if not isinstance(space, Box):
            raise DatasetError(
                f"{dataset_id} has {name} space {space}; only boxes can be read. Flatten it and use from_arrays."
            )
    if not dataset.total_episodes:
        raise DatasetError(f"{dataset_id} holds no episode.")
    return dataset


def d4rl(dataset_id: str, *, max_episode_steps: int | None = None) -> Source:
    """The source of :func:`load_d4rl`."""
    from torchrl.data.datasets.d4rl_infos import D4RL_DATASETS

    task = dataset_id.split("-")[0]
    if dataset_id not in D4RL_DATASETS:
        alike = [name for name in sorted(D4RL_DATASETS) if name.startswith(task)] or sorted(D4RL_DATASETS)
        raise DatasetError(f"D4RL has no dataset {dataset_id!r}; it has {', '.join(alike)}.")
    url = D4RL_DATASETS[dataset_id]
    folder = Path(os.environ.get("D4RL_DATASET_DIR") or Path.home() / ".d4rl" / "datasets").expanduser()
    file = folder / url.rpartition("/")[2]
    if not file.is_file():
        _download(url, file)
    env_id, scores = _D4RL_TASKS.get(task, (None, None))
    if max_episode_steps is None and scores is not None:
        max_episode_steps = _D4RL_TIME_LIMIT
    return replace(hdf5(file, max_episode_steps=max_episode_steps), env_id=env_id, reference_scores=scores)


def _download(url: str, file: Path) -> None:
    """Download an HDF5 file; it is there complete, or not at all."""
    import h5py

    try:
        with write_whole(file) as aside:
            torch.hub.download_url_to_file(url, str(aside), progress=sys.stderr.isatty())
            h5py.File(aside, "r").close()  # refuses an incomplete one
    except Exception as error:
        raise DatasetError(f"{url} cannot be downloaded ({error}); try again, or put the file at {file}.") from error
