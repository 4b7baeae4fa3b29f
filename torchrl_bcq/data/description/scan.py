"""The pass over transitions: statistics, ends of episodes, and counts of what may be wrong."""

from __future__ import annotations

import math
import zlib
from collections import defaultdict
from collections.abc import Callable

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import TensorSpec

from torchrl_bcq.data.checks import Rows
from torchrl_bcq.data.description.extremes import action_bounds, at_bounds, far_values, reward_outliers
from torchrl_bcq.data.description.reader import Key, Reader, name_of, next_key
from torchrl_bcq.data.description.survey import ColumnStats, Images, Survey

SAMPLE_ROWS = 100_000  # for quantiles and pictures: a percentile is then right to about 0.1 percent
SAMPLE_VALUES = 20_000_000  # 80 MB, where columns are many
HASHED_ROWS = 4_000_000  # 64 MB; of more rows a part is searched for repetitions
IMAGE_VALUES = 256  # of an image that go into its row's hash: enough to tell two apart
HUGE = 1e5  # rewards and observations of usual tasks stay below 1e4; squared, this exceeds float32's digits
SAME = 1e-4  # relative: float16 and recomputed observations differ by less than about this


def scan(transitions: TensorDictBase, action_spec: TensorSpec | None = None) -> Survey:
    """Survey the transitions of :func:`describe`.

    Memory: a chunk, a sample of at most ``SAMPLE_ROWS``, ``HASHED_ROWS`` hashes, and 26 bytes for each episode.
    """
    reader = Reader(transitions)
    run = _Scan(reader)
    for start, stop in reader.chunks():
        run.chunk(start, stop)
    bounds = action_bounds(action_spec, len(run.fields["actions"].low))
    at_bound, outside = at_bounds(reader, run.fields["actions"], bounds, run.counts)
    reward_outliers(reader, run.fields["rewards"], run.counts)
    far = far_values(reader, run.fields, run.counts)
    lengths, returns, last, terminated, truncated = (torch.cat(parts) for parts in zip(*run.ends, strict=True))
    return Survey(
        rows=reader.rows,
        nbytes=reader.nbytes,
        observations=[run.fields[name_of(key)] for key in reader.vectors],
        images=list(run.images.values()),
        actions=run.fields["actions"],
        rewards=run.fields["rewards"],
        lengths=lengths,
        returns=returns,
        last=last,
        terminated=terminated,
        truncated=truncated,
        counts=_repeats(run) | run.counts | _returning(run),
        repeats_are_estimated=run.every > 1,
        bounds=bounds,
        at_bound=at_bound,
        outside=outside,
        far=far,
    )


class _Scan:
    """What has been seen up to a row."""

    def __init__(self, reader: Reader):
        self.reader = reader
        self.counts: dict[tuple[str, str], Rows] = defaultdict(Rows)
        self.fields: dict[str, ColumnStats] = {}
        self.images: dict[str, Images] = {}
        self.ends: list[tuple[Tensor, ...]] = []
        self.numbers: list[Tensor] = []
        self.open = (0, 0.0)  # rows and return of the episode that goes on
        self.every = 2 ** max(0, math.ceil(math.log2(reader.rows / HASHED_ROWS)))
        self.hashes: list[Tensor] = []
        values = sum(reader.leaves[key][0].numel() for key in [*reader.vectors, "action"]) + 1
        picks = max(1, min(SAMPLE_ROWS, SAMPLE_VALUES // values, reader.rows))
        # one random row of each stretch: even steps could meet every episode at the same time step
        stretch = torch.linspace(0, reader.rows, picks + 1, dtype=torch.float64)
        jitter = torch.rand(picks, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.picks = (stretch[:-1] + jitter * stretch.diff()).long().clamp(max=reader.rows - 1)
        if picks == reader.rows:
            self.picks = torch.arange(picks)

    def chunk(self, start: int, stop: int) -> None:
        """Take in the rows from ``start`` up to ``stop``."""
        reader = self.reader
        hashes = torch.zeros(stop - start, dtype=torch.int64)
        rewards = self._vector("rewards", reader.matrix(("next", "reward"), start, stop), start, hashes)
        self._vector("actions", reader.matrix("action", start, stop), start, hashes)
        flags = terminated, _, last = self._flags(start, stop, rewards)
        hashes += _mixed(terminated.long() + 17)
        for key in reader.vectors:
            values = self._vector(name_of(key), reader.matrix(key, start, stop), start, hashes)
            self._zeros(key, name_of(key), values, torch.ones_like(last), start)
            if next_key(key) in reader.leaves:
                self._following(key, values, flags, start, hashes)
        for key in reader.images:
            for image in (key, next_key(key)):
                if image in reader.leaves:
                    self._image(image, start, stop, hashes)
        keep = hashes & (self.every - 1) == 0
        self.hashes.append(torch.stack([hashes[keep], keep.nonzero().squeeze(1) + start]))

    def _count(self, kind: str, name: str, mask: Tensor, start: int) -> None:
        self.counts[kind, name].add(mask.numpy(), start)

    def _vector(self, name: str, values: Tensor, start: int, hashes: Tensor) -> Tensor:
        """Statistics and hashes of a field's chunk ``[R, D]``, which comes back."""
        if name not in self.fields:
            self.fields[name] = ColumnStats.empty(name, values.shape[1])
        columns = self.fields[name]
        finite = self._finite(name, values, start)
        columns.add(values, finite)
        if float(values.abs().amax()) > HUGE or finite is not None:
            self._count("huge", name, (values.abs() > HUGE).logical_and(values.isfinite()).any(1), start)
        mixed = _mixed(_bits(values))
        rows = _mixed(torch.arange(start, start + len(values))) | 1
        columns.mark = columns.mark + (mixed * rows[:, None]).sum(0)
        hashes += _hashes(name, mixed)
        low, high = torch.searchsorted(self.picks, torch.tensor([start, start + len(values)])).tolist()
        columns.samples.append(values[self.picks[low:high] - start].float())
        return values

    def _finite(self, name: str, values: Tensor, start: int) -> Tensor | None:
        if math.isfinite(float(values.sum(dtype=torch.float64))):
            return None
        finite = values.isfinite()
        self._count("not finite", name, ~finite.all(1), start)
        return finite

    def _zeros(self, key: Key, name: str, values: Tensor, among: Tensor, start: int) -> None:
        # a single observation may well pass through zero, and integers may count from it
        if values.shape[1] > 1 and self.reader.leaves[key].is_floating_point():
            self._count("zero", name, _where(values[:, 0] == 0, lambda at: (values[at] == 0).all(1)) & among, start)

    def _following(
        self, key: Key, values: Tensor, flags: tuple[Tensor, Tensor, Tensor], start: int, hashes: Tensor
    ) -> None:
        """The next observation of each row, against its own and the following row's observation."""
        reader, name, rows = self.reader, name_of(key, following=True), len(values)
        terminated, stops, last = flags
        after = reader.matrix(next_key(key), start, start + rows)
        self._finite(name, after, start)
        hashes += _hashes(name, _mixed(_bits(after)))
        if after.shape != values.shape:
            return
        self._zeros(key, name, after, ~terminated, start)
        still = _where(after[:, 0] == values[:, 0], lambda at: (after[at] == values[at]).all(1))
        self._count("still", name, still & ~terminated, start)
        row_after = reader.matrix(key, start + 1, start + rows + 1)
        after, last, terminated = after[: len(row_after)], last[: len(row_after)], terminated[: len(row_after)]
        differs = (after != row_after).any(1)
        self._count("joined", name, ~differs & last & ~terminated, start)
        apart = _where(differs & ~last & ~stops[: len(last)], lambda at: _far(after[at], row_after[at]))
        self._count("not continued", name, apart, start)

    def _flags(self, start: int, stop: int, rewards: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Count flags, and close the episodes that end in a chunk: rows that are terminated, done, the last."""
        reader = self.reader
        terminated = reader.flag("terminated", start, stop)
        assert terminated is not None  # the reader has seen to it
        done, truncated = reader.flag("done", start, stop), reader.flag("truncated", start, stop)
        if truncated is None:
            truncated = torch.zeros_like(terminated) if done is None else done & ~terminated
        flagged = terminated | truncated
        stops = flagged if done is None else flagged | done
        last, number = stops.clone(), reader.number(start, stop + 1)
        if number is not None:
            last[: len(number) - 1] = number[1:] != number[:-1]
        if reader.steps and number is None:
            last |= (torch.arange(start, stop) + 1) % reader.steps == 0
        if stop == reader.rows:
            last[-1] = True
        if number is not None:
            self.numbers.append(number[: stop - start][last])
        for kind, mask in (("terminated", terminated), ("truncated", truncated), ("both", terminated & truncated)):
            self._count(kind, "flags", mask, start)
        self._count("unexplained", "done", stops & ~flagged, start)
        self._count("inside", "done", stops & ~last, start)
        self._close(last, rewards, start, terminated, truncated)
        return terminated, stops, last

    def _close(self, last: Tensor, rewards: Tensor, start: int, terminated: Tensor, truncated: Tensor) -> None:
        at = last.nonzero().squeeze(1)
        segment = last.long().cumsum(0) - last.long()
        gains = torch.nan_to_num(rewards.double().sum(1), 0.0, 0.0, 0.0)
        sums = torch.zeros(len(at) + 1, dtype=torch.float64).index_add_(0, segment, gains)
        rows = torch.bincount(segment, minlength=len(at) + 1)
        rows[0] += self.open[0]
        sums[0] += self.open[1]
        self.open = int(rows[-1]), float(sums[-1])
        self.ends.append((rows[:-1], sums[:-1], at + start, terminated[at], truncated[at]))

    def _image(self, key: Key, start: int, stop: int, hashes: Tensor) -> None:
        leaf = self.reader.leaves[key]
        name = name_of(key[1:], following=True) if isinstance(key, tuple) and key[0] == "next" else name_of(key)
        chunk = leaf[start:stop].detach().cpu()
        image = self.images.setdefault(name, Images(name, tuple(leaf.shape[1:]), leaf.dtype))
        if chunk.is_floating_point():
            finite = self._finite(name, chunk.reshape(len(chunk), -1), start)
            chunk = chunk if finite is None else torch.nan_to_num(chunk, 0.0, 0.0, 0.0)
        image.low, image.high = min(image.low, float(chunk.amin())), max(image.high, float(chunk.amax()))
        chunk = chunk.reshape(len(chunk), -1)
        chunk = chunk[:, :: max(1, chunk.shape[1] // IMAGE_VALUES)].float()
        hashes += _hashes(name, _mixed(_bits(chunk)))


def _repeats(run: _Scan) -> dict[tuple[str, str], Rows]:
    """Rows whose hash an earlier row has."""
    hashes, rows = torch.cat(run.hashes, 1)
    hashes, order = hashes.sort(stable=True)
    repeated = rows[order[1:][hashes[1:] == hashes[:-1]]]
    first = int(repeated.min()) if len(repeated) else -1
    return {("repeated", "transitions"): Rows(len(repeated) * run.every, first)}


def _returning(run: _Scan) -> dict[tuple[str, str], Rows]:
    """Rows of episodes whose number an earlier one has, with others between."""
    if not run.numbers:
        return {}
    lengths, _, last, _, _ = (torch.cat(parts) for parts in zip(*run.ends, strict=True))
    numbers, order = torch.cat(run.numbers).sort(stable=True)
    again = order[1:][numbers[1:] == numbers[:-1]]
    if not len(again):
        return {}
    first = int((last - lengths + 1)[again].min())
    return {("comes back", "episode"): Rows(int(lengths[again].sum()), first)}


def _where(candidates: Tensor, test: Callable[[Tensor], Tensor]) -> Tensor:
    """Rows ``[R]`` among the candidates for whose indices ``[K]`` the test holds."""
    at = candidates.nonzero().squeeze(1)
    found = torch.zeros_like(candidates)
    if len(at):
        found[at] = test(at)
    return found


def _far(a: Tensor, b: Tensor) -> Tensor:
    """Rows ``[R]`` that differ by more than rounding does, of values that are not small beside their row."""
    scale = torch.maximum(b.abs(), 1e-2 * b.abs().amax(1, keepdim=True))
    apart = (a - b).abs()
    return ((apart > SAME * scale) & apart.isfinite()).any(1)


def _bits(values: Tensor) -> Tensor:
    """Floats as int64, equal where they are; both zeros are one."""
    return (values + 0.0).view(torch.int32 if values.dtype == torch.float32 else torch.int64).long()


def _hashes(name: str, mixed: Tensor) -> Tensor:
    """Hash of each row ``[R]`` of a field's mixed words ``[R, D]``; it depends on their order and on the field."""
    weights = _mixed(torch.arange(mixed.shape[1]) + zlib.crc32(name.encode())) | 1
    return (mixed * weights).sum(1)


def _mixed(words: Tensor) -> Tensor:
    """A bijection of int64 that spreads each bit over the others."""
    words = (words ^ 0x5DEECE66D) * 0x1F3D5B79A2C8E695
    words = (words ^ (words >> 32)) * 0x2545F4914F6CDD1D
    return words ^ (words >> 29)
