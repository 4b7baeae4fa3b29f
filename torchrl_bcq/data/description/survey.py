"""What a scan of transitions finds."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from torchrl_bcq.data.checks import Rows


@dataclass
class ColumnStats:
    """Statistics of a field ``[N, D]``, each ``[D]`` in float64, over its finite values; ``std`` divides by N."""

    name: str
    low: Tensor
    high: Tensor
    mean: Tensor
    square: Tensor  # sum of squared deviations
    count: Tensor
    mark: Tensor  # int64 hash: equal where two columns are
    whole: bool = True  # every value is a whole number
    samples: list[Tensor] = field(default_factory=list)  # [S, D] in all

    @classmethod
    def empty(cls, name: str, width: int) -> ColumnStats:
        """Of no rows yet."""
        zero = torch.zeros(width, dtype=torch.float64)
        inf = torch.full_like(zero, torch.inf)
        return cls(name, inf, -inf, zero.clone(), zero.clone(), zero.clone(), zero.long())

    @property
    def std(self) -> Tensor:
        """Standard deviation of each column; nan without a finite value, as are the others."""
        return (self.square / self.count).sqrt()

    @property
    def sample(self) -> Tensor:
        """Some of the rows, evenly spread, ``[S, D]``; all where there are few."""
        return torch.cat(self.samples)

    @property
    def constant(self) -> Tensor:
        """Which columns have one value, in all rows where they are finite."""
        return self.low == self.high

    def add(self, values: Tensor, finite: Tensor | None) -> None:
        """Merge a chunk ``[R, D]``; ``finite`` is a mask of its values where not all are.

        Source: Chan, Golub and LeVeque, 1979, for the merge of two sets' moments.
        """
        wide = values.double()
        low = (wide if finite is None else wide.masked_fill(~finite, torch.inf)).amin(0)
        high = (wide if finite is None else wide.masked_fill(~finite, -torch.inf)).amax(0)
        count = torch.full_like(low, len(wide)) if finite is None else finite.sum(0).double()
        wide = wide if finite is None else wide.masked_fill(~finite, 0)
        mean = wide.sum(0) / count.clamp(min=1)
        deviation = wide - mean if finite is None else (wide - mean).masked_fill(~finite, 0)
        total, shift = (self.count + count).clamp(min=1), mean - self.mean
        self.square = self.square + deviation.square_().sum(0) + shift.square() * self.count * count / total
        self.mean = self.mean + shift * count / total
        self.count = self.count + count
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        self.whole = self.whole and bool((wide == wide.round()).all())


@dataclass
class Images:
    """A field of more dimensions than ``[N, D]``, or of bytes: the shape of one, and its range."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    low: float = float("inf")
    high: float = float("-inf")


@dataclass(frozen=True)
class Far:
    """A value of a column that is far from all of its others, and the range of those."""

    value: float
    column: int
    low: float
    high: float


@dataclass
class Survey:
    """What is in a dataset; an episode is a run of rows with one number, or up to a flag."""

    rows: int
    nbytes: int
    observations: list[ColumnStats]
    images: list[Images]
    actions: ColumnStats
    rewards: ColumnStats
    lengths: Tensor  # [E], of each episode, as the next four
    returns: Tensor
    last: Tensor  # row
    terminated: Tensor
    truncated: Tensor
    counts: dict[tuple[str, str], Rows]  # by what is wrong, and the field
    repeats_are_estimated: bool
    bounds: tuple[Tensor, Tensor] | None  # of the spec, [A] each
    at_bound: list[Rows]  # of each action column
    outside: tuple[float, int] | None  # an action outside the spec, and its column
    far: dict[str, Far]  # by the field

    def __getitem__(self, kind_and_field: tuple[str, str]) -> Rows:
        """Count of what is wrong with a field, such as ``survey["zero", "observations"]``."""
        return self.counts.get(kind_and_field, Rows())
