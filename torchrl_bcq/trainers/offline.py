"""Training of an offline objective in TorchRL's Trainer."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.checkpoint import Checkpoint, CheckpointRotation
from torchrl.data import PrioritizedSampler, ReplayBuffer
from torchrl.objectives.utils import TargetNetUpdater
from torchrl.record.loggers import Logger
from torchrl.trainers.trainers import OptimizationStepper, ReplayBufferTrainer

from torchrl_bcq.objectives import OfflineLoss
from torchrl_bcq.trainers.checkpoints import LoggerState, make_checkpoint
from torchrl_bcq.trainers.checks import check_buffer, check_stepper, check_updater
from torchrl_bcq.trainers.distributed import Processes
from torchrl_bcq.trainers.execution import Execution
from torchrl_bcq.trainers.offline_collector import OfflineCollector
from torchrl_bcq.trainers.replicas import ReplicatedTrainer
from torchrl_bcq.trainers.stepper import OfflineOptimizationStepper
from torchrl_bcq.trainers.targets import FastTargetNetUpdaterHook
from torchrl_bcq.trainers.watch import LossWatch


class OfflineTrainer(ReplicatedTrainer):
    """A :class:`torchrl.trainers.Trainer` that trains an objective on a fixed dataset: a frame is a gradient step.

    Args:
        loss_module: any :class:`~torchrl_bcq.OfflineLoss`.
        replay_buffer: holds the transitions and has a batch size.
        target_net_updater: of ``loss_module``, stepped after each gradient step, such as
            ``SoftUpdate(loss_module, tau=0.005)``. None if the loss has no targets.
        total_steps: gradient steps in all, those before a resumed checkpoint included.
        optimization_stepper: Adam at 1e-3 for each network, in the loss's order, if not given.
        log_interval: gradient steps between two updates of progress bar and logger, which show means over them. Losses
            are checked, and checkpoints written, at its multiples.
        compile: whether losses are compiled by :func:`torch.compile`, or keywords for it, such as
            ``{"mode": "max-autotune"}``. The first step of each network then takes up to a minute. Compiled code draws
            other random numbers, unless ``{"options": {"fallback_random": True}}``.
        precision: of matrix products. None keeps PyTorch's setting, float32 by default. ``"highest"``, ``"high"`` and
            ``"medium"`` are those of :func:`torch.set_float32_matmul_precision`, set during training; PyTorch and the
            processor decide what they compute. ``"highest"`` is float32. ``"high"`` is TF32 on GPUs since Ampere and on
            CPUs with AMX-FP16, float32 on other x86 CPUs. ``"medium"`` is TF32 on these GPUs and float32 on x86 CPUs
            without AMX; on CPUs with AMX it rounds the factors of products of more than 4,096 multiplications to
            bfloat16 (relative error of a product 2e-3, in float32 3e-7). ``"bf16-target"`` evaluates target networks,
            which have no gradient, in bfloat16 on every processor, ``"bf16-mixed"`` all networks. Weights, optimizers,
            targets and losses are stored in float32 in all of them.
        cudagraph: whether gradient steps are captured into CUDA graphs, so that a step is one launch. Needs a loss on a
            CUDA device, and optimizers that can be captured.
        data_parallel: whether the processes of :mod:`torch.distributed`, such as ``torchrun`` starts, train together,
            each on its own batches: they start with the first one's networks, and average gradients before each step of
            an optimizer. All make this trainer, with a replay buffer of another seed, as
            ``make_replay_buffer(..., seed=seed + rank)``, and call the same methods. N batches of B rows count as one
            of N * B. Only the first process logs and writes; hooks that only watch may be in it alone.
        logger: one of TorchRL's.
        progress_bar: whether to show one; needs tqdm.
        seed: of PyTorch and NumPy, set here.
        clip_norm: largest norm of each network's gradient; None does not clip.
        clip_grad_norm: False clips gradients by value in place of norm.
        save_trainer_file: folder of a checkpoint, replaced by each new one.
        save_trainer_interval: a checkpoint is written once more gradient steps than these have passed.
        checkpoint: :func:`make_checkpoint` with the logger's state if not given.
        checkpoint_rotation: keeps several checkpoints, in place of ``save_trainer_file``.
        checkpoint_metadata: returns what each checkpoint's manifest holds beside the counters.
        log_timings: whether TorchRL's timers are logged.

    A checkpoint is a :class:`torchrl.checkpoint.Checkpoint`, written to a temporary folder and renamed. It holds
    networks, targets, optimizers, counters, hooks, sampler and random states, but not the dataset:
    ``trainer.load_from_file(path)`` continues bit for bit, unless the replay buffer prefetches in threads. Nothing in
    it is pickled, unless ``checkpoint`` is your own and pickles. A checkpoint of several processes holds what each
    draws from; new processes draw from new random states, which follow from the first one's, their rank and the step.

    ``trainer.request_stop(reason)``, also from a signal handler, ends ``train`` after the present gradient step with a
    checkpoint; of several processes, all of them after the ``log_interval``. After an interrupt, ``train()`` makes all
    steps that are left; the interrupted one is made again.

    Raises:
        TypeError: for another kind of ``compile``.
        ValueError: if the updater is missing or belongs to another loss, a network lacks its optimizer, a prioritised
            buffer reads another entry than the loss writes, ``precision`` is unknown, or ``cudagraph`` or
            ``data_parallel`` is not available; in ``train``, if processes differ, or draw the same rows.
        RuntimeError: if another process has failed, or has ended.
        FloatingPointError: in ``train``, if a loss was not finite within the last ``log_interval`` steps, or weights
            are not when a checkpoint is due. It names the step, the loss, the rows of its batch, which are written
            beside the checkpoints, and the last good checkpoint.
        OSError: in ``train``, if a checkpoint cannot be written; the one before it stays as it was.
    """

    default_stepper: type[OfflineOptimizationStepper] = OfflineOptimizationStepper
    _optim_count: int

    def __init__(
        self,
        loss_module: OfflineLoss,
        replay_buffer: ReplayBuffer,
        *,
        target_net_updater: TargetNetUpdater | None,
        total_steps: int,
        optimization_stepper: OptimizationStepper | None = None,
        log_interval: int = 100,
        compile: bool | Mapping[str, Any] = False,
        precision: str | None = None,
        cudagraph: bool = False,
        data_parallel: bool = False,
        logger: Logger | None = None,
        progress_bar: bool = True,
        seed: int | None = None,
        clip_norm: float | None = None,
        clip_grad_norm: bool = True,
        save_trainer_file: str | Path | None = None,
        save_trainer_interval: int = 10_000,
        checkpoint: Checkpoint | None = None,
        checkpoint_rotation: CheckpointRotation | None = None,
        checkpoint_metadata: Callable[[Any], Mapping[str, Any]] | None = None,
        log_timings: bool = False,
    ) -> None:
        check_updater(loss_module, target_net_updater)
        stepper = optimization_stepper or self.default_stepper.adam(loss_module)
        check_stepper(loss_module, stepper, captured=cudagraph, parallel=data_parallel)
        check_buffer(loss_module, replay_buffer)
        device = next(loss_module.parameters()).device
        if cudagraph:
            stepper.capture()
        super().__init__(
            processes=Processes(device if data_parallel else None),
            replay_buffer=replay_buffer,
            collector=OfflineCollector(total_steps, log_interval),
            total_frames=total_steps,
            frame_skip=1,
            optim_steps_per_batch=log_interval,
            loss_module=loss_module,
            optimization_stepper=stepper,
            target_net_updater=target_net_updater,
            log_interval=-1,  # logs whatever a hook reports, once per interval
            auto_log_optim_steps=False,
            logger=logger,
            progress_bar=progress_bar,
            seed=seed,
            clip_norm=clip_norm,
            clip_grad_norm=clip_grad_norm,
            save_trainer_file=save_trainer_file,
            save_trainer_interval=save_trainer_interval,
            checkpoint=checkpoint or make_checkpoint(**({} if logger is None else {"logger": LoggerState(logger)})),
            checkpoint_rotation=checkpoint_rotation,
            checkpoint_metadata=checkpoint_metadata,
            log_timings=log_timings,
        )
        self._last_log: dict[str, int] = {}  # TorchRL's is shared by all live trainers
        self._log_dict: dict[str, deque] = defaultdict(lambda: deque(maxlen=1))  # TorchRL's grows forever
        self._last_save = 0
        self._execution = Execution(loss_module, compile, precision)
        self._watch = LossWatch(replay_buffer)
        self._replay = ReplayBufferTrainer(replay_buffer)
        self.register_op("process_optim_batch", self._draw)
        if isinstance(replay_buffer.sampler, PrioritizedSampler):
            self.register_op("post_optim_log", self._replay.update_priority)
        if target_net_updater is not None:
            hook = FastTargetNetUpdaterHook(target_net_updater)
            self.register_op("setup", hook.find)
            self.register_op("post_optim", hook)
        self.register_op("post_optim_complete_log", self._log_losses)
        self.register_op("setup", self._set_up)
        self.register_module("metrics", _LastMetrics(self))

    @property
    def metrics(self) -> dict[str, float]:
        """The values logged last, by name."""
        return {name: float(values[-1]) for name, values in self._log_dict.items() if values}

    def logged_at(self, name: str) -> int | None:
        """The gradient step at which a metric was logged last, in this process; None if it was not."""
        return self._last_log.get(name)

    def train(self) -> None:
        """Make the gradient steps that are left, or those until a stop is requested."""
        self.collected_frames = self._optim_count  # an interrupt leaves TorchRL's own counters ahead
        self.collector.load_state_dict({"steps": self._optim_count})
        try:
            super().train()
            if self._saved_at != self.collected_frames:  # nothing was left to do after an interrupt but this
                self.save_trainer(force_save=True)
        finally:
            if self.progress_bar:
                self._pbar.n = self.collected_frames
                self._pbar.close()

    def optim_steps(self, batch: TensorDictBase) -> None:
        """Make the gradient steps of a log interval, or fewer if a stop is requested or an error is raised."""
        before = self._optim_count
        self.optim_steps_per_batch = self._steps_left = batch.numel()
        self._watch.begin(before)
        try:
            with self._execution.active():
                super().optim_steps(batch)
        finally:
            if undone := self._steps_left:
                self._optim_count = before + batch.numel() - undone
                self.collected_frames -= undone
                self.collector.take_back(undone)

    def _post_optim_hook(self) -> None:
        self._steps_left -= 1  # an interrupt from here on does not repeat the step
        super()._post_optim_hook()

    def compute_loss(self, sub_batch: TensorDictBase, method: str | None = None) -> Any:
        """Evaluate the loss, or one of its methods, and remember the value until it is checked."""
        out = self._execution.compute(sub_batch, method)
        self.remember_losses({method: out[0]} if method else out)
        return out

    def remember_losses(self, losses: Mapping[str, Any]) -> None:
        """Remember losses of the present step, which are checked at the end of the log interval."""
        if not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            self._watch.add(losses)

    def _draw(self, interval: TensorDictBase) -> TensorDictBase:
        """Draw a batch; TorchRL ends the interval at ``StopIteration``."""
        if self._stop_training:
            raise StopIteration
        batch = self._replay.sample(interval)
        self._watch.next_step(batch)
        return batch

    def _log_losses(self, optim_steps: int, average_losses: TensorDictBase | None) -> dict[str, Any] | None:
        """Log the means of a log interval, the losses also on the progress bar; one transfer from the device."""
        watch = self._watch
        self._fail_together(watch.find(), lambda at: watch.describe(at, self._checkpoint_folder, self._last_good))
        if average_losses is None or self._steps_left:
            return None  # stopped within the interval; a resumed run makes the rest of it
        names = list(average_losses.keys())
        values = self.processes.mean(torch.stack([average_losses.get(name) for name in names]))
        means = zip(names, values.tolist(), strict=True)
        known = {name: mean for name, mean in means if not math.isnan(mean)}  # others did not learn
        self._log(**{name: mean for name, mean in known.items() if not name.startswith("loss_")})
        return {"log_pbar": True, **{name: mean for name, mean in known.items() if name.startswith("loss_")}}

    def _set_up(self) -> None:
        """Start a resumed run's progress bar at its step."""
        if self.progress_bar:
            self._pbar.unit = " steps"
            self._pbar.n = self._pbar.initial = self.collected_frames
            self._pbar.refresh()

    def _pbar_description(self) -> None:
        """Show metrics behind steps, rate and time left, which a narrow terminal would otherwise cut off."""
        if self.progress_bar:
            losses_last = sorted(self._pbar_str, key=lambda name: (name.startswith("loss_"), name))
            self._pbar.set_postfix({name: f"{self._pbar_str[name]:.4g}" for name in losses_last})


class _LastMetrics:
    """The logged values that a resumed run needs, for hooks such as TorchRL's ``EarlyStopping``."""

    def __init__(self, trainer: OfflineTrainer) -> None:
        self._trainer = trainer

    def state_dict(self) -> dict[str, float]:
        return self._trainer.metrics

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        for name, value in state_dict.items():
            self._trainer._log_dict[name].append(value)
