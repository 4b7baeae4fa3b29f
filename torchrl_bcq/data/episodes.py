"""Finds the episode of each transition, and checks the entries of transitions."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import Tensor

from torchrl_bcq.data.defects import Rows
from torchrl_bcq.errors import DatasetError, remedy

FLAGS = ("done", "terminated", "truncated")
CHUNK_VALUES = 2**22  # number of values that check_finite reads at a time
STEPS = "steps_to_next_obs"  # entry of n-step transitions: number of steps that a row spans
_JOIN = "To join datasets, use load_transitions([A, B]) for files or from_rollouts([a, b]), and not torch.cat"


def episode_numbers(transitions: TensorDictBase) -> Tensor:
    """Return the episode number of each row, ``[N]``. The first episode has number 0, the next one 1, etc.

    Args:
        transitions: TensorDict of batch size ``[N]``. Rows with the same number in ``episode [N]`` belong to one
            episode. Without this entry, an episode ends where ``("next", "done") [N, 1]`` is true.

    Raises:
        DatasetError: if ``episode`` and ``done`` are both missing, if the rows of an episode do not directly follow
            each other, or if an episode continues after a row that is ``done``.
    """
    rows = check_rows(transitions)
    episode = transitions.get("episode", None)
    if episode is None:
        done = flat_entry(transitions, ("next", "done"), "set transitions['episode'] to a number per row")
        if not ((done == 0) | (done == 1)).all():
            raise DatasetError("('next', 'done') has values other than 0 and 1; use 1 where an episode ends, else 0.")
        done = done.long()
        return done.cumsum(0) - done  # subtract done: a row with done=True belongs to the episode that it ends
    if not isinstance(episode, Tensor) or episode.is_complex() or (episode != episode).any():
        found = str(episode.dtype) if isinstance(episode, Tensor) else type(episode).__name__
        raise DatasetError(f"episode ({found}) has values that are no numbers; set one number for each row.")
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
            f"episode {episode[row].item()} appears again at row {row}, after rows of another episode. {_JOIN}, "
            "because both may have an episode of this number. If the rows of one dataset are in a wrong order, sort "
            "them by episode and then by time."
        )
    _check_ends(transitions, starts)
    return starts.cumsum(0) - 1


def first_rows(numbers: Tensor) -> Tensor:
    """Return the first row of each episode, from the ``episode_numbers``. ``[N] -> [E]``."""
    return numbers.diff(prepend=numbers.new_tensor([-1])).nonzero().squeeze(1)


def last_rows(numbers: Tensor) -> Tensor:
    """Return the last row of each episode, from the ``episode_numbers``. ``[N] -> [E]``."""
    return numbers.bincount().cumsum(0) - 1


def group_numbers(transitions: TensorDictBase) -> Tensor | None:
    """Return the group number of each row, ``[N]``, counted from 0. Without the entry ``group [N]``, return None.

    Raises:
        DatasetError: as in ``episode_numbers``; if ``group`` has another shape or holds no integers; or if the rows of
            an episode have several groups.
    """
    group = transitions.get("group", None)
    if group is None:
        return None
    rows = check_rows(transitions)
    if group.shape not in ((rows,), (rows, 1)) or group.is_floating_point() or group.is_complex():
        found = f"shape {tuple(group.shape)} and dtype {group.dtype}"
        raise DatasetError(f"group has {found}, expected ({rows},), one integer for each row.")
    group, numbers = group.reshape(rows), episode_numbers(transitions)
    mixed = Rows()
    mixed.add(((group[1:] != group[:-1]) & (numbers[1:] == numbers[:-1])).cpu(), 1)
    if mixed.count:
        raise DatasetError(f"group differs from the row before, in the same episode, in {mixed}; correct the groups.")
    return group.unique(return_inverse=True)[1]


def _check_ends(transitions: TensorDictBase, starts: Tensor) -> None:
    """Check that no episode continues after a row that is done, as it does where ``torch.cat`` joined two datasets."""
    done = transitions.get(("next", "done"), None)
    if done is None or done.shape != (len(starts), 1):
        return
    again = done.squeeze(1)[:-1].bool() & ~starts[1:]
    if STEPS in transitions.keys():  # a row of several steps has the flags of its last step, so it may precede the end
        again &= transitions[STEPS].reshape(len(starts))[:-1] == 1
    if again.any():
        row = int(again.int().argmax())
        number = transitions["episode"].reshape(-1)[row].item()
        raise DatasetError(
            f"row {row} ends episode {number} (done is true), but row {row + 1} has the same episode number. {_JOIN}. "
            "If these are rows of one dataset, correct the numbers, or delete the entry episode, so that done ends "
            "episodes."
        )


def episode_returns(transitions: TensorDictBase, gamma: float = 1.0) -> Tensor:
    """Return the sum of ``gamma^t`` times the reward of step ``t`` of each episode in float64, ``[E]``.

    Args:
        transitions: TensorDict as in ``episode_numbers``; it must also contain ``("next", "reward") [N, 1]``.
        gamma: discount factor.

    Raises:
        DatasetError: as in ``episode_numbers``, if a row spans several steps, or if the reward is missing or not
            ``[N, 1]``.
    """
    check_single_steps(transitions)
    numbers = episode_numbers(transitions)
    reward = flat_entry(transitions, ("next", "reward"), "add the rewards").double()
    if gamma != 1:
        step = torch.arange(len(numbers), device=numbers.device) - first_rows(numbers)[numbers]
        reward = reward * gamma ** step.double()
    return reward.new_zeros(int(numbers[-1]) + 1).index_add_(0, numbers, reward)


def check_single_steps(transitions: TensorDictBase) -> None:
    """Raise a DatasetError if a row spans several steps, as in the result of ``multi_step``."""
    if STEPS in transitions.keys() and (transitions[STEPS] != 1).any():
        how = remedy("pass transitions of single steps", "name a dataset of single steps")
        raise DatasetError(f"the transitions have {STEPS}, so a row spans several steps; {how}.")


def flat_entry(transitions: TensorDictBase, key: tuple[str, str], remedy: str) -> Tensor:
    """Return the entry ``key [N, 1]`` as ``[N]``. A missing entry or another shape raises DatasetError."""
    value, rows = transitions.get(key, None), len(transitions)
    if value is None:
        present = sorted(map(str, transitions.keys(True, True)))
        raise DatasetError(f"the transitions lack {key}; they hold {present}. Rename the entry, or {remedy}.")
    if value.shape != (rows, 1):
        raise DatasetError(f"{key} has shape {tuple(value.shape)}, expected ({rows}, 1).")
    return value.squeeze(1)


def check_rows(transitions: TensorDictBase) -> int:
    """Return the number of rows. Zero rows, or another batch size than ``[N]``, raise a ``ValueError``."""
    if len(transitions.batch_size) != 1 or not len(transitions):
        raise ValueError(
            f"transitions have batch size {tuple(transitions.batch_size)}, expected [N] with N at least 1; "
            "flatten rollouts with from_rollouts."
        )
    return len(transitions)


def check_outcomes(transitions: TensorDictBase) -> None:
    """Check that reward and flags under ``"next"`` have shape ``[N, 1]`` and that the flags are booleans."""
    rows = len(transitions)
    for name in ("reward", *FLAGS):
        value = transitions.get(("next", name), None)
        if value is not None and value.shape != (rows, 1):
            hint = f" Use {name}[:, None]." if value.shape == (rows,) else ""
            raise DatasetError(f"('next', {name!r}) has shape {tuple(value.shape)}, expected ({rows}, 1).{hint}")
        if value is not None and name in FLAGS and value.dtype != torch.bool:
            raise DatasetError(f"('next', {name!r}) has dtype {value.dtype}, expected torch.bool; use .bool().")


def check_finite(name: str, values: Tensor) -> None:
    """Raise a ``DatasetError`` if ``values`` contain NaN or infinity. Integer tensors are not checked."""
    rows, step = Rows(), max(CHUNK_VALUES * len(values) // max(values.numel(), 1), 1)
    for start in range(0, len(values), step) if values.is_floating_point() else ():
        finite = values[start : start + step].isfinite()
        if not finite.all():
            rows.add(~finite.reshape(len(finite), -1).all(1).cpu(), start)
    if rows.count:
        raise DatasetError(f"{name} has {rows} that are not finite; drop or repair them.")
