"""A collector for training without an environment."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from tensordict import TensorDict, TensorDictBase
from torchrl.collectors import BaseCollector


class OfflineCollector(BaseCollector):
    """Lets :class:`torchrl.trainers.Trainer` run without an environment: a frame is a gradient step.

    Args:
        total_steps: gradient steps in all.
        steps_per_batch: gradient steps of each batch, after which the trainer logs. Batches end at its multiples, and
            at ``total_steps``.

    Yields: a TensorDict without entries, of batch size ``[k]``, that asks for ``k`` gradient steps.

    Raises:
        ValueError: if a number is below 1.
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
        """Batches from the present step to the last."""
        while self._steps < self.total_frames:
            interval = self.requested_frames_per_batch
            steps = min(interval - self._steps % interval, self.total_frames - self._steps)
            self._steps += steps
            yield TensorDict({}, [steps])

    def take_back(self, steps: int) -> None:
        """Return steps that were handed out but not made."""
        self._steps -= steps

    def set_seed(self, seed: int, static_seed: bool = False) -> int:
        """Nothing here is random."""
        return seed

    def update_policy_weights_(self, *args: Any, **kwargs: Any) -> None:
        """There is no policy here."""

    def shutdown(self, timeout: float | None = None, close_env: bool = True, raise_on_error: bool = True) -> None:
        """Nothing here is open."""

    def state_dict(self) -> OrderedDict[str, int]:
        """The number of steps handed out."""
        return OrderedDict(steps=self._steps)

    def load_state_dict(self, state_dict: OrderedDict[str, int]) -> None:
        """Continue after ``state_dict["steps"]``."""
        self._steps = state_dict["steps"]
