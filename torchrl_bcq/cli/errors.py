"""What a user can put right."""


class RunError(ValueError):
    """What is wrong with a run or its settings, and what to do."""
