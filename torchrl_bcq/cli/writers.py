"""Recorded transitions on disk: in D4RL's layout as HDF5, and in Minari's local store."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tensordict import TensorDictBase

from torchrl_bcq.cli.errors import RunError

if TYPE_CHECKING:
    from minari.data_collector import EpisodeBuffer


def write_hdf5(path: str | Path, transitions: TensorDictBase, env_id: str, *, overwrite: bool = False) -> None:
    """Write recorded transitions in D4RL's layout; the file is there whole, or not at all.

    Args:
        path: file that ends in ``.hdf5`` or ``.h5``; its folder is made if there is none.
        transitions: those of :func:`~torchrl_bcq.cli.record.record`, ``[N]``.
        env_id: is kept as an attribute, so that the file says where to evaluate.
        overwrite: whether a file that is there is replaced.

    Raises:
        RunError: if there is a file already, or the name has another ending.
        OSError: if it cannot be written.

    Source: D4RL, arXiv:2004.07219.
    """
    import h5py

    check_out(str(path), overwrite)
    path = Path(path).expanduser()
    after = transitions["next"]
    fields = {
        "observations": transitions["observation"],
        "actions": transitions["action"],
        "rewards": after["reward"].squeeze(-1),
        "next_observations": after["observation"],
        "terminals": after["terminated"].squeeze(-1),
        "timeouts": after["truncated"].squeeze(-1),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with h5py.File(aside, "w") as file:
            for name, values in fields.items():
                file.create_dataset(name, data=values.cpu().numpy(), compression="gzip", shuffle=True)
            file.attrs["env_id"] = env_id
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def write_minari(
    dataset_id: str, transitions: TensorDictBase, env_id: str, *, algorithm: str, overwrite: bool = False
) -> None:
    """Write recorded transitions into Minari's local store (``$MINARI_DATASETS_PATH``, ``~/.minari`` if not set).

    Args:
        dataset_id: such as ``"mine/hopper/noisy-v0"``.
        transitions: those of :func:`~torchrl_bcq.cli.record.record`, ``[N]``.
        env_id: environment of the dataset.
        algorithm: how the actions came about, in words.
        overwrite: whether a dataset that is there is replaced.

    Raises:
        RunError: if there is such a dataset already, the id is none of Minari's, or Minari refuses the environment.
        OSError: if it cannot be written.
    """
    import minari
    from minari.storage import get_dataset_path

    check_out(f"minari:{dataset_id}", overwrite)
    episodes = [_minari_episode(episode) for episode in _episodes(transitions)]
    with _replacing(get_dataset_path(dataset_id)), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="minari")  # it asks for an author's e-mail address
        try:
            minari.create_dataset_from_buffers(
                dataset_id,
                buffer=episodes,
                env=env_id,
                eval_env=env_id,
                algorithm_name=algorithm,
                author="torchrl_bcq",
                code_permalink="torchrl_bcq/cli/record.py",
                description=f"{len(transitions)} steps of {env_id}, recorded by torchrl-bcq.",
            )
        except ValueError as error:  # such as for an environment that cannot be written as JSON
            raise RunError(f"Minari cannot keep {dataset_id} ({error}); record it into a file.") from error


def check_out(out: str, overwrite: bool) -> None:
    """Refuse a target before anything is recorded for it."""
    if out.startswith("minari:"):
        from minari.dataset.minari_dataset import parse_dataset_id
        from minari.storage import get_dataset_path

        dataset_id = out.removeprefix("minari:")
        try:
            parse_dataset_id(dataset_id)
        except (TypeError, ValueError) as error:  # the first where there is no version
            raise RunError(f"{dataset_id!r} is no id of Minari's; those look like 'mine/hopper/noisy-v0'.") from error
        path = get_dataset_path(dataset_id)
    else:
        path = Path(out).expanduser()
        if path.suffix not in (".hdf5", ".h5"):
            raise RunError(f"{out} is neither FILE.hdf5 nor minari:NAMESPACE/DATASET-v0.")
        if path.is_dir():
            raise RunError(f"{out} is a folder; name a file.")
    if path.exists() and not overwrite:
        raise RunError(f"{out} is there already; name another, or pass --overwrite.")


def _episodes(transitions: TensorDictBase) -> Sequence[TensorDictBase]:
    """Split transitions ``[N]`` behind each ``done``; the last one must be."""
    ends = transitions["next", "done"].squeeze(-1).nonzero().squeeze(-1) + 1
    return transitions.split(torch.diff(ends, prepend=ends.new_zeros(1)).tolist())


def _minari_episode(episode: TensorDictBase) -> EpisodeBuffer:
    """One episode ``[T]`` in Minari's layout: ``T + 1`` observations and ``T`` of all else."""
    from minari.data_collector import EpisodeBuffer

    last = episode["next", "observation"][-1:]
    return EpisodeBuffer(
        observations=torch.cat([episode["observation"], last]).numpy(),
        actions=episode["action"].numpy(),
        rewards=episode["next", "reward"].squeeze(-1).numpy(),
        terminations=episode["next", "terminated"].squeeze(-1).numpy(),
        truncations=episode["next", "truncated"].squeeze(-1).numpy(),
    )


@contextmanager
def _replacing(folder: Path) -> Iterator[None]:
    """What is written to a folder meanwhile replaces what is there; if that fails, what was there comes back."""
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    if folder.exists():
        folder.rename(aside)
    try:
        yield
    except BaseException:  # an interrupt, too
        shutil.rmtree(folder, ignore_errors=True)
        if aside.exists():
            aside.rename(folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)
