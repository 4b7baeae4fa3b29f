"""Files of named arrays, as the tests of the readers need them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np


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
