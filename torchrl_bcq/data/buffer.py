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

from torchrl_bcq.data.checks import check_finite
from torchrl_bcq.data.episodes import check_outcomes, check_rows
from torchrl_bcq.data.sampling import WeightedSampler

PRIORITY_ALPHA, PRIORITY_BETA = 0.6, 0.4  # proportional variant of arXiv:1511.05952, which anneals beta to 1
_SAMPLERS = ("uniform", "without_replacement", "prioritized")


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
    """Put transitions into a read-only TorchRL replay buffer.

    Args:
        transitions: batch size ``[N]``, as the readers return them; shared with the buffer if they are on ``device``.
        batch_size: rows of each sample; the author's is 100.
        device: of the dataset and the samples; the transitions' own if not given.
        seed: of the buffer's own generator; PyTorch's global random state if not given.
        sampler: ``"uniform"`` (with replacement); ``"without_replacement"`` (each row once per round, each round in a
            new order; the last batch of a round may be shorter); ``"prioritized"`` (by the ``td_error`` that the loss
            writes, with the published alpha 0.6 and beta 0.4); or a TorchRL sampler.
        weights: ``[N]``, rows are drawn with replacement in proportion to them, such as those of
            :func:`~torchrl_bcq.data.episode_weights` or :func:`~torchrl_bcq.data.return_weights`, or a mask.

    Raises:
        DatasetError: if an entry has values that are not finite, or under ``"next"`` the reward is not ``[N, 1]`` or
            the flags are not boolean ``[N, 1]``.
        ValueError: if the transitions are not ``[N]`` with ``N >= 1``, ``batch_size`` is below 1, the sampler is
            unknown, or the weights are invalid or combined with another sampler.
        ImportError: if ``"prioritized"`` needs TorchRL's compiled extension and it does not fit the installed torch.

    Source: prioritised replay, arXiv:1511.05952.
    """
    rows = check_rows(transitions)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected at least 1.")
    chosen = _make_sampler(sampler, weights, rows)
    check_outcomes(transitions)
    for key, value in transitions.items(include_nested=True, leaves_only=True):
        check_finite(repr(key), value)
    device = transitions.device or torch.device("cpu") if device is None else torch.device(device)
    held = transitions.to(device)
    if not held.is_memmap():
        held = held.detach().contiguous()  # the buffer's own TensorDict shares the tensors
    return TensorDictReplayBuffer(
        storage=TensorStorage(held, device=device),
        sampler=chosen,
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
    if sampler != "prioritized":
        return RandomSampler() if sampler == "uniform" else SamplerWithoutReplacement()
    try:
        return PrioritizedSampler(rows, alpha=PRIORITY_ALPHA, beta=PRIORITY_BETA)
    except RuntimeError as error:
        raise ImportError(
            f"prioritised sampling needs TorchRL's compiled extension, which does not fit torch {torch.__version__}; "
            "torchrl 0.14 is built for torch 2.14: install that, or use sampler='uniform'."
        ) from error
