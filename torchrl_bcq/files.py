"""Writes files and folders atomically."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

UNFINISHED = ".part-"  # start of the names of unfinished files and folders


@contextmanager
def write_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it to ``path`` at the end of the ``with`` block.

    If the block raises an exception or the process is killed, ``path`` does not change. After an exception, the
    temporary file or folder is removed. The temporary name has the same file extension as ``path``. Missing parent
    folders are created. A new file replaces an existing file; a new folder replaces only an empty folder.

    Raises:
        OSError: if the file or folder cannot be written.
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
