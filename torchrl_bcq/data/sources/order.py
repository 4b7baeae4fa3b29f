"""Checks that the rows of a table are in order, and marks the ends of episodes."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np

from torchrl_bcq.data.checks import Columns
from torchrl_bcq.data.defects import Rows, listed
from torchrl_bcq.data.frame_store import equal_rows
from torchrl_bcq.data.transitions import with_successors
from torchrl_bcq.errors import DatasetError, remedy

_logger = logging.getLogger(__name__)

# messages about rows in a wrong order, or with a wrong episode name, step number or flag
_NAMELESS = "the episode column has {} without a name or number; fill in the cells, or drop these rows."
_TORN = "episode has {} where an earlier episode continues; sort the table by episode and step."
_INSIDE = (
    "terminated or truncated is set in {} before the last row of an episode; correct the flags, or renumber the "
    "episodes."
)
_STEPLESS = "step has {} without a finite number; fill in the numbers, or drop these rows."
_JUMPS = (
    "step has {} that are not 1 more than the row before; sort the table by episode and step, and start a new episode "
    "after each gap."
)


def check_limit(max_episode_steps: int | None) -> None:
    """Raise a ``DatasetError`` if the time limit is not None and not a whole number of at least 1."""
    if max_episode_steps is not None and (not isinstance(max_episode_steps, int) or max_episode_steps < 1):
        raise DatasetError(f"max_episode_steps is {max_episode_steps!r}, expected a whole number of at least 1.")


def cut_at_limit(chunks: Iterator[Columns], max_episode_steps: int | None, *, report: bool = True) -> Iterator[Columns]:
    """Yield the chunks. A missing ``truncated`` is computed from ``max_episode_steps``, if this is set.

    If ``report`` is true, a warning is logged if the time limit has no effect, or if the next observations show other
    ends of episodes.
    """
    steps, start, apart = 0, 0, Rows()  # steps: number of steps of the current episode in earlier chunks
    for number, chunk in enumerate(chunks):
        if "truncated" in chunk and max_episode_steps is not None and report and not number:
            _logger.warning("max_episode_steps has no effect, because the file says where episodes were cut off.")
        if "truncated" in chunk or (max_episode_steps is None and "next_observations" in chunk):
            yield chunk
            continue
        if max_episode_steps is None:
            raise DatasetError(
                "it has neither timeouts nor next_observations, so it is unknown where episodes were cut off. "
                + remedy(
                    "Pass max_episode_steps=, add timeouts, or use from_arrays if no episode was cut off.",
                    "Set reader.max_episode_steps=N to the time limit, or add timeouts, which are all 0 if no episode "
                    "was cut off.",
                )
            )
        ends = np.asarray(chunk["terminated"]).reshape(-1) == 1
        row = np.arange(len(ends))
        starts = np.where(np.roll(ends, 1), row, -steps)
        starts[:1] = -steps
        step = row - np.maximum.accumulate(starts) + 1  # rows since the last terminated row, including this row
        truncated = ~ends & (step % max_episode_steps == 0)
        now, after = (np.asarray(chunk.get(name, ())) for name in ("observations", "next_observations"))
        if len(ends) > 1 and now.shape == after.shape and len(now) == len(ends):
            apart.add(~(equal_rows(now[1:], after[:-1]) | (ends | truncated)[:-1]), start)
        yield {**chunk, "truncated": truncated}
        start += len(ends)
        steps = int(step[-1]) if len(step) and not ends[-1] else 0
    if apart.count and report:
        advice = remedy("leave max_episode_steps out", "leave reader.max_episode_steps out")
        _logger.warning(
            "inside an episode of max_episode_steps, the next observation differs from the observation of the next row "
            "in %s. If episodes end there, %s: then the next observations show the ends of episodes.",
            *(apart, advice),
        )


def in_order(chunks: Iterator[dict[str, np.ndarray]]) -> Iterator[Columns]:
    """Mark the last row of each episode; raise an error at the end if rows are out of order."""
    start = 0
    seen: set[object] = set()  # names of all episodes so far
    defects = {remedy: Rows() for remedy in (_NAMELESS, _TORN, _INSIDE, _STEPLESS, _JUMPS)}
    for fields, is_end in with_successors(chunks):
        chunk = {field: values[:-1] for field, values in fields.items() if field not in ("episode", "step")}
        terminated = chunk["terminated"][:, 0] == 1
        truncated = chunk.get("truncated", np.zeros((len(terminated), 1)))
        last = done = terminated | (truncated[:, 0] == 1)
        if "episode" in fields:
            names = fields["episode"]
            last = (names[:-1] != names[1:]).astype(bool) | is_end
            # find empty cells, which are None or NaN; name != name is true only for NaN
            defects[_NAMELESS].add(np.array([name is None or name != name for name in names[:-1]]), start)
            defects[_INSIDE].add(done & ~last, start)
            defects[_TORN].add(_returning(names, last & (not is_end), seen), start + 1)
            chunk["truncated"] = np.where((last & ~terminated)[:, None], 1, truncated)
        if "step" in fields:
            step = fields["step"][:, 0]
            defects[_STEPLESS].add(~np.isfinite(step[:-1]), start)
            defects[_JUMPS].add((step[1:] != step[:-1] + 1) & ~(last | is_end), start + 1)
        start += len(done)
        yield chunk
    if found := [remedy.format(rows) for remedy, rows in defects.items() if rows.count]:
        raise DatasetError(listed(found))


def _returning(names: np.ndarray, last: np.ndarray, seen: set[object]) -> np.ndarray:
    """Return a mask of rows whose next row belongs to an earlier episode; add new names to ``seen``."""
    found = np.zeros(len(last), dtype=bool)
    seen.add(names[0])
    for row in last.nonzero()[0]:  # a loop over episodes, not over all rows
        found[row] = names[row + 1] in seen
        seen.add(names[row + 1])
    return found
