"""What counts as a difference of weights."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def differences(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    return importlib.import_module("same_weights").differences


def weights(**values: list[float]) -> dict[str, np.ndarray]:
    return {name: np.array(value, np.float32) for name, value in values.items()}


def test_each_differing_bit_counts(differences):
    before = weights(same=[1, 2], one=[1, 2], sign=[0], nan=[np.nan])
    now = weights(same=[1, 2], one=[1, 2.5], sign=[-0.0], nan=[np.nan])
    assert differences(before, now) == {"one": 0.5, "sign": 0.0}


@pytest.mark.parametrize("now", [{"a": [1.0]}, {"a": [1.0], "b": [1.0, 2.0]}, {"a": [1.0], "c": [1.0]}])
def test_other_names_or_shapes_are_refused(differences, now):
    with pytest.raises(ValueError, match="names or shapes of the weights differ: .*'b'"):
        differences(weights(a=[1.0], b=[1.0]), weights(**now))
