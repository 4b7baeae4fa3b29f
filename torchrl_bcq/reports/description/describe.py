"""Describe a dataset: a table, a picture and a list of possible defects."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tensordict import TensorDictBase
from torchrl.data import TensorSpec

from torchrl_bcq.reports.description import picture
from torchrl_bcq.reports.description.findings import Finding, findings
from torchrl_bcq.reports.description.scan import Survey
from torchrl_bcq.reports.pictures import save

WIDTH = 100  # of a terminal, in characters
SHOWN = 20  # columns of a field in the table
NAME = 32  # characters of a field's name in the table


def describe(transitions: TensorDictBase, *, action_spec: TensorSpec | None = None) -> Description:
    """Describe a dataset: ``print`` the result for a table, ``plot`` it, and read its ``findings``.

    Statistics are exact, over finite values. Rows are read in chunks, so the transitions may be memory-mapped and
    larger than memory.

    Args:
        transitions: from the readers, or a rollout ``[T]`` or ``[B, T]``, with ``action``, ``("next", "reward")``,
            ``("next", "terminated")`` and observations under any other keys: those that ``"next"`` has too, if there
            are any. Episodes are told apart by ``episode`` or, without it, by their flags.
        action_spec: bounds to compare the actions with.

    Raises:
        DatasetError: if there is no row, an entry is missing, rows span several steps, or the spec is not Bounded or of
            another size.
    """
    survey = Survey(transitions, action_spec)
    return Description(survey, findings(survey))


@dataclass(frozen=True)
class Description:
    """Result of :func:`describe`; ``print`` it for the table."""

    survey: Survey
    findings: list[Finding]

    def plot(self, path: str | Path) -> None:
        """Draw it as PNG and create missing folders; the file is complete or absent. Needs matplotlib."""
        save(picture.draw(self.survey, [finding.message for finding in self.findings]), Path(path))

    def __str__(self) -> str:
        """Return the table, for a terminal of 100 columns."""
        return "\n\n".join("\n".join(block) for block in (_summary(self.survey), _table(self.survey), self._advice()))

    def _advice(self) -> Iterator[str]:
        count = len(self.findings)
        yield f"{count} {'thing' if count == 1 else 'things'} to look at" if count else picture.HEALTHY
        for number, finding in enumerate(self.findings, 1):
            yield textwrap.fill(finding.message, WIDTH, initial_indent=f"{number:>3}  ", subsequent_indent=" " * 5)


def _summary(survey: Survey) -> Iterator[str]:
    lengths, returns, rewards = survey.lengths, survey.returns, survey.rewards
    ends = [int(survey.terminated.sum()), int((survey.truncated & ~survey.terminated).sum())]
    moments = {
        "return": (returns.min(), returns.mean(), returns.std(correction=0), returns.max()),
        "reward": (rewards.low, rewards.mean, rewards.std, rewards.high),
    }
    yield f"{picture.size_of(survey)}, {survey.nbytes / 1e6:,.1f} MB"
    least, median, most = np.quantile(lengths, [0, 0.5, 1])
    yield f"{'episode length':<16}min {least:.4g}  median {median:.4g}  max {most:.4g} steps"
    for name, values in moments.items():
        low, mean, std, high = (float(value.flatten()[0]) for value in values)
        yield f"{name:<16}min {low:.4g}  mean {mean:.4g}  std {std:.4g}  max {high:.4g}"
    unflagged = len(lengths) - sum(ends)
    yield f"{'ends':<16}{ends[0]:,} terminated  {ends[1]:,} truncated  {unflagged:,} without a flag"
    for image in survey.images.values():
        kind = str(image.dtype).removeprefix("torch.")
        yield f"{image.name:<16}{list(image.shape)} {kind}  min {image.low:g}  max {image.high:g}"


def _table(survey: Survey) -> Iterator[str]:
    """The first columns of each field; for actions also the spec's bounds, and the share of rows at them."""
    fields = *survey.observations, survey.actions
    width = min(max(len(field.name) for field in fields), NAME) + 4
    yield f"{'column':<{width}}{'min':>11}{'mean':>11}{'std':>11}{'max':>11}   {'spec':<15}{'at bounds':>10}"
    for field in fields:
        for at in range(min(len(field.low), SHOWN)):
            values = [float(value[at]) for value in (field.low, field.mean, field.std, field.high)]
            numbers = "".join(f"{value if field.count[at] else math.nan:>11.4g}" for value in values)
            bound = _bound(survey, at) if field is survey.actions else ""
            yield f"{f'{field.name[:NAME]} {at}':<{width}}{numbers}   {bound}".rstrip()
        if len(field.low) > SHOWN:
            yield f"... {len(field.low) - SHOWN} more columns"


def _bound(survey: Survey, column: int) -> str:
    spec = "-" if survey.bounds is None else "{:.4g} to {:.4g}".format(*(bound[column] for bound in survey.bounds))
    return f"{spec:<15}{survey.at_bound[column].count / survey.rows:>10.1%}"
