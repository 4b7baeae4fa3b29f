"""Writes transitions to HDF5 files in D4RL's layout, and to Minari's local store."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tensordict import TensorDictBase

from torchrl_bcq.data.sources.environment import Environment
from torchrl_bcq.errors import RunError, remedy
from torchrl_bcq.files import home, write_whole

if TYPE_CHECKING:
    from minari.data_collector import EpisodeBuffer


def write_hdf5(
    path: str | Path,
    transitions: TensorDictBase,
    env: str | Environment,
    *,
    n_actions: int | None = None,
    overwrite: bool = False,
) -> None:
    """Write transitions to an HDF5 file in D4RL's layout; if this fails, no partial file is left.

    Args:
        path: path of the file, ending in ``.hdf5`` or ``.h5``. Missing folders are created.
        transitions: TensorDict of batch size ``[N]``, as ``torchrl_bcq.evaluation.recording.record`` returns it.
        env: environment for evaluation, or its Gymnasium id. The file stores the id, the arguments (as JSON) and the
            time limit in its attributes ``env_id``, ``env_kwargs`` and ``max_episode_steps``, and the entries of a Dict
            observation (as JSON) in ``observation_entries``.
        n_actions: number of discrete actions, which the file stores in its attribute ``n_actions``.
        overwrite: whether to replace an existing file.

    Raises:
        RunError: if the file exists and ``overwrite`` is not set, if ``path`` is a folder, or if ``path`` does not end
        in ``.hdf5`` or ``.h5``.
        OSError: if the file cannot be written.

    Source: D4RL, arXiv:2004.07219.
    """
    import h5py

    env = Environment.of(env)
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
    for name, entry in (("action_masks", transitions), ("next_action_masks", after)):
        if (mask := entry.get("action_mask", None)) is not None:
            fields[name] = mask
    with write_whole(home(path)) as aside, h5py.File(aside, "w") as file:
        for name, values in fields.items():
            file.create_dataset(name, data=values.cpu().numpy(), compression="gzip", shuffle=True)
        file.attrs["env_id"] = env.id
        if n_actions is not None:
            file.attrs["n_actions"] = n_actions
        if env.kwargs:
            file.attrs["env_kwargs"] = json.dumps(env.kwargs)
        if env.max_episode_steps is not None:
            file.attrs["max_episode_steps"] = env.max_episode_steps
        if env.observation is not None:
            file.attrs["observation_entries"] = json.dumps(list(env.observation))


def write_minari(
    dataset_id: str, transitions: TensorDictBase, env: str | Environment, *, algorithm: str, overwrite: bool = False
) -> None:
    """Write transitions into Minari's local store (``$MINARI_DATASETS_PATH``, by default ``~/.minari/datasets``).

    Args:
        dataset_id: id of the new dataset, such as ``"mine/hopper/noisy-v0"``.
        transitions, env, overwrite: as for ``write_hdf5``.
        algorithm: description of how the actions were chosen.

    Raises:
        RunError: if the dataset exists and ``overwrite`` is not set, if the id is invalid, or if Minari rejects the
            environment.
        OSError: if the dataset cannot be written.
    """
    import gymnasium
    import minari
    from minari.storage import get_dataset_path

    env = Environment.of(env)
    check_out(f"minari:{dataset_id}", overwrite, env)
    with _replacing(get_dataset_path(dataset_id)), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="minari")  # no warning that the author's e-mail address is missing
        try:
            made = gymnasium.make(env.id, **{"max_episode_steps": env.max_episode_steps, **env.kwargs})
            made.close()
            minari.create_dataset_from_buffers(
                dataset_id,
                buffer=_minari_episodes(transitions),
                env=made.spec,
                eval_env=made.spec,
                algorithm_name=algorithm,
                author="torchrl_bcq",
                code_permalink="torchrl_bcq/evaluation/recording.py",
                description=f"{len(transitions)} steps of {env}, recorded by torchrl-bcq.",
            )
        except ValueError as error:  # for example if the environment cannot be described in JSON
            raise RunError(f"Minari cannot store {dataset_id} ({error}); record into an HDF5 file.") from error


def check_out(out: str, overwrite: bool, env: Environment | None = None) -> None:
    """Raise a ``RunError`` if ``out`` is invalid, cannot hold steps of ``env``, or exists and is not overwritten."""
    if out.startswith("minari:"):
        if env is not None and env.observation is not None:
            raise RunError(f"{env} has joined observations, which Minari cannot store; record into an HDF5 file.")
        from minari.dataset.minari_dataset import parse_dataset_id
        from minari.storage import get_dataset_path

        dataset_id = out.removeprefix("minari:")
        try:
            parse_dataset_id(dataset_id)
        except (TypeError, ValueError) as error:  # a TypeError if the id has no version
            raise RunError(f"{dataset_id!r} is not a Minari id; use one such as 'mine/hopper/noisy-v0'.") from error
        path = get_dataset_path(dataset_id)
    else:
        path = home(out)
        if path.suffix not in (".hdf5", ".h5"):
            raise RunError(f"{out} is neither FILE.hdf5 nor minari:NAMESPACE/DATASET-v0; use one of these forms.")
        if path.is_dir():
            raise RunError(f"{out} is a folder; choose a file.")
    if path.exists() and not overwrite:
        how = remedy("overwrite=True", "--overwrite")
        raise RunError(f"{out} already exists; choose another name, or overwrite it with {how}.")


def _minari_episodes(transitions: TensorDictBase) -> list[EpisodeBuffer]:
    """Split ``transitions`` into Minari episodes; each has T actions and T + 1 observations."""
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
    """Rename the old folder. Delete it after the ``with`` block, or restore it if the block fails."""
    # write_whole cannot be used here, because Minari writes directly to the final path
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    if folder.exists():
        folder.rename(aside)
    try:
        yield
    except BaseException:  # a KeyboardInterrupt also restores the old folder
        shutil.rmtree(folder, ignore_errors=True)
        if aside.exists():
            aside.rename(folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)
