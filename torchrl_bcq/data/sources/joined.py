"""Joins several sources into one."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensordict import TensorDict

from torchrl_bcq.data.action_checks import ActionChecks
from torchrl_bcq.data.checks import Checks
from torchrl_bcq.data.frame_layout import width_of
from torchrl_bcq.data.sources.source import Chunks, Recordings, Source
from torchrl_bcq.errors import DatasetError, RunError

# facts that are unknown for the joined source if its parts disagree, and the settings of torchrl-bcq train for them
_FACTS = {"env": "evaluation.env", "reference_scores": "evaluation.reference_scores"}
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class JoinedSource(Source):
    """Several sources, one after the other. No episode continues from one source to the next. Make it with ``join``."""

    sources: tuple[Source, ...] = ()

    def read(self, **reading: Any) -> TensorDict:
        """Read and check the steps of all sources; log a warning if facts about the sources differ."""
        for fact, setting in _FACTS.items():
            if isinstance(pair := _agreed(self.sources, fact), list):
                (one, value), (other, another) = pair
                message = "%s names %s, but %s names %s, so torchrl-bcq train uses neither, unless %s is set."
                _logger.warning(message, one, value, other, another, setting)
        return super().read(**reading)

    def has_discrete_actions(self) -> bool:
        """Return whether the actions are discrete; raise a RunError if they are so in some of the sources only."""
        if not self.typed:  # one file with a fraction makes the actions of all files continuous
            return super().has_discrete_actions()
        kinds = {source.has_discrete_actions(): source.name for source in self.sources}
        if len(kinds) > 1:
            found = f"the actions are discrete in {kinds[True]}, but continuous in {kinds[False]}"
            raise RunError(f"{found}; join only datasets of the same task.")
        return True in kinds

    def _recordings(self, checks: Checks) -> Recordings:
        widths: dict[str, tuple[str, Any]] = {}  # for each field: name of the first source, and its width_of
        for source in self.sources:
            own = checks.alike(source.typed)
            with closing(_checked(source, own, widths)) as chunks:
                yield source.name, chunks
            checks.add(source.name, own)


def _checked(source: Source, checks: Checks, widths: dict[str, tuple[str, Any]]) -> Chunks:
    """Yield the checked chunks of one source; its name is added to each error."""
    try:
        for fields in source._checked_chunks(checks):
            own = sorted({"frames", "action_masks", "action_probabilities", "groups"} & fields.keys())
            first, expected = widths.setdefault("", (source.name, own))
            if own != expected:
                found = f"of the optional fields, it holds {own}, but {first} holds {expected}"
                raise DatasetError(f"{found}; all sources need the same fields.")
            for name in {"observations", "actions", "frames", "action_masks"} & fields.keys():
                width = width_of(fields[name])
                first, expected = widths.setdefault(name, (source.name, width))
                if width != expected:
                    kind = "features" if isinstance(width, int) else "as the shape of its frames"
                    found = f"{name} has {width} {kind}, but {expected} in {first}"
                    raise DatasetError(f"{found}; join only datasets of the same task.")
            yield fields
        if not checks.rows:
            raise DatasetError("the data has no rows; leave this source out.")
    except DatasetError as error:
        raise DatasetError(f"{source.name}: {error}") from error.__cause__


def join(sources: Sequence[Source]) -> Source:
    """Return one source that reads all ``sources`` in their order.

    Raises:
        DatasetError: if a source occurs twice, or the action bounds of two sources differ.
    """
    names: dict[Path, str] = {}
    for source in sources:
        for file in source.files:
            if (path := file.resolve()) in names:
                raise DatasetError(f"{names[path]} and {source.name} are the same data; name it only once.")
        names |= {file.resolve(): source.name for file in source.files}
    known = [source for source in sources if source.action_spec is not None]
    for source in known[1:]:
        bounds = [ActionChecks(each.action_spec).expected for each in (known[0], source)]
        if bounds[0] != bounds[1]:
            what = "action bounds are" if isinstance(bounds[1], list) else "number of actions is"
            raise DatasetError(
                f"the {what} {bounds[1]} in {source.name}, but {bounds[0]} in {known[0].name}; join only datasets of "
                "the same task."
            )
    found = {source.name: getattr(source.env, "observation", None) for source in sources}
    entries = [(name, list(names)) for name, names in found.items() if names is not None]
    for name, own in entries[1:]:
        if own != entries[0][1]:
            raise DatasetError(
                f"{name} joins the entries {own} to one observation, but {entries[0][0]} joins {entries[0][1]}; read "
                "both with the same entries, in the same order."
            )
    facts = {fact: _agreed(sources, fact) for fact in _FACTS}
    return JoinedSource(
        f"{len(sources)} sources",
        lambda: (chunk for source in sources for chunk in source.chunks()),
        [file for source in sources for file in source.files],
        {"sources": [[len(source.files), source.settings] for source in sources]},
        known[0].action_spec if known else None,
        **{fact: None if isinstance(value, list) else value for fact, value in facts.items()},
        action_type=sources[0].action_type,  # all sources are read with the same settings
        typed=all(source.typed for source in sources),
        columns=sources[0].columns,
        sources=tuple(sources),
    )


def _agreed(sources: Sequence[Source], fact: str) -> Any:
    """Return the value of a fact, from the sources that know it; if two differ, return a list of both with names."""
    known = [(source.name, getattr(source, fact)) for source in sources if getattr(source, fact) is not None]
    for pair in known[1:]:
        if pair[1] != known[0][1]:
            return [known[0], pair]
    return known[0][1] if known else None
