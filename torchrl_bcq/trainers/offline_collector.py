"""A collector for training without an environment."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from tensordict import TensorDict, TensorDictBase
from torchrl.collectors import BaseCollector


class OfflineCollector(BaseCollector):
    """Lets ``torchrl.trainers.Trainer`` run without an environment; one gradient step is one frame.

    Args:
        total_steps: total number of gradient steps.
        steps_per_batch: number of gradient steps that the trainer makes for one batch of this collector. The trainer
            then logs. A batch ends at each multiple of ``steps_per_batch`` and at ``total_steps``.

    Yields: empty TensorDicts; for a TensorDict of batch size ``[k]``, the trainer makes ``k`` gradient steps.

    Raises:
        ValueError: if ``total_steps`` or ``steps_per_batch`` is less than 1.
    """

    init_random_frames = 0

    def __init__(self, total_steps: int, steps_per_batch: int) -> None:
        super().__init__()
        if total_steps < 1 or steps_per_batch < 1:
            found = f"total_steps is {total_steps} and steps_per_batch {steps_per_batch}"
            raise ValueError(f"{found}; both must be at least 1.")
        self.total_frames = total_steps
        self.requested_frames_per_batch = steps_per_batch
        self._steps = 0

    def iterator(self) -> Iterator[TensorDictBase]:
        """Yield empty batches, one for each log interval from the current step to ``total_steps``."""
        while self._steps < self.total_frames:
            interval = self.requested_frames_per_batch
            steps = min(interval - self._steps % interval, self.total_frames - self._steps)
            self._steps += steps
            yield TensorDict({}, [steps])

    def take_back(self, steps: int) -> None:
        """Subtract ``steps``, which the trainer has not made, from the number of requested steps."""
        self._steps -= steps

    def set_seed(self, seed: int, static_seed: bool = False) -> int:
        """Return ``seed``; this collector draws no random numbers."""
        return seed

    def update_policy_weights_(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing; this collector has no policy."""

    def shutdown(self, timeout: float | None = None, close_env: bool = True, raise_on_error: bool = True) -> None:
        """Do nothing; this collector has no environment to close."""

    def state_dict(self) -> OrderedDict[str, int]:
        """Return the number of steps that were requested so far."""
        return OrderedDict(steps=self._steps)

    def load_state_dict(self, state_dict: OrderedDict[str, int]) -> None:
        """Set the step counter to ``state_dict["steps"]``; the next batch begins after this step."""
        self._steps = state_dict["steps"]
