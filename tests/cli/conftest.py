"""Small runs, started with the words that a user types."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from torchrl_bcq.runs.settings import default_settings

from ..small_runs import TINY


@pytest.fixture
def words(file, tmp_path):
    """Overrides of a small run of an algorithm in ``tmp_path / "run"``."""

    def make(*overrides: str, algorithm: str = "bcq") -> list[str]:
        settings = default_settings(algorithm)
        small = [word for word in TINY if OmegaConf.select(settings, word.partition("=")[0]) is not None]
        return [f"dataset={file}", f"out={tmp_path / 'run'}", f"algorithm={algorithm}", *small, *overrides]

    return make


@pytest.fixture
def run(tmp_path) -> Path:
    return tmp_path / "run"
