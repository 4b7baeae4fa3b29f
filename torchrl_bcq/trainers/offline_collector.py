"""A collector for a learner that never collects."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from tensordict import TensorDict, TensorDictBase
from torchrl.collectors import BaseCollector


class OfflineCollector(BaseCollector):
    """Lets :class:`torchrl.trainers.Trainer` run with no environment: yields empty ticks, a frame is a gradient step.

    Args:
        total_steps: gradient steps in all.
        steps_per_tick: gradient steps of each tick, between two looks of the trainer at its logs. Ticks end at
            multiples of it, wherever they begin, and at ``total_steps``.

    Yields: a TensorDict without entries, of batch size ``[k]``, that asks for ``k`` gradient steps.

    Raises:
        ValueError: if a number is below 1.
    """

    init_random_frames = 0

    def __init__(self, total_steps: int, steps_per_tick: int) -> None:
        super().__init__()
        if total_steps < 1 or steps_per_tick < 1:
            raise ValueError(
                f"total_steps is {total_steps} and steps_per_tick {steps_per_tick}; both must be at least 1."
            )
        self.total_frames = total_steps
        self.requested_frames_per_batch = steps_per_tick
        self._steps = 0

    def iterator(self) -> Iterator[TensorDictBase]:
        """Ticks from the present step to the last."""
        while self._steps < self.total_frames:
            per_tick = self.requested_frames_per_batch
            tick = min(per_tick - self._steps % per_tick, self.total_frames - self._steps)
            self._steps += tick
            yield TensorDict({}, [tick])

    def take_back(self, steps: int) -> None:
        """Steps that were handed out, but not made."""
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
        """Go on after ``state_dict["steps"]``."""
        self._steps = state_dict["steps"]
