"""Makes n-step transitions."""

from __future__ import annotations

from pathlib import Path

import torch
from tensordict import TensorDict, TensorDictBase, is_leaf_nontensor, is_tensor_collection
from torch import Tensor

from torchrl_bcq.data.episodes import STEPS, check_single_steps, episode_numbers, flat_entry, last_rows
from torchrl_bcq.data.sources.conversion import load_memmap, write_memmap
from torchrl_bcq.errors import DatasetError
from torchrl_bcq.files import home

_CHUNK = 2**16  # number of rows written at a time


def multi_step(
    transitions: TensorDictBase, num_steps: int, gamma: float, *, folder: str | Path | None = None
) -> TensorDict:
    """Turn single-step transitions into n-step transitions.

    In the result, row ``i`` spans ``h`` steps. ``h`` is ``num_steps``, or less if the episode ends earlier. ``("next",
    "reward")`` becomes ``sum_{k<h} gamma^k r_{i+k}``, summed in float64; integer rewards become floats. All other
    entries under ``"next"``, including the flags, are taken from row ``i + h - 1``. The new entry ``steps_to_next_obs
    [N, 1]`` holds ``h``. The loss multiplies the next value by ``gamma^h``, or by 0 if row ``i + h - 1`` is terminated.
    There is no off-policy correction. Without ``folder``, the entries outside ``"next"`` are not copied: the result and
    ``transitions`` use the same memory.

    Args:
        transitions: TensorDict of batch size ``[N]`` with the rows of each episode in order of time. Required entries
            are ``("next", "reward")`` and ``("next", "done")``, each ``[N, 1]``; ``episode [N]`` is also required if an
            episode ends without ``done``.
        num_steps: number of steps, at least 1. With 1, the function only adds ``steps_to_next_obs``.
        gamma: discount factor of the loss, between 0 and 1.
        folder: new folder. The result is written there in parts and is memory-mapped. Pass a folder if the result does
            not fit into memory.

    Raises:
        OSError: if the folder exists (``FileExistsError``) or cannot be written.
        ValueError: if ``num_steps`` or ``gamma`` is out of range.
        DatasetError: if the reward or ``done`` is missing or has a wrong shape or dtype, if the rows of an episode do
            not directly follow each other or continue after ``done``, if a row already spans several steps, or
            if an entry is not a tensor.

    Source: Sutton, 1988. TorchRL's ``MultiStep`` differs: it keeps the flags of row ``i``. If only a later one of the
    ``h`` rows is terminated, the loss then bootstraps from a state after the end of the episode. ``MultiStep`` also
    joins episodes that end without ``done``.
    """
    if num_steps < 1 or not 0 <= gamma <= 1:
        raise ValueError(f"num_steps is {num_steps}, expected at least 1; gamma is {gamma}, expected between 0 and 1.")
    folder = check_output(transitions, folder)
    check_single_steps(transitions)
    steps = _steps_left(transitions).clamp_max(num_steps)
    last = torch.arange(len(steps), device=steps.device) + steps - 1
    reward = _discounted_sum(flat_entry(transitions, ("next", "reward"), "add it"), steps, gamma)
    now, following = transitions.exclude("next"), transitions.get("next").exclude("reward")

    def part(rows: slice) -> TensorDict:
        ends = last[rows]
        later = following.apply(lambda entry: entry[ends], batch_size=ends.shape).set("reward", reward[rows, None])
        return now[rows].copy().update({"next": later, STEPS: steps[rows, None]})

    if folder is None:
        return part(slice(None))
    write_memmap((part(slice(i, i + _CHUNK)) for i in range(0, len(steps), _CHUNK)), len(steps), folder)
    return load_memmap(folder)


def check_output(transitions: TensorDictBase, folder: str | Path | None) -> Path | None:
    """Return the path of the new folder, if one is given, and check that it does not exist.

    Also check that the entries under "next" are tensors, and all other entries if they will be written to a folder.
    """
    folder = None if folder is None else home(folder)
    if folder is not None and folder.exists():
        raise FileExistsError(f"{folder} already exists; choose a new folder, or load this folder with load_memmap.")
    if not is_tensor_collection(transitions):
        raise DatasetError(f"the transitions are {transitions!r:.60}, expected a TensorDict, as from_arrays returns.")
    if not is_tensor_collection(after := transitions.get("next", transitions)):
        raise DatasetError(f"the entry next is a {type(after).__name__}, expected a TensorDict of what follows a step.")
    tensors = set(transitions.keys(True, True))
    entries = transitions.keys(True, True, is_leaf=is_leaf_nontensor)
    if odd := [key for key in entries if key not in tensors and (folder is not None or key[0] == "next")]:
        raise DatasetError(f"{sorted(map(str, odd))} hold no tensors; exclude them, or convert them to tensors.")
    return folder


def _steps_left(transitions: TensorDictBase) -> Tensor:
    """Return for each row how many rows of its episode are left, including this row, as a tensor ``[N]``."""
    numbers = episode_numbers(transitions)
    done = flat_entry(transitions, ("next", "done"), "add it")
    if done.dtype != torch.bool:
        raise DatasetError(f"('next', 'done') has dtype {done.dtype}, expected torch.bool; cast it with .bool().")
    return last_rows(numbers)[numbers] - torch.arange(len(numbers), device=numbers.device) + 1


def _discounted_sum(reward: Tensor, steps: Tensor, gamma: float) -> Tensor:
    total = torch.zeros_like(reward, dtype=torch.float64)
    for k in range(int(steps.max())):
        later = reward[k:].where(steps[: len(reward) - k] > k, 0)
        total[: len(reward) - k].add_(later, alpha=gamma**k)
    return total.to(reward.dtype if reward.is_floating_point() else torch.get_default_dtype())
