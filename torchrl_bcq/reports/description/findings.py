"""Rules that find possible defects in a dataset, and their messages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torchrl_bcq.data.defects import Rows, listed_columns
from torchrl_bcq.errors import remedy
from torchrl_bcq.reports.description.fields import ColumnStats
from torchrl_bcq.reports.description.scan import HUGE, OUTLIER, Survey

FEW_ROWS = 1000  # report a dataset with fewer rows than ten batches of 100, because networks memorise it
NEARLY_ALL = 0.9  # if more than this fraction of next observations equals the observation of the same row, report it
TIME_LIMITED = 3  # this many episodes of the greatest length suggest a time limit
MOST = 0.5  # report an action column if more than this fraction of its rows is at a bound
TINY_RANGE = 0.05  # actions that use less than this fraction of the spec's range probably have different units
SCALES = 1000.0  # report columns whose std differs by a larger factor: networks ignore the column of smaller std

TEXTS = {  # a message for each kind of defect; the most certain kinds come first
    "not finite": "{field} has {rows} that are not finite; drop or repair these rows.",
    "dropped": (
        "values that are not finite are also in {rows} that the reader drops, because they have no next observation; "
        "drop or repair these rows."
    ),
    "zero": "{field} has only zeros in {rows}; drop these rows, unless zero is a valid state of the task.",
    "zero successor": (
        "{field} has only zeros in {rows} where terminated is not set; drop these rows, or store the true next "
        "observation."
    ),
    "no observations": "observations are missing in all {rows}; add them under any key, because a policy needs them.",
    "all terminated": (
        "terminated is set in all {rows}, so each target is the reward alone; set terminated only where an episode "
        "ended in a final state, and truncated where a time limit ended it."
    ),
    "no flags": (
        "terminated and truncated are set in none of {rows}{but}, {episodes}; this is right if only time limits ended "
        "the episodes, otherwise set terminated where an episode ended in a final state."
    ),
    "both flags": (
        "terminated and truncated are both set in {rows}; clear terminated where a time limit ended the episode."
    ),
    "unexplained": (
        "done is set in {rows} where neither terminated nor truncated is set, so targets use the value of the next "
        "observation; set terminated where the state was final, and truncated where a time limit ended the episode."
    ),
    "inside": (
        "done is set in {rows} although the next row has the same episode number; if torch.cat joined datasets, use "
        "load_transitions([A, B]) or from_rollouts([a, b]) instead; otherwise correct the flags or numbers."
    ),
    "comes back": (
        "episode has {rows} with the number of an earlier episode; if torch.cat joined datasets, use load_transitions("
        "[A, B]) or from_rollouts([a, b]) instead; otherwise store all rows of an episode together."
    ),
    "several groups": (
        "group differs from the row before, in the same episode, in {rows}; correct the groups, or the episode numbers."
    ),
    "single rows": "each of {rows} is an episode of its own; check the flags or the entry episode.",
    "time limit": (
        "terminated is set in {rows} that end episodes after {longest} steps, the greatest length, so a time limit may "
        "have ended them; if so, set truncated instead, because targets use no next value where terminated is set."
    ),
    "still": (
        "{field} equals the observation of the same row in {rows}, so it was probably stored without the shift by one "
        "step; leave this field out, then the observation of the next row is used."
    ),
    "not continued": (
        "{field} differs from the observation of the next row of the same episode in {rows}; if the rows of several "
        "environments alternate, sort them by environment, then by time; unless rows were left out or shuffled, leave "
        "this field out, then the observation of the next row is used."
    ),
    "joined": (
        "{field} holds the first observation of the next episode in {rows} where an episode ends, but terminated is "
        "not set; if the environment was reset there, drop these rows, or store the last observation before the reset; "
        "vector environments of Gymnasium reset in the row after an end, so drop that row instead."
    ),
    "late": (
        "{field} jumps in {rows} that end an episode without terminated: the next observation is close to the next "
        "row and far from its own row, so the episodes probably end one row too late; set truncated one row earlier."
    ),
    "early": (
        "{field} jumps in {rows} that start an episode: the observation is close to the row before and far from its "
        "next observation, so the episodes probably end one row too early; set truncated one row later."
    ),
    "repeated": "transitions has {rows} that repeat earlier rows; drop them, unless there are few states and actions.",
    "constant rewards": "rewards is {value:g} in all {rows}, so no action is better than another; check the recording.",
    "huge": "{field} has {rows} of magnitude above {huge:.0f}; check the units, or {scale}.",
    "outlier": (
        "rewards has {rows} inside an episode with more than {outlier:.0f} times the magnitude of 99% of all rewards; "
        "drop these rows, unless the task gives such rewards."
    ),
    "constant": "{field} is constant in {columns}, in all {rows}; check the recording.",
    "same": "{field} has equal values in {columns}, in all {rows}; check that each column was recorded.",
    "whole": (
        "actions has only whole numbers in all {rows}, from {low:g} to {high:g}; this is normal for bang-bang control, "
        "otherwise the actions are rounded, or they are discrete: then {how}."
    ),
    "no action": "actions has {rows} with no action of the spec, such as {rows.example}; correct the actions.",
    "never": (
        "{absent} of {number} discrete actions occur in no row: {listed}; the data does not show what they lead to; "
        "check the number of actions."
    ),
    "outside": "actions has {rows} outside the action bounds, such as {rows.example}; clip or rescale the actions.",
    "at bounds": (
        "actions has {rows} at {bound} in {columns}; this is normal for bang-bang control, otherwise check whether the "
        "actions were clipped or scaled wrongly."
    ),
    "narrow": (
        "actions spans only {low:g} to {high:g} in {columns}, in all {rows}, but the action bounds are {spec_low:g} to "
        "{spec_high:g}; if the actions are normalised, scale them to the units of the spec."
    ),
    "far": (
        "{field} has {rows} far from all others, such as {rows.example}; if such values mark missing data, drop or "
        "repair these rows."
    ),
    "scales": (
        "{field} has columns of different scales in all {rows}: the standard deviation is {small:.3g} in column "
        "{small_column} and {large:.3g} in column {large_column}; {scale}."
    ),
    "few rows": "transitions has only {rows}, fewer than {few}; record more data, because networks overfit few rows.",
}


_Report = tuple[str, str, Rows, dict[str, Any]]  # kind, field, rows and further values of the message


@dataclass(frozen=True)
class Finding:
    """A possible defect: its kind, its field, the number of rows, the first row, and a message with advice."""

    kind: str
    field: str
    rows: int
    first: int
    message: str

    def __str__(self) -> str:
        """Return the message."""
        return self.message


def findings(survey: Survey) -> list[Finding]:
    """Apply all rules, and sort the findings in the order of ``TEXTS``."""
    rules = _counted, _flags, _continuity, _columns, _actions, _scales
    found = [_finding(survey, *report) for rule in rules for report in rule(survey)]
    if (odd := survey.origins.odd).count:
        found.append(Finding("dropped", "transitions", odd.count, odd.first, TEXTS["dropped"].format(rows=odd)))
    return sorted(found, key=lambda finding: list(TEXTS).index(finding.kind))


def _finding(survey: Survey, kind: str, field: str, rows: Rows, values: dict[str, Any]) -> Finding:
    rows = survey.origins.locate_kept(rows)
    values |= {"field": field, "rows": rows, "huge": HUGE, "outlier": OUTLIER, "few": FEW_ROWS}
    values["scale"] = remedy("scale the values with Normalization.fit", "train with normalize=true")
    return Finding(kind, field, rows.count, rows.first, TEXTS[kind].format(**values))


def _report(kind: str, field: str, rows: Rows, **values: Any) -> Iterator[_Report]:
    """Yield the parts of a finding of this kind, or nothing if there are no rows."""
    if rows.count:
        yield kind, field, rows, values


def _counted(survey: Survey) -> Iterator[_Report]:
    for (kind, field), rows in survey.counts.items():
        if kind not in ("still", "not continued", "joined"):  # _continuity reports these kinds
            yield from _report(kind, field, rows)
    if not (survey.observations or survey.images or survey.stored):
        yield from _report("no observations", "observations", survey.all_rows)
    if survey.rows < FEW_ROWS:
        yield from _report("few rows", "transitions", survey.all_rows)


def _flags(survey: Survey) -> Iterator[_Report]:
    """Find flags that are set in all rows or in none, and episode lengths that suggest wrong flags."""
    if not survey.terminated_rows and survey.truncated_rows == int(survey.truncated[-1]):
        but = " except the last" if survey.truncated_rows else ""  # the readers mark the last row of the data
        count = len(survey.lengths)
        episodes = f"although there are {count} episodes" if count > 1 else "so all rows are one endless episode"
        yield from _report("no flags", "terminated", survey.all_rows, episodes=episodes, but=but)
    longest = int(survey.lengths.max())
    limited = survey.terminated & (survey.lengths == longest)
    count = int(limited.sum())
    if survey.terminated_rows == survey.rows:
        yield from _report("all terminated", "terminated", survey.all_rows)
    elif longest == 1 and survey.rows > 1:
        yield from _report("single rows", "episode", survey.all_rows)
    elif count >= TIME_LIMITED and count > len(limited) / 2:
        yield from _report("time limit", "terminated", Rows(count, int(survey.last[limited][0])), longest=longest)


def _continuity(survey: Survey) -> Iterator[_Report]:
    """Find wrong next observations: compare them with the observations of the same row and the next row."""
    moving = survey.rows - survey.terminated_rows
    for observation in survey.observations:
        if observation.constant.all():
            continue
        name = "next_" + observation.name if observation.name == "observations" else "next." + observation.name
        still, apart, joined = (survey.counts[kind, name] for kind in ("still", "not continued", "joined"))
        # an observation of one whole number, such as an on/off signal, often stays the same: no defect
        coarse = observation.whole and len(observation.low) == 1
        if moving and still.count > NEARLY_ALL * moving and (apart.count or not coarse):
            yield from _report("still", name, still)
        else:
            yield from _report("not continued", name, apart)
        if not coarse:
            yield from _report("joined", name, joined)


def _columns(survey: Survey) -> Iterator[_Report]:
    """Find constant columns, equal columns and constant rewards. A fixed cost per step is no defect."""
    reward = survey.rewards.low[0]
    if survey.rewards.constant.all() and (not reward or not survey.terminated_rows):
        yield from _report("constant rewards", "rewards", survey.all_rows, value=float(reward))
    for field in (survey.actions, *survey.observations):
        if constant := field.constant.nonzero().flatten().tolist():
            yield from _report("constant", field.name, survey.all_rows, columns=_listed(field, constant))
        if pairs := _pairs(field):
            yield from _report("same", field.name, survey.all_rows, columns=pairs)


def _actions(survey: Survey) -> Iterator[_Report]:
    """Find discrete actions that never occur, and actions that are whole, often at a bound, or in a small range."""
    actions, spec = survey.actions, survey.bounds
    low, high = actions.low, actions.high
    if (frequencies := survey.frequencies) is not None:
        absent = [str(index) for index in (frequencies == 0).nonzero().flatten().tolist()]
        listed = ", ".join(absent[:10]) + (f" and {len(absent) - 10} more" if len(absent) > 10 else "")
        rows = survey.all_rows if absent else Rows()
        yield from _report("never", "actions", rows, absent=len(absent), number=len(frequencies), listed=listed)
        return
    if actions.whole and not actions.constant.all():
        how = remedy("pass action_type='discrete' to the reader", "set reader.action_type=discrete")
        yield from _report("whole", "actions", survey.all_rows, low=low.min(), high=high.max(), how=how)
    often = [at for at, rows in enumerate(survey.at_bound) if rows.count > MOST * survey.rows and low[at] < high[at]]
    if often:
        rows = max((survey.at_bound[at] for at in often), key=lambda rows: rows.count)
        bound = "a bound of the action spec" if spec else "the smallest or largest value"
        yield from _report("at bounds", "actions", rows, bound=bound, columns=_listed(actions, often))
    if spec is None:
        return
    share = (high - low) / (spec[1] - spec[0])
    if narrow := ((share > 0) & (share < TINY_RANGE)).nonzero().flatten().tolist():
        at = narrow[0]
        spans = {"low": low[at], "high": high[at], "spec_low": spec[0][at], "spec_high": spec[1][at]}
        yield from _report("narrow", "actions", survey.all_rows, columns=_listed(actions, narrow), **spans)


def _scales(survey: Survey) -> Iterator[_Report]:
    """Find columns of very different scales, unless huge values or outliers explain the difference."""
    for field in survey.observations:
        varying = (field.low < field.high).nonzero().flatten()
        std = field.std[varying]
        explained = survey.counts["huge", field.name].count or survey.counts["far", field.name].count
        if len(varying) and std.max() > SCALES * std.min() and not explained:
            small, large = int(std.argmin()), int(std.argmax())
            columns = {"small_column": field.labels[varying[small]], "large_column": field.labels[varying[large]]}
            yield from _report("scales", field.name, survey.all_rows, small=std[small], large=std[large], **columns)


def _pairs(field: ColumnStats) -> str:
    """Return a text about equal columns that are not constant, such as ``columns 2 and 7 (and 1 more pair)``."""
    first: dict[int, int] = {}
    varying = (field.low < field.high).nonzero().flatten().tolist()
    pairs = [(earlier, at) for at in varying if (earlier := first.setdefault(field.checksums[at], at)) != at]
    if not pairs:
        return ""
    more = f" (and {len(pairs) - 1} more {'pair' if len(pairs) == 2 else 'pairs'})" if len(pairs) > 1 else ""
    return f"columns {field.labels[pairs[0][0]]} and {field.labels[pairs[0][1]]}{more}"


def _listed(field: ColumnStats, columns: list[int]) -> str:
    return listed_columns([field.labels[at] for at in columns])
