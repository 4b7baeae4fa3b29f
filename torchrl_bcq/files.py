"""Writes files and folders atomically."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from uuid import uuid4

UNFINISHED = ".part-"  # start of the names of unfinished files and folders


def home(path: str | os.PathLike[str]) -> Path:
    """Return the path with ``~`` expanded.

    Raises:
        FileNotFoundError: if the path starts with ``~`` and the name of an unknown user, and does not exist.
    """
    expanded = Path(os.path.expanduser(path))
    if not expanded.parts or not expanded.parts[0].startswith("~"):
        return expanded
    if not expanded.exists():
        raise FileNotFoundError(f"{path} starts with the home folder of an unknown user; write the whole path.")
    return Path.cwd() / expanded  # a name such as ~file, which must not be expanded again


def check_writable(file: Path, remedy: str) -> None:
    """Raise an OSError if a file cannot be written into its folder. Call this before long work."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise OSError(f"{file} cannot be written: {error.strerror}; {remedy}.") from error


@contextmanager
def write_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it to ``path`` at the end of the ``with`` block.

    If the block raises an exception or the process is killed, ``path`` does not change. After an exception, the
    temporary file or folder is removed. The temporary name has the same file extension as ``path``. Missing parent
    folders are created. A new file replaces an existing file; a new folder replaces only an empty folder.

    Raises:
        OSError: if the file or folder cannot be written.
    """
    if not path.name:
        raise IsADirectoryError(f"{str(path)!r} is a folder; write the name of a file.")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{UNFINISHED}{uuid4().hex[:8]}.{path.name}")
    try:
        yield aside
        aside.replace(path)
    except OSError as error:  # name the file of the user, not the temporary one
        if error.errno is None or error.filename not in (None, str(aside)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        if aside.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.unlink(missing_ok=True)
