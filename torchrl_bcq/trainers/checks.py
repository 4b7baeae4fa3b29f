"""Checks that a trainer's loss, target updater, stepper and replay buffer fit together."""

from __future__ import annotations

import warnings

from torchrl.data import PrioritizedSampler, ReplayBuffer, ReplayBufferEnsemble
from torchrl.objectives.utils import TargetNetUpdater
from torchrl.trainers.trainers import OptimizationStepper

from torchrl_bcq.errors import remedy
from torchrl_bcq.objectives import OfflineLoss
from torchrl_bcq.trainers.stepper import OfflineOptimizationStepper


def check_updater(loss_module: OfflineLoss, updater: TargetNetUpdater | None) -> None:
    """Raise a ValueError if the updater is missing, not needed, or made for another loss."""
    delayed = [*loss_module.delayed_names]
    if delayed and updater is None:
        remedy = "target_net_updater=SoftUpdate(loss_module, tau=0.005)"
        raise ValueError(f"the loss has target networks for {delayed}; pass {remedy}.")
    if updater is not None and not delayed:
        raise ValueError("the loss has no target networks; pass target_net_updater=None.")
    if updater is not None and updater.loss_module is not loss_module:
        raise ValueError("target_net_updater was made for another loss; make it from the loss_module of the trainer.")


def check_stepper(loss_module: OfflineLoss, stepper: OptimizationStepper, *, captured: bool, parallel: bool) -> None:
    """Raise a ValueError if the stepper does not fit the loss, ``cudagraph`` or ``data_parallel``."""
    if loss_module.reduction == "none":
        raise ValueError("the loss has reduction='none', but a gradient step needs one number; use 'mean' or 'sum'.")
    if parallel and loss_module.reduction == "sum":
        advice = remedy("use reduction='mean'", "set loss.reduction=mean")
        raise ValueError(f"several processes average their gradients, so the loss cannot be a sum; {advice}.")
    is_ours = isinstance(stepper, OfflineOptimizationStepper)
    trained = loss_module.trainable_names
    if is_ours and set(stepper.optimizers) != set(trained):
        found = f"the loss trains {[*trained]}, but optimization_stepper has optimizers for {[*stepper.optimizers]}"
        raise ValueError(f"{found}; pass one optimizer for each network that the loss trains.")
    for name, optimizer in stepper.optimizers.items() if is_ours else ():
        weights = {id(weight) for weight in getattr(loss_module, f"{name}_network_params").parameters()}
        if weights.isdisjoint(id(weight) for group in optimizer.param_groups for weight in group["params"]):
            found = f"the optimizer of {name!r} has no parameter of {name}_network"
            raise ValueError(f"{found}; build it from the parameters of this network, in the loss of this trainer.")
    if (captured or parallel) and not is_ours:
        setting = "cudagraph" if captured else "data_parallel"
        raise ValueError(f"{setting}=True needs an OfflineOptimizationStepper, not a {type(stepper).__name__}.")
    if captured and parallel:
        advice = remedy("set data_parallel=False or cudagraph=False", "start one process, or set cudagraph=false")
        raise ValueError(f"several processes cannot train with CUDA graphs; {advice}.")
    device = next(loss_module.parameters()).device
    if captured and device.type != "cuda":
        advice = remedy("move it to a GPU, or set cudagraph=False", "set device=cuda or cudagraph=false")
        raise ValueError(f"CUDA graphs need a GPU, but the loss is on {device}; {advice}.")


def check_buffer(loss_module: OfflineLoss, replay_buffer: ReplayBuffer) -> None:
    """Raise a ValueError if the buffer does not fit the loss, or cannot be saved; warn if the buffer prefetches."""
    if isinstance(replay_buffer, ReplayBufferEnsemble):
        raise ValueError("checkpoints cannot hold a ReplayBufferEnsemble; put all transitions into one replay buffer.")
    if isinstance(replay_buffer.sampler, PrioritizedSampler):
        if not hasattr(replay_buffer, "priority_key"):
            kind = type(replay_buffer).__name__
            raise ValueError(f"a {kind} does not update priorities from batches; use a TensorDictReplayBuffer.")
        written, read = loss_module.tensor_keys.priority, replay_buffer.priority_key
        if written != read:
            found = f"the loss writes priorities to {written!r}, but the buffer reads them from {read!r}"
            raise ValueError(f"{found}; make the buffer with priority_key={written!r}.")
    if getattr(replay_buffer, "_prefetch", False):
        warnings.warn(
            "replay_buffer prefetches batches in threads, in an order that is not reproducible: two runs with the same "
            "seed differ, and a resumed run differs from an uninterrupted one. Make the buffer with prefetch=None for "
            "an exact resume.",
            stacklevel=4,
        )
