"""Errors that a user can fix."""


class RunError(ValueError):
    """A training run or its settings cannot be used; the message says why and what to do."""
