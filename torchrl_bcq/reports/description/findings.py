"""Rules that find possible defects in a dataset, and their messages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torchrl_bcq.data.checks import Rows
from torchrl_bcq.reports.description.fields import ColumnStats
from torchrl_bcq.reports.description.scan import HUGE, OUTLIER, Survey

FEW_ROWS = 1000  # fewer than ten batches of 100: networks memorise them
NEARLY_ALL = 0.9  # of rows that equal their successor: no task stands still so often
TIME_LIMITED = 3  # episodes of the greatest length: so many are hardly a coincidence
MOST = 0.5  # of rows at a bound; the middle of the range is then the exception
TINY_RANGE = 0.05  # of the spec's: units differ by more than a factor of 20
SCALES = 1000.0  # between standard deviations of columns: a network cannot see the small one

TEXTS = {  # by kind of defect, the most certain ones first
    "not finite": "{field} has {rows} that are not finite; drop or repair them.",
    "zero": "{field} has {rows} that are all zero; drop them, unless zero is a state of the task.",
    "zero successor": "{field} has {rows} that are all zero and not terminated; drop them or store the true successor.",
    "no observations": "observations are missing in all {rows}, under any key; add them, a policy needs them.",
    "all terminated": (
        "terminated is set in all {rows}, so each target is the reward alone; set it where an episode ended in a final "
        "state, and truncated where a time limit cut it off."
    ),
    "no flags": (
        "terminated and truncated are set in none of {rows}, {episodes}; that is right if only time limits ended them, "
        "otherwise set terminated where an episode ended in a final state."
    ),
    "both flags": "terminated and truncated are both set in {rows}; clear terminated where a time limit cut it off.",
    "unexplained": (
        "done is set in {rows} where neither terminated nor truncated is, and targets use the value of the next "
        "observation; set terminated where the state was final, truncated where a time limit cut the episode off."
    ),
    "inside": "done is set in {rows} inside an episode, whose number continues; correct the flags, or episode.",
    "comes back": "episode has {rows} that return to an earlier number; keep the rows of an episode together.",
    "single rows": "episode has {rows}, each an episode of its own; check the flags, or the episodes' numbers.",
    "time limit": (
        "terminated has {rows} that end an episode after {longest} steps, the longest, as a time limit does; if it was "
        "a time limit, set truncated instead, or targets treat the next value as zero."
    ),
    "still": (
        "{field} has {rows} equal to the observation of the same row; they were probably stored without the shift by "
        "one step: leave the field out, and it is taken from the next row."
    ),
    "not continued": (
        "{field} has {rows} that are not the observation of the next row, in the same episode; unless rows were left "
        "out or shuffled, leave the field out, and it is taken from the next row."
    ),
    "joined": (
        "{field} has {rows} that end an episode without terminating and hold the first observation of the next one; if "
        "there was a reset between, drop them, or store the last observation before it."
    ),
    "repeated": "transitions has {rows} that repeat earlier rows; drop them, unless states and actions are few.",
    "constant rewards": "rewards is {value:g} in all {rows}, so no action is better than another; check the recording.",
    "huge": "{field} has {rows} of magnitude above {huge:.0f}; check the units, or scale them with Normalization.fit.",
    "outlier": (
        "rewards has {rows} inside an episode of more than {outlier:.0f} times the magnitude of 99% of the others; "
        "drop them, unless the task pays such rewards."
    ),
    "constant": "{field} is constant in {columns}, in all {rows}; check that it was recorded.",
    "same": "{field} is the same in {columns}, in all {rows}; check that each was recorded.",
    "whole": (
        "actions is of whole numbers in all {rows}, from {low:g} to {high:g}; that is normal for bang-bang control, "
        "otherwise they were rounded or are discrete, and BCQ needs continuous ones."
    ),
    "outside": ("actions has {rows} outside the action spec, such as {rows.example}; clip or rescale them."),
    "at bounds": (
        "actions has {rows} at {bound} in {columns}; that is normal for bang-bang control, otherwise check that they "
        "were not clipped, or scaled wrongly."
    ),
    "narrow": (
        "actions spans only {low:g} to {high:g} of the action spec's {spec_low:g} to {spec_high:g} in {columns}, in "
        "all {rows}; if they are normalised, scale them to the spec's units."
    ),
    "far": (
        "{field} has {rows} far from all others, such as {rows.example}; if that stands for a missing value, drop or "
        "repair them."
    ),
    "scales": (
        "{field} differs in scale in all {rows}: the standard deviation is {small:.3g} in column {small_column} and "
        "{large:.3g} in column {large_column}; scale them with Normalization.fit."
    ),
    "few rows": "transitions has only {rows}, fewer than {few}; record more, networks overfit so few.",
}


@dataclass(frozen=True)
class Finding:
    """A possible defect: its kind and field, the number of rows, the first of them, and what to do."""

    kind: str
    field: str
    rows: int
    first: int
    message: str

    def __str__(self) -> str:
        """Return the message."""
        return self.message


def findings(survey: Survey) -> list[Finding]:
    """Apply all rules, and sort what they find in the order of :data:`TEXTS`."""
    rules = _counted, _flags, _continuity, _columns, _actions, _scales
    found = [finding for rule in rules for finding in rule(survey)]
    return sorted(found, key=lambda finding: list(TEXTS).index(finding.kind))


def _report(kind: str, field: str, rows: Rows, **values: Any) -> Iterator[Finding]:
    """The finding of a kind with its text, or nothing if there are no rows."""
    if rows.count:
        values |= {"field": field, "rows": rows, "huge": HUGE, "outlier": OUTLIER, "few": FEW_ROWS}
        yield Finding(kind, field, rows.count, rows.first, TEXTS[kind].format(**values))


def _counted(survey: Survey) -> Iterator[Finding]:
    for (kind, field), rows in survey.counts.items():
        if kind not in ("still", "not continued", "joined"):  # see _continuity
            yield from _report(kind, field, rows)
    if not survey.observations and not survey.images:
        yield from _report("no observations", "observations", survey.all_rows)
    if survey.rows < FEW_ROWS:
        yield from _report("few rows", "transitions", survey.all_rows)


def _flags(survey: Survey) -> Iterator[Finding]:
    """Flags that are set in all rows or in none, and lengths of episodes."""
    if not survey.terminated_rows and not survey.truncated_rows:
        count = len(survey.lengths)
        episodes = f"though there are {count} episodes" if count > 1 else "so they are one endless episode"
        yield from _report("no flags", "terminated", survey.all_rows, episodes=episodes)
    longest = int(survey.lengths.max())
    limited = survey.terminated & (survey.lengths == longest)
    count = int(limited.sum())
    if survey.terminated_rows == survey.rows:
        yield from _report("all terminated", "terminated", survey.all_rows)
    elif longest == 1 and survey.rows > 1:
        yield from _report("single rows", "episode", survey.all_rows)
    elif count >= TIME_LIMITED and count > len(limited) / 2:
        yield from _report("time limit", "terminated", Rows(count, int(survey.last[limited][0])), longest=longest)


def _continuity(survey: Survey) -> Iterator[Finding]:
    """Next observations against the observations of the same and of the next row."""
    moving = survey.rows - survey.terminated_rows
    for observation in survey.observations:
        if observation.constant.all():
            continue
        name = "next_" + observation.name if observation.name == "observations" else "next." + observation.name
        still, apart, joined = (survey.counts[kind, name] for kind in ("still", "not continued", "joined"))
        coarse = observation.whole and len(observation.low) == 1  # a switch often keeps its value
        if moving and still.count > NEARLY_ALL * moving and (apart.count or not coarse):
            yield from _report("still", name, still)
        else:
            yield from _report("not continued", name, apart)
        if not coarse:
            yield from _report("joined", name, joined)


def _columns(survey: Survey) -> Iterator[Finding]:
    """Columns that are constant or equal another one; for rewards, a constant that is not the cost of time."""
    reward = survey.rewards.low[0]
    if survey.rewards.constant.all() and (not reward or not survey.terminated_rows):
        yield from _report("constant rewards", "rewards", survey.all_rows, value=float(reward))
    for field in (survey.actions, *survey.observations):
        if constant := field.constant.nonzero().flatten().tolist():
            yield from _report("constant", field.name, survey.all_rows, columns=_listed(constant))
        if pairs := _pairs(field):
            yield from _report("same", field.name, survey.all_rows, columns=pairs)


def _actions(survey: Survey) -> Iterator[Finding]:
    """Actions of whole numbers, and actions against the spec or, without one, against their own extremes."""
    actions, spec = survey.actions, survey.bounds
    low, high = actions.low, actions.high
    if actions.whole and not actions.constant.all():
        yield from _report("whole", "actions", survey.all_rows, low=low.min(), high=high.max())
    often = [at for at, rows in enumerate(survey.at_bound) if rows.count > MOST * survey.rows and low[at] < high[at]]
    if often:
        rows = max((survey.at_bound[at] for at in often), key=lambda rows: rows.count)
        bound = "a bound of the action spec" if spec else "the smallest or largest value"
        yield from _report("at bounds", "actions", rows, bound=bound, columns=_listed(often))
    if spec is None:
        return
    share = (high - low) / (spec[1] - spec[0])
    if narrow := ((share > 0) & (share < TINY_RANGE)).nonzero().flatten().tolist():
        at = narrow[0]
        spans = {"low": low[at], "high": high[at], "spec_low": spec[0][at], "spec_high": spec[1][at]}
        yield from _report("narrow", "actions", survey.all_rows, columns=_listed(narrow), **spans)


def _scales(survey: Survey) -> Iterator[Finding]:
    """Columns of very different scales, unless huge or far values explain them."""
    for field in survey.observations:
        varying = (field.low < field.high).nonzero().flatten()
        std = field.std[varying]
        explained = survey.counts["huge", field.name].count or survey.counts["far", field.name].count
        if len(varying) and std.max() > SCALES * std.min() and not explained:
            small, large = int(std.argmin()), int(std.argmax())
            columns = {"small_column": varying[small], "large_column": varying[large]}
            yield from _report("scales", field.name, survey.all_rows, small=std[small], large=std[large], **columns)


def _pairs(field: ColumnStats) -> str:
    """Columns that equal an earlier one, except constant ones: ``columns 2 and 7 (and 1 more pair)``."""
    first: dict[int, int] = {}
    varying = (field.low < field.high).nonzero().flatten().tolist()
    pairs = [(earlier, at) for at in varying if (earlier := first.setdefault(field.checksums[at], at)) != at]
    if not pairs:
        return ""
    more = f" (and {len(pairs) - 1} more {'pair' if len(pairs) == 2 else 'pairs'})" if len(pairs) > 1 else ""
    return f"columns {pairs[0][0]} and {pairs[0][1]}{more}"


def _listed(columns: list[int]) -> str:
    """Columns by number, at most four: ``columns 27, 28, 29 and 81 more``."""
    if len(columns) > 4:
        return f"columns {', '.join(map(str, columns[:3]))} and {len(columns) - 3} more"
    return f"column{'s' * (len(columns) > 1)} {', '.join(map(str, columns))}"
