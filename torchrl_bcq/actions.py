"""Discrete actions as TorchRL stores them: as an index or as a one-hot vector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchrl.data import Binary, Categorical, Composite, MultiCategorical, MultiOneHot, OneHot, TensorSpec


def is_discrete(spec: Any) -> bool:
    """Return whether a spec is that of one discrete action."""
    return isinstance(spec, (Categorical, OneHot)) and not isinstance(spec, (Binary, MultiCategorical, MultiOneHot))


def number_of(spec: TensorSpec) -> int | None:
    """Return the number of discrete actions of a spec, or None if the spec is not discrete."""
    return DiscreteActions.of(spec).number if is_discrete(spec) else None


@dataclass(frozen=True)
class DiscreteActions:
    """How a batch stores discrete actions. ``K`` is the number of actions.

    Args:
        one_hot: whether an action is a one-hot vector ``[K]``; otherwise an action is an index.
        number: ``K``, or None if only the kind of the actions is known.
        shape: shape of one action: ``()`` or ``(1,)`` for an index, ``(K,)`` for a one-hot vector.
        dtype: dtype of an action.
    """

    one_hot: bool
    number: int | None = None
    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.int64

    @classmethod
    def of(cls, action_space: str | TensorSpec | None) -> DiscreteActions:
        """Read the kind of the actions from ``"categorical"``, ``"one-hot"``, or the spec of one action.

        Raises:
            ValueError: if ``action_space`` is neither of them, or is the spec of several actions.
        """
        if isinstance(action_space, str) and action_space in ("categorical", "one-hot", "one_hot"):
            return cls(one_hot=action_space != "categorical")
        if isinstance(action_space, Composite):
            raise ValueError(
                f"action_space is a Composite; pass one of its leaves {list(action_space.keys(True, True))}, as in "
                "env.full_action_spec[key]."
            )
        spec: Any = action_space
        is_one_hot = isinstance(spec, OneHot)
        if not is_discrete(spec):
            found = repr(spec) if spec is None or isinstance(spec, str) else f"a {type(spec).__name__}"
            raise ValueError(
                f"action_space is {found}, expected one discrete action for each step; pass "
                "action_space=env.action_spec, 'categorical' (indices) or 'one-hot'."
            )
        number, shape = int(spec.space.n), tuple(spec.shape)
        if shape not in ([(number,)] if is_one_hot else [(), (1,)]):
            raise ValueError(
                f"action_space has shape {shape}, expected the spec of one action; for a vectorised environment, pass "
                "env.action_spec_unbatched."
            )
        return cls(is_one_hot, number, shape, spec.dtype)

    def batch_size(self, action: Tensor, ndim: int) -> torch.Size:
        """Return the batch dimensions ``*B`` of actions ``[*B]``, ``[*B, 1]`` or ``[*B, K]``.

        Args:
            action: indices or one-hot vectors.
            ndim: number of batch dimensions of the tensordict that holds the actions; ``*B`` has at least as many.

        Raises:
            ValueError: if the actions are no one-hot vectors of the right size, but should be.
        """
        if self.one_hot and self.number and action.shape[-1:] != (self.number,):
            raise ValueError(
                f"the action has shape {tuple(action.shape)}, but the networks use one-hot vectors of {self.number} "
                "actions; pass action_spec=env.action_spec to the function that reads the data, such as load_hdf5."
            )
        has_features = self.one_hot or bool(self.shape) or (action.ndim > ndim and action.shape[-1] == 1)
        return action.shape[:-1] if has_features else action.shape

    def to_index(self, action: Tensor, batch: torch.Size, number: int) -> Tensor:
        """Convert actions to indices. ``[*B]``, ``[*B, 1]`` or ``[*B, K] -> [*B, 1]``.

        Raises:
            ValueError: if the actions do not fit ``number``, the number of actions ``K``. The values of the actions are
                checked only on the CPU, because the check would make a GPU wait.
        """
        if self.one_hot:
            if action.shape != (*batch, number):
                raise ValueError(
                    f"the action has shape {tuple(action.shape)}, expected one-hot vectors {(*batch, number)}: the "
                    f"networks have {number} actions."
                )
            if can_check(action) and not bool(((action != 0).sum(-1) == 1).all()):
                row = ((action != 0).sum(-1) != 1).nonzero()[0].tolist()
                raise ValueError(f"the action at {row} is no one-hot vector; it must have exactly one 1.")
            return (action != 0).to(torch.int64).argmax(-1, keepdim=True)
        if action.dtype.is_floating_point or action.dtype == torch.bool:
            raise ValueError(
                f"the action has dtype {action.dtype}, expected indices, which are whole numbers; cast the actions, or "
                "use action_space='one-hot'."
            )
        if can_check(action) and action.numel():
            low, high = (int(end) for end in action.aminmax())
            if low < 0 or high >= number:
                raise ValueError(
                    f"the actions are {low} to {high}, expected 0 to {number - 1}: the networks have {number} actions."
                )
        if action.shape not in (batch, (*batch, 1)):
            raise ValueError(
                f"the action has shape {tuple(action.shape)}, expected indices {tuple(batch)} or {(*batch, 1)}; for "
                "one-hot vectors, use action_space='one-hot' or a OneHot spec."
            )
        return action.reshape((*batch, 1)).long()

    def from_index(self, index: Tensor, number: int) -> Tensor:
        """Convert indices ``[*B]`` to actions of the environment."""
        if self.one_hot:
            return torch.nn.functional.one_hot(index, number).to(self.dtype)
        return index.reshape((*index.shape, *self.shape)).to(self.dtype)


def check_mask(mask: Tensor, scores: Tensor, name: str, ended: Tensor | None = None) -> None:
    """Check the mask of available actions, ``[*B, K]``, against the scores of the actions, ``[*B, K]``.

    Args:
        mask: True for each action that is available.
        scores: values or logits of the actions.
        name: name of the mask in messages.
        ended: True for each state that ends its episode, ``[*B, 1]``. Such a state needs no available action.

    Raises:
        ValueError: if the mask has another dtype or shape; or, checked only on the CPU, if no action is available in a
            state that does not end its episode.
    """
    if mask.dtype != torch.bool or mask.shape != scores.shape:
        raise ValueError(
            f"{name} has shape {tuple(mask.shape)} and dtype {mask.dtype}, expected booleans {tuple(scores.shape)}: "
            "True for each action that is available."
        )
    if can_check(mask):
        empty = ~mask.any(-1, keepdim=True)
        empty = empty if ended is None else empty & ~ended
        if bool(empty.any()):
            raise ValueError(
                f"{name} allows no action in {int(empty.sum())} states that do not end an episode (first: "
                f"{empty.nonzero()[0, :-1].tolist()}); repair the mask."
            )


def check_available(mask: Tensor, index: Tensor, name: str) -> None:
    """Raise a ValueError if a mask ``[*B, K]`` excludes an action of the batch ``[*B, 1]``; checked only on the CPU."""
    if can_check(mask) and not bool((available := mask.gather(-1, index)).all()):
        row = (~available).nonzero()[0, :-1].tolist()
        raise ValueError(
            f"{int((~available).sum())} actions of the batch are not available (first: at {row}), because {name} is "
            "False for them; repair the mask or the actions."
        )


def check_threshold(threshold: float) -> None:
    """Raise a ValueError if the threshold of likely actions is out of range."""
    if not 0 <= threshold < 1:
        raise ValueError(
            f"unlikely_action_threshold is {threshold}, expected at least 0 and below 1: at 1, no action would pass."
        )


def can_check(tensor: Tensor) -> bool:
    """Whether the values of a tensor can be read: not on a GPU, in a compiled graph or inside ``torch.vmap``."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return tensor.device.type == "cpu" and not traced and not torch._C._functorch.is_batchedtensor(tensor)
