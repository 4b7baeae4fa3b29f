"""What is in a dataset, and what looks wrong with it."""

from torchrl_bcq.data.description.describe import Description, describe

__all__ = ["Description", "describe"]
