"""A trainer for several processes, each with its own copy of the networks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tensordict import TensorDictBase
from torchrl.data import ReplayBuffer
from torchrl.trainers.trainers import Trainer

from torchrl_bcq.trainers.checkpoints import SamplerState, tidy, tidy_rotation
from torchrl_bcq.trainers.distributed import Processes
from torchrl_bcq.trainers.random_states import RankStates
from torchrl_bcq.trainers.watch import check_parameters


class ReplicatedTrainer(Trainer):
    """TorchRL's trainer, extended to start, stop, fail and save at the same gradient step in all processes.

    If one process left the training loop or wrote a checkpoint alone, the others would wait for it forever. So the
    processes exchange their stop and save requests at the end of every log interval, and then all processes carry out
    the requests. Only the first process logs and shows a progress bar.
    """

    def __init__(self, *, processes: Processes, replay_buffer: ReplayBuffer, **trainer_kwargs: Any) -> None:
        self.processes = processes
        self._stop_reasons: list[str | None] = []  # reasons of the stop requests that this process received
        # functions that write the requested checkpoints at the end of the log interval
        self._writes: list[Callable[[], None]] = []
        self._steps_left = 0  # gradient steps left in the current log interval
        self._saved_at: int | None = None  # gradient step of the last checkpoint
        if not processes.is_first:
            trainer_kwargs.update(logger=None, progress_bar=False)
        super().__init__(**trainer_kwargs)
        sampler = SamplerState(replay_buffer)
        self._ranks = RankStates(processes, replay_buffer, sampler, next(self.loss_module.parameters()).device)
        self.register_module("sampler", sampler)
        self.register_module("random_state", self._ranks)

    def request_stop(self, reason: str | None = None) -> None:
        """End ``train`` after this gradient step; with several processes, at the end of the log interval."""
        self._stop_reasons.append(reason)
        if self.processes.world_size == 1:
            self._stop_together()

    def forget_stop(self) -> None:
        """Remove all requests to stop, so that the next call of ``train`` continues; the stop's reason remains."""
        self._stop_training = False
        self._stop_reasons.clear()

    @property
    def stop_requested(self) -> bool:
        """Whether this process has a request to stop, even if the other processes do not know the request yet."""
        return self._stop_training or bool(self._stop_reasons)

    def load_from_file(self, file: str | Path, **kwargs: Any) -> Any:
        """Load a checkpoint of one or more processes; each process must call this method."""
        if not Path(file).exists():  # a run may be writing beside an existing checkpoint
            self.processes.on_first(lambda: tidy(Path(file)))
        super().load_from_file(file, **kwargs)
        self._ranks.restore(self.collected_frames)
        is_newest = (last := self.last_checkpoint) is not None and last.resolve() == Path(file).resolve()
        self._saved_at = self.collected_frames if is_newest else None  # the best one may be newer
        return self

    @property
    def last_checkpoint(self) -> Path | None:
        """Path of the newest checkpoint, or None if no checkpoint exists."""
        if self.checkpoint_rotation is not None:
            return self.checkpoint_rotation.latest()
        file = self.save_trainer_file
        return Path(file) if file is not None and Path(file).exists() else None

    def write_checkpoint(self, write: Callable[[], Any]) -> None:
        """Call ``write`` at the end of the log interval to save a checkpoint, if all weights are finite."""
        self._writes.append(lambda: self._write(write))

    def _write(self, write: Callable[[], Any]) -> None:
        check_parameters(self.loss_module, self._optim_count, self._last_good)
        try:
            write()
        except OSError as error:
            after = "start again" if self.last_checkpoint is None else "resume from that checkpoint"
            raise OSError(
                f"the checkpoint after {self._optim_count} gradient steps cannot be written ({error}). "
                f"{self._last_good} Fix the cause of this error, then {after}."
            ) from error

    def _save_trainer(self) -> None:
        save = super()._save_trainer
        self._write_together(lambda: self._write(save))
        self._saved_at = self.collected_frames

    @property
    def _last_good(self) -> str:
        last = self.last_checkpoint
        return "There is no checkpoint yet." if last is None else f"The last good checkpoint is {last}."

    @property
    def _checkpoint_folder(self) -> Path | None:
        if self.checkpoint_rotation is not None:
            return self.checkpoint_rotation.directory.parent
        return None if self.save_trainer_file is None else Path(self.save_trainer_file).absolute().parent

    def _setup_hook(self) -> None:
        self._check_alike()
        self._ranks.begin(self.collected_frames)
        self.processes.replicate(self.loss_module.state_dict().values())
        self.processes.on_first(self._tidy)
        super()._setup_hook()
        self._exchange_requests()

    def _tidy(self) -> None:
        """Remove the temporary files that a killed run has left."""
        if self.checkpoint_rotation is not None:
            tidy_rotation(self.checkpoint_rotation.directory, self.checkpoint_rotation.prefix)
        elif self.save_trainer_file is not None:
            tidy(Path(self.save_trainer_file).absolute())

    def _post_steps_log_hook(self, batch: TensorDictBase) -> None:
        super()._post_steps_log_hook(batch)
        self._exchange_requests()

    def _exchange_requests(self) -> None:
        """Let all processes save or stop together if at least one process has requested it."""
        stop, write = self.processes.agree(bool(self._stop_reasons), bool(self._writes))
        if write:
            writes, self._writes = self._writes, []
            self._write_together(*writes)
        if stop:
            self._stop_together()

    def _stop_together(self) -> None:
        if not self._stop_training:
            given = self.processes.gather(self._stop_reasons)
            super().request_stop(next((reasons[0] for reasons in given if reasons), None))

    def _write_together(self, *writes: Callable[[], None]) -> None:
        """Send the states of all processes to the first process, which then writes the checkpoints."""

        def write() -> None:
            for each in writes:
                each()

        self._ranks.collect()
        self.processes.on_first(write)

    def _fail_together(self, position: int | None, describe: Callable[[int], str]) -> None:
        """Raise a FloatingPointError in all processes if at least one process has a loss that is not finite."""
        if self._steps_left and not self._stop_training and self.processes.world_size > 1:
            raise RuntimeError(
                f"a hook has ended the log interval {self._steps_left} gradient steps early, but the other processes "
                "wait for these steps; call trainer.request_stop(reason) in the hook instead."
            )
        failed, stop = self.processes.agree(position is not None, bool(self._stop_reasons))
        if failed:
            found = self.processes.gather(position)
            rank = min((place, rank) for rank, place in enumerate(found) if place is not None)[1]
            own = describe(position) if position is not None and rank == self.processes.rank else None
            where = f"in process {rank}: " if self.processes.world_size > 1 else ""
            raise FloatingPointError(f"{where}{self.processes.gather(own)[rank]}")
        if stop:
            self._stop_together()

    def _check_alike(self) -> None:
        """Raise a ValueError if the trainers of the processes differ: such processes could wait forever."""
        stepper = self.optimization_stepper
        shapes = [(name, tuple(value.shape)) for name, value in self.loss_module.state_dict().items()]
        plan = {
            "networks (a digest of names and shapes)": hashlib.sha256(repr(shapes).encode()).hexdigest()[:8],
            "gradient steps made": self.collected_frames,
            "total_steps": self.total_frames,
            "log_interval": self.collector.requested_frames_per_batch,
            "whether checkpoints are written": self._has_checkpoint_destination(),
            "save_trainer_interval": self.save_trainer_interval,
            "the schedules of the networks": repr(getattr(stepper, "schedules", None)),
        }
        plans = self.processes.gather(plan)
        for name in plan:
            if any(other[name] != plans[0][name] for other in plans):
                found = [other[name] for other in plans]
                raise ValueError(f"the processes differ in {name}: {found}; make the same trainer in each of them.")
