"""What is in a dataset, as a text, as a picture and as a list of what looks wrong."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import TensorSpec

from torchrl_bcq.data.description import picture
from torchrl_bcq.data.description.findings import Finding, findings
from torchrl_bcq.data.description.scan import scan
from torchrl_bcq.data.description.survey import Survey

WIDTH = 100  # of a terminal, in characters
SHOWN = 20  # columns in the table


def describe(transitions: TensorDictBase, *, action_spec: TensorSpec | None = None) -> Description:
    """Describe a dataset: print it for a table, ``plot`` it, and see its ``findings``.

    Statistics are exact, over finite values. They are taken a chunk of rows at a time, so the transitions may be
    memory-mapped and larger than the memory.

    Args:
        transitions: of the readers, or a rollout ``[T]`` or ``[B, T]``: ``action``, ``("next", "reward")``,
            ``("next", "terminated")``, and observations under any other keys: those that ``"next"`` has too, if there
            are any. Episodes are told apart by ``episode``, or else by their flags.
        action_spec: bounds to hold the actions against.

    Raises:
        DatasetError: if there is no row, an entry is missing, rows span several steps, or the spec is not Bounded or of
            another size.
    """
    survey = scan(transitions, action_spec)
    return Description(survey, findings(survey))


@dataclass(frozen=True)
class Description:
    """What :func:`describe` found; ``print`` it for the table."""

    survey: Survey
    findings: list[Finding]

    def plot(self, path: str | Path) -> None:
        """Draw it as PNG, in a folder that is made; the file is whole or not there at all. Needs matplotlib."""
        picture.save(picture.draw(self.survey, [finding.message for finding in self.findings]), Path(path))

    def __str__(self) -> str:
        """Lay out the table, for a terminal of 100 columns."""
        blocks = [list(_summary(self.survey)), list(_table(self.survey)), list(_advice(self.findings))]
        return "\n\n".join("\n".join(block) for block in blocks)


def _summary(survey: Survey) -> Iterator[str]:
    lengths, returns = survey.lengths.double(), survey.returns
    counts = [int((survey.terminated).sum()), int((survey.truncated & ~survey.terminated).sum())]
    unflagged = len(lengths) - sum(counts)
    yield f"{picture.size_of(survey)}, {_bytes(survey.nbytes)}"
    yield f"{'episode length':<16}{_span(lengths)} steps"
    yield f"{'return':<16}{_moments(returns)}"
    rewards = survey.rewards
    values = (rewards.low, rewards.mean, rewards.std, rewards.high)
    yield f"{'reward':<16}" + "  ".join(
        f"{name} {float(value[0]):.4g}" for name, value in zip(("min", "mean", "std", "max"), values, strict=True)
    )
    yield f"{'ends':<16}{counts[0]:,} terminated  {counts[1]:,} truncated  {unflagged:,} without a flag"
    for image in survey.images:
        kind = str(image.dtype).removeprefix("torch.")
        yield f"{image.name:<16}{list(image.shape)} {kind}  min {image.low:g}  max {image.high:g}"


def _table(survey: Survey) -> Iterator[str]:
    """Observation and action columns; the actions with the spec's bounds, and how often they are at them."""
    rows = [
        (f"{field.name} {column}", field, column, "")
        for field in survey.observations
        for column in range(len(field.low))
    ]
    actions = [
        (f"actions {column}", survey.actions, column, _bound(survey, column))
        for column in range(len(survey.actions.low))
    ]
    kept = max(SHOWN - len(actions), SHOWN // 2)
    names = [name for name, *_ in [*rows[:kept], *actions[:SHOWN]]]
    width = min(max(map(len, names)), 36) + 2
    yield f"{'column':<{width}}{'min':>11}{'mean':>11}{'std':>11}{'max':>11}   {'spec':<15}{'at bounds':>10}"
    for some, shown in ((rows, kept), (actions, SHOWN - min(kept, len(rows)))):
        for name, field, column, bound in some[:shown]:
            values = [float(value[column]) for value in (field.low, field.mean, field.std, field.high)]
            values = values if field.count[column] else [float("nan")] * 4
            numbers = "".join(f"{value:>11.4g}" for value in values)
            yield f"{name[: width - 2]:<{width}}{numbers}   {bound}".rstrip()
        if len(some) > shown:
            yield f"... {len(some) - shown} more columns"


def _bound(survey: Survey, column: int) -> str:
    share = survey.at_bound[column].count / survey.rows
    if survey.bounds is None:
        return f"{'-':<15}{share:>10.1%}"
    low, high = (float(bound[column]) for bound in survey.bounds)
    return f"{f'{low:.4g} to {high:.4g}':<15}{share:>10.1%}"


def _advice(found: list[Finding]) -> Iterator[str]:
    if not found:
        yield "nothing looks wrong"
        return
    yield f"{len(found)} {'thing' if len(found) == 1 else 'things'} to look at"
    for number, finding in enumerate(found, 1):
        yield textwrap.fill(finding.message, WIDTH, initial_indent=f"{number:>3}  ", subsequent_indent=" " * 5)


def _span(values: Tensor) -> str:
    ordered = values.sort().values
    median = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    return f"min {ordered[0]:.4g}  median {median:.4g}  max {ordered[-1]:.4g}"


def _moments(values: Tensor) -> str:
    std = values.std(correction=0)
    return f"min {values.min():.4g}  mean {values.mean():.4g}  std {std:.4g}  max {values.max():.4g}"


def _bytes(count: int) -> str:
    if count < 1e3:
        return f"{count} bytes"
    if count < 1e6:
        return f"{count / 1e3:.1f} kB"
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.1f} GB"
