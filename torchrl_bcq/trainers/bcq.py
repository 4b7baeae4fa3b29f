"""BCQ in TorchRL's Trainer."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.checkpoint import Checkpoint, GlobalRNGState
from torchrl.data import PrioritizedSampler, ReplayBuffer, SamplerWithoutReplacement
from torchrl.objectives.utils import TargetNetUpdater
from torchrl.trainers.trainers import OptimizationStepper, ReplayBufferTrainer, TargetNetUpdaterHook, Trainer

from torchrl_bcq.objectives import BCQLoss
from torchrl_bcq.trainers.offline_collector import OfflineCollector
from torchrl_bcq.trainers.stepper import BCQOptimizationStepper

# arguments of TorchRL's Trainer that are settled here
_NOT_OFFLINE = {"async_collection", "batch_size", "frame_skip", "learner_backend", "lr", "num_epochs", "optimizer"}


class BCQTrainer(Trainer):
    """A :class:`torchrl.trainers.Trainer` whose frames are gradient steps on a fixed dataset.

    Args:
        loss_module: the objective.
        replay_buffer: holds the transitions and knows its batch size.
        target_net_updater: of ``loss_module``; stepped after each gradient step, the author's is
            ``SoftUpdate(loss_module, tau=0.005)``. None where the loss delays neither actor nor critics.
        total_steps: gradient steps in all, those before a resumed checkpoint included.
        optimization_stepper: the author's Adam optimizers if not given.
        log_interval: gradient steps between two updates of the progress bar and of the logger; what is logged is the
            mean over them.
        **trainer_kwargs: any other argument of TorchRL's Trainer: ``logger``, ``seed``, ``progress_bar``,
            ``clip_norm``, ``save_trainer_file``, ``save_trainer_interval``, ``checkpoint`` ...

    With ``save_trainer_file=path`` it leaves a :class:`torchrl.checkpoint.Checkpoint` there, written aside and renamed.
    That holds the networks, targets, optimizers, counters, the sampler and the random states, but not the dataset:
    ``trainer.load_from_file(path)`` goes on as if there had been no break.

    Raises:
        TypeError: for an argument of TorchRL's Trainer that would have no effect here.
        ValueError: if the updater is missing or belongs to another loss, a network lacks its optimizer, or a
            prioritised buffer reads its priorities from another entry than the loss writes.
        FloatingPointError: in ``train``, if a loss was not finite within the last ``log_interval`` steps.
    """

    def __init__(
        self,
        loss_module: BCQLoss,
        replay_buffer: ReplayBuffer,
        *,
        target_net_updater: TargetNetUpdater | None,
        total_steps: int,
        optimization_stepper: OptimizationStepper | None = None,
        log_interval: int = 100,
        **trainer_kwargs: Any,
    ) -> None:
        if taken := _NOT_OFFLINE & trainer_kwargs.keys():
            raise TypeError(f"BCQTrainer has no use for {sorted(taken)}; optimizers go into optimization_stepper.")
        _check_updater(loss_module, target_net_updater)
        optimization_stepper = optimization_stepper or BCQOptimizationStepper.adam(loss_module)
        _check_stepper(loss_module, optimization_stepper)
        super().__init__(
            collector=OfflineCollector(total_steps, log_interval),
            total_frames=total_steps,
            frame_skip=1,
            optim_steps_per_batch=log_interval,
            loss_module=loss_module,
            optimization_stepper=optimization_stepper,
            target_net_updater=target_net_updater,
            log_interval=0,  # a tick is the interval
            auto_log_optim_steps=False,
            **{"checkpoint": Checkpoint(), **trainer_kwargs},
        )
        self._last_log: dict[str, int] = {}  # TorchRL's is shared by all live trainers
        self._last_save = 0
        replay = ReplayBufferTrainer(replay_buffer)
        self.register_op("process_optim_batch", replay.sample)
        if isinstance(replay_buffer.sampler, PrioritizedSampler):
            _check_priority_key(loss_module, replay_buffer)
            self.register_op("post_optim_log", replay.update_priority)
        if target_net_updater is not None:
            self.register_op("post_optim", TargetNetUpdaterHook(target_net_updater))
        self.register_op("post_optim_complete_log", self._log_losses)
        self.register_op("setup", self._advance_progress_bar)
        self.register_op("shutdown", self._close_progress_bar)
        self.register_module("sampler", _SamplerState(replay_buffer))
        self.register_module("random_state", GlobalRNGState())

    def optim_steps(self, batch: TensorDictBase) -> None:
        """Make as many gradient steps as the tick has frames."""
        self.optim_steps_per_batch = batch.numel()
        super().optim_steps(batch)

    def _log_losses(self, optim_steps: int, average_losses: TensorDictBase) -> dict[str, Any]:
        """Log the means of a tick, the losses also on the progress bar; one transfer from the device."""
        names = list(average_losses.keys())
        means = dict(zip(names, torch.stack([average_losses.get(name) for name in names]).tolist(), strict=True))
        broken = {name: mean for name, mean in means.items() if not math.isfinite(mean)}
        if broken:
            raise FloatingPointError(
                f"not finite within gradient steps {optim_steps - self.optim_steps_per_batch + 1} to {optim_steps}: "
                f"{broken}. If the dataset is finite, lower the learning rate, set clip_norm, or scale the rewards."
            )
        self._log(**{name: mean for name, mean in means.items() if not name.startswith("loss_")})
        return {"log_pbar": True, **{name: mean for name, mean in means.items() if name.startswith("loss_")}}

    def _advance_progress_bar(self) -> None:
        """Start a resumed run's bar at its step."""
        if self.progress_bar:
            self._pbar.n = self._pbar.initial = self.collected_frames
            self._pbar.refresh()

    def _close_progress_bar(self) -> None:
        if self.progress_bar:
            self._pbar.close()


def _check_updater(loss_module: BCQLoss, updater: TargetNetUpdater | None) -> None:
    delayed = loss_module.delay_actor or loss_module.delay_qvalue
    if delayed != (updater is not None):
        raise ValueError(
            "the loss has target networks; pass target_net_updater=SoftUpdate(loss_module, tau=0.005)."
            if delayed
            else "the loss has no target networks (delay_actor, delay_qvalue); pass target_net_updater=None."
        )
    if updater is not None and updater.loss_module is not loss_module:
        raise ValueError("target_net_updater was made for another loss; its targets are not the ones that are used.")


def _check_stepper(loss_module: BCQLoss, stepper: OptimizationStepper) -> None:
    trained = loss_module.network_names
    if isinstance(stepper, BCQOptimizationStepper) and set(stepper.optimizers) != set(trained):
        raise ValueError(f"the loss trains {[*trained]}, but optimization_stepper steps {[*stepper.optimizers]}.")


def _check_priority_key(loss_module: BCQLoss, replay_buffer: ReplayBuffer) -> None:
    written, read = loss_module.tensor_keys.priority, replay_buffer.priority_key
    if written != read:
        raise ValueError(
            f"the loss writes priorities to {written!r}, the buffer reads {read!r}; set priority_key={written!r}."
        )


class _SamplerState:
    """What a replay buffer needs to go on drawing the same rows: its sampler and generator, without the data."""

    def __init__(self, replay_buffer: ReplayBuffer) -> None:
        self._buffer = replay_buffer

    def dump(self, path: Path) -> None:
        """Write the sampler's own files, and the generator's state, into the folder ``path``."""
        (path / "sampler.json").write_text(json.dumps({"class": self._sampler_class, "rows": len(self._buffer)}))
        self._buffer.sampler.dumps(path / "sampler")
        generator = self._buffer._rng
        state = {} if generator is None else {"generator": generator.get_state()}
        TensorDict(state).memmap(path / "generator")

    def load(self, path: Path) -> None:
        """Read them back."""
        saved = json.loads((path / "sampler.json").read_text())
        if saved["class"] != self._sampler_class:
            raise ValueError(
                f"the checkpoint's replay buffer drew with a {saved['class']}, this one with a {self._sampler_class}; "
                "make it alike."
            )
        if saved["rows"] != len(self._buffer):
            raise ValueError(
                f"the checkpoint's replay buffer had {saved['rows']} transitions, this one has {len(self._buffer)}; "
                "go on with the same dataset."
            )
        state, generator = TensorDict.load_memmap(path / "generator", allow_pickle=False).to_dict(), self._buffer._rng
        if (generator is None) == ("generator" in state):
            with_seed = "with" if generator is None else "without"
            raise ValueError(
                f"the checkpoint's replay buffer was made {with_seed} a seed, this one was not; make it alike."
            )
        sampler = self._buffer.sampler
        sampler.loads(path / "sampler")
        if isinstance(sampler, SamplerWithoutReplacement) and sampler._sample_list is not None:
            # TorchRL leaves the rest of the round on the CPU, and would draw the next one there, too
            sampler._sample_list = sampler._sample_list.to(self._buffer.storage.device)
        if generator is not None:
            generator.set_state(state["generator"].cpu())

    @property
    def _sampler_class(self) -> str:
        return type(self._buffer.sampler).__name__
