"""The replay buffer of a fixed dataset."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import (
    ImmutableDatasetWriter,
    PrioritizedSampler,
    RandomSampler,
    SamplerWithoutReplacement,
    TensorDictReplayBuffer,
    TensorStorage,
)
from torchrl.data.replay_buffers.samplers import Sampler

from torchrl_bcq.data.checks import DatasetError, Rows
from torchrl_bcq.data.episodes import check_rows
from torchrl_bcq.data.sampling import WeightedSampler

PRIORITY_ALPHA, PRIORITY_BETA = 0.6, 0.4  # proportional variant of arXiv:1511.05952, which anneals beta to 1
_SAMPLERS = ("uniform", "without_replacement", "prioritized")
_FLAGS = ("done", "terminated", "truncated")
_ELEMENTS = 2**22  # looked at together


class _FixedWriter(ImmutableDatasetWriter):
    WRITING_ERR = (
        "the dataset is fixed; put new rows into a buffer of their own, as TorchRL's OfflineToOnlineReplayBuffer does."
    )


def make_replay_buffer(
    transitions: TensorDictBase,
    *,
    batch_size: int = 100,
    device: torch.device | str | None = None,
    seed: int | None = None,
    sampler: str | Sampler = "uniform",
    weights: Tensor | None = None,
) -> TensorDictReplayBuffer:
    """Put transitions into a TorchRL replay buffer, to which nothing can be added.

    Transitions that are on ``device`` already are held as they are, in memory or memory-mapped, not copied; a change of
    their values in place is a change of the dataset.

    Args:
        transitions: batch size ``[N]``, as the readers give them.
        batch_size: rows of each sample; the author's is 100.
        device: where the dataset lives and samples are drawn, the transitions' own if not given.
        seed: of the buffer's own generator, so that the order of rows depends on nothing else; PyTorch's global
            random state if not given.
        sampler: ``"uniform"`` (with replacement); ``"without_replacement"`` (each row once, in a new order, then again;
            the last batch of a round may be shorter); ``"prioritized"`` (by the ``td_error`` that the loss writes, with
            the published alpha 0.6 and beta 0.4); or a sampler of TorchRL's, such as a ``PrioritizedSampler`` with
            others.
        weights: ``[N]``, rows are drawn with replacement in proportion to them, 0 is never; see
            :func:`~torchrl_bcq.data.episode_weights`, :func:`~torchrl_bcq.data.return_weights` and
            :func:`~torchrl_bcq.data.split_episodes`.

    Raises:
        DatasetError: if an entry has values that are not finite, or under ``"next"`` the reward is not ``[N, 1]`` or
            the flags are not boolean ``[N, 1]``.
        ValueError: if the transitions are not a batch of rank 1 with at least one row, ``batch_size`` is below 1, or
            the sampler is unknown, or the weights cannot be drawn by, or go with another sampler.
        ImportError: if TorchRL's compiled extension, which ``"prioritized"`` needs, does not fit the installed torch.

    Source: prioritised replay, arXiv:1511.05952.
    """
    rows = check_rows(transitions)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected at least 1.")
    drawn = _make_sampler(sampler, weights, rows)
    _check_shapes(transitions)
    _check_finite(transitions)
    device = transitions.device or torch.device("cpu") if device is None else torch.device(device)
    held = transitions.to(device)
    if not held.is_memmap():
        held = held.detach().contiguous()  # tensors are shared, the TensorDict is the buffer's own
    return TensorDictReplayBuffer(
        storage=TensorStorage(held, device=device),
        sampler=drawn,
        writer=_FixedWriter(),
        batch_size=batch_size,
        generator=None if seed is None else torch.Generator(device).manual_seed(seed),
    )


def _make_sampler(sampler: str | Sampler, weights: Tensor | None, rows: int) -> Sampler:
    if weights is not None:
        if sampler != "uniform":
            raise ValueError(f"weights and sampler={sampler!r} both say which rows to draw; pass one of them.")
        weighted = WeightedSampler(weights)
        if len(weights) != rows:
            raise ValueError(f"there are {len(weights)} weights for {rows} transitions.")
        return weighted
    if isinstance(sampler, Sampler):
        return sampler
    if sampler not in _SAMPLERS:
        raise ValueError(f"sampler is {sampler!r}, expected one of {[*_SAMPLERS]} or a sampler of TorchRL's.")
    if sampler == "prioritized":
        return _make_prioritized(rows)
    return RandomSampler() if sampler == "uniform" else SamplerWithoutReplacement()


def _make_prioritized(rows: int) -> PrioritizedSampler:
    try:
        return PrioritizedSampler(rows, alpha=PRIORITY_ALPHA, beta=PRIORITY_BETA)
    except RuntimeError as error:
        raise ImportError(
            f"prioritised sampling needs TorchRL's compiled extension, which does not fit torch {torch.__version__}; "
            "torchrl 0.14 is built for torch 2.14: install that, or use sampler='uniform'."
        ) from error


def _check_shapes(transitions: TensorDictBase) -> None:
    rows = len(transitions)
    for name in ("reward", *_FLAGS):
        value = transitions.get(("next", name), None)
        if value is None:
            continue
        if value.shape != (rows, 1):
            hint = f" Use {name}[:, None]." if value.shape == (rows,) else ""
            raise DatasetError(f"('next', {name!r}) has shape {tuple(value.shape)}, expected ({rows}, 1).{hint}")
        if name in _FLAGS and value.dtype != torch.bool:
            raise DatasetError(f"('next', {name!r}) has dtype {value.dtype}, expected torch.bool; cast it.")


def _check_finite(transitions: TensorDictBase) -> None:
    """Look at some rows at a time, so that a memory map stays one."""
    rows = len(transitions)
    for key, value in transitions.items(include_nested=True, leaves_only=True):
        if not value.dtype.is_floating_point:
            continue
        step = max(_ELEMENTS * rows // max(value.numel(), 1), 1)
        broken = Rows()
        for start in range(0, rows, step):
            finite = value[start : start + step].isfinite()
            if not finite.all():
                broken.add(~finite.reshape(len(finite), -1).all(1).cpu().numpy(), start)
        if broken.count:
            raise DatasetError(f"{key!r} has {broken} that are not finite; drop or repair them.")
