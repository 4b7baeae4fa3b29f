"""Checks that the parts of a trainer fit together."""

from __future__ import annotations

import warnings

from torchrl.data import PrioritizedSampler, ReplayBuffer
from torchrl.objectives.utils import TargetNetUpdater
from torchrl.trainers.trainers import OptimizationStepper

from torchrl_bcq.objectives import OfflineLoss
from torchrl_bcq.trainers.stepper import OfflineOptimizationStepper


def check_updater(loss_module: OfflineLoss, updater: TargetNetUpdater | None) -> None:
    """Raise a ValueError if the updater is missing, superfluous, or of another loss."""
    delayed = [*loss_module.delayed_names]
    if delayed and updater is None:
        remedy = "target_net_updater=SoftUpdate(loss_module, tau=0.005)"
        raise ValueError(f"the loss has targets of {delayed}; pass {remedy}.")
    if updater is not None and not delayed:
        raise ValueError("the loss has no target networks; pass target_net_updater=None.")
    if updater is not None and updater.loss_module is not loss_module:
        raise ValueError("target_net_updater was made for another loss; its targets are not the ones that are used.")


def check_stepper(loss_module: OfflineLoss, stepper: OptimizationStepper, *, captured: bool, parallel: bool) -> None:
    """Raise a ValueError if a network lacks its optimizer, or the execution asked for is not available."""
    is_ours = isinstance(stepper, OfflineOptimizationStepper)
    trained = loss_module.trainable_names
    if is_ours and set(stepper.optimizers) != set(trained):
        raise ValueError(f"the loss trains {[*trained]}, but optimization_stepper steps {[*stepper.optimizers]}.")
    if (captured or parallel) and not is_ours:
        setting = "cudagraph" if captured else "data_parallel"
        raise ValueError(f"{setting}=True needs an OfflineOptimizationStepper, not a {type(stepper).__name__}.")
    if captured and parallel:
        raise ValueError("data_parallel=True and cudagraph=True cannot be combined; set one of them.")
    device = next(loss_module.parameters()).device
    if captured and device.type != "cuda":
        raise ValueError(f"cudagraph=True needs a loss on a CUDA device, this one is on {device}.")


def check_buffer(loss_module: OfflineLoss, replay_buffer: ReplayBuffer) -> None:
    """Raise a ValueError if the buffer reads other priorities than the loss writes; warn if it prefetches."""
    if isinstance(replay_buffer.sampler, PrioritizedSampler):
        written, read = loss_module.tensor_keys.priority, replay_buffer.priority_key
        if written != read:
            found = f"the loss writes priorities to {written!r}, the buffer reads {read!r}"
            raise ValueError(f"{found}; set priority_key={written!r}.")
    if getattr(replay_buffer, "_prefetch", False):
        warnings.warn(
            "replay_buffer prefetches batches in threads, in an order that is not reproducible: neither a run of the "
            "same seed nor a resumed run is the same. Make it with prefetch=None for exact resume.",
            stacklevel=4,
        )
