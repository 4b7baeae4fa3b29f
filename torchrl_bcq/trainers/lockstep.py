"""A trainer that has a twin in each of several processes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tensordict import TensorDictBase
from torch import Tensor
from torchrl.checkpoint import GlobalRNGState
from torchrl.data import ReplayBuffer
from torchrl.trainers.trainers import Trainer

from torchrl_bcq.trainers.checkpoints import SamplerState
from torchrl_bcq.trainers.distributed import DataParallel, RankStates


class LockstepTrainer(Trainer):
    """TorchRL's trainer, which begins, stops, fails and saves at the same gradient step as its twins.

    A twin that left the loop alone, or wrote a checkpoint alone, would have the others wait for ever. So what one of
    them wants is told to all at the end of a tick, and all do it. Without twins nothing is changed.

    Args:
        parallel: the processes, if there are twins.
        **trainer_kwargs: of TorchRL's Trainer; its optimization stepper counts its ``steps``.
    """

    def __init__(self, *, parallel: DataParallel | None, **trainer_kwargs: Any) -> None:
        self._parallel = parallel
        self._ranks: RankStates | None = None
        self._stop_reasons: list[str | None] = []  # that were given in this process
        self._writes: list[Callable[[], None]] = []  # of checkpoints, until the others know of them
        self._due = 0
        if parallel is not None and not parallel.is_first:
            trainer_kwargs.update(logger=None, progress_bar=False)
        super().__init__(**trainer_kwargs)

    def register_random_states(self, replay_buffer: ReplayBuffer) -> None:
        """Keep in checkpoints what rows and noise are drawn from."""
        sampler = SamplerState(replay_buffer)
        if self._parallel is not None:
            device = next(self.loss_module.parameters()).device
            self._ranks = RankStates(self._parallel, replay_buffer, sampler, device)
        self.register_module("sampler", sampler)
        self.register_module("random_state", self._ranks or GlobalRNGState())

    def request_stop(self, reason: str | None = None) -> None:
        """Ask for the end of ``train``: after the present gradient step, with twins after those of the tick."""
        if self._parallel is None:
            super().request_stop(reason)
        else:
            self._stop_reasons.append(reason)

    @property
    def stop_requested(self) -> bool:
        """Whether it was asked to stop, though its twins may not know yet."""
        return self._stop_training or bool(self._stop_reasons)

    def load_from_file(self, file: str | Path, **kwargs: Any) -> Any:
        """Go on from a checkpoint, of any number of processes; each of them must call it."""
        super().load_from_file(file, **kwargs)
        if self._ranks is not None:
            self._ranks.restore(self.collected_frames)
        return self

    def optim_steps(self, batch: TensorDictBase) -> None:
        """Make the gradient steps of a tick."""
        self._due = self._steps_made + batch.numel()
        super().optim_steps(batch)

    def _setup_hook(self) -> None:
        if self._parallel is not None and self._ranks is not None:
            self._parallel.check_alike(self._plan())
            self._ranks.begin(self.collected_frames)
            self._parallel.replicate(self.loss_module.state_dict().values())
        super()._setup_hook()
        self._meet()

    def _post_steps_log_hook(self, batch: TensorDictBase) -> None:
        super()._post_steps_log_hook(batch)
        self._meet()

    def _meet(self) -> None:
        """Do what hooks and signals of any process have asked for."""
        if self._parallel is None:
            return
        stop, write = self._parallel.agree(bool(self._stop_reasons), bool(self._writes))
        if write:
            self._write_together(*self._writes)
            self._writes.clear()
        if stop:
            self._stop_together()

    def _stop_together(self) -> None:
        if self._parallel is not None and not self._stop_training:
            super().request_stop(next(given[0] for given in self._parallel.gather(self._stop_reasons) if given))

    def _write_together(self, *writes: Callable[[], None]) -> None:
        """Write checkpoints, in the first process, of what all of them are at."""

        def write() -> None:
            for each in writes:
                each()

        if self._ranks is not None:
            self._ranks.collect()
        self._on_first(write)

    def _on_first(self, call: Callable[[], None]) -> None:
        call() if self._parallel is None else self._parallel.on_first(call)

    def _fail_together(self, position: int | None, describe: Callable[[int], str]) -> None:
        """Raise what was found at the earliest position in any process, if anything was.

        Raises:
            FloatingPointError: in all processes.
            RuntimeError: if this one has left the tick.
        """
        if self._parallel is None:
            if position is not None:
                raise FloatingPointError(describe(position))
            return
        if self._steps_made != self._due and not self._stop_training:
            raise RuntimeError(
                f"a hook has ended the tick {self._due - self._steps_made} gradient steps early, for which other "
                "processes wait; have it call trainer.request_stop(reason) instead."
            )
        failed, stop = self._parallel.agree(position is not None, bool(self._stop_reasons))
        if failed:
            found = self._parallel.gather(position)
            rank = min((place, rank) for rank, place in enumerate(found) if place is not None)[1]
            own = describe(position) if position is not None and rank == self._parallel.rank else None
            raise FloatingPointError(f"in process {rank}: {self._parallel.gather(own)[rank]}")
        if stop:
            self._stop_together()

    def _mean(self, values: Tensor) -> Tensor:
        """Over all processes."""
        return values if self._parallel is None else self._parallel.mean(values)

    @property
    def _steps_made(self) -> int:
        return getattr(self.optimization_stepper, "steps", 0)

    def _plan(self) -> dict[str, Any]:
        """What decides how often twins meet, and over what."""
        stepper = self.optimization_stepper
        shapes = [(name, tuple(value.shape)) for name, value in self.loss_module.state_dict().items()]
        return {
            "networks (a digest of names and shapes)": hashlib.sha256(repr(shapes).encode()).hexdigest()[:8],
            "gradient steps made": self.collected_frames,
            "total_steps": self.total_frames,
            "log_interval": self.collector.requested_frames_per_batch,
            "whether checkpoints are written": self._has_checkpoint_destination(),
            "save_trainer_interval": self.save_trainer_interval,
            "the steps that each network learns in": (
                stepper.steps,
                stepper.vae_warmup_steps,
                stepper.freeze_vae_after,
                stepper.actor_update_interval,
            ),
        }
