"""Shared by the fuzz tests: good steps, a ledger of malformed inputs, and a pickle that must never be opened."""

from __future__ import annotations

import inspect
import pickle
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from tensordict import TensorDict

import torchrl_bcq
from torchrl_bcq import DatasetError, from_arrays
from torchrl_bcq.errors import RunError

settings.register_profile("reproducible", deadline=None, derandomize=True, database=None)
settings.load_profile("reproducible")

OURS = Path(torchrl_bcq.__file__).parent


class Steps(dict):
    """Fields of ``from_arrays`` for 1 to 40 steps of whole episodes, and the episode and step of each row."""

    def __init__(self, seed: int):
        rng = np.random.default_rng(seed)
        rows, width, actions = int(rng.integers(1, 41)), int(rng.integers(1, 4)), int(rng.integers(1, 3))
        self.rng = rng
        ends = rng.random(rows) < 0.2
        ends[-1] = True
        self.episode = np.cumsum(ends) - ends
        self.step = np.arange(rows) - np.flatnonzero(np.r_[True, ends[:-1]])[self.episode]
        terminated = ends & (rng.random(rows) < 0.5)
        observations, after = rng.normal(size=(2, rows, width)) + 5
        after[:-1][~ends[:-1]] = observations[1:][~ends[:-1]]
        super().__init__(
            observations=observations,
            actions=rng.uniform(0.1, 1, (rows, actions)),
            rewards=rng.normal(size=rows),
            terminated=terminated,
            truncated=ends & ~terminated,
            next_observations=after,
        )

    def transitions(self) -> TensorDict:
        """The transitions of these steps, laid out by hand."""
        done = self["terminated"] | self["truncated"]
        after = {"observation": self["next_observations"], "reward": self["rewards"][:, None], "done": done[:, None]}
        after |= {name: self[name][:, None] for name in ("terminated", "truncated")}
        columns = {"observation": self["observations"], "action": self["actions"], "episode": self.episode}
        td = TensorDict({**columns, "next": after}, [len(done)])
        return td.apply(lambda value: value.float() if value.is_floating_point() else value)


class Ledger:
    """Loads malformed inputs, asserts that they are refused or loaded properly, and counts them by kind."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.marker = folder / "unpickled"
        self.counts: Counter[str] = Counter()

    def load(self, kind: str, load: Callable[..., TensorDict]) -> TensorDict | None:
        """The result of a malformed input, in memory and memory-mapped; None if it is refused."""
        self.counts[kind] += 1
        result = self._outcome(load)
        if "root" in inspect.signature(load).parameters:
            with tempfile.TemporaryDirectory(dir=self.folder) as root:
                converted = self._outcome(lambda: load(root=root))
                self._check_left(Path(root), complete=converted is not None)
                assert (result is None) == (converted is None)
                assert result is None or is_same(result, converted)
        assert not self.marker.exists(), "a pickle was opened"
        return result

    def refuse(self, kind: str, load: Callable[..., TensorDict]) -> None:
        assert self.load(kind, load) is None, "a malformed input was loaded"

    def _outcome(self, load: Callable[..., TensorDict]) -> TensorDict | None:
        try:
            return load()
        except (ValueError, OSError) as error:
            refusal = error
        origin = traceback.extract_tb(refusal.__traceback__)[-1]
        assert OURS in Path(origin.filename).parents, f"raised by {origin.filename}: {refusal!r}"
        if not isinstance(refusal, (DatasetError, OSError)):
            assert type(refusal) in (ValueError, RunError), repr(refusal)
            assert origin.line.startswith("raise "), f"not a message of this package: {refusal!r}"
        assert len(str(refusal)) > 15
        return None

    def _check_left(self, root: Path, complete: bool) -> None:
        folders = [path for path in root.iterdir() if not (path.is_file() and path.suffix == ".lock")]
        assert len(folders) == complete
        assert not any(path.name.startswith(".") for path in folders)

    def pickled(self) -> bytes:
        """A pickle that leaves a mark when it is opened."""
        return pickle.dumps(Bomb(self.marker))


class Bomb:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def is_same(one: TensorDict, other: TensorDict) -> bool:
    """Whether all entries are equal, bit by bit except for the sign of zero."""
    keys = set(one.keys(True, True))
    return keys == set(other.keys(True, True)) and all(
        one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]) for key in keys
    )


@pytest.fixture(scope="session")
def ledger(tmp_path_factory) -> Ledger:
    ledger = Ledger(tmp_path_factory.mktemp("fuzz"))
    pickle.loads(ledger.pickled())
    assert ledger.marker.exists(), "the bomb does not work"
    ledger.marker.unlink()
    return ledger


@pytest.fixture(scope="session")
def make_steps() -> type[Steps]:
    """Makes the fields of a seed."""
    steps = Steps(0)
    assert is_same(from_arrays(**steps), steps.transitions())
    return Steps


@pytest.fixture(scope="session")
def same() -> Callable[[TensorDict, TensorDict], bool]:
    return is_same
