"""What is minimised."""

from torchrl_bcq.objectives.bcq import BCQLoss

__all__ = ["BCQLoss"]
