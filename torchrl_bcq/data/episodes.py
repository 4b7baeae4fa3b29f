"""The episode of each transition."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import Tensor

from torchrl_bcq.data.checks import DatasetError

FLAGS = ("done", "terminated", "truncated")


def episode_numbers(transitions: TensorDictBase) -> Tensor:
    """Number the episodes ``0`` to ``E - 1`` in the order of their rows: ``[N]``.

    Args:
        transitions: batch size ``[N]``, with ``episode [N]`` or else ``("next", "done") [N, 1]``.

    Raises:
        DatasetError: if both entries are missing, or the rows of an episode are not together.
    """
    rows = check_rows(transitions)
    episode = transitions.get("episode", None)
    if episode is None:
        done = flat_entry(transitions, ("next", "done"), "set transitions['episode'], one number for each row").long()
        return done.cumsum(0) - done  # the last row of an episode belongs to it
    if episode.shape not in ((rows,), (rows, 1)):
        raise DatasetError(f"episode has shape {tuple(episode.shape)}, expected ({rows},), one number for each row.")
    episode = episode.reshape(rows)
    starts = torch.ones(rows, dtype=torch.bool, device=episode.device)
    starts[1:] = episode[1:] != episode[:-1]
    first = starts.nonzero().squeeze(1)
    numbers, order = episode[first].sort(stable=True)
    repeated = first[order[1:][numbers[1:] == numbers[:-1]]]
    if len(repeated):
        row = int(repeated.min())
        raise DatasetError(
            f"episode {episode[row].item()} appears again at row {row}, after rows of another; sort the rows by "
            "episode, then time."
        )
    return starts.cumsum(0) - 1


def episode_returns(transitions: TensorDictBase) -> Tensor:
    """Sum of the rewards of each episode, undiscounted, in float64: ``[E]``.

    Args:
        transitions: as for :func:`episode_numbers`, with ``("next", "reward") [N, 1]``.

    Raises:
        DatasetError: if the reward is missing or of another shape, or nothing tells episodes apart.
    """
    numbers = episode_numbers(transitions)
    reward = flat_entry(transitions, ("next", "reward"), "give rewards").double()
    return reward.new_zeros(int(numbers[-1]) + 1).index_add_(0, numbers, reward)


def flat_entry(transitions: TensorDictBase, key: tuple[str, str], remedy: str) -> Tensor:
    """An entry ``[N, 1]`` as ``[N]``; a missing one and other shapes are refused."""
    value, rows = transitions.get(key, None), len(transitions)
    if value is None:
        present = sorted(map(str, transitions.keys(True, True)))
        raise DatasetError(f"the transitions lack {key}; they hold {present}. Rename the entry, or {remedy}.")
    if value.shape != (rows, 1):
        raise DatasetError(f"{key} has shape {tuple(value.shape)}, expected ({rows}, 1).")
    return value.squeeze(1)


def check_rows(transitions: TensorDictBase) -> int:
    """Number of rows of flat transitions; other batch sizes than ``[N]`` and no rows are refused by a ValueError."""
    if len(transitions.batch_size) != 1 or not len(transitions):
        raise ValueError(
            f"transitions have batch size {tuple(transitions.batch_size)}, expected [N] with N at least 1."
        )
    return len(transitions)


def check_outcomes(transitions: TensorDictBase) -> None:
    """Refuse a reward under ``"next"`` that is not ``[N, 1]``, and flags that are not boolean ``[N, 1]``."""
    rows = len(transitions)
    for name in ("reward", *FLAGS):
        value = transitions.get(("next", name), None)
        if value is not None and value.shape != (rows, 1):
            hint = f" Use {name}[:, None]." if value.shape == (rows,) else ""
            raise DatasetError(f"('next', {name!r}) has shape {tuple(value.shape)}, expected ({rows}, 1).{hint}")
        if value is not None and name in FLAGS and value.dtype != torch.bool:
            raise DatasetError(f"('next', {name!r}) has dtype {value.dtype}, expected torch.bool; cast it.")
