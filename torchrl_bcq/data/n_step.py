"""Transitions over several steps."""

from __future__ import annotations

from pathlib import Path

import torch
from tensordict import TensorDict, TensorDictBase, is_leaf_nontensor
from torch import Tensor

from torchrl_bcq.data.checks import DatasetError
from torchrl_bcq.data.episodes import episode_numbers, flat_entry
from torchrl_bcq.data.sources.conversion import load_memmap, write_memmap

_STEPS = "steps_to_next_obs"
_CHUNK = 2**16  # rows written at a time


def multi_step(
    transitions: TensorDictBase, num_steps: int, gamma: float, *, folder: str | Path | None = None
) -> TensorDict:
    """Make each row span ``h`` steps, ``num_steps`` or as many as its episode has left.

    ``("next", "reward")`` becomes ``sum_{k<h} gamma^k r_{i+k}``, summed in float64 (integers become floats). All other
    entries under ``"next"``, including the flags, become those of row ``i + h - 1``. ``steps_to_next_obs [N, 1]`` is
    ``h``: the loss bootstraps with ``gamma^h``, unless that row terminated. There is no off-policy correction.

    In memory, the result copies the entries under ``"next"`` and shares all others with ``transitions``.

    Args:
        transitions: batch size ``[N]``, rows of an episode in order; ``("next", "reward")`` and ``("next", "done")``
            ``[N, 1]``, and ``episode [N]`` where episodes end without a flag.
        num_steps: at least 1; 1 only adds ``steps_to_next_obs``.
        gamma: discount of the loss.
        folder: new folder for a memory-mapped result, written in parts, if it does not fit into memory.

    Raises:
        OSError: if the folder exists (FileExistsError) or cannot be written.
        ValueError: if ``num_steps`` or ``gamma`` is out of its range.
        DatasetError: if the reward or ``done`` is missing or has another shape or dtype, the rows of an episode are
            not together, the transitions span several steps already, or an entry is not a tensor.

    Source: Sutton, 1988. TorchRL's ``MultiStep`` keeps the flags of row ``i``, so rows before a terminated one
    bootstrap from beyond the end, and it joins episodes that end without ``done``.
    """
    if num_steps < 1 or not 0 <= gamma <= 1:
        raise ValueError(f"num_steps is {num_steps} and gamma {gamma}, expected at least 1, and between 0 and 1.")
    if _STEPS in transitions.keys():
        raise DatasetError(f"the transitions hold {_STEPS}, so they span several steps already; pass single steps.")
    folder = None if folder is None else Path(folder).expanduser()
    if folder is not None and folder.exists():
        raise FileExistsError(f"{folder} exists; name a new folder, or read this one with load_memmap.")
    _check_tensors(transitions, written=folder is not None)
    steps = _steps_left(transitions).clamp_max(num_steps)
    last = torch.arange(len(steps), device=steps.device) + steps - 1
    reward = _discounted_sum(flat_entry(transitions, ("next", "reward"), "add it"), steps, num_steps, gamma)
    now, following = transitions.exclude("next"), transitions.get("next").exclude("reward")

    def part(rows: slice) -> TensorDict:
        ends = last[rows]
        later = following.apply(lambda entry: entry[ends], batch_size=ends.shape).set("reward", reward[rows, None])
        return now[rows].copy().update({"next": later, _STEPS: steps[rows, None]})

    if folder is None:
        return part(slice(None))
    write_memmap((part(slice(i, i + _CHUNK)).cpu() for i in range(0, len(steps), _CHUNK)), len(steps), folder)
    return load_memmap(folder)


def _check_tensors(transitions: TensorDictBase, written: bool) -> None:
    """Refuse entries that are not tensors under "next", and anywhere if they are to be written."""
    tensors = set(transitions.keys(True, True))
    entries = transitions.keys(True, True, is_leaf=is_leaf_nontensor)
    if odd := [key for key in entries if key not in tensors and (written or key[0] == "next")]:
        raise DatasetError(f"{sorted(map(str, odd))} hold no tensors; exclude them, or write them as numbers.")


def _steps_left(transitions: TensorDictBase) -> Tensor:
    """Number of rows up to the end of the episode, including the row itself: ``[N]``."""
    numbers = episode_numbers(transitions)
    done = flat_entry(transitions, ("next", "done"), "add it")
    if done.dtype != torch.bool:
        raise DatasetError(f"('next', 'done') has dtype {done.dtype}, expected torch.bool; cast it with .bool().")
    ends = done.clone()
    ends[:-1] |= numbers[1:] != numbers[:-1]
    ends[-1] = True
    ends = ends.nonzero().squeeze(1)
    rows = torch.arange(len(numbers), device=numbers.device)
    return ends[torch.searchsorted(ends, rows)] - rows + 1


def _discounted_sum(reward: Tensor, steps: Tensor, num_steps: int, gamma: float) -> Tensor:
    total = torch.zeros_like(reward, dtype=torch.float64)
    for k in range(min(num_steps, len(reward))):
        later = reward[k:].where(steps[: len(reward) - k] > k, 0)
        total[: len(reward) - k].add_(later, alpha=gamma**k)
    return total.to(reward.dtype if reward.is_floating_point() else torch.get_default_dtype())
