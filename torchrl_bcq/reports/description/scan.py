"""Surveys transitions: computes statistics, finds episodes, and counts possible defects."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import TensorSpec

from torchrl_bcq.actions import number_of
from torchrl_bcq.data.arrays import spec_bounds
from torchrl_bcq.data.defects import Rows
from torchrl_bcq.data.origins import Origins
from torchrl_bcq.errors import DatasetError
from torchrl_bcq.reports.description.fields import ACTION, REWARD, TERMINATED, ColumnStats, Images, Key, Reader, name_of

SAMPLE_ROWS = 100_000  # number of sampled rows for pictures and percentiles, whose error is about 0.1 percent
SAMPLE_VALUES = 20_000_000  # largest number of sampled values (80 MB); if rows are wide, fewer rows are sampled
# report larger absolute values: most tasks stay below 1e4, and float32 squares of 1e5 are imprecise
HUGE = 1e5
SAME = 1e-4  # smaller relative differences count as rounding errors
AT_BOUND = 1e-5  # an action is at a bound if their distance is below this fraction of the range (float32 tanh rounds)
OUTLIER = 1000.0  # a reward is an outlier if abs(reward) exceeds this many times the 99th percentile of abs(rewards)
FAR = 10.0  # a value, such as -9999, is far if its distance to all others exceeds this many times their range
JUMP = 1.5  # a change of an observation is a jump if it exceeds 99% of all changes by this factor
FEW_ENDS = 3  # do not search for jumps at fewer ends of episodes


class Survey:
    """Statistics of a dataset and of its episodes, with the number of rows for each possible defect.

    An episode consists of successive rows with the same episode number. Without episode numbers, an episode ends at a
    row with a flag. The survey keeps one chunk and ``SAMPLE_ROWS`` sampled rows in memory, and about 50 bytes for each
    row of the dataset.
    """

    def __init__(
        self,
        transitions: TensorDictBase,
        action_spec: TensorSpec | None = None,
        origins: Origins | None = None,
        column_names: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        reader, self.origins = Reader(transitions), Origins() if origins is None else origins
        self.rows, self.nbytes, self.all_rows = reader.rows, reader.nbytes, Rows(reader.rows)
        self.counts: dict[tuple[str, str], Rows] = defaultdict(Rows)  # bad rows, by kind of defect and name of field
        self.images = {key: Images(name_of(key), reader.leaves[key]) for key in reader.images}
        now = {key: stack for key, stack in reader.stored.items() if key[0] != "next"}
        self.stored = [Images.of_stored(name_of(key), stack) for key, stack in now.items()]
        sampled, keys = _sampled_rows(reader), (REWARD, ACTION, *reader.vectors)
        fields = {key: ColumnStats(name_of(key), reader.matrix(key, sampled).float()) for key in keys}
        self.rewards, self.actions, *self.observations = fields.values()
        for field in (self.actions, *self.observations):
            names = (column_names or {}).get(field.name, ())
            if len(names) == len(field.labels):  # one column of a table may hold several numbers
                field.labels = [*names]
        self.frequencies: Tensor | None = None  # number of rows with each discrete action, [K]
        if (choices := reader.choices()) is not None:
            number = None if action_spec is None else number_of(action_spec)
            self.frequencies = _count_choices(choices, number, self.counts["no action", "actions"])
            action_spec = None
        # lower and upper bounds [A] of the spec
        self.bounds = None if action_spec is None else tuple(map(torch.from_numpy, spec_bounds(action_spec)))
        if action_spec is not None and action_spec.shape != self.actions.low.shape:
            width, shape = len(self.actions.low), tuple(action_spec.shape)
            raise DatasetError(f"actions have {width} columns, but the action bounds have shape {shape}.")

        flags = self._read_episodes(reader)
        self._read_values(reader, fields, flags)
        self._read_bounds(reader)
        if not self.counts["huge", "rewards"].count:
            self._read_outliers(reader, stops=flags[1])
        for key in reader.successors:
            self._count_jumps(reader, key)
        for key in reader.vectors:
            if not self.counts["huge", name_of(key)].count:
                _count_far(reader, key, fields[key], self.counts["far", name_of(key)])

    def _read_episodes(self, reader: Reader) -> tuple[Tensor, Tensor, Tensor]:
        """Find episodes and wrong flags; return masks of rows: terminated, any flag, last of an episode."""
        terminated, truncated, done = reader.flags()
        flagged, numbers = terminated | truncated, reader.column(("episode",))
        stops = flagged | done
        is_last = stops.clone()
        if numbers is not None:
            is_last[:-1] = numbers[1:] != numbers[:-1]
        elif reader.steps:
            is_last[reader.steps - 1 :: reader.steps] = True
        is_last[-1] = True
        self.groups = 0  # number of groups, such as patients; 0 without an entry group
        if (group := reader.column(("group",))) is not None:
            self.groups = len(group.unique())
            self.counts["several groups", "group"].add((group[1:] != group[:-1]) & ~is_last[:-1], 1)
        self.counts["both flags", "terminated"].add(terminated & truncated)
        self.counts["unexplained", "done"].add(stops & ~flagged)
        self.counts["inside", "done"].add(stops & ~is_last)
        self.terminated_rows, self.truncated_rows = int(terminated.sum()), int(truncated.sum())
        self.last = is_last.nonzero().squeeze(1)  # last row of each episode [E]
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
        hashes = []
        for rows in reader.chunks():
            for key, field in fields.items():
                values = reader.matrix(key, rows)
                finite = self._count_finite(field.name, values, rows.start)
                field.add(values, finite)
                self.counts["huge", field.name].add(((values.abs() > HUGE) & finite).any(1), rows.start)
            for key in reader.vectors:
                self._check_observations(reader, key, rows, *(flag[rows] for flag in flags))
            for key, image in self.images.items():
                low = high = reader.entry(key, rows)
                if low.is_floating_point():
                    odd = ~self._count_finite(image.name, low, rows.start)
                    low, high = (low.masked_fill(odd, end) for end in (torch.inf, -torch.inf))
                image.low, image.high = min(image.low, float(low.amin())), max(image.high, float(high.amax()))
            hashes.append(_hash_rows(reader, rows))
        if len(repeated := _again(torch.cat(hashes))):
            self.counts["repeated", "transitions"] = Rows(len(repeated), int(repeated.min()))

    def _count_finite(self, name: str, values: Tensor, start: int) -> Tensor:
        """Return a mask ``[R, D]`` of the finite values; count the rows in which a value is not finite."""
        finite = values.isfinite()
        self.counts["not finite", name].add(~finite.all(1), start)
        return finite

    def _check_observations(
        self, reader: Reader, key: Key, rows: slice, terminated: Tensor, stops: Tensor, is_last: Tensor
    ) -> None:
        """Count rows whose observation is all zeros, or whose next observation is probably wrong."""
        start = rows.start
        observed = reader.matrix(key, slice(start, rows.stop + 1))
        # in a single number or in integers, zero is a normal value, so only float vectors are checked
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

    def _count_jumps(self, reader: Reader, key: Key) -> None:
        """Count jumps that suggest that ends of episodes are one row too late or too early.

        If an end is too late, the observation jumps in the last row of the episode: the next observation already
        belongs to the next episode, which goes on from there. If an end is too early, the observation jumps in the
        first row of the next episode, and this row still continues the episode before.
        """
        after = reader.successors[key]
        ends = self.last[:-1][~self.terminated[:-1]][:SAMPLE_ROWS]
        if len(ends) < FEW_ENDS or reader.leaves[key].shape != reader.leaves[after].shape:
            return
        edges, inside = torch.cat([self.last, self.last + 1, torch.tensor([0])]), _sampled_rows(reader)
        inside = inside[~torch.isin(inside, edges)]  # the ends of episodes are compared with these rows
        usual = reader.matrix(after, inside).double() - reader.matrix(key, inside)
        scale = usual.square().mean(0).sqrt()

        def size(before: Tensor, following: Tensor) -> Tensor:
            # 0 / 0 becomes 0: a column that never changes inside episodes did not change here either
            return ((following.double() - before) / scale).nan_to_num(0.0).square().mean(1).sqrt()

        if not len(inside):
            return
        limit = size(reader.matrix(key, inside), reader.matrix(after, inside)).quantile(0.99)
        last, following, first, second = (
            reader.matrix(entry, rows) for rows in (ends, ends + 1) for entry in (key, after)
        )
        gap = size(following, first)
        for kind, row, step in (("late", ends, size(last, following)), ("early", ends + 1, size(first, second))):
            jumps = step > JUMP * limit
            if 2 * int((jumps & (gap <= limit) & (gap > 0)).sum()) > len(ends):
                self.counts[kind, name_of(after)] = Rows(int(jumps.sum()), int(row[jumps][0]))

    def _read_bounds(self, reader: Reader) -> None:
        """For each action column, count the rows at a bound of the spec (without a spec: at min or max)."""
        outside = self.counts["outside", "actions"]
        low, high = (bound.float().double() for bound in self.bounds or (self.actions.low, self.actions.high))
        near = torch.nan_to_num(AT_BOUND * (high - low), 0.0, 0.0, 0.0)
        self.at_bound = [Rows() for _ in low]  # one for each column
        if self.frequencies is not None:
            return
        for rows in reader.chunks(ACTION):
            values = reader.matrix(ACTION, rows).float().double()  # float32, because the readers return float32 actions
            near_bound = ((values - low).abs() <= near) | ((values - high).abs() <= near)
            for column, found in enumerate(self.at_bound):
                found.add(near_bound[:, column], rows.start)
            if self.bounds and (beyond := (values < low) | (values > high)).any():
                outside.add(beyond.any(1), rows.start)
                row, at = beyond.nonzero()[0].tolist()
                where = f"in column {self.actions.labels[at]}, where the bounds are {low[at]:g} to {high[at]:g}"
                example = f"{values[row, at]:g} {where}"
                outside.example = outside.example or example

    def _read_outliers(self, reader: Reader, stops: Tensor) -> None:
        """Count rewards of unusual magnitude, except at ends of episodes, where many tasks give a bonus."""
        sample = self.rewards.sample[self.rewards.sample.isfinite()].abs()
        usual = float(sample.quantile(0.99, interpolation="lower")) if len(sample) else 0.0
        if usual:
            values = reader.matrix(REWARD)[:, 0]
            outlier = (values.abs() > OUTLIER * usual) & values.isfinite() & ~stops
            self.counts["outlier", "rewards"].add(outlier)


def _count_choices(choices: Tensor, number: int | None, odd: Rows) -> Tensor:
    """Return how often each discrete action occurs, ``[K]``. Add rows whose action is no action of the spec to ``odd``.

    If the ``number`` of actions is not given, the largest index in the data is the last action.
    """
    number = int(choices.max()) + 1 if number is None else number
    outside = (choices < 0) | (choices >= number)
    odd.add(outside)
    odd.example = f"{choices[odd.first]}, where the spec has 0 to {number - 1}" if odd.count else ""
    return choices[~outside].bincount(minlength=number)


def _count_far(reader: Reader, key: Key, field: ColumnStats, far: Rows) -> None:
    """Add rows to ``far`` whose value is a column's min or max and far from the column's other values."""
    low, high = torch.full_like(field.low, torch.inf), torch.full_like(field.low, -torch.inf)  # range without extremes
    for rows in reader.chunks(key):
        values = reader.matrix(key, rows).double()
        between = (values > field.low) & (values < field.high)
        low = torch.minimum(low, values.masked_fill(~between, torch.inf).amin(0))
        high = torch.maximum(high, values.masked_fill(~between, -torch.inf).amax(0))
    gap, known = FAR * (high - low), low < high
    below, above = known & (low - field.low > gap), known & (field.high - high > gap)
    if not (below | above).any():
        return
    for rows in reader.chunks(key):
        values = reader.matrix(key, rows).double()
        far.add(((values == field.low) & below | (values == field.high) & above).any(1), rows.start)
    at = int((below | above).nonzero()[0])
    value, low, high = field.low.where(below, field.high), low.where(below, field.low), high.where(above, field.high)
    far.example = f"{value[at]:g} in column {field.labels[at]}, where the others span {low[at]:g} to {high[at]:g}"


def _sampled_rows(reader: Reader) -> Tensor:
    """Return the sorted indices ``[S]`` of randomly chosen rows.

    The choice is random, because every k-th row could have the same time step in its episode.
    """
    values = sum(reader.leaves[key][0].numel() for key in [*reader.vectors, ACTION]) + 1
    count = max(1, min(SAMPLE_ROWS, SAMPLE_VALUES // values))
    return torch.randperm(reader.rows, generator=torch.Generator().manual_seed(0))[:count].sort().values


def _differ(a: Tensor, b: Tensor) -> Tensor:
    """Return a mask of the rows where the relative difference of ``a`` and ``b`` exceeds ``SAME``."""
    scale = torch.maximum(b.abs(), 1e-2 * b.abs().amax(1, keepdim=True))
    apart = (a - b).abs()
    return ((apart > SAME * scale) & apart.isfinite()).any(1)


def _again(numbers: Tensor) -> Tensor:
    """Return the indices in ``numbers`` at which an earlier number occurs again."""
    numbers, order = numbers.sort(stable=True)
    return order[1:][numbers[1:] == numbers[:-1]]


def _hash_rows(reader: Reader, rows: slice) -> Tensor:
    """Return a tensor ``[R]`` that contains a hash of each row."""
    keys = (REWARD, ACTION, TERMINATED, *reader.vectors, *reader.successors.values(), *reader.images)
    numbers = [stack.index[rows].cpu().contiguous().view(torch.uint8) for stack in reader.stored.values()]
    entries = [(reader.entry(key, rows) + 0).contiguous().view(torch.uint8) for key in keys]  # + 0 turns -0.0 into 0.0
    return torch.tensor([hash(bytes(row)) for row in torch.cat([*entries, *numbers], 1).numpy()])
