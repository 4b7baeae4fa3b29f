"""Files of other projects, read into transitions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tensordict import TensorDict
from torchrl.data import Bounded, TensorSpec

from torchrl_bcq.data.transitions import from_arrays

_HDF5_FIELDS = ("observations", "actions", "rewards", "terminals")


def load_hdf5(path: str | Path, *, action_spec: TensorSpec | None = None) -> TensorDict:
    """Read an HDF5 file in D4RL's layout.

    Args:
        path: file with ``observations [N, D]``, ``actions [N, A]``, ``rewards [N]``, ``terminals [N]``,
            and at least one of ``timeouts [N]`` and ``next_observations [N, D]``.
        action_spec: bounds that the actions must keep, if given.

    Returns:
        The transitions of :func:`from_arrays`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no HDF5 file, lacks a field, or does not pass :func:`from_arrays`.

    Source: D4RL, arXiv:2004.07219.
    """
    import h5py

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    if not h5py.is_hdf5(path):
        raise ValueError(f"{path} is not an HDF5 file.")
    try:
        with h5py.File(path, "r") as file:
            found = sorted(file)
            arrays = {name: file[name][()] for name in (*_HDF5_FIELDS, "timeouts", "next_observations") if name in file}
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error}); copy it again.") from error
    missing = [name for name in _HDF5_FIELDS if name not in arrays]
    if missing:
        raise ValueError(f"{path} lacks {missing}; it holds {found}. D4RL's layout needs {list(_HDF5_FIELDS)}.")
    if "timeouts" not in arrays and "next_observations" not in arrays:
        raise ValueError(
            f"{path} has neither timeouts nor next_observations, so nothing says where an episode was cut off and the "
            "next one began. Add a timeouts field, or use from_arrays if no episode was cut."
        )
    return from_arrays(
        observations=arrays["observations"],
        actions=arrays["actions"],
        rewards=arrays["rewards"],
        terminated=arrays["terminals"],
        truncated=arrays.get("timeouts"),
        next_observations=arrays.get("next_observations"),
        action_spec=action_spec,
    )


def load_minari(dataset_id: str) -> TensorDict:
    """Read a Minari dataset, from the local store or else from its server, and check actions against its space.

    Args:
        dataset_id: such as ``"mujoco/hopper/medium-v0"``; observations and actions must be boxes.

    Returns:
        The transitions of :func:`from_arrays`.

    Raises:
        ValueError: if there is no such dataset, a space is not a box, or the data does not pass :func:`from_arrays`.

    Source: Minari, https://minari.farama.org. TorchRL 0.14's own ``MinariExperienceReplay`` returns zeros.
    """
    import minari
    from gymnasium.spaces import Box

    try:
        dataset = minari.load_dataset(dataset_id, download=True)
    except Exception as error:  # Minari and its download clients raise many kinds
        raise ValueError(
            f"Minari dataset {dataset_id!r} can be neither opened nor downloaded: {error} "
            "Ids look like 'mujoco/hopper/medium-v0'; `minari list local` and `minari list remote` show them."
        ) from error
    for name, space in (("observation", dataset.observation_space), ("action", dataset.action_space)):
        if not isinstance(space, Box):
            raise ValueError(
                f"{dataset_id} has {name} space {space}; only boxes can be read. Flatten it and use from_arrays."
            )
    episodes = list(dataset.iterate_episodes())
    if not episodes:
        raise ValueError(f"{dataset_id} holds no episode.")
    actions = dataset.action_space
    return from_arrays(
        observations=np.concatenate([episode.observations[:-1] for episode in episodes]),
        actions=np.concatenate([episode.actions for episode in episodes]),
        rewards=np.concatenate([episode.rewards for episode in episodes]),
        terminated=np.concatenate([episode.terminations for episode in episodes]),
        truncated=np.concatenate([_ends(episode.terminations, episode.truncations) for episode in episodes]),
        next_observations=np.concatenate([episode.observations[1:] for episode in episodes]),
        action_spec=Bounded(torch.tensor(actions.low), torch.tensor(actions.high), actions.shape, dtype=torch.float32),
    )


def _ends(terminations: np.ndarray, truncations: np.ndarray) -> np.ndarray:
    """Truncations of an episode; one whose record breaks off without a flag is truncated at its last row."""
    truncations = truncations.copy()
    truncations[-1] |= not terminations[-1]
    return truncations
