"""Comparing the folders of runs."""

from __future__ import annotations

from pathlib import Path

import torch

from torchrl_bcq.runs.folder import find_checkpoint


def contents(folder: Path, *without: str) -> dict[str, bytes]:
    """The bytes of all files by name, except those that hold times, and the ones named here."""
    skipped = {"train.log", ".lock", *without}
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not skipped & set(file.relative_to(folder).parts)
    }


def scalars(run: Path) -> dict[str, bytes]:
    found = contents(run / "log" / "scalars")
    assert found
    return found


def state(run: Path) -> dict[str, torch.Tensor]:
    """State of the loss in the last checkpoint."""
    (file,) = find_checkpoint(run, "last").glob("components/*-loss_module/state.pt")
    return torch.load(file, weights_only=True)


def assert_same(one: Path, other: Path) -> None:
    """The logs, the names of the checkpoints, and all parts of the last one are equal, bit for bit."""
    assert scalars(one) == scalars(other)
    names = [sorted(path.name for path in (run / "checkpoints").iterdir()) for run in (one, other)]
    assert names[0] == names[1]
    files = [sorted(find_checkpoint(run, "last").rglob("state.pt")) for run in (one, other)]
    assert len(files[0]) == len(files[1]) > 5
    for pair in zip(*files, strict=True):
        first, second = (torch.load(file, weights_only=True, map_location="cpu") for file in pair)
        if not pair[0].parent.name.endswith("logger"):
            assert equal(first, second), pair[0].parent.name


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) or (a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b or (a != a and b != b)
