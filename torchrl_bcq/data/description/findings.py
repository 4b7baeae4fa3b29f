"""What looks wrong in a dataset, in plain words: one rule, one function."""

from __future__ import annotations

from collections.abc import Iterator

from torchrl_bcq.data.checks import Rows
from torchrl_bcq.data.description import values
from torchrl_bcq.data.description.finding import Finding, everywhere, found
from torchrl_bcq.data.description.survey import Survey

FEW_ROWS = 1000  # less than ten batches of 100: networks learn them by heart
NEARLY_ALL = 0.9  # of rows whose successor is themselves: no task stands still so much
TIME_LIMITED = 3  # episodes of the greatest length, as many as make a coincidence unlikely


def findings(survey: Survey) -> list[Finding]:
    """Apply every rule, the most certain ones first."""
    about_steps = _flags, _ends, _continuity
    about_values = values.rewards, values.actions, values.bounds, values.columns, values.far, values.scales
    rules = values.broken, _missing, *about_steps, *about_values, _amount
    return [finding for rule in rules for finding in rule(survey)]


def _missing(survey: Survey) -> Iterator[Finding]:
    if not survey.observations and not survey.images:
        rows = everywhere(survey)
        message = (
            f"observations is in none of {rows}, under no key; add the observations, or BCQ has nothing to act upon."
        )
        yield found("observations", rows, message)


def _flags(survey: Survey) -> Iterator[Finding]:
    """Terminated, truncated and done, row by row."""
    everything, terminated, both = everywhere(survey), survey["terminated", "flags"], survey["both", "flags"]
    if terminated.count == survey.rows:
        message = (
            f"terminated is set in all {everything}: no value would follow anything, and BCQ would learn rewards only; "
            "set it where an episode ended in a final state, and truncated where a time limit cut it off."
        )
        yield found("terminated", everything, message)
    if not terminated.count and not survey["truncated", "flags"].count:
        episodes = len(survey.lengths)
        what = f"though there are {episodes} episodes" if episodes > 1 else "so they are one endless episode"
        message = (
            f"terminated and truncated are set in none of {everything}, {what}; that is right if nothing but time "
            "limits ended them, otherwise set terminated where an episode ended in a final state."
        )
        yield found("terminated", everything, message)
    if both.count:
        message = (
            f"terminated and truncated are both set in {both}; BCQ takes them as terminated: clear terminated where a "
            "time limit cut the episode off."
        )
        yield found("terminated", both, message)
    done = survey["unexplained", "done"]
    if done.count:
        message = (
            f"done is set in {done} where neither terminated nor truncated is, and BCQ takes the value of what "
            "follows; set terminated where the state was final, truncated where a time limit cut the episode off."
        )
        yield found("done", done, message)


def _ends(survey: Survey) -> Iterator[Finding]:
    """Lengths of episodes, and their numbers."""
    inside, back, lengths = survey["inside", "done"], survey["comes back", "episode"], survey.lengths
    if inside.count:
        message = f"done is set in {inside} inside an episode, whose number goes on; correct the flags, or episode."
        yield found("done", inside, message)
    if back.count:
        message = (
            f"episode has {back} whose number an earlier episode has, with others between; keep the rows of an "
            "episode together and in order, or number the episodes anew."
        )
        yield found("episode", back, message)
    if survey["terminated", "flags"].count == survey.rows or survey.rows == 1:
        return
    longest = int(lengths.max())
    if longest == 1:
        rows = everywhere(survey)
        message = f"episode has {rows}, each an episode of its own; check the flags, or the episodes' numbers."
        yield found("episode", rows, message)
        return
    limited = survey.terminated & (lengths == longest)
    rows = Rows(int(limited.sum()), int(survey.last[limited][0]) if limited.any() else -1)
    if rows.count >= TIME_LIMITED and rows.count > len(lengths) / 2:
        message = (
            f"terminated has {rows} that end an episode after {longest} steps, the longest, as a time limit does; "
            "if one cut them off, set truncated in its place, or BCQ learns that no value follows."
        )
        yield found("terminated", rows, message)


def _continuity(survey: Survey) -> Iterator[Finding]:
    """Observations against next observations, and rows against each other."""
    moving = survey.rows - survey["terminated", "flags"].count
    for observation in survey.observations:
        if observation.constant.all():
            continue
        name = "next_" + observation.name if observation.name == "observations" else "next." + observation.name
        still, apart, joined = (survey[kind, name] for kind in ("still", "not continued", "joined"))
        coarse = observation.whole and len(observation.low) == 1  # a switch stays, and is found, where it is
        if moving and still.count > NEARLY_ALL * moving and (apart.count or not coarse):
            message = (
                f"{name} has {still} equal to the observation of the same row; they were probably stored without the "
                "shift by one step: leave the field out, and it is taken from the next row."
            )
            yield found(name, still, message)
        elif apart.count:
            message = (
                f"{name} has {apart} that are not the observation of the next row, in the same episode; unless rows "
                "were left out or shuffled, leave the field out, and it is taken from the next row."
            )
            yield found(name, apart, message)
        if joined.count and not coarse:
            message = (
                f"{name} has {joined} that end an episode without terminating and hold the first observation of the "
                "next one; if there was a reset between, drop them, or store the last observation before it."
            )
            yield found(name, joined, message)
    repeated = survey["repeated", "transitions"]
    if repeated.count:
        about = "about " if survey.repeats_are_estimated else ""
        message = (
            f"transitions has {about}{repeated} that repeat an earlier row exactly; drop them, unless the task has "
            "so few states and actions."
        )
        yield found("transitions", repeated, message)


def _amount(survey: Survey) -> Iterator[Finding]:
    if survey.rows < FEW_ROWS:
        message = (
            f"transitions has only {everywhere(survey)}, fewer than {FEW_ROWS}; record more, or expect little of them."
        )
        yield found("transitions", everywhere(survey), message)
