"""Values at their bounds, outliers, and values far from all others: searched for when the ranges are known."""

from __future__ import annotations

import torch
from torch import Tensor

from torchrl_bcq.data.checks import Rows
from torchrl_bcq.reports.description.columns import ColumnStats
from torchrl_bcq.reports.description.reader import ACTION, REWARD, Key, Reader

AT_BOUND = 1e-5  # of the range: about where tanh saturates in float32
OUTLIER = 1000.0  # times the 99th percentile of the rewards' magnitude
FAR = 10.0  # times the range of all others: too much for a state, but usual for -9999 as a missing value


def at_bounds(reader: Reader, actions: ColumnStats, bounds: tuple[Tensor, ...] | None, outside: Rows) -> list[Rows]:
    """Rows at the bounds of each action column (without a spec, at its extremes); counts rows outside the spec."""
    low, high = (bound.float().double() for bound in bounds or (actions.low, actions.high))
    near = torch.nan_to_num(AT_BOUND * (high - low), 0.0, 0.0, 0.0)
    at_bound = [Rows() for _ in low]
    for rows in reader.chunks(ACTION):
        values = reader.matrix(ACTION, rows).float().double()  # the readers compare in float32 too
        near_bound = ((values - low).abs() <= near) | ((values - high).abs() <= near)
        for column, found in enumerate(at_bound):
            found.add(near_bound[:, column], rows.start)
        if bounds and (beyond := (values < low) | (values > high)).any():
            outside.add(beyond.any(1), rows.start)
            row, at = beyond.nonzero()[0].tolist()
            spans = f"it spans {bounds[0][at]:g} to {bounds[1][at]:g}"
            outside.example = outside.example or f"{values[row, at]:g} in column {at}, where {spans}"
    return at_bound


def count_outliers(reader: Reader, rewards: ColumnStats, is_end: Tensor, outliers: Rows) -> None:
    """Count single rewards far above the others, except at ends of episodes ``[N]``, where many tasks pay a bonus."""
    sample = rewards.sample[rewards.sample.isfinite()].abs().double()
    usual = float(sample.sort().values[int(0.99 * (len(sample) - 1))]) if len(sample) else 0.0
    if usual and max(abs(float(rewards.low)), abs(float(rewards.high))) > OUTLIER * usual:
        values = reader.matrix(REWARD)[:, 0]
        outliers.add((values.abs() > OUTLIER * usual) & values.isfinite() & ~is_end)


def count_far(reader: Reader, key: Key, field: ColumnStats, far_rows: Rows) -> None:
    """Count rows with a value far from all others of its column.

    Only the smallest and the largest value of a column are candidates. A candidate counts if its gap to the other
    values exceeds ``FAR`` times their range.
    """
    inner = _inside(field.sample.double(), field.low.float().double(), field.high.float().double())
    if not _is_far(field, *inner).any():  # more rows can only narrow the gap
        return
    chunks = [_inside(reader.matrix(key, rows).double(), field.low, field.high) for rows in reader.chunks(key)]
    lows, highs = (torch.stack(ends) for ends in zip(*chunks, strict=True))
    lows, highs = lows.amin(0), highs.amax(0)
    below, above = _is_far(field, lows, highs)
    lows, highs = torch.where(below, lows, field.low), torch.where(above, highs, field.high)
    far = below, above = _is_far(field, lows, highs)
    if not far.any():
        return
    for rows in reader.chunks(key):
        values = reader.matrix(key, rows).double()
        far_rows.add(((values == field.low) & below | (values == field.high) & above).any(1), rows.start)
    at = int(far.any(0).nonzero()[0])
    value = field.low[at] if below[at] else field.high[at]
    far_rows.example = f"{value:g} in column {at}, where they span {lows[at]:g} to {highs[at]:g}"


def _inside(values: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Range ``[D]`` of the values strictly between two bounds; ``inf`` and ``-inf`` without any."""
    out = ~((values > low) & (values < high))
    return values.masked_fill(out, torch.inf).amin(0), values.masked_fill(out, -torch.inf).amax(0)


def _is_far(field: ColumnStats, low: Tensor, high: Tensor) -> Tensor:
    """Whether the smallest and the largest value ``[2, D]`` are far from the range of the others."""
    gap = FAR * (high - low)
    return torch.stack([low - field.low > gap, field.high - high > gap]) & (low < high)
