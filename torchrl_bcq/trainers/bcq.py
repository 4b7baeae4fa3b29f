"""BCQ in TorchRL's Trainer."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.data import PrioritizedSampler, ReplayBuffer
from torchrl.objectives.utils import TargetNetUpdater
from torchrl.trainers.trainers import OptimizationStepper, ReplayBufferTrainer

from torchrl_bcq.objectives import BCQLoss
from torchrl_bcq.trainers.checkpoints import LoggerState, make_checkpoint, tidy, tidy_rotation
from torchrl_bcq.trainers.distributed import DataParallel
from torchrl_bcq.trainers.execution import Execution
from torchrl_bcq.trainers.lockstep import LockstepTrainer
from torchrl_bcq.trainers.offline_collector import OfflineCollector
from torchrl_bcq.trainers.randomness import RandomState
from torchrl_bcq.trainers.stepper import BCQOptimizationStepper
from torchrl_bcq.trainers.targets import FastTargetNetUpdaterHook
from torchrl_bcq.trainers.watch import LossWatch, check_parameters

# arguments of TorchRL's Trainer that are settled here
_NOT_OFFLINE = {"async_collection", "batch_size", "frame_skip", "learner_backend", "lr", "num_epochs", "optimizer"}


class BCQTrainer(LockstepTrainer):
    """A :class:`torchrl.trainers.Trainer` whose frames are gradient steps on a fixed dataset.

    Args:
        loss_module: the objective.
        replay_buffer: holds the transitions and knows its batch size.
        target_net_updater: of ``loss_module``; stepped after each gradient step, the author's is
            ``SoftUpdate(loss_module, tau=0.005)``. None where the loss delays neither actor nor critics.
        total_steps: gradient steps in all, those before a resumed checkpoint included.
        optimization_stepper: the author's Adam optimizers if not given.
        log_interval: gradient steps between two updates of the progress bar and of the logger; what is logged is the
            mean over them. Losses are checked, and checkpoints written, at its multiples.
        compile: whether losses are compiled by :func:`torch.compile`, or keywords for it, such as
            ``{"mode": "max-autotune"}``. The first step of each network then takes up to a minute, and latents are
            other draws than PyTorch's, unless by ``{"options": {"fallback_random": True}}``.
        precision: of matrix products. ``None`` leaves it as PyTorch is set up, float32 by default. ``"highest"``,
            ``"high"`` and ``"medium"`` are those of :func:`torch.set_float32_matmul_precision`, set while it trains:
            other float32 kernels, whose error depends on the processor. ``"bf16-target"`` evaluates the critics'
            target, which has no gradient, in bfloat16, ``"bf16-mixed"`` all networks; weights, optimizers, targets
            and losses stay float32.
        cudagraph: whether gradient steps are captured into CUDA graphs, so that a step is one launch; needs a loss on
            a CUDA device, and optimizers that can be captured.
        data_parallel: whether the processes of :mod:`torch.distributed`, such as ``torchrun`` starts, train together,
            each on batches of its own: they begin with the first one's networks, and average gradients before each
            step of an optimizer. All make this trainer, with a replay buffer of another seed, as
            ``make_replay_buffer(..., seed=seed + rank)``, and call the same methods. N batches of B rows count as one
            of N * B. Only the first process logs and writes; hooks that only watch may be its alone.
        **trainer_kwargs: any other argument of TorchRL's Trainer: ``logger``, ``seed``, ``progress_bar``,
            ``clip_norm``, ``save_trainer_file``, ``save_trainer_interval``, ``checkpoint``, ``checkpoint_rotation`` ...

    With ``save_trainer_file=path``, or ``checkpoint_rotation=CheckpointRotation(folder, keep_last=2)``, it leaves
    :class:`torchrl.checkpoint.Checkpoint` s, written aside and renamed. They hold the networks, targets, optimizers,
    counters, hooks, the sampler and the random states, but not the dataset: ``trainer.load_from_file(path)`` goes on as
    if there had been no break. Nothing in them is pickled, unless ``checkpoint`` is one of your own that does.

    ``trainer.request_stop(reason)``, from a signal handler too, ends ``train`` after the present gradient step with a
    checkpoint; of several processes, all of them after the ``log_interval``.

    A checkpoint of several processes holds what each draws from. As many go on bit by bit; where there were fewer, the
    new ones draw from new random states, which follow from the first one's, their rank and the step.

    Raises:
        TypeError: for an argument of TorchRL's Trainer that would have no effect here, or another kind of ``compile``.
        ValueError: if the updater is missing or belongs to another loss, a network lacks its optimizer, a prioritised
            buffer reads its priorities from another entry than the loss writes, ``precision`` is unknown, or
            ``cudagraph`` or ``data_parallel`` is asked for where it cannot be had; in ``train``, if processes differ
            where they must not, or draw the same rows.
        RuntimeError: if another process has failed, or has ended.
        FloatingPointError: in ``train``, if a loss was not finite within the last ``log_interval`` steps, or weights
            are not when a checkpoint is due. It names the step, the loss, the rows of its batch, which are written
            beside the checkpoints, and the last good checkpoint.
        OSError: in ``train``, if a checkpoint cannot be written; the one before it is left as it was.
    """

    _optim_count: int

    def __init__(
        self,
        loss_module: BCQLoss,
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
        **trainer_kwargs: Any,
    ) -> None:
        if taken := _NOT_OFFLINE & trainer_kwargs.keys():
            raise TypeError(f"BCQTrainer has no use for {sorted(taken)}; optimizers go into optimization_stepper.")
        _check_updater(loss_module, target_net_updater)
        optimization_stepper = optimization_stepper or BCQOptimizationStepper.adam(loss_module)
        _check_stepper(loss_module, optimization_stepper)
        parallel = _join(loss_module, optimization_stepper, cudagraph) if data_parallel else None
        if cudagraph:
            _capture(loss_module, optimization_stepper)
        logger = trainer_kwargs.get("logger")
        own = {"checkpoint": make_checkpoint(**({} if logger is None else {"logger": LoggerState(logger)}))}
        super().__init__(
            parallel=parallel,
            collector=OfflineCollector(total_steps, log_interval),
            total_frames=total_steps,
            frame_skip=1,
            optim_steps_per_batch=log_interval,
            loss_module=loss_module,
            optimization_stepper=optimization_stepper,
            target_net_updater=target_net_updater,
            log_interval=-1,  # a tick is the interval
            auto_log_optim_steps=False,
            **{**own, **trainer_kwargs},
        )
        self._last_log: dict[str, int] = {}  # TorchRL's is shared by all live trainers
        self._log_dict: dict[str, deque] = defaultdict(lambda: deque(maxlen=1))  # TorchRL's grows for ever
        self._last_save = 0
        self._execution = Execution(loss_module, compile, precision)
        self._watch = LossWatch(replay_buffer)
        self._replay = ReplayBufferTrainer(replay_buffer)
        # of an agent that is trained together with others, which is where its own random numbers begin
        self.random_state = None if trainer_kwargs.get("seed") is None else self._present_random_state()
        self.register_op("process_optim_batch", self._draw)
        if isinstance(replay_buffer.sampler, PrioritizedSampler):
            _check_priority_key(loss_module, replay_buffer)
            self.register_op("post_optim_log", self._replay.update_priority)
        if target_net_updater is not None:
            self.register_op("post_optim", FastTargetNetUpdaterHook(target_net_updater))
        self.register_op("post_optim_complete_log", self._log_losses)
        self.register_op("setup", self._set_up)
        self.register_random_states(replay_buffer)
        self.register_module("metrics", _LastMetrics(self))

    @property
    def metrics(self) -> dict[str, float]:
        """What was logged last, by name."""
        return {name: float(values[-1]) for name, values in self._log_dict.items() if values}

    @property
    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint that is there, if any."""
        if self.checkpoint_rotation is not None:
            return self.checkpoint_rotation.latest()
        file = self.save_trainer_file
        return Path(file) if file is not None and Path(file).exists() else None

    def train(self) -> None:
        """Make the gradient steps that are left, or those until a stop is requested."""
        try:
            super().train()
        finally:
            if self.progress_bar:
                self._pbar.n = self.collected_frames
                self._pbar.close()

    def optim_steps(self, batch: TensorDictBase) -> None:
        """Make as many gradient steps as the tick has frames, or fewer if a stop is requested meanwhile."""
        before = self._optim_count
        self.optim_steps_per_batch = batch.numel()
        self._watch.begin(before)
        with self._execution.active():
            super().optim_steps(batch)
        if undone := batch.numel() - self._watch.steps:
            self._optim_count = before + self._watch.steps
            self.collected_frames -= undone
            self.collector.take_back(undone)

    def compute_loss(self, sub_batch: TensorDictBase, method: str | None = None) -> Any:
        """Evaluate the loss, or one of its methods, and remember the value until it is checked."""
        out = self._execution.compute(sub_batch, method)
        self.remember_losses({method: out[0]} if method else out)
        return out

    def remember_losses(self, losses: Mapping[str, Any]) -> None:
        """Have the values of losses in the present step checked at the end of the tick."""
        if not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            self._watch.add(losses)

    def write_checkpoint(self, write: Callable[[], Any]) -> None:
        """Have ``write`` write a checkpoint, of finite weights only; of several processes at the end of the tick.

        Raises:
            FloatingPointError: if weights are not finite.
            OSError: if it cannot be written.
        """
        if self._parallel is None:
            self._write(write)
        else:
            self._writes.append(lambda: self._write(write))

    def _write(self, write: Callable[[], Any]) -> None:
        check_parameters(self.loss_module, self._optim_count, self._last_good)
        try:
            write()
        except OSError as error:
            raise OSError(
                f"the checkpoint after {self._optim_count} gradient steps cannot be written ({error}). "
                f"{self._last_good} Mend that, then go on from there."
            ) from error

    def _save_trainer(self) -> None:
        save = super()._save_trainer
        self._write_together(lambda: self._write(save))

    def load_from_file(self, file: str | Path, **kwargs: Any) -> BCQTrainer:
        """Go on from a checkpoint; see TorchRL's method for the keywords."""
        self._on_first(lambda: tidy(Path(file)))
        super().load_from_file(file, **kwargs)
        self.random_state = self._present_random_state()
        return self

    def _present_random_state(self) -> RandomState:
        return RandomState(next(self.loss_module.parameters()).device)

    @property
    def _last_good(self) -> str:
        last = self.last_checkpoint
        return "There is no checkpoint yet." if last is None else f"The last good checkpoint is {last}."

    def _draw(self, tick: TensorDictBase) -> TensorDictBase:
        """Draw a batch; TorchRL ends a tick at ``StopIteration``."""
        if self._stop_training:
            raise StopIteration
        batch = self._replay.sample(tick)
        self._watch.next_step(batch)
        return batch

    def _log_losses(self, optim_steps: int, average_losses: TensorDictBase | None) -> dict[str, Any] | None:
        """Log the means of a tick, the losses also on the progress bar; one transfer from the device."""
        watch = self._watch
        self._fail_together(watch.find(), lambda at: watch.describe(at, self._checkpoint_folder, self._last_good))
        if average_losses is None or self._watch.steps < self.optim_steps_per_batch:
            return None  # broken off; a resumed run makes the rest of the tick
        names = list(average_losses.keys())
        values = self._mean(torch.stack([average_losses.get(name) for name in names]))
        means = dict(zip(names, values.tolist(), strict=True))
        known = {name: mean for name, mean in means.items() if not math.isnan(mean)}  # others did not learn
        self._log(**{name: mean for name, mean in known.items() if not name.startswith("loss_")})
        return {"log_pbar": True, **{name: mean for name, mean in known.items() if name.startswith("loss_")}}

    @property
    def _checkpoint_folder(self) -> Path | None:
        if self.checkpoint_rotation is not None:
            return self.checkpoint_rotation.directory.parent
        return None if self.save_trainer_file is None else Path(self.save_trainer_file).absolute().parent

    def _set_up(self) -> None:
        """Remove what a killed run left half-written, and start a resumed run's bar at its step."""
        self._on_first(self._tidy)
        if self.progress_bar:
            self._pbar.unit = " steps"
            self._pbar.n = self._pbar.initial = self.collected_frames
            self._pbar.refresh()

    def _tidy(self) -> None:
        if self.checkpoint_rotation is not None:
            tidy_rotation(self.checkpoint_rotation.directory, self.checkpoint_rotation.prefix)
        elif self.save_trainer_file is not None:
            tidy(Path(self.save_trainer_file).absolute())

    def _pbar_description(self) -> None:
        """Show what is logged after steps, rate and time left, which a narrow terminal would else cut off."""
        if self.progress_bar:
            losses_last = sorted(self._pbar_str, key=lambda name: (name.startswith("loss_"), name))
            self._pbar.set_postfix({name: f"{self._pbar_str[name]:.4g}" for name in losses_last})


class _LastMetrics:
    """What a resumed run must still know of what was logged, for hooks such as TorchRL's ``EarlyStopping``."""

    def __init__(self, trainer: BCQTrainer) -> None:
        self._trainer = trainer

    def state_dict(self) -> dict[str, float]:
        return self._trainer.metrics

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        for name, value in state_dict.items():
            self._trainer._log_dict[name].append(value)


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


def _capture(loss_module: BCQLoss, stepper: OptimizationStepper) -> None:
    device = next(loss_module.parameters()).device
    if device.type != "cuda":
        raise ValueError(f"cudagraph=True needs a loss on a CUDA device, this one is on {device}.")
    if not isinstance(stepper, BCQOptimizationStepper):
        raise ValueError(f"cudagraph=True needs a BCQOptimizationStepper, not a {type(stepper).__name__}.")
    stepper.capture()


def _join(loss_module: BCQLoss, stepper: OptimizationStepper, cudagraph: bool) -> DataParallel:
    if not isinstance(stepper, BCQOptimizationStepper):
        raise ValueError(f"data_parallel=True needs a BCQOptimizationStepper, not a {type(stepper).__name__}.")
    if cudagraph:
        raise ValueError("data_parallel=True and cudagraph=True do not go together; leave one of them.")
    stepper.parallel = DataParallel(next(loss_module.parameters()).device)
    return stepper.parallel


def _check_priority_key(loss_module: BCQLoss, replay_buffer: ReplayBuffer) -> None:
    written, read = loss_module.tensor_keys.priority, replay_buffer.priority_key
    if written != read:
        raise ValueError(
            f"the loss writes priorities to {written!r}, the buffer reads {read!r}; set priority_key={written!r}."
        )
