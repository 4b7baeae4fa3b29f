"""Statistics of the fields of a dataset."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchrl_bcq.functional import merge_moments


class ColumnStats:
    """Statistics of the finite values of a field ``[N, D]``, each ``[D]`` in float64; ``std`` divides by N."""

    def __init__(self, name: str, sample: Tensor) -> None:
        self.name = name
        self.sample = sample  # random rows [S, D]; all rows where there are few
        width = sample.shape[1]
        self.low, self.high = torch.tensor([[torch.inf], [-torch.inf]], dtype=torch.float64).expand(2, width)
        self.count, self.mean, self.square = torch.zeros(3, width, dtype=torch.float64)  # square: of deviations, summed
        self.mark = torch.zeros(width, dtype=torch.int64)  # hash: equal for equal columns
        self.whole = True  # every value is a whole number

    @property
    def std(self) -> Tensor:
        """Standard deviation of each column; nan without a finite value."""
        return (self.square / self.count).sqrt()

    @property
    def constant(self) -> Tensor:
        """Whether the finite values of each column are equal ``[D]``."""
        return self.low == self.high

    def add(self, values: Tensor, finite: Tensor) -> None:
        """Merge a chunk ``[R, D]`` and the mask of its finite values."""
        low, high = (values if finite.all() else values.masked_fill(~finite, end) for end in (torch.inf, -torch.inf))
        self.low, self.high = torch.minimum(self.low, low.amin(0)), torch.maximum(self.high, high.amax(0))
        wide, count = values.double().masked_fill(~finite, 0), finite.sum(0)
        self.whole = self.whole and bool((wide == wide.round()).all())
        mean = wide.sum(0) / count.clamp(min=1)
        square = (wide - mean).masked_fill_(~finite, 0).square_().sum(0)
        self.count, self.mean, self.square = merge_moments(self.count, self.mean, self.square, count, mean, square)


@dataclass
class Images:
    """A field with more dimensions than ``[N, D]``, or of bytes: the shape of one row, and the range of values."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    low: float = float("inf")
    high: float = float("-inf")
