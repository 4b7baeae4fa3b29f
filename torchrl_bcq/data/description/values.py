"""What looks wrong in values: of rewards, actions and observations."""

from __future__ import annotations

from collections.abc import Iterator

from torchrl_bcq.data.description.extremes import OUTLIER
from torchrl_bcq.data.description.finding import Finding, column_list, everywhere, found, pairs
from torchrl_bcq.data.description.scan import HUGE
from torchrl_bcq.data.description.survey import Survey

MOST = 0.5  # of rows at a bound; the middle of the range is then the exception
TINY_RANGE = 0.05  # of the spec's: units differ by more than a factor of 20
SCALES = 1000.0  # between columns' standard deviations: a network sees nothing of the small one


def broken(survey: Survey) -> Iterator[Finding]:
    """Rows that are not finite, or all zero."""
    for (kind, field), rows in survey.counts.items():
        if kind == "not finite" and rows.count:
            yield found(field, rows, f"{field} has {rows} that are not finite; drop or repair them.")
    for (kind, field), rows in survey.counts.items():
        if kind == "zero" and rows.count and field.startswith("next"):
            message = (
                f"{field} has {rows} that are all zero and not terminated, so BCQ would take the value of a state "
                "that never was; drop them, or store the true successor."
            )
            yield found(field, rows, message)
        elif kind == "zero" and rows.count:
            message = f"{field} has {rows} that are all zero; drop them, unless zero is a state of the task."
            yield found(field, rows, message)


def rewards(survey: Survey) -> Iterator[Finding]:
    """Constant, huge, far from the others."""
    rewards, everything = survey.rewards, everywhere(survey)
    huge, outlier = survey["huge", "rewards"], survey["outlier", "rewards"]
    if rewards.constant.all() and (not rewards.low[0] or not survey["terminated", "flags"].count):
        message = (
            f"rewards is {float(rewards.low[0]):g} in all {everything}, so no action is better than another; check "
            "that it was written and read properly."
        )
        yield found("rewards", everything, message)
    if huge.count:
        message = (
            f"rewards has {huge} of magnitude above {HUGE:.0f}; check the units, or scale them with Normalization.fit."
        )
        yield found("rewards", huge, message)
    elif outlier.count:
        message = (
            f"rewards has {outlier} inside an episode of more than {OUTLIER:.0f} times the magnitude of 99% of the "
            "others; drop them, unless the task pays such rewards."
        )
        yield found("rewards", outlier, message)


def actions(survey: Survey) -> Iterator[Finding]:
    """Constant and whole-numbered columns."""
    actions, everything = survey.actions, everywhere(survey)
    constant = actions.constant.nonzero().flatten().tolist()
    if constant:
        message = (
            f"actions is constant in {column_list(constant)}, in all {everything}; check that it was recorded: BCQ "
            "can only repeat it."
        )
        yield found("actions", everything, message)
    if actions.whole and not actions.constant.all():
        message = (
            f"actions is of whole numbers in all {everything}, from {actions.low.min():g} to {actions.high.max():g}; "
            "that is normal for bang-bang control, otherwise they were rounded or are discrete, and BCQ needs "
            "continuous ones."
        )
        yield found("actions", everything, message)
    repeated = pairs(actions)
    if repeated:
        message = f"actions is the same in {repeated}, in all {everything}; check that each was recorded."
        yield found("actions", everything, message)


def bounds(survey: Survey) -> Iterator[Finding]:
    """Actions against the spec; without one, against their own extremes."""
    outside, low, high = survey["outside", "actions"], survey.actions.low, survey.actions.high
    if outside.count and survey.outside and survey.bounds:
        value, at = survey.outside
        message = (
            f"actions has {outside} outside the action spec, such as {value:g} in column {at}, where it spans "
            f"{survey.bounds[0][at]:g} to {survey.bounds[1][at]:g}; clip or rescale them."
        )
        yield found("actions", outside, message)
    often = [
        column
        for column, rows in enumerate(survey.at_bound)
        if rows.count > MOST * survey.rows and low[column] < high[column]
    ]
    if often:
        rows = max((survey.at_bound[column] for column in often), key=lambda rows: rows.count)
        bound = "a bound of the action spec" if survey.bounds else "the smallest or largest value"
        message = (
            f"actions has {rows} at {bound} in {column_list(often)}; that is normal for bang-bang control, otherwise "
            "check that they were not clipped, or scaled wrongly."
        )
        yield found("actions", rows, message)
    if survey.bounds is None:
        return
    share = (high - low) / (survey.bounds[1] - survey.bounds[0])
    narrow = ((share > 0) & (share < TINY_RANGE)).nonzero().flatten().tolist()
    if narrow:
        at, everything = narrow[0], everywhere(survey)
        message = (
            f"actions spans only {low[at]:g} to {high[at]:g} of the action spec's {survey.bounds[0][at]:g} to "
            f"{survey.bounds[1][at]:g} in {column_list(narrow)}, in all {everything}; if they are normalised, scale "
            "them to the spec's units."
        )
        yield found("actions", everything, message)


def columns(survey: Survey) -> Iterator[Finding]:
    """Observation columns that are constant, or one and the same."""
    everything = everywhere(survey)
    for observation in survey.observations:
        constant = observation.constant.nonzero().flatten().tolist()
        if constant:
            message = (
                f"{observation.name} is constant in {column_list(constant)}, in all {everything}; leave out what is "
                "constant, or check that it was recorded."
            )
            yield found(observation.name, everything, message)
        repeated = pairs(observation)
        if repeated:
            message = (
                f"{observation.name} is the same in {repeated}, in all {everything}; leave one out, or check that each "
                "was recorded."
            )
            yield found(observation.name, everything, message)


def far(survey: Survey) -> Iterator[Finding]:
    """Observations that stand for something else, such as -9999 for a missing one."""
    for name, example in survey.far.items():
        rows = survey["far", name]
        if survey["huge", name].count:
            continue
        message = (
            f"{name} has {rows} far from all others, such as {example.value:g} in column {example.column}, where they "
            f"span {example.low:g} to {example.high:g}; if that stands for a missing value, drop or repair them."
        )
        yield found(name, rows, message)


def scales(survey: Survey) -> Iterator[Finding]:
    """Observation columns of huge values, or of very different spread."""
    for observation in survey.observations:
        name, huge = observation.name, survey["huge", observation.name]
        if huge.count:
            message = (
                f"{name} has {huge} of magnitude above {HUGE:.0f}; check the units, or scale them with "
                "Normalization.fit."
            )
            yield found(name, huge, message)
        varying = (observation.low < observation.high).nonzero().flatten()
        spread = observation.std[varying]
        if len(varying) and spread.max() > SCALES * spread.min() and not huge.count and name not in survey.far:
            small, large = int(spread.argmin()), int(spread.argmax())
            message = (
                f"{name} differs in scale in all {everywhere(survey)}: the standard deviation is {spread[small]:.3g} "
                f"in column {varying[small]} and {spread[large]:.3g} in column {varying[large]}; scale them with "
                "Normalization.fit."
            )
            yield found(name, everywhere(survey), message)
