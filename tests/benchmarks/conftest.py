"""Imports files of this folder."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest


@pytest.fixture
def load(monkeypatch):
    """Import a file of this folder as a script does."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    return importlib.import_module
