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
_CHUNK = 2**16  # rows written together


def multi_step(
    transitions: TensorDictBase, num_steps: int, gamma: float, *, folder: str | Path | None = None
) -> TensorDict:
    """Make each row span ``h`` steps, ``num_steps`` or as many as its episode has left.

    ``("next", "reward")`` becomes ``sum_{k<h} gamma^k r_{i+k}``, added in float64 (integers become floats); everything
    else under ``"next"``, flags included, becomes that of row ``i + h - 1``; ``steps_to_next_obs [N, 1]`` is ``h``, by
    which the loss bootstraps with ``gamma^h``, unless that row terminated. Nothing reaches over the end of an episode,
    flagged or not. The rewards follow the dataset's actions for ``h`` steps, uncorrected.

    In memory the result holds a copy of what is under ``"next"``, and shares all else with ``transitions``, memory maps
    included; while it is made, it takes about 50 bytes a row more.

    Args:
        transitions: batch size ``[N]``, rows of an episode in order; ``("next", "reward")`` and ``("next", "done")``
            ``[N, 1]``, and ``episode [N]`` where episodes end without a flag.
        num_steps: at least 1, which changes nothing but adds ``steps_to_next_obs``.
        gamma: that of the loss.
        folder: where to write the result, some rows at a time, and map it from, if it does not fit into memory; it must
            not exist yet, those above it are made.

    Raises:
        FileExistsError: if the folder exists.
        OSError: if it cannot be written.
        ValueError: if ``num_steps`` or ``gamma`` is out of its range.
        DatasetError: if the reward or the flags are missing, ``done`` is not boolean, the rows of an episode are not
            together, the transitions span several steps already, or, under ``"next"`` or with ``folder``, an entry is
            no tensor.

    Source: Sutton, 1988. TorchRL's ``MultiStep`` leaves the flags of row ``i`` where they are, so the rows before a
    terminated one bootstrap from beyond it; joins episodes that end without ``done``; and needs memory for the number
    of episodes times N.
    """
    if num_steps < 1 or not 0 <= gamma <= 1:
        raise ValueError(f"num_steps is {num_steps} and gamma {gamma}, expected at least 1, and between 0 and 1.")
    if _STEPS in transitions.keys():
        raise DatasetError(f"the transitions hold {_STEPS}, so they span several steps already; start from the others.")
    folder = None if folder is None else Path(folder).expanduser()
    if folder is not None and folder.exists():
        raise FileExistsError(f"{folder} exists; name a new folder, or load_memmap it if it is what you are after.")
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
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{folder.parent} cannot be a folder ({error}); name another.") from error
    write_memmap((part(slice(i, i + _CHUNK)).cpu() for i in range(0, len(steps), _CHUNK)), len(steps), folder)
    return load_memmap(folder)


def _check_tensors(transitions: TensorDictBase, written: bool) -> None:
    """Refuse what cannot be moved between rows, or be written."""
    tensors = set(transitions.keys(True, True))
    entries = transitions.keys(True, True, is_leaf=is_leaf_nontensor)
    odd = [key for key in entries if key not in tensors and (written or key[0] == "next")]
    if odd:
        raise DatasetError(f"{sorted(map(str, odd))} hold no tensors; exclude them, or write them as numbers.")


def _steps_left(transitions: TensorDictBase) -> Tensor:
    """Rows up to the end of the episode, the row itself included: ``[N]``."""
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
