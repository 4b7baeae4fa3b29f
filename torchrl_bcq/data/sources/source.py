"""A source of recorded steps, and what becomes of it: transitions in memory, or memory-mapped."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from tensordict import TensorDict
from torchrl.data import TensorSpec

from torchrl_bcq.data.checks import Checks, Columns, DatasetError, spec_bounds
from torchrl_bcq.data.sources.conversion import fingerprint, load_memmap, remove_unfinished, write_memmap
from torchrl_bcq.data.transitions import lay_out

_logger = logging.getLogger(__name__)


def env_id_or_none(name: object) -> str | None:
    """The Gymnasium id that a dataset gives, if it is one that is safe to make.

    Gymnasium imports whatever stands before a colon, and a dataset may come from anybody: such ids are left out.
    """
    if isinstance(name, bytes):
        name = name.decode(errors="replace")
    return str(name) if isinstance(name, str) and re.fullmatch(r"[\w./-]+", name) else None


def scores_or_none(random: object, expert: object) -> tuple[float, float] | None:
    """Two mean returns that a score can be measured between: finite numbers, the expert's above the random policy's."""
    try:
        low, high = (np.asarray(score, dtype=float).item() for score in (random, expert))
    except (TypeError, ValueError, OverflowError):  # of whatever was written in place of a number
        return None
    return (low, high) if -math.inf < low < high < math.inf else None


@dataclass(frozen=True)
class Source:
    """Recorded steps that can be read again and again, a chunk at a time.

    Args:
        name: of messages, progress bars and converted copies.
        chunks: gives fields as :func:`~torchrl_bcq.from_arrays` takes them, the same ones in each chunk.
        files: what the steps are read from.
        settings: whatever else decides what is read, such as the names of columns.
        action_spec: bounds that the source itself gives for its actions.
        env_id: Gymnasium id of the environment that was recorded, if the source names it.
        reference_scores: mean returns of a random and of an expert policy, if the source gives both, for D4RL's
            normalised score ``100 * (return - random) / (expert - random)`` (arXiv:2004.07219).
    """

    name: str
    chunks: Callable[[], Iterator[Columns]]
    files: list[Path]
    settings: Mapping[str, Any] = field(default_factory=dict)
    action_spec: TensorSpec | None = None
    env_id: str | None = None
    reference_scores: tuple[float, float] | None = None

    def read(
        self, *, action_spec: TensorSpec | None = None, root: str | Path | None = None, strict: bool = True
    ) -> TensorDict:
        """Check the steps and lay them out as transitions.

        Args:
            action_spec: bounds that the actions must keep; the source's own if not given.
            root: folder for a memory-mapped copy, which is made once for the same content; without it, transitions
                are read into memory.
            strict: whether bad rows are refused, rather than left for :func:`~torchrl_bcq.describe` to find.

        Raises:
            DatasetError: if the source cannot be read, or does not pass :func:`~torchrl_bcq.from_arrays`.
            OSError: if the copy cannot be written.
        """
        action_spec = action_spec or self.action_spec
        try:
            if root is not None:
                return self._convert(Path(root).expanduser(), action_spec, strict)
            return torch.cat(list(self._parts(Checks(action_spec), "reading", strict=strict)))
        except DatasetError as error:
            raise DatasetError(f"{self.name}: {error}") from error.__cause__

    def _convert(self, root: Path, action_spec: TensorSpec | None, strict: bool) -> TensorDict:
        """Check everything, then write everything, unless it was done before."""
        bounds = None if action_spec is None else [bound.tolist() for bound in spec_bounds(action_spec)]
        settings = {**self.settings, "action_spec": bounds, "strict": strict}
        digest = fingerprint(self.files, settings)
        folder = root / f"{re.sub(r'[^A-Za-z0-9.-]+', '_', Path(self.name).stem)[:100]}-{digest}"
        folder = next(root.glob(f"[!.]*-{digest}"), folder)  # whatever the file was called
        if not folder.exists():  # a copy that is there may lie where nobody can write
            try:
                root.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise OSError(f"{root} cannot be a folder for copies ({error}); choose another root.") from error
            with FileLock(root / f".{folder.name}.lock"):  # others who want the same copy wait for it
                if not folder.exists():
                    remove_unfinished(folder)  # of a run that was killed
                    checks = Checks(action_spec)
                    rows = sum(len(part) for part in self._parts(checks, "checking", strict=strict))
                    with closing(self._unchanged_parts(checks.rows, digest, settings)) as parts:
                        write_memmap(parts, rows, folder)
        _logger.info("%s is memory-mapped from %s", self.name, folder)
        return load_memmap(folder)

    def _unchanged_parts(
        self, steps: int, digest: str, settings: Mapping[str, Any]
    ) -> Generator[TensorDict, None, None]:
        yield from self._parts(Checks(), "converting", steps=steps, strict=False)
        if fingerprint(self.files, settings) != digest:
            raise DatasetError("it changed while it was converted; let it settle.")

    def _parts(
        self, checks: Checks, verb: str, steps: int | None = None, strict: bool = True
    ) -> Generator[TensorDict, None, None]:
        with closing(self._watched_chunks(verb, steps)) as chunks:  # a refused file is not left open
            yield from lay_out(map(checks, chunks), report=steps is None)  # once for two passes
        checks.finish(strict=strict)

    def _watched_chunks(self, verb: str, steps: int | None) -> Generator[Columns, None, None]:
        """The chunks, with a progress bar where there is a terminal and tqdm."""
        try:
            from tqdm.auto import tqdm
        except ImportError:
            yield from self._guarded_chunks()
            return
        desc = f"{verb} {self.name}"
        with tqdm(total=steps, desc=desc, unit=" rows", unit_scale=True, disable=None, delay=1, leave=False) as bar:
            for chunk in self._guarded_chunks():
                yield chunk
                bar.update(np.shape(chunk["actions"])[0])

    def _guarded_chunks(self) -> Iterator[Columns]:
        try:
            yield from self.chunks()
        except (DatasetError, ImportError, MemoryError):
            raise
        except Exception as error:  # libraries raise many kinds for damaged files
            raise DatasetError(f"it cannot be read ({error}); copy it again, or write it anew.") from error
