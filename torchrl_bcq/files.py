"""Writing files and folders atomically."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

UNFINISHED = ".part-"  # prefix of temporary names


@contextmanager
def write_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``, and rename it to ``path`` at the end of the block.

    If the block raises or the process is killed, ``path`` stays as it was; after an exception the temporary file or
    folder is removed, too. The temporary name keeps the ending of ``path``, and missing parent folders are created. A
    file replaces an existing file; a folder replaces an empty folder only.

    Raises:
        OSError: if it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{UNFINISHED}{uuid4().hex[:8]}.{path.name}")
    try:
        yield aside
        aside.replace(path)
    finally:
        if aside.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.unlink(missing_ok=True)
