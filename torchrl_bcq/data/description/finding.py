"""What a finding is, and how it names columns and rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from torchrl_bcq.data.checks import Rows
from torchrl_bcq.data.description.survey import ColumnStats, Survey


@dataclass(frozen=True)
class Finding:
    """Something suspicious: in which field, in how many rows, the first of them, and what to do about it."""

    field: str
    rows: int
    first: int
    message: str

    def __str__(self) -> str:
        """Give the message."""
        return self.message


def found(field: str, rows: Rows, message: str) -> Finding:
    """A finding in the given rows."""
    return Finding(field, rows.count, rows.first, message)


def everywhere(survey: Survey) -> Rows:
    """All rows, as those of a finding."""
    return Rows(survey.rows)


def pairs(columns: ColumnStats) -> str:
    """Columns that repeat an earlier one, constant ones aside: ``columns 2 and 7 (and 1 more pair)``."""
    varying = (columns.low < columns.high).nonzero().flatten()
    marks, order = torch.sort(columns.mark[varying], stable=True)
    same = (marks[1:] == marks[:-1]).nonzero().flatten()
    if not len(same):
        return ""
    equal = sorted((int(varying[order[at]]), int(varying[order[at + 1]])) for at in same.tolist())
    more = len(equal) - 1
    rest = f" (and {more} more {'pair' if more == 1 else 'pairs'})" if more else ""
    return f"columns {equal[0][0]} and {equal[0][1]}{rest}"


def column_list(columns: list[int]) -> str:
    """Columns by number, at most four: ``columns 27, 28, 29 and 81 more``."""
    if len(columns) == 1:
        return f"column {columns[0]}"
    shown = columns if len(columns) <= 4 else columns[:3]
    rest = f" and {len(columns) - 3} more" if len(columns) > 4 else ""
    return f"columns {', '.join(map(str, shown))}{rest}"
