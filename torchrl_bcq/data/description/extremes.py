"""The second look at transitions, once their statistics are known: values at and beyond the ends of their ranges."""

from __future__ import annotations

import torch
from torch import Tensor
from torchrl.data import TensorSpec

from torchrl_bcq.data.checks import DatasetError, Rows, spec_bounds
from torchrl_bcq.data.description.reader import Key, Reader, name_of
from torchrl_bcq.data.description.survey import ColumnStats, Far

AT_BOUND = 1e-5  # of the range: about where tanh saturates in float32
OUTLIER = 1000.0  # times the 99th percentile of the rewards' magnitude
FAR = 10.0  # times the range of all others: no task's states leave such a gap, but -9999 for a missing value does


def action_bounds(spec: TensorSpec | None, width: int) -> tuple[Tensor, Tensor] | None:
    """Low and high ``[A]`` of a spec in float64, or None where there is none.

    Raises:
        DatasetError: if the spec is not Bounded or of another size.
    """
    if spec is None:
        return None
    low, high = (torch.from_numpy(bound).double().flatten() for bound in spec_bounds(spec))
    if len(low) != width:
        raise DatasetError(f"actions have {width} columns, but the action spec has shape {tuple(spec.shape)}.")
    return low, high


def at_bounds(
    reader: Reader, actions: ColumnStats, bounds: tuple[Tensor, Tensor] | None, counts: dict[tuple[str, str], Rows]
) -> tuple[list[Rows], tuple[float, int] | None]:
    """Rows at the bounds of each action column (without bounds, at its extremes), and an action outside of them."""
    low, high = (bound.float().double() for bound in bounds or (actions.low, actions.high))
    near = torch.nan_to_num(AT_BOUND * (high - low), 0.0, 0.0, 0.0)
    at_bound, outside = [Rows() for _ in low], None
    for start, stop in reader.chunks("action"):
        values = reader.matrix("action", start, stop).float().double()  # the readers compare in float32 too
        at = ((values - low).abs() <= near) | ((values - high).abs() <= near)
        for column in at.any(0).nonzero().flatten().tolist():
            at_bound[column].add(at[:, column].numpy(), start)
        beyond = (values < low) | (values > high) if bounds else torch.zeros_like(at)
        if beyond.any() and outside is None:
            row, column = beyond.nonzero()[0].tolist()
            outside = float(values[row, column]), column
        counts["outside", "actions"].add(beyond.any(1).numpy(), start)
    return at_bound, outside


def reward_outliers(reader: Reader, rewards: ColumnStats, counts: dict[tuple[str, str], Rows]) -> None:
    """Single rewards far above the others; not at an end, where many tasks pay a bonus."""
    sample = rewards.sample[rewards.sample.isfinite()].abs().double()
    usual = float(sample.sort().values[int(0.99 * (len(sample) - 1))]) if len(sample) else 0.0
    if not usual or max(abs(float(rewards.low)), abs(float(rewards.high))) <= OUTLIER * usual:
        return
    for start, stop in reader.chunks(("next", "reward")):
        flags = [reader.flag(name, start, stop) for name in ("done", "terminated", "truncated")]
        ends = torch.stack([flag for flag in flags if flag is not None]).any(0)
        values = reader.matrix(("next", "reward"), start, stop)[:, 0]
        found = (values.abs() > OUTLIER * usual) & values.isfinite() & ~ends
        counts["outlier", "rewards"].add(found.numpy(), start)


def far_values(reader: Reader, fields: dict[str, ColumnStats], counts: dict[tuple[str, str], Rows]) -> dict[str, Far]:
    """Count rows of observations that hold a value far from all others of its column; of the first column, by field.

    Only the least and the greatest value can be; each must leave a gap of ``FAR`` times the range of what lies between.
    """
    names = {key: name_of(key) for key in reader.vectors}
    found = {name: _far_value(reader, key, fields[name], counts["far", name]) for key, name in names.items()}
    return {name: far for name, far in found.items() if far}


def _far_value(reader: Reader, key: Key, field: ColumnStats, rows: Rows) -> Far | None:
    sample = field.sample.double()
    inner = _inside(sample, field.low.float().double(), field.high.float().double())
    if not _is_far(field, *inner).any():  # of all rows there are more values between, and none is further off
        return None
    lows, highs = torch.full_like(field.low, torch.inf), torch.full_like(field.low, -torch.inf)
    for start, stop in reader.chunks(key):
        low, high = _inside(reader.matrix(key, start, stop).double(), field.low, field.high)
        lows, highs = torch.minimum(lows, low), torch.maximum(highs, high)
    below, above = _is_far(field, lows, highs)
    lows, highs = torch.where(below, lows, field.low), torch.where(above, highs, field.high)
    far = below, above = _is_far(field, lows, highs)
    if not far.any():
        return None
    for start, stop in reader.chunks(key):
        values = reader.matrix(key, start, stop).double()
        found = (values == field.low) & below | (values == field.high) & above
        rows.add(found.any(1).numpy(), start)
    column = int(far.any(0).nonzero()[0])
    value = float((field.low if below[column] else field.high)[column])
    return Far(value, column, float(lows[column]), float(highs[column]))


def _inside(values: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Range ``[D]`` of what lies strictly between two values; ``inf`` and ``-inf`` where nothing does."""
    out = ~((values > low) & (values < high))
    return values.masked_fill(out, torch.inf).amin(0), values.masked_fill(out, -torch.inf).amax(0)


def _is_far(field: ColumnStats, low: Tensor, high: Tensor) -> Tensor:
    """Whether the least and the greatest value ``[2, D]`` are far from the range of the others."""
    gap = FAR * (high - low)
    return torch.stack([low - field.low > gap, field.high - high > gap]) & (low < high)
