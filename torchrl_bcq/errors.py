"""Errors that a user can fix, with advice for Python or for the command line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_on_command_line: ContextVar[bool] = ContextVar("on_command_line", default=False)


class RunError(ValueError):
    """Raised if a training run or its settings cannot be used. The message says why and what to do."""


class DatasetError(ValueError):
    """Raised for a dataset that cannot be used; the message says what was found, where, and what to do."""


@contextmanager
def on_command_line() -> Iterator[None]:
    """While the context is open, ``remedy`` returns the advice for the command line."""
    token = _on_command_line.set(True)
    try:
        yield
    finally:
        _on_command_line.reset(token)


def with_packages(error: Exception) -> str:
    """Return the text of an error; if a package is missing, with the command that installs it."""
    is_new = isinstance(error, ImportError) and "pip install" not in str(error)
    return f"{error}; install what is missing: pip install 'torchrl-bcq[train]'" if is_new else str(error)


def remedy(python: str, command: str) -> str:
    """Return the advice for a user of the Python functions, or for a user of the command line."""
    return command if _on_command_line.get() else python
