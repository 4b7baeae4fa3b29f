"""Errors that a user can fix."""


class RunError(ValueError):
    """Raised if a training run or its settings cannot be used. The message says why and what to do."""
