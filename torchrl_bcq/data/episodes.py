"""Which episode each transition belongs to."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import Tensor

from torchrl_bcq.data.checks import DatasetError


def episode_numbers(transitions: TensorDictBase) -> Tensor:
    """Number the episodes ``0`` to ``E - 1`` in the order of their rows: ``[N]``.

    Args:
        transitions: batch size ``[N]``, rows of an episode one after another; ``episode [N]`` tells episodes apart,
            or, where there is none, ``("next", "done") [N, 1]``.

    Raises:
        DatasetError: if both entries are missing, or the rows of an episode are not together.
    """
    rows = check_rows(transitions)
    episode = transitions.get("episode", None)
    if episode is None:
        done = flat_entry(transitions, ("next", "done"), "set transitions['episode'], one number for each row")
        done = done.to(torch.int64)
        return done.cumsum(0) - done  # the row that ends an episode still belongs to it
    if episode.shape not in ((rows,), (rows, 1)):
        raise DatasetError(f"episode has shape {tuple(episode.shape)}, expected ({rows},), one number for each row.")
    episode = episode.reshape(rows)
    starts = torch.ones(rows, dtype=torch.bool, device=episode.device)
    starts[1:] = episode[1:] != episode[:-1]
    _check_together(episode, starts.nonzero().squeeze(1))
    return starts.cumsum(0) - 1


def episode_returns(transitions: TensorDictBase) -> Tensor:
    """Sum of the rewards of each episode, undiscounted, in float64: ``[E]``.

    Args:
        transitions: batch size ``[N]``, with ``("next", "reward") [N, 1]`` and what :func:`episode_numbers` reads.

    Raises:
        DatasetError: if the reward is missing or of another shape, or nothing tells episodes apart.
    """
    numbers = episode_numbers(transitions)
    reward = flat_entry(transitions, ("next", "reward"), "give rewards").double()
    return reward.new_zeros(int(numbers[-1]) + 1).index_add_(0, numbers, reward)


def flat_entry(transitions: TensorDictBase, key: tuple[str, str], remedy: str) -> Tensor:
    """An entry ``[N, 1]`` as ``[N]``.

    Raises:
        DatasetError: if it is missing or of another shape.
    """
    value, rows = transitions.get(key, None), len(transitions)
    if value is None:
        present = sorted(map(str, transitions.keys(True, True)))
        raise DatasetError(f"the transitions lack {key}; they hold {present}. Rename the entry, or {remedy}.")
    if value.shape != (rows, 1):
        raise DatasetError(f"{key} has shape {tuple(value.shape)}, expected ({rows}, 1).")
    return value.squeeze(1)


def check_rows(transitions: TensorDictBase) -> int:
    """Count the rows of flat transitions.

    Raises:
        ValueError: if the batch size is not ``[N]`` with N at least 1.
    """
    if len(transitions.batch_size) != 1 or not len(transitions):
        raise ValueError(
            f"transitions have batch size {tuple(transitions.batch_size)}, expected [N] with N at least 1."
        )
    return len(transitions)


def _check_together(episode: Tensor, starts: Tensor) -> None:
    numbers = episode[starts]
    _, first = torch.unique(numbers, return_inverse=True)
    if len(first) == int(first.max()) + 1:
        return
    seen: set[int] = set()
    for number, row in zip(numbers.tolist(), starts.tolist(), strict=True):
        if number in seen:
            raise DatasetError(
                f"episode {number} comes back at row {row}, after rows of another; sort the rows by episode, then time."
            )
        seen.add(number)
