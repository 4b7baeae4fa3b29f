"""Reads a source of recorded steps into memory, or converts it to a memory-mapped copy."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torchrl.data import TensorSpec

from torchrl_bcq.data.checks import Checks, Columns
from torchrl_bcq.data.frame_store import FramesInFolder, FramesInMemory, FrameStore
from torchrl_bcq.data.origins import Origins
from torchrl_bcq.data.sources.conversion import contents_digest, fingerprint, load_memmap, load_or_write, write_memmap
from torchrl_bcq.data.sources.environment import RecordedEnvironment
from torchrl_bcq.data.transitions import lay_out
from torchrl_bcq.errors import DatasetError
from torchrl_bcq.files import home

_logger = logging.getLogger(__name__)
_Parts = Generator[TensorDict, None, None]
Chunks = Generator[dict[str, np.ndarray], None, None]
Recordings = Generator[tuple[str, Chunks], None, None]


def scores_or_none(scores: Any) -> tuple[float, float] | None:
    """Return the two scores as floats if both are finite and the first is lower; otherwise return None."""
    try:
        low, high = (np.asarray(score, dtype=float).item() for score in scores)
    except (TypeError, ValueError, OverflowError):  # ``scores`` does not hold two numbers
        return None
    return (low, high) if -math.inf < low < high < math.inf else None


def existing_file(path: str | Path) -> Path:
    """Return the path if the file exists, else raise a ``FileNotFoundError``."""
    if not isinstance(path, (str, os.PathLike)):
        raise DatasetError(f"the path is {path!r}, expected one file; to read several, use load_transitions([A, B]).")
    path = home(path)
    if not path.is_file():
        where = "" if path.is_absolute() else f" in {Path.cwd()}"
        raise FileNotFoundError(f"there is no file {path}{where}.")
    return path


@dataclass(frozen=True)
class Source:
    """Recorded steps that can be read several times, in chunks.

    ``reference_scores`` holds the mean returns of a random and of an expert policy. D4RL's normalized score is ``100 *
    (return - random) / (expert - random)`` (arXiv:2004.07219).
    """

    name: str  # name of the source in messages and progress bars; also part of the folder name of a copy
    chunks: Callable[[], Iterator[Columns]]  # yields chunks; each holds arrays for the arguments of from_arrays
    files: list[Path]
    settings: Mapping[str, Any] = field(default_factory=dict)  # reader arguments that affect which steps are read
    action_spec: TensorSpec | None = None
    env: RecordedEnvironment | None = None  # the environment for evaluation, as the dataset names it
    reference_scores: tuple[float, float] | None = None  # mean returns of a random and of an expert policy
    action_type: str | None = None  # as for Checks, like the next two
    typed: bool = True
    columns: Mapping[str, Sequence[str]] | None = None

    def read(
        self,
        *,
        action_spec: TensorSpec | None = None,
        root: str | Path | None = None,
        strict: bool = True,
        origins: Origins | None = None,
    ) -> TensorDict:
        """Read and check all steps; return them as transitions. By default, use the source's ``action_spec``.

        ``origins`` gets the rows that were read and dropped.
        """
        action_spec = self.action_spec if action_spec is None else action_spec
        try:
            if root is not None:
                return self._convert(home(root), action_spec, strict, origins)
            checks, store = self._checks(action_spec), FramesInMemory()
            parts = list(self._parts(checks, "reading", store, strict=strict, origins=origins))
            return store.view(checks.actions.convert(torch.cat(parts)))
        except DatasetError as error:
            raise DatasetError(f"{self.name}: {error}") from error.__cause__

    def has_discrete_actions(self) -> bool:
        """Return whether the actions are discrete. Without data types, all steps are read, else the first steps."""
        checks = self._checks(self.action_spec)
        try:
            with closing(self._checked_chunks(checks)) as chunks:
                for _ in chunks:
                    if self.typed or not checks.actions.discrete:
                        break
        except DatasetError as error:
            raise DatasetError(f"{self.name}: {error}") from error.__cause__
        return checks.actions.discrete

    def _convert(self, root: Path, action_spec: TensorSpec | None, strict: bool, origins: Origins | None) -> TensorDict:
        """Return the memory-mapped copy in ``root``. If there is no copy, check all steps and write one first."""
        checks = self._checks(action_spec)
        settings = {**self.settings, "action_spec": checks.actions.stored_as, "strict": strict}
        contents = contents_digest(self.files)
        digest = fingerprint(contents, settings)
        folder = root / f"{re.sub(r'[^A-Za-z0-9.-]+', '_', Path(self.name).stem)[:100]}-{digest}"
        # find the copy by its digest, because the source file may have been renamed since the conversion
        found = next(root.glob(f"[!.]*-{digest}"), None)
        if found is None and checks.actions.stored_as == "continuous":  # a copy made without a spec may be the same
            without = fingerprint(contents, {**settings, "action_spec": None})
            found = next((one for one in root.glob(f"[!.]*-{without}") if _is_continuous(one)), None)
        folder = found or folder
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"{root} cannot be a folder for copies ({error}); choose another folder.") from error

        def write() -> None:
            parts = self._parts(checks, "checking", FrameStore(), strict=strict, origins=origins)
            rows, store = sum(map(len, parts)), FramesInFolder()
            with closing(self._unchanged_parts(rows, contents, store, action_spec)) as parts:
                write_memmap(map(checks.actions.convert, parts), rows, folder, store)

        copy = load_or_write(folder, write)
        if strict and not checks.actions.accepts(copy["action"]):  # an earlier copy, made without these bounds
            for _ in self._parts(self._checks(action_spec), "checking", FrameStore()):
                pass  # the error shows the rows of the source
        if origins is not None and not origins.rows:  # an earlier copy does not tell which rows were dropped
            for _ in self._parts(self._checks(action_spec), "counting", FrameStore(), strict=False, origins=origins):
                pass
        _logger.info("%s: memory-mapped from %s", self.name, folder)
        return copy

    def _checks(self, action_spec: TensorSpec | None = None) -> Checks:
        return Checks(action_spec, self.action_type, self.columns, typed=self.typed)

    def _unchanged_parts(self, rows: int, contents: str, store: FrameStore, action_spec: TensorSpec | None) -> _Parts:
        yield from self._parts(self._checks(action_spec), "converting", store, rows=rows, strict=False)
        if contents_digest(self.files) != contents:
            raise DatasetError("it changed during the conversion; try again when no program writes to it.")

    def _parts(
        self,
        checks: Checks,
        verb: str,
        store: FrameStore,
        rows: int | None = None,
        strict: bool = True,
        origins: Origins | None = None,
    ) -> _Parts:
        is_first = rows is None  # only the first pass logs its rows
        with closing(self._recordings(checks)) as recordings, _progress_bar(f"{verb} {self.name}", rows) as bar:
            for part in lay_out(recordings, store, report=is_first, origins=origins):
                yield part
                if bar is not None:
                    bar.update(len(part))
        for name, count in checks.counts.items() if is_first else ():
            _logger.info("%s: %d rows", name, count)
        checks.finish(strict=strict)
        if is_first and (guess := checks.actions.guess):
            _logger.warning("%s: %s", self.name, guess)

    def _recordings(self, checks: Checks) -> Recordings:
        """Yield name and checked chunks of each recording; an episode does not continue in another recording."""
        with closing(self._checked_chunks(checks)) as chunks:  # closes the file if a check fails
            yield "", chunks  # the name of the only source is in the messages already

    def _checked_chunks(self, checks: Checks) -> Chunks:
        try:
            yield from map(checks, self.chunks())
        except (DatasetError, ImportError, MemoryError):
            raise
        except Exception as error:  # libraries raise various exceptions for damaged files
            raise DatasetError(
                f"the source cannot be read ({error}) and may be damaged: copy or create the source again."
            ) from error


def _is_continuous(copy: Path) -> bool:
    return load_memmap(copy)["action"].is_floating_point()


def _progress_bar(description: str, rows: int | None) -> Any:
    """Return a context manager that yields a progress bar, or ``None`` if tqdm is not installed."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return nullcontext()
    return tqdm(total=rows, desc=description, unit=" rows", unit_scale=True, disable=None, delay=1, leave=False)
