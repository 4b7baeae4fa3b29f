"""Checks the actions of a dataset, and decides whether the actions are continuous or discrete."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from tensordict import TensorDict
from torch import Tensor
from torchrl.data import TensorSpec

from torchrl_bcq.actions import DiscreteActions, number_of
from torchrl_bcq.data.arrays import as_array, column, spec_bounds, to_float32
from torchrl_bcq.data.defects import Rows, in_columns
from torchrl_bcq.errors import DatasetError, remedy

_KINDS = ("continuous", "discrete")
_MOST = 2**20  # largest number of discrete actions
_OTHERS = {  # defects of masks and probabilities
    "action_masks": "action_masks allows no action in {}; correct the masks.",
    "next_action_masks": "next_action_masks allows no action in {} that do not end in a final state; correct them.",
    "action": "actions has {} with an action that action_masks does not allow; correct the actions or the masks.",
    "probability": (
        "action_probabilities has {} that are not above 0 or, for discrete actions, are above 1; give the probability "
        "with which the recorded policy chose the action of the row."
    ),
}


class ActionChecks:
    """Checks the actions of a dataset chunk by chunk.

    Continuous actions are vectors ``[N, A]``. Discrete actions are indices ``[N]`` or ``[N, 1]``, or one-hot vectors
    ``[N, K]``. The ``kind`` or the ``spec`` decides which of them the actions are. If both are None, actions of an
    integer or boolean dtype are discrete. In a source without data types, actions are then discrete if all of them are
    whole numbers.

    Args:
        spec: spec of one action. All actions must lie within its bounds, or be one of its discrete actions.
        kind: ``"continuous"``, ``"discrete"`` or None.
        columns: names of the columns of the actions, for messages.
        typed: whether the source has data types.
    """

    def __init__(
        self, spec: TensorSpec | None = None, kind: str | None = None, typed: bool = True, columns: Sequence[str] = ()
    ) -> None:
        if kind is not None and kind not in _KINDS:
            raise DatasetError(f"action_type is {kind!r}, expected one of {list(_KINDS)}.")
        self.number = None if spec is None else number_of(spec)  # number of discrete actions, if it is known
        of_spec = None if spec is None else _KINDS[self.number is not None]
        if None not in (kind, of_spec) and kind != of_spec:
            raise DatasetError(f"action_type is {kind!r}, but the action spec is {of_spec}; change one of them.")
        self._kind = kind or of_spec
        self._bounds = None if spec is None or self.number else spec_bounds(spec)
        self._stored = DiscreteActions.of(spec) if self.number else None
        self._typed, self._columns = typed, columns
        self._dtype: np.dtype | None = None  # of the first chunk
        self._width = 1
        self._rows = 0
        self._finite = True  # whether all actions so far are finite
        self._whole = False  # whether the dtype, or all numbers of a source without data types, are whole numbers
        self._outside, self._odd = Rows(), Rows()  # rows out of bounds, and rows without a discrete action
        self._bad = {name: Rows() for name in _OTHERS}
        self._seen = np.zeros(0, bool)  # [K], whether each index has occurred
        self._lowest, self._highest = np.float32(np.inf), np.float32(-np.inf)

    @property
    def discrete(self) -> bool:
        """Whether the actions are discrete. In a source without data types, this is known after the last chunk."""
        return self._whole if self._kind is None else self._kind == "discrete"

    def read(self, values: ArrayLike, start: int, number: int | None = None) -> np.ndarray:
        """Check actions and return them as float32 ``[n, A]`` or ``[n, 1]``.

        Args:
            values: actions of successive rows.
            start: number of the first row.
            number: number of discrete actions that the masks of these rows have.
        """
        self.number = self.number or number
        array = as_array("actions", values)
        if self._dtype is None:
            self._dtype, self._whole = array.dtype, not self._typed or array.dtype.kind in "biu"
        other = self._typed and (array.dtype.kind in "biu") != self._whole
        # Parquet's integers with empty cells are floats
        if other and self._kind is None and self._finite and np.isfinite(array).all():
            raise DatasetError(
                f"actions has dtype {array.dtype} from row {start} on, but {self._dtype} before; store all actions "
                "with one dtype."
            )
        array = column("actions", array, rank=2)
        actions = to_float32("actions", array.astype(np.uint8) if array.dtype == bool else array)
        self._width, finite = actions.shape[1], np.isfinite(actions).all(1)  # Checks counts rows that are not finite
        self._rows += len(actions)
        self._finite = self._finite and bool(finite.all())
        if self._whole:
            self._whole = bool((actions == actions.round())[finite].all())
        if self._bounds is not None:
            self._check_bounds(actions, finite, start)
        elif self.discrete:
            self._check_choices(actions, finite, start)
        return actions

    def _check_bounds(self, actions: np.ndarray, finite: np.ndarray, start: int) -> None:
        assert self._bounds is not None
        low, high = self._bounds
        if actions.shape[1:] != low.shape:
            raise DatasetError(
                f"actions have shape {actions.shape}, but the action bounds have shape {low.shape}; choose the bounds "
                "of this dataset, or read other actions."
            )
        self._lowest = np.minimum(self._lowest, actions[finite].min(0, initial=np.inf))
        self._highest = np.maximum(self._highest, actions[finite].max(0, initial=-np.inf))
        self._outside.add(finite[:, None] & ((actions < low) | (actions > high)), start)

    def _check_choices(self, actions: np.ndarray, finite: np.ndarray, start: int) -> None:
        """Count rows that are no index from 0 to ``number - 1``, or no one-hot vector."""
        if self._width > 1:
            if self.number not in (None, self._width):
                raise DatasetError(
                    f"actions has {self._width} columns, but there are {self.number} discrete actions; store each "
                    "action as an index, or as a one-hot vector with one column for each action."
                )
            odd = ((actions != 0) & (actions != 1)).any(1) | ((actions == 1).sum(1) != 1)
            index = actions.argmax(1)
        else:
            index = actions[:, 0]
            odd = (index != index.round()) | (index < 0) | (index >= (self.number or _MOST))
        odd &= finite
        if odd.any() and not self._odd.count:
            self._odd.example = ", such as " + str(actions[odd][0].tolist() if self._width > 1 else index[odd][0])
        self._odd.add(odd, start)
        known = index[finite & ~odd].astype(int)
        seen = np.bincount(known, minlength=len(self._seen)) > 0
        seen[: len(self._seen)] |= self._seen
        self._seen = seen

    def check_others(self, fields: Mapping[str, np.ndarray], start: int) -> None:
        """Check the masks of available actions, ``[n, K]``, and the probabilities of the actions, ``[n]``."""
        if "action_probabilities" in fields:
            probability = fields["action_probabilities"]
            high = 1 + 1e-6 if self.discrete else np.inf  # the density of a continuous action can be above 1
            self._bad["probability"].add((probability <= 0) | (probability > high), start)
        for name in ("action_masks", "next_action_masks"):
            if name not in fields:
                continue
            mask: Any = fields[name]
            if not self.discrete:
                raise DatasetError(
                    f"{name} is given, but the actions are continuous; if they are discrete, {_setting('discrete')}; "
                    f"otherwise remove {name} from the data."
                )
            number = self._width if self._width > 1 else self.number
            if number not in (None, mask.shape[1]):
                raise DatasetError(
                    f"{name} has {mask.shape[1]} columns, but there are {number} discrete actions; store one column "
                    "for each action."
                )
            self.number = mask.shape[1]
            ended = fields["terminated"] if name.startswith("next") else np.zeros(len(mask), bool)
            self._bad[name].add(~mask.any(1) & ~ended, start)
        if "action_masks" in fields:
            actions, mask = fields["actions"], fields["action_masks"]
            index = actions.argmax(1) if self._width > 1 else np.nan_to_num(actions[:, 0], nan=-1)
            inside = (index >= 0) & (index < mask.shape[1])  # other rows are counted by _check_choices
            chosen = np.where(inside, index, 0).astype(int)
            self._bad["action"].add(inside & ~np.take_along_axis(mask, chosen[:, None], 1)[:, 0], start)

    def add(self, name: str, source: ActionChecks) -> None:
        """Add the findings of the source ``name``."""
        if not source._rows:
            return
        if self._rows and self._typed and self.discrete != source.discrete:
            kinds = [_KINDS[one.discrete] for one in (source, self)]
            found = f"{name}: its actions are {kinds[0]}, but {kinds[1]} in the sources before it"
            raise DatasetError(f"{found}; join only sources of the same task.")
        self._dtype, self._width = source._dtype, source._width
        self._whole = source._whole and (self._whole or not self._rows)
        self._rows += source._rows
        self._finite = self._finite and source._finite
        if source._odd.count:
            first = self._odd if self._odd.count else replace(source._odd, where=f" of {name}")
            self._odd = replace(first, count=self._odd.count + source._odd.count)
        seen = np.zeros(max(len(self._seen), len(source._seen)), bool)
        for one in (self._seen, source._seen):
            seen[: len(one)] |= one
        self._seen = seen

    def defects(self) -> list[str]:
        """Return a text for each defect in single rows."""
        if self._outside.count and self._bounds is not None:
            low, high = self._bounds
            where = in_columns(self._columns, self._outside.columns)
            spans = f"{self._lowest.tolist()} to {self._highest.tolist()}"
            advice = "set action_clip=true, or action_low and action_high, in torchrl-bcq train."
            return [
                f"actions has {self._outside} outside the action bounds{where}: the actions span {spans}, the bounds "
                f"are {low.tolist()} to {high.tolist()}; " + remedy("clip or rescale the actions.", advice)
            ]
        found = [text.format(self._bad[name]) for name, text in _OTHERS.items() if self._bad[name].count]
        if self._odd.count and self.discrete and not self._is_unclear:
            last = "" if self.number is None else f" to {self.number - 1}"
            expected = f"whole numbers from 0{last}" if self._width == 1 else "one-hot vectors with a single 1"
            found.append(
                f"actions has {self._odd} that are not {expected}{self._odd.example}{in_columns(self._columns)}; "
                f"correct the actions. {_if_continuous()}."
            )
        return found

    @property
    def _is_unclear(self) -> bool:
        """Whether all actions are whole numbers, without a data type, that may be choices or amounts."""
        rare = self._width == 1 and 2 * self._seen.sum() < len(self._seen)
        return not self._typed and self._kind is None and self._whole and bool(self._odd.count or rare)

    def unclear(self) -> list[str]:
        """Return a text if it is unclear whether the actions of a source without data types are discrete."""
        if not self._is_unclear:
            return []
        rare = f"only {self._seen.sum()} of the numbers 0 to {len(self._seen) - 1} occur"
        found = rare if not self._odd.count else f"{self._odd} are no one-hot vectors{self._odd.example}"
        if self._odd.count and self._width == 1:
            found = f"{self._odd} are negative or too large{self._odd.example}"
        return [
            f"actions has only whole numbers in all {self._rows} rows{in_columns(self._columns)}, and {found}. "
            f"{_if_continuous()}; if they are discrete actions, {_setting('discrete')}."
        ]

    @property
    def guess(self) -> str | None:
        """A text, if the actions of a source without data types were taken for discrete actions."""
        if self._typed or self._kind is not None or not self._whole or self._is_unclear:
            return None
        choices = f"{self._width} columns" if self._width > 1 else f"0 to {len(self._seen) - 1}"
        return (
            f"the actions are read as discrete actions ({choices}), because all of them are whole numbers. "
            f"{_if_continuous()}."
        )

    @property
    def expected(self) -> Any:
        """What the spec says about the actions, as plain values."""
        if self._stored is not None and (self._stored.one_hot or self._stored.shape):
            return str(self._stored)
        return self.number if self._bounds is None else [bound.tolist() for bound in self._bounds]

    @property
    def stored_as(self) -> Any:
        """What the spec says about the actions, without their bounds, which do not change the stored rows."""
        return self.expected if self._bounds is None else "continuous"

    def accepts(self, actions: Tensor) -> bool:
        """Return whether stored actions ``[M, A]`` are continuous and within the bounds, or the spec has no bounds."""
        if self._bounds is None:
            return True
        low, high = map(torch.from_numpy, self._bounds)
        if not actions.is_floating_point() or actions.shape[1:] != low.shape:
            return False
        least, most = actions.aminmax(dim=0)
        return bool((least >= low).all() and (most <= high).all())

    def convert(self, transitions: TensorDict) -> TensorDict:
        """Return the transitions. Discrete actions are stored as the spec says, by default as indices ``[M]`` of int64.

        If a row has a defect, the actions stay as they are.
        """
        action = transitions["action"]
        if not self.discrete or self._odd.count or self._is_unclear or not self._finite:
            return transitions
        index = action.argmax(-1) if action.shape[-1] > 1 else action[:, 0].to(torch.int64)
        if self._stored is None or self.number is None:
            return transitions.set("action", index)
        return transitions.set("action", self._stored.from_index(index, self.number))


def _setting(kind: str) -> str:
    return remedy(f"pass action_type={kind!r}", f"set reader.action_type={kind}")


def _if_continuous() -> str:
    return f"If the actions are continuous, such as doses in whole units, {_setting('continuous')}"
