"""Shares of visited pairs by the part of the dataset that is nearest, and the picture."""

from __future__ import annotations

import json

import h5py
import numpy as np
import pytest


@pytest.fixture
def halves(load):
    return load("halves")


def test_shares_by_hand(halves, tmp_path):
    """The first part has states near 0, the second near 10; actions are 0 and count in units of their deviation."""
    segments = [
        {"policy": name, "first_row": start, "end_row": start + 5, "return_mean": float(start)}
        for name, start in (("early", 0), ("late", 5))
    ]
    with h5py.File(tmp_path / "parts.hdf5", "w") as file:
        file["observations"] = np.array([[0.0]] * 5 + [[10.0]] * 5)
        file["actions"] = np.array([[-1.0], [1.0]] * 5)
        file.attrs["segments"] = json.dumps(segments)
    parts = halves.Parts(tmp_path / "parts.hdf5")
    assert parts.shares(np.array([[1.0, 0.0], [4.0, 0.0], [6.0, 0.0], [-3.0, 1.0]])) == {"early": 0.75, "late": 0.25}


def test_picture(halves, tmp_path):
    shared = {"return": 5.0, "value_estimate": 1.0, "discounted_return": 2.0, "returns": [3.0, 9.0]}
    lines = [{**shared, "step": step, "shares": {"a": 0.25, "b": 0.75}} for step in (10, 0)]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    halves.draw(tmp_path / "picture.png", tmp_path / "lines.jsonl")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
