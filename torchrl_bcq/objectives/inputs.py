"""Checks of a loss's inputs. A wrong input raises an error: a loss never broadcasts or casts an input."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey, expand_as_right

from torchrl_bcq.protocols import has_batch_norm


def check_choice(name: str, value: Any, choices: Collection[Any]) -> None:
    """Raise a ValueError if the value of a setting is not one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, expected one of {[*choices]}.")


def check_gamma(gamma: float, name: str = "gamma") -> None:
    """Raise a ValueError if a discount or a decay is out of range."""
    if not 0 <= gamma <= 1:
        raise ValueError(f"{name} is {gamma}, expected a number from 0 to 1.")


def select_inputs(
    tensordict: TensorDictBase,
    keys: Sequence[NestedKey],
    *,
    networks: Iterable[Any],
    action_key: NestedKey,
    dtype: torch.dtype,
    batch_of: Callable[[torch.Tensor, int], torch.Size],
    reward_key: NestedKey | None = None,
    flag_keys: Collection[NestedKey] = (),
) -> TensorDictBase:
    """Check and select the entries that a loss reads. The action's shape defines the batch size ``*B``.

    Args:
        tensordict: the batch; its batch size is ``*B`` or the first dimensions of ``*B``.
        keys: entries to select, including the action.
        networks: networks that read the batch; an absent network is None.
        action_key: entry of the action, whose shape defines ``*B``.
        dtype: required dtype of the reward and of all floating-point entries.
        batch_of: function that returns ``*B``, from the action and the number of batch dimensions of ``tensordict``.
        reward_key: entry of the reward, which must have the shape ``[*B, 1]``.
        flag_keys: entries that must be boolean and have the shape ``[*B, 1]``.

    Raises:
        ValueError: if an entry is missing or has a wrong shape or dtype, or BatchNorm would read several dimensions.
    """
    entries = {key: tensordict.get(key, None) for key in keys}
    if missing := [key for key, value in entries.items() if value is None]:
        present = sorted(map(str, tensordict.keys(True, True)))
        raise ValueError(
            f"the batch lacks {missing}; it holds {present}. If your entries have different names, pass the names of "
            "rewards and flags to loss.set_keys(...), and the names of observations and actions to the networks."
        )
    action = entries[action_key]
    batch = batch_of(action, tensordict.ndim)
    if len(batch) < tensordict.ndim:
        shapes = f"{action_key} has shape {tuple(action.shape)}, and the batch has size {tuple(tensordict.batch_size)}"
        raise ValueError(f"{shapes}; an action of one number needs a last dimension of 1.")
    for key, value in entries.items():
        is_flag = key in flag_keys
        wanted = torch.bool if is_flag else dtype
        if value.dtype != wanted and (is_flag or key == reward_key or value.dtype.is_floating_point):
            hint = "" if is_flag else " or the loss"
            raise ValueError(f"{key} has dtype {value.dtype}, expected {wanted}; cast the entry{hint}.")
        column = is_flag or key == reward_key
        if value.shape[: len(batch)] != batch or (column and value.shape != (*batch, 1)):
            raise ValueError(
                f"{key} has shape {tuple(value.shape)}, but the action has shape {tuple(action.shape)}, so the batch "
                f"size *B is {tuple(batch)}; expected [*B, 1] for reward, done and terminated, and [*B, ...] for all "
                "other entries."
            )
    names = [*tensordict.names, *[None] * (len(batch) - tensordict.ndim)][: len(batch)]
    if 2 <= tensordict.ndim < len(batch) and "time" not in names:  # TorchRL's estimators would take the last dimension
        names[tensordict.ndim - 1] = "time"
    selected = TensorDict(batch_size=batch, names=names, device=tensordict.device)
    for key, value in entries.items():  # torch.compile does not support tensordict's select() with nested keys
        selected.set(key, value)
    _check_batch_norm(selected, networks)
    return selected


def _check_batch_norm(batch: TensorDictBase, networks: Iterable[Any]) -> None:
    """Raise a ValueError if BatchNorm of a network would take a time dimension for channels."""
    if batch.ndim != 1 and any(has_batch_norm(net) for net in networks if not getattr(net, "flattens_rows", False)):
        raise ValueError(
            f"the batch has size {tuple(batch.shape)}, but a network has BatchNorm, which needs a flat batch [B]; "
            "reshape the batch, or use LayerNorm."
        )


def row_weights(weights: torch.Tensor, loss: torch.Tensor, key: NestedKey) -> torch.Tensor:
    """Expand the weights of rows to the shape of their losses; several losses of a row, as of agents, share its weight.

    Raises:
        ValueError: if the shape of ``weights`` is not that of the first dimensions of ``loss``.
    """
    if weights.shape != loss.shape[: weights.ndim]:
        found = f"{key} has shape {tuple(weights.shape)}"
        raise ValueError(f"{found}, expected {tuple(loss.shape)}: one weight for each row.")
    return expand_as_right(weights, loss)


def check_time_dimension(batch: TensorDictBase, steps: NestedKey) -> None:
    """Raise a ValueError if a batch has no time dimension, which multi-step value estimators need, or n-step rows."""
    if steps in batch.keys(True):
        raise ValueError(
            f"the batch has {steps!r}, so its rewards are already sums over several steps, which TD(1) and TD(lambda) "
            "would count more than once; use TD0, or single transitions."
        )
    if batch.ndim < 2 and "time" not in (batch.names or ()):
        raise ValueError(
            f"the batch has size {tuple(batch.shape)}, but TD(1) and TD(lambda) need a time dimension; pass "
            "slices of trajectories as [B, T], or name the time dimension 'time'. Use TD0 for single transitions."
        )


def correct_batch_size(
    tensordict: TensorDictBase, action_key: NestedKey, batch_of: Callable[[torch.Tensor, int], torch.Size]
) -> TensorDictBase:
    """Return a copy with the batch size of the action, if TorchRL's ``dispatch`` has found a larger batch size.

    ``dispatch`` takes all first dimensions that tensors have in common, which includes equal numbers of features.
    """
    action = tensordict.get(action_key, None)
    if action is None or len(batch := batch_of(action, tensordict.ndim)) >= tensordict.ndim:
        return tensordict
    corrected = tensordict.copy()
    corrected.batch_size = batch
    return corrected


def check_state_dict(own: Mapping[str, Any], given: Mapping[str, Any], prefix: str = "", *, strict: bool) -> None:
    """Raise a RuntimeError if ``own`` and ``given`` differ in shapes or, if ``strict`` is True, in names.

    ``prefix`` begins the names in ``given``, whose other entries are ignored.
    """
    given = {name.removeprefix(prefix): value for name, value in given.items() if name.startswith(prefix)}
    lacking, unknown = own.keys() - given.keys(), given.keys() - own.keys()
    if strict and (lacking or unknown):
        raise RuntimeError(
            f"the state_dict lacks {len(lacking)} entries of this loss{_such_as(lacking)} and has {len(unknown)} "
            f"other entries{_such_as(unknown)}; build the networks with the same layers as the saved ones, and with "
            "normalization (such as Normalization.identity) if the saved networks had normalization."
        )
    shared = {name for name, value in own.items() if isinstance(value, torch.Tensor) and name in given}
    if resized := {name for name in shared if own[name].shape != given[name].shape}:
        name = min(resized)
        raise RuntimeError(
            f"the state_dict has {len(resized)} entries whose shape differs from this loss (such as {name}: "
            f"{[*given[name].shape]} in the state_dict, {[*own[name].shape]} in the loss); build the networks with the "
            "same hidden sizes and for the same observations and actions as the saved networks."
        )


def _such_as(names: Collection[str]) -> str:
    return f" (such as {min(names)})" if names else ""
