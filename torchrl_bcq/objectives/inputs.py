"""Checks of what a loss is given: nothing is missing, broadcast, cast or skipped silently."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey


def check_choice(name: str, value: Any, choices: Collection[Any]) -> None:
    """Raise a ValueError if a setting is none of the choices."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, expected one of {[*choices]}.")


def select_inputs(
    tensordict: TensorDictBase,
    keys: Sequence[NestedKey],
    *,
    action_key: NestedKey,
    dtype: torch.dtype,
    reward_key: NestedKey | None = None,
    flag_keys: Collection[NestedKey] = (),
) -> TensorDictBase:
    """Select the entries that a loss reads, with the batch size ``*B`` of the action ``[*B, A]``.

    Args:
        tensordict: any batch size that is a prefix of ``*B``.
        keys: entries to select, the action among them.
        action_key: decides ``*B``.
        dtype: of all entries that are real numbers.
        reward_key: must be ``[*B, 1]``.
        flag_keys: must be boolean and ``[*B, 1]``.

    Raises:
        ValueError: if an entry is missing, or its shape or dtype does not fit.
    """
    missing = [key for key in keys if tensordict.get(key, None) is None]
    if missing:
        present = sorted(map(str, tensordict.keys(True, True)))
        raise ValueError(f"the batch lacks {missing}; it holds {present}. Rename entries with loss.set_keys(...).")
    action = tensordict.get(action_key)
    batch = action.shape[:-1]
    for key in keys:
        value, is_flag = tensordict.get(key), key in flag_keys
        wanted = torch.bool if is_flag else dtype
        if value.dtype != wanted and (is_flag or key == reward_key or value.dtype.is_floating_point):
            hint = "" if is_flag else " or the loss"
            raise ValueError(f"{key} has dtype {value.dtype}, expected {wanted}; cast the entry{hint}.")
        column = is_flag or key == reward_key
        if value.shape[: len(batch)] != batch or (column and value.shape != (*batch, 1)):
            raise ValueError(
                f"{key} has shape {tuple(value.shape)}, which does not fit the action's {tuple(action.shape)}: "
                "expected [*B, 1] for reward, done and terminated, and [*B, ...] for all else."
            )
    names = [*tensordict.names, *[None] * (len(batch) - tensordict.ndim)]
    selected = TensorDict(batch_size=batch, names=names, device=tensordict.device)
    for key in keys:  # tensordict's own select does not compile where these are nested
        selected.set(key, tensordict.get(key))
    return selected


def check_time_dimension(batch: TensorDictBase) -> None:
    """Raise a ValueError for a flat batch, whose rows multi-step estimators would take for one trajectory."""
    if batch.ndim < 2 and "time" not in (batch.names or ()):
        raise ValueError(
            f"the batch has size {tuple(batch.shape)}, but TD(1) and TD(lambda) need a time dimension: pass whole "
            "slices of trajectories as [B, T], or name the dimension 'time'; for single transitions use TD0."
        )


def check_state_dict(own: Mapping[str, Any], given: Mapping[str, Any], *, strict: bool) -> None:
    """Raise a RuntimeError if a state_dict has other sizes than a loss's own, or, if ``strict``, other entries."""
    lacking, unknown = own.keys() - given.keys(), given.keys() - own.keys()
    if strict and (lacking or unknown):
        raise RuntimeError(
            f"the state_dict lacks {len(lacking)} entries of this loss{_such_as(lacking)} and has {len(unknown)} "
            f"others{_such_as(unknown)}; build the networks with the same layers, and with normalization (such as "
            "Normalization.identity) if they had it."
        )
    shared = {name for name, value in own.items() if isinstance(value, torch.Tensor) and name in given}
    if resized := {name for name in shared if own[name].shape != given[name].shape}:
        name = min(resized)
        raise RuntimeError(
            f"the state_dict has {len(resized)} entries of other sizes than this loss (such as {name}, "
            f"{[*given[name].shape]} there and {[*own[name].shape]} here); build the networks with the same hidden "
            "sizes, for the same observations and actions."
        )


def _such_as(names: Collection[str]) -> str:
    return f" (such as {min(names)})" if names else ""
