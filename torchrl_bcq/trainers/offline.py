"""Trains an offline objective with TorchRL's ``Trainer``."""

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
from torchrl_bcq.trainers.checkpoints import LastMetrics, LoggerState, make_checkpoint
from torchrl_bcq.trainers.checks import check_buffer, check_stepper, check_updater
from torchrl_bcq.trainers.distributed import Processes
from torchrl_bcq.trainers.execution import Execution
from torchrl_bcq.trainers.offline_collector import OfflineCollector
from torchrl_bcq.trainers.replicas import ReplicatedTrainer
from torchrl_bcq.trainers.stepper import OfflineOptimizationStepper
from torchrl_bcq.trainers.targets import FastTargetNetUpdaterHook
from torchrl_bcq.trainers.watch import LossWatch


class OfflineTrainer(ReplicatedTrainer):
    """A ``torchrl.trainers.Trainer`` for objectives on a fixed dataset; one gradient step counts as one frame.

    Args:
        loss_module: any ``OfflineLoss``.
        replay_buffer: replay buffer that holds the transitions and has a batch size.
        target_net_updater: updater of the loss's target networks, called after each gradient step, such as
            ``SoftUpdate(loss_module, tau=0.005)``. Pass None if the loss has no target networks.
        total_steps: total number of gradient steps. In a resumed run, this number includes the steps before the
            checkpoint.
        optimization_stepper: makes the gradient steps; by default, each network has its own Adam with learning rate
            1e-3, and the networks learn in the order of the loss's ``trainable_names``.
        log_interval: number of gradient steps between two logs. Each log shows the means of losses and metadata over
            these steps in the progress bar and the logger. The trainer checks losses and writes checkpoints only at
            multiples of ``log_interval``, and when it stops.
        compile: whether to compile the losses with ``torch.compile``; or a mapping of arguments of ``torch.compile``,
            such as ``{"mode": "max-autotune-no-cudagraphs"}``. The first step of each network then takes up to a
            minute. Compiled code draws other random numbers than uncompiled code, unless you pass ``{"options":
            {"fallback_random": True}}``.
        precision: precision of matrix products. None keeps PyTorch's setting, which is float32 by default. The trainer
            passes ``"highest"``, ``"high"`` or ``"medium"`` to ``torch.set_float32_matmul_precision`` during training.
            The actual precision then depends on the PyTorch version and the processor. ``"highest"`` is float32.
            ``"high"`` is TF32 on Ampere and newer GPUs and on CPUs with AMX-FP16; it is float32 on other x86 CPUs.
            ``"medium"`` is TF32 on Ampere and newer GPUs; it is float32 on x86 CPUs without AMX. On CPUs with AMX,
            ``"medium"`` rounds the inputs of a matrix product to bfloat16 if the product has more than 4,096
            multiplications. The relative error of such a product is then 2e-3; in float32, it is 3e-7.
            ``"bf16-target"`` computes only the target values in bfloat16, on every processor. ``"bf16-mixed"``
            evaluates all networks in bfloat16. Weights, targets, optimizer states and losses always remain float32.
        cudagraph: whether to capture gradient steps in CUDA graphs. Each step then needs only one launch on the GPU.
            ``cudagraph=True`` needs a loss on a CUDA device and optimizers that support capture.
        data_parallel: whether the processes of ``torch.distributed`` train together on different batches; ``torchrun``
            can start these processes. All processes start with the first process's networks and average the gradients
            before each optimizer step. So N uniform batches of B rows act as one batch of N * B rows. All processes
            must make the same trainer and call the same methods. But the replay buffer of each process needs its own
            seed, for example ``make_replay_buffer(..., seed=seed + rank)``. Only the first process logs and writes
            checkpoints. A hook that changes nothing, such as a logging hook, may be registered in the first alone.
        logger: a TorchRL logger, or None.
        progress_bar: whether to show a progress bar; needs tqdm.
        seed: seed of PyTorch and NumPy, set by the constructor.
        clip_norm: largest gradient norm of each network; None does not clip.
        clip_grad_norm: True clips gradient norms; False clips each gradient value to ``[-clip_norm, clip_norm]``.
        save_trainer_file: folder of the checkpoint; each new checkpoint replaces the old one.
        save_trainer_interval: the trainer writes a checkpoint when more than this number of steps have passed since the
            last checkpoint.
        checkpoint: ``Checkpoint`` that saves the state; the default comes from ``make_checkpoint`` and includes the
            logger's state.
        checkpoint_rotation: ``CheckpointRotation`` that keeps several checkpoints; None keeps only the last one.
        checkpoint_metadata: function that takes the trainer and returns entries to add to each checkpoint's manifest.
        log_timings: whether to log TorchRL's timers.

    A checkpoint is a ``torchrl.checkpoint.Checkpoint``. The trainer writes a checkpoint to a temporary folder and then
    renames this folder, so no checkpoint is left incomplete. A checkpoint holds the states of networks, targets,
    optimizers, counters, hooks, sampler and random generators, but not the dataset. After
    ``trainer.load_from_file(path)``, training gives bit for bit the same results as training without an interruption,
    unless the replay buffer prefetches in threads. Loading a checkpoint executes no code (``weights_only=True``),
    unless you pass your own ``Checkpoint`` whose format uses pickles. With several processes, a checkpoint holds the
    sampler states and random states of each process. If a resumed run has more processes than the run that saved the
    checkpoint, each additional process computes its random states from the first process's random states, its own rank
    and the step.

    ``trainer.request_stop(reason)`` ends ``train`` after the current gradient step and saves a checkpoint. A signal
    handler may call this method. With several processes, all processes stop at the end of the log interval. After such
    a stop or a ``KeyboardInterrupt``, ``train()`` makes the remaining steps.

    Raises:
        TypeError: if ``compile`` is neither a bool nor a mapping.
        ValueError: if the updater is missing or belongs to another loss; if a network lacks its optimizer; if the loss
            and a prioritized buffer use different priority keys; if ``precision`` is unknown; if ``compile``,
            ``cudagraph`` or ``data_parallel`` is not available. ``train`` raises a ValueError if the processes have
            different trainers, or if their replay buffers would draw the same rows.
        RuntimeError: if another process has failed or ended.
        FloatingPointError: in ``train``, if a loss in the last ``log_interval`` steps is not finite, or if a weight is
            not finite just before a checkpoint is written. If a loss is not finite, the message names the step, the
            loss and the rows of the batch; the rows are also saved to a file beside the checkpoints. The message always
            names the last good checkpoint.
        OSError: in ``train``, if a checkpoint cannot be written; the previous checkpoint stays unchanged.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.data import Bounded, Unbounded
        >>> from torchrl_bcq import CloningLoss, OfflineTrainer, make_cloning_modules, make_replay_buffer
        >>> data = TensorDict({"observation": torch.rand(50, 3), "action": torch.zeros(50, 1)}, [50])
        >>> (network,) = make_cloning_modules(Unbounded((3,)), Bounded(-1, 1, (1,)), hidden=[8])
        >>> buffer = make_replay_buffer(data, batch_size=10, seed=0)
        >>> trainer = OfflineTrainer(
        ...     CloningLoss(network), buffer, target_net_updater=None, total_steps=300, progress_bar=False
        ... )
        >>> trainer.train()
        >>> trainer.metrics["loss_actor"] < 0.01
        True
    """

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
        stepper = optimization_stepper or OfflineOptimizationStepper.adam(loss_module)
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
            log_interval=-1,  # with -1, TorchRL logs every value that a hook reports
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
        self._last_log: dict[str, int] = {}  # own dict, because TorchRL's dict is shared by all trainers
        self._log_dict: dict[str, deque] = defaultdict(lambda: deque(maxlen=1))  # keep only the last value of a metric
        self._last_save = 0
        self._execution = Execution(loss_module, compile, precision)
        self._watch = LossWatch(replay_buffer)
        self._replay = ReplayBufferTrainer(replay_buffer)
        self.register_op("process_optim_batch", self._draw)
        if isinstance(replay_buffer.sampler, PrioritizedSampler):
            key, update = loss_module.tensor_keys.priority, self._replay.update_priority
            # if the network that writes the priorities has made no step, the batch has none
            self.register_op("post_optim_log", lambda batch: update(batch) if key in batch.keys(True) else None)
        if target_net_updater is not None:
            hook = FastTargetNetUpdaterHook(target_net_updater)
            self.register_op("setup", hook.find)
            self.register_op("post_optim", hook)
        self.register_op("post_optim_complete_log", self._log_losses)
        self.register_op("setup", self._set_up)
        self.register_module("metrics", LastMetrics(self))

    @property
    def metrics(self) -> dict[str, float]:
        """Dictionary from the name of each metric to the last logged value of this metric."""
        last = {name: values[-1] for name, values in self._log_dict.items() if values}
        return {name: float(value) for name, value in last.items() if torch.as_tensor(value).numel() == 1}

    def logged_at(self, name: str) -> int | None:
        """Return the last gradient step at which this process logged the metric ``name``, or None."""
        return self._last_log.get(name)

    def train(self) -> None:
        """Make the remaining gradient steps, or stop earlier if a stop is requested."""
        self.collected_frames = self._optim_count  # correct TorchRL's counter, which is too high after an interrupt
        self.collector.load_state_dict({"steps": self._optim_count})
        self._stop_reason = next(iter(self._stop_reasons), None)  # forgets the stop of an earlier call
        try:
            super().train()
            if self._saved_at != self.collected_frames:  # an interrupt prevented this checkpoint; write it now
                self.save_trainer(force_save=True)
        finally:
            self.forget_stop()
            if self.progress_bar:
                self._pbar.n = self.collected_frames
                self._pbar.close()

    def optim_steps(self, batch: TensorDictBase) -> None:
        """Make the gradient steps of a log interval. A stop request or an error ends the interval early."""
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
        # the step is complete, so an interrupt after this line does not repeat it
        self._steps_left -= 1
        super()._post_optim_hook()

    def compute_loss(self, sub_batch: TensorDictBase, method: str | None = None) -> Any:
        """Evaluate the loss module, or its method ``method``, and store the losses for the next check."""
        out = self._execution.compute(sub_batch, method)
        self.remember_losses({method: out[0]} if method else out)
        return out

    def remember_losses(self, losses: Mapping[str, Any]) -> None:
        """Store this step's losses; at the end of the log interval, the trainer checks that they are finite."""
        if not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            self._watch.add(losses)

    def _draw(self, interval: TensorDictBase) -> TensorDictBase:
        """Draw a batch; if a stop was requested, raise ``StopIteration`` to end the log interval."""
        if self._stop_training:
            raise StopIteration
        try:
            batch = self._replay.sample(interval)
        except Exception as error:  # priorities that are not finite cannot be drawn from
            if (at := self._watch.find()) is None:
                raise
            raise FloatingPointError(self._describe(at)) from error
        self._watch.next_step(batch)
        return batch

    def _describe(self, place: int) -> str:
        return self._watch.describe(place, self._checkpoint_folder, self._last_good)

    def _log_losses(self, optim_steps: int, average_losses: TensorDictBase | None) -> dict[str, Any] | None:
        """Check that the losses of the log interval are finite; then log their means over the interval."""
        self._fail_together(self._watch.find(), self._describe)
        if average_losses is None or self._steps_left:
            return None  # log nothing yet: a resumed run completes this interval and logs it
        values = self.processes.mean(torch.stack([*average_losses.values()]))
        means = zip(average_losses.keys(), values.tolist(), strict=True)
        known = {name: mean for name, mean in means if not math.isnan(mean)}  # skip networks that did not learn (NaN)
        self._log(**{name: mean for name, mean in known.items() if not name.startswith("loss_")})
        return {"log_pbar": True, **{name: mean for name, mean in known.items() if name.startswith("loss_")}}

    def _set_up(self) -> None:
        """Set the progress bar to the current step, for a resumed run."""
        if self.progress_bar:
            self._pbar.unit = " steps"
            self._pbar.n = self._pbar.initial = self.collected_frames
            self._pbar.refresh()

    def _pbar_description(self) -> None:
        """Show metrics before losses in the progress bar, because a narrow terminal cuts off the line's end."""
        if self.progress_bar:
            losses_last = sorted(self._pbar_str, key=lambda name: (name.startswith("loss_"), name))
            self._pbar.set_postfix({name: f"{self._pbar_str[name]:.4g}" for name in losses_last})
