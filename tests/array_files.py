"""Files of named arrays, as the tests of the readers need them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from tensordict import TensorDictBase


def write_arrays(path: str | Path, fields: Mapping[str, Any], **attributes: Any) -> Path:
    """Write the fields to an ``.npz`` archive, or to an HDF5 file with these attributes, and return its path."""
    path = Path(path)
    if path.suffix == ".npz":
        np.savez(path, **fields)
        return path
    with h5py.File(path, "w") as file:
        for name, values in fields.items():
            file[name] = values
        file.attrs.update(attributes)
    return path


def same(found: TensorDictBase, expected: TensorDictBase) -> None:
    """Assert that both hold the same entries, bit for bit."""
    assert found.batch_size == expected.batch_size
    assert set(found.keys(True, True)) == set(expected.keys(True, True))
    for key, value in expected.items(True, True):
        assert found[key].dtype == value.dtype, key
        assert torch.equal(found[key], value), key
