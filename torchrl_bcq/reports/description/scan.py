"""Survey of transitions: statistics, episodes, and counts of possible defects."""

from __future__ import annotations

import math
import zlib
from collections import defaultdict

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import TensorSpec

from torchrl_bcq.data.checks import DatasetError, Rows, spec_bounds
from torchrl_bcq.reports.description.columns import ColumnStats, Images
from torchrl_bcq.reports.description.extremes import at_bounds, count_far, count_outliers
from torchrl_bcq.reports.description.reader import ACTION, REWARD, TERMINATED, Key, Reader, name_of

SAMPLE_ROWS = 100_000  # for quantiles and pictures: percentiles are then exact to about 0.1 percent
SAMPLE_VALUES = 20_000_000  # 80 MB, for wide rows
HASHED_ROWS = 4_000_000  # 64 MB; of more rows only a part is searched for repetitions
IMAGE_VALUES = 256  # of an image in the hash of its row: enough to distinguish images
HUGE = 1e5  # rewards and observations of usual tasks stay below 1e4; its square exceeds float32's digits
SAME = 1e-4  # relative difference; float16 and recomputed observations differ by less


class Survey:
    """Statistics of a dataset. An episode is a run of rows with one number or, without numbers, up to a flag.

    Needs memory for a chunk, ``SAMPLE_ROWS`` rows, ``HASHED_ROWS`` hashes and about 20 bytes for each row.
    """

    def __init__(self, transitions: TensorDictBase, action_spec: TensorSpec | None = None) -> None:
        reader = Reader(transitions)
        self.rows, self.nbytes, self.all_rows = reader.rows, reader.nbytes, Rows(reader.rows)
        self.counts: dict[tuple[str, str], Rows] = defaultdict(Rows)  # by kind of defect and field
        self.hashed_part = 2 ** max(0, math.ceil(math.log2(self.rows / HASHED_ROWS)))  # one row of so many
        self.images: dict[Key, Images] = {}
        sampled, keys = _sampled_rows(reader), (REWARD, ACTION, *reader.vectors)
        fields = {key: ColumnStats(name_of(key), reader.matrix(key, sampled).float()) for key in keys}
        self.rewards, self.actions, *self.observations = fields.values()
        # low and high [A] of the spec
        self.bounds = None if action_spec is None else tuple(map(torch.from_numpy, spec_bounds(action_spec)))
        if action_spec is not None and action_spec.shape != self.actions.low.shape:
            width, shape = len(self.actions.low), tuple(action_spec.shape)
            raise DatasetError(f"actions have {width} columns, but the action spec has shape {shape}.")

        flags = self._read_episodes(reader)
        self._read_values(reader, fields, flags)
        self.at_bound = at_bounds(reader, self.actions, self.bounds, self.counts["outside", "actions"])  # by column
        if not self.counts["huge", "rewards"].count:
            count_outliers(reader, self.rewards, flags[1], self.counts["outlier", "rewards"])
        for key in reader.vectors:
            if not self.counts["huge", name_of(key)].count:
                count_far(reader, key, fields[key], self.counts["far", name_of(key)])

    def _read_episodes(self, reader: Reader) -> tuple[Tensor, Tensor, Tensor]:
        """Find the episodes and count odd flags; return which rows ``[N]`` are terminated, done, and last."""
        terminated, truncated, done = reader.flags()
        flagged, numbers = terminated | truncated, reader.column(("episode",))
        stops = flagged | done
        is_last = stops.clone()
        if numbers is not None:
            is_last[:-1] = numbers[1:] != numbers[:-1]
        elif reader.steps:
            is_last[reader.steps - 1 :: reader.steps] = True
        is_last[-1] = True
        self.counts["both flags", "terminated"].add(terminated & truncated)
        self.counts["unexplained", "done"].add(stops & ~flagged)
        self.counts["inside", "done"].add(stops & ~is_last)
        self.terminated_rows, self.truncated_rows = int(terminated.sum()), int(truncated.sum())
        self.last = is_last.nonzero().squeeze(1)  # row of each episode [E], as the others
        self.lengths = self.last.diff(prepend=torch.tensor([-1]))
        gains = torch.nan_to_num(reader.matrix(REWARD).double().sum(1), 0.0, 0.0, 0.0)
        self.returns = torch.segment_reduce(gains, "sum", lengths=self.lengths)
        self.terminated, self.truncated = terminated[self.last], truncated[self.last]
        if numbers is not None and len(again := _again(numbers[self.last])):
            first = int((self.last - self.lengths + 1)[again].min())
            self.counts["comes back", "episode"] = Rows(int(self.lengths[again].sum()), first)
        return terminated, stops, is_last

    def _read_values(self, reader: Reader, fields: dict[Key, ColumnStats], flags: tuple[Tensor, ...]) -> None:
        """Collect statistics, compare successive observations, and search for repeated rows."""
        kept = []
        for rows in reader.chunks():
            for key, field in fields.items():
                values = reader.matrix(key, rows)
                finite = self._count_finite(field.name, values, rows.start)
                field.add(values, finite)
                self.counts["huge", field.name].add(((values.abs() > HUGE) & finite).any(1), rows.start)
            for key in reader.vectors:
                self._check_observations(reader, key, rows, *(flag[rows] for flag in flags))
            for key in reader.images:
                self._read_images(key, reader.leaves[key][rows].detach().cpu(), rows.start)
            hashes = _hash_rows(reader, rows, fields)
            keep = hashes & (self.hashed_part - 1) == 0
            kept.append(torch.stack([hashes[keep], keep.nonzero().squeeze(1) + rows.start]))
        hashes, at = torch.cat(kept, 1)
        if len(repeated := at[_again(hashes)]):
            self.counts["repeated", "transitions"] = Rows(len(repeated) * self.hashed_part, int(repeated.min()))

    def _count_finite(self, name: str, values: Tensor, start: int) -> Tensor:
        """Mask of the finite values ``[R, D]``; counts the rows with others."""
        finite = values.isfinite()
        self.counts["not finite", name].add(~finite.all(1), start)
        return finite

    def _check_observations(
        self, reader: Reader, key: Key, rows: slice, terminated: Tensor, stops: Tensor, is_last: Tensor
    ) -> None:
        """Search for zeros; compare each next observation with the observations of the same and the following row."""
        start = rows.start
        observed = reader.matrix(key, slice(start, rows.stop + 1))
        # one number can pass through zero, and integers can start at it
        is_zero_odd = observed.shape[1] > 1 and reader.leaves[key].is_floating_point()
        if is_zero_odd:
            self.counts["zero", name_of(key)].add((observed[: len(stops)] == 0).all(1), start)
        if key not in reader.successors:
            return
        name, after = name_of(reader.successors[key]), reader.matrix(reader.successors[key], rows)
        self._count_finite(name, after, start)
        if after.shape[1] != observed.shape[1]:
            return
        if is_zero_odd:
            self.counts["zero successor", name].add((after == 0).all(1) & ~terminated, start)
        self.counts["still", name].add((after == observed[: len(after)]).all(1) & ~terminated, start)
        observed = observed[1:]
        after, terminated, stops, is_last = (each[: len(observed)] for each in (after, terminated, stops, is_last))
        differs = (after != observed).any(1)
        self.counts["joined", name].add(~differs & is_last & ~terminated, start)
        apart = differs & ~is_last & ~stops
        apart[apart.clone()] = _differ(after[apart], observed[apart])
        self.counts["not continued", name].add(apart, start)

    def _read_images(self, key: Key, values: Tensor, start: int) -> None:
        image = self.images.setdefault(key, Images(name_of(key), tuple(values.shape[1:]), values.dtype))
        if values.is_floating_point():
            values = values.flatten(1)
            values = values.masked_fill(~self._count_finite(image.name, values, start), 0)
        image.low, image.high = min(image.low, float(values.amin())), max(image.high, float(values.amax()))


def _sampled_rows(reader: Reader) -> Tensor:
    """Random rows ``[S]`` in order: equal distances could hit every episode at the same time step."""
    values = sum(reader.leaves[key][0].numel() for key in [*reader.vectors, ACTION]) + 1
    count = max(1, min(SAMPLE_ROWS, SAMPLE_VALUES // values, reader.rows))
    if count == reader.rows:
        return torch.arange(count)
    return torch.randint(reader.rows, (count,), generator=torch.Generator().manual_seed(0)).sort().values


def _differ(a: Tensor, b: Tensor) -> Tensor:
    """Rows ``[R]`` that differ by more than rounding in values that are not small for their row."""
    scale = torch.maximum(b.abs(), 1e-2 * b.abs().amax(1, keepdim=True))
    apart = (a - b).abs()
    return ((apart > SAME * scale) & apart.isfinite()).any(1)


def _again(numbers: Tensor) -> Tensor:
    """Indices of numbers ``[N]`` that an earlier one equals."""
    numbers, order = numbers.sort(stable=True)
    return order[1:][numbers[1:] == numbers[:-1]]


def _hash_rows(reader: Reader, rows: slice, fields: dict[Key, ColumnStats]) -> Tensor:
    """Hash of each row ``[R]``; adds to the marks of the fields' columns."""
    hashes = torch.zeros(rows.stop - rows.start, dtype=torch.int64)
    row_weights = _mix(torch.arange(rows.start, rows.stop))[:, None] | 1
    for key in (REWARD, ACTION, TERMINATED, *reader.vectors, *reader.successors.values(), *reader.images):
        step = max(1, reader.leaves[key][0].numel() // IMAGE_VALUES) if key in reader.images else 1
        values = reader.matrix(key, rows, step) + 0.0  # 0 and -0 are equal
        words = _mix(values.view(torch.int32 if values.dtype == torch.float32 else torch.int64).long())
        if key in fields:
            fields[key].mark += (words * row_weights).sum(0)
        weights = _mix(torch.arange(words.shape[1]) + zlib.crc32(".".join(key).encode())) | 1
        hashes += (words * weights).sum(1)
    return hashes


def _mix(words: Tensor) -> Tensor:
    """Bijection of int64 that spreads each bit over the others."""
    words = (words ^ 0x5DEECE66D) * 0x1F3D5B79A2C8E695
    words = (words ^ (words >> 32)) * 0x2545F4914F6CDD1D
    return words ^ (words >> 29)
