"""Describes a dataset by a table, a picture and a list of possible defects."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tensordict import TensorDictBase
from torchrl.data import TensorSpec

from torchrl_bcq.data.origins import Origins
from torchrl_bcq.reports.description import picture
from torchrl_bcq.reports.description.findings import Finding, findings
from torchrl_bcq.reports.description.scan import Survey
from torchrl_bcq.reports.pictures import save

WIDTH = 100  # width of a terminal, in characters
SHOWN = 20  # largest number of columns that the table shows for one entry of the dataset
CHOICES = 50  # largest number of discrete actions that the table shows
NAME = 32  # length to which the table cuts an entry's name, in characters


def describe(
    transitions: TensorDictBase,
    *,
    action_spec: TensorSpec | None = None,
    column_names: Mapping[str, Sequence[str]] | None = None,
    origins: Origins | None = None,
) -> Description:
    """Return a description of a dataset: ``print`` it as a table, ``plot`` it, or read its ``findings``.

    Statistics are exact and leave out values that are not finite. Of frames from a reader, a sample is read. Rows are
    read in chunks, so the transitions may be memory-mapped and larger than memory.

    Args:
        transitions: transitions ``[N]`` from the readers, or a rollout ``[T]`` or ``[B, T]``, with ``action``,
            ``("next", "reward")``, ``("next", "terminated")`` and observations. Observations are the other entries that
            also exist under ``"next"``; if no such entry exists, all other entries are observations. The entry
            ``episode`` holds the episode number of each row; without this entry, the flags show where episodes end.
        action_spec: spec whose bounds, or whose number of discrete actions, is compared with the actions.
        column_names: names of the columns of ``actions`` or ``observations``, such as ``{"actions": ["force"]}``, for
            the table and the findings. By default, columns have numbers.
        origins: rows that ``load_transitions(..., origins=origins)`` has read. The description then counts the dropped
            rows, and row numbers are those of the file. By default, row numbers are those of ``transitions``.

    Raises:
        DatasetError: if there are no rows, an entry is missing, a row is a multi-step transition, ``action_spec`` is
            neither Bounded nor discrete, or its size differs from the size of an action.

    Example:
        >>> from torchrl.envs import GymEnv
        >>> from torchrl_bcq import describe, from_rollouts
        >>> found = describe(from_rollouts(GymEnv("Pendulum-v1").rollout(400, break_when_any_done=False)))
        >>> str(found).splitlines()[1]
        'episode length  min 200  median 200  max 200 steps'
        >>> [finding.kind for finding in found.findings]
        ['few rows']
    """
    survey = Survey(transitions, action_spec, origins, column_names)
    return Description(survey, findings(survey))


@dataclass(frozen=True)
class Description:
    """Result of ``describe``; ``print`` shows it as a table."""

    survey: Survey
    findings: list[Finding]

    def plot(self, path: str | Path) -> None:
        """Draw a PNG of the dataset; create missing folders. Errors leave no partial file. Needs matplotlib."""
        save(picture.draw(self.survey, [finding.message for finding in self.findings]), Path(path))

    def __str__(self) -> str:
        """Return the table and the findings as text, for a terminal that is 100 characters wide."""
        blocks = [_summary(self.survey), _table(self.survey), _frequencies(self.survey), self._advice()]
        return "\n\n".join(text for block in blocks if (text := "\n".join(block)))

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
    if (dropped := survey.origins.dropped).count:
        yield f"{'dropped':<16}{dropped} without a next observation or action mask"
    for image in (*survey.images.values(), *survey.stored):
        kind = str(image.dtype).removeprefix("torch.")
        yield f"{image.name:<16}{list(image.shape)} {kind}  min {image.low:g}  max {image.high:g}{image.note}"


def _table(survey: Survey) -> Iterator[str]:
    """Yield a header, then a line of statistics for each column of the observations and of continuous actions."""
    fields = [*survey.observations, *([survey.actions] if survey.frequencies is None else [])]
    if not fields:
        return
    longest = max(len(label) for field in fields for label in field.labels[:SHOWN])
    width = min(max(len(field.name) for field in fields), NAME) + 2 + max(longest, 2)
    of_actions = f"   {'spec':<15}{'at bounds':>10}" if survey.frequencies is None else ""
    yield f"{'column':<{width}}{'min':>11}{'mean':>11}{'std':>11}{'max':>11}{of_actions}"
    for field in fields:
        for at in range(min(len(field.low), SHOWN)):
            values = [float(value[at]) for value in (field.low, field.mean, field.std, field.high)]
            numbers = "".join(f"{value if field.count[at] else math.nan:>11.4g}" for value in values)
            bound = _bound(survey, at) if field is survey.actions else ""
            yield f"{f'{field.name[:NAME]} {field.labels[at]}':<{width}}{numbers}   {bound}".rstrip()
        if len(field.low) > SHOWN:
            yield f"... {len(field.low) - SHOWN} more columns"


def _frequencies(survey: Survey) -> Iterator[str]:
    """Yield a header, then a line for each discrete action."""
    if (counts := survey.frequencies) is None:
        return
    yield f"{'action':<10}{'rows':>14}{'share':>10}"
    for index, count in enumerate(counts[:CHOICES].tolist()):
        yield f"{index:<10}{count:>14,}{count / survey.rows:>10.1%}"
    if len(counts) > CHOICES:
        yield f"... {len(counts) - CHOICES} more actions"


def _bound(survey: Survey, column: int) -> str:
    spec = "-" if survey.bounds is None else "{:.4g} to {:.4g}".format(*(bound[column] for bound in survey.bounds))
    return f"{spec:<15}{survey.at_bound[column].count / survey.rows:>10.1%}"
