"""Writing transitions: D4RL's layout in HDF5, and Minari's local store."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tensordict import TensorDictBase

from torchrl_bcq.errors import RunError
from torchrl_bcq.files import write_whole

if TYPE_CHECKING:
    from minari.data_collector import EpisodeBuffer


def write_hdf5(path: str | Path, transitions: TensorDictBase, env_id: str, *, overwrite: bool = False) -> None:
    """Write transitions in D4RL's layout; the file is complete or absent.

    Args:
        path: file that ends in ``.hdf5`` or ``.h5``; missing folders are created.
        transitions: ``[N]``, as ``torchrl_bcq.evaluation.recording.record`` returns them.
        env_id: environment to evaluate in, kept as an attribute.
        overwrite: whether to replace an existing file.

    Raises:
        RunError: if the file exists, or its name has another ending.
        OSError: if it cannot be written.

    Source: D4RL, arXiv:2004.07219.
    """
    import h5py

    check_out(str(path), overwrite)
    after = transitions["next"]
    fields = {
        "observations": transitions["observation"],
        "actions": transitions["action"],
        "rewards": after["reward"].squeeze(-1),
        "next_observations": after["observation"],
        "terminals": after["terminated"].squeeze(-1),
        "timeouts": after["truncated"].squeeze(-1),
    }
    with write_whole(Path(path).expanduser()) as aside, h5py.File(aside, "w") as file:
        for name, values in fields.items():
            file.create_dataset(name, data=values.cpu().numpy(), compression="gzip", shuffle=True)
        file.attrs["env_id"] = env_id


def write_minari(
    dataset_id: str, transitions: TensorDictBase, env_id: str, *, algorithm: str, overwrite: bool = False
) -> None:
    """Write transitions into Minari's local store (``$MINARI_DATASETS_PATH``, or else ``~/.minari``).

    Args:
        dataset_id: such as ``"mine/hopper/noisy-v0"``.
        transitions, env_id, overwrite: as for :func:`write_hdf5`.
        algorithm: description of how the actions were chosen.

    Raises:
        RunError: if the dataset exists, the id is invalid, or Minari refuses the environment.
        OSError: if it cannot be written.
    """
    import minari
    from minari.storage import get_dataset_path

    check_out(f"minari:{dataset_id}", overwrite)
    with _replacing(get_dataset_path(dataset_id)), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="minari")  # it asks for an author's e-mail address
        try:
            minari.create_dataset_from_buffers(
                dataset_id,
                buffer=_minari_episodes(transitions),
                env=env_id,
                eval_env=env_id,
                algorithm_name=algorithm,
                author="torchrl_bcq",
                code_permalink="torchrl_bcq/evaluation/recording.py",
                description=f"{len(transitions)} steps of {env_id}, recorded by torchrl-bcq.",
            )
        except ValueError as error:  # such as an environment that cannot be written as JSON
            raise RunError(f"Minari cannot keep {dataset_id} ({error}); record it into a file.") from error


def check_out(out: str, overwrite: bool) -> None:
    """Refuse a target other than ``FILE.hdf5`` and ``minari:ID``, and an existing one, by a :class:`RunError`."""
    if out.startswith("minari:"):
        from minari.dataset.minari_dataset import parse_dataset_id
        from minari.storage import get_dataset_path

        dataset_id = out.removeprefix("minari:")
        try:
            parse_dataset_id(dataset_id)
        except (TypeError, ValueError) as error:  # TypeError where there is no version
            raise RunError(f"{dataset_id!r} is no id of Minari's; those look like 'mine/hopper/noisy-v0'.") from error
        path = get_dataset_path(dataset_id)
    else:
        path = Path(out).expanduser()
        if path.suffix not in (".hdf5", ".h5"):
            raise RunError(f"{out} is neither FILE.hdf5 nor minari:NAMESPACE/DATASET-v0.")
        if path.is_dir():
            raise RunError(f"{out} is a folder; name a file.")
    if path.exists() and not overwrite:
        raise RunError(f"{out} exists already; name another, or overwrite it (overwrite=True, or --overwrite).")


def _minari_episodes(transitions: TensorDictBase) -> list[EpisodeBuffer]:
    """Split transitions ``[N]`` behind each ``done``; an episode of T actions has T + 1 observations in Minari."""
    from minari.data_collector import EpisodeBuffer

    ends = transitions["next", "done"].squeeze(-1).nonzero().squeeze(-1) + 1
    return [
        EpisodeBuffer(
            observations=torch.cat([episode["observation"], episode["next", "observation"][-1:]]).numpy(),
            actions=episode["action"].numpy(),
            rewards=episode["next", "reward"].squeeze(-1).numpy(),
            terminations=episode["next", "terminated"].squeeze(-1).numpy(),
            truncations=episode["next", "truncated"].squeeze(-1).numpy(),
        )
        for episode in transitions.split(ends.diff(prepend=ends.new_zeros(1)).tolist())
    ]


@contextmanager
def _replacing(folder: Path) -> Iterator[None]:
    """Move an existing folder aside; if the block fails, move it back, else delete it."""
    # write_whole cannot do it: Minari writes at its final place only
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    if folder.exists():
        folder.rename(aside)
    try:
        yield
    except BaseException:  # also an interrupt
        shutil.rmtree(folder, ignore_errors=True)
        if aside.exists():
            aside.rename(folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)
