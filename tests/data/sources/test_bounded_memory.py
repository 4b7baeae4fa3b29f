"""Each reader holds only a part of a file in memory."""

from __future__ import annotations

import h5py
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import csv, parquet

from torchrl_bcq.data.sources.array_files import hdf5
from torchrl_bcq.data.sources.tables import table

from ...array_files import write_arrays

LIMIT = 30_000_000  # bytes of a chunk; the files hold 72 million
ROWS, WIDE = 60_000, 300
COLUMNS = {"action": ["a"], "reward": "r", "terminated": "end", "episode": "episode"}


def columns(**observations):
    zeros = np.zeros(ROWS)
    return pa.table(
        {**observations, "a": zeros + 0.5, "r": zeros + 1, "end": zeros > 0, "episode": np.arange(ROWS) // 99}
    )


def fields():
    ends = np.arange(ROWS) % 100 == 99
    observations = np.ones((ROWS, WIDE), dtype=np.float32)
    return {
        "observations": observations,
        "actions": observations[:, :1],
        "rewards": observations[:, 0],
        "terminated": ends,
        "truncated": ends,
    }


def write_hdf5(path):
    return hdf5(write_arrays(path, fields()))


def write_episodes(path):
    with h5py.File(path, "w") as file:
        for name, values in fields().items():
            for i in range(60):
                file[f"episode_{i}/{name}"] = values[1000 * i : 1000 * (i + 1)]
    return hdf5(path)


def write_lists(path):
    """One column of lists in one row group."""
    lists = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(ROWS * WIDE, dtype=np.float32)), WIDE)
    parquet.write_table(columns(x=lists), path, row_group_size=ROWS, use_dictionary=False, compression="none")
    return table(path, observation=["x"], **COLUMNS)


def write_csv(path):
    csv.write_csv(columns(x=np.arange(ROWS) * 1e-5, y=np.arange(ROWS) * 1.0), path)
    return table(path, observation=["x", "y"], **COLUMNS)


WRITERS = {
    "d.hdf5": write_hdf5,
    "episodes.hdf5": write_episodes,
    "d.parquet": write_lists,
    "d.csv": write_csv,
}


@pytest.mark.parametrize("name", WRITERS)
def test_chunks_are_small(tmp_path, name):
    rows = 0
    for chunk in WRITERS[name](tmp_path / name).chunks():
        assert sum(np.asarray(values).nbytes for values in chunk.values()) < LIMIT
        rows += len(chunk["actions"])
    assert rows == ROWS


def test_parquet_files_are_not_held_by_pyarrow(tmp_path):
    source = write_lists(tmp_path / "d.parquet")
    before = pa.total_allocated_bytes()
    assert max(pa.total_allocated_bytes() - before for _ in source.chunks()) < LIMIT
