"""The replay buffer of a fixed dataset."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torchrl.data import LazyTensorStorage, RandomSampler, TensorDictReplayBuffer


def make_replay_buffer(
    transitions: TensorDictBase,
    *,
    batch_size: int = 100,
    device: torch.device | str | None = None,
    seed: int | None = None,
) -> TensorDictReplayBuffer:
    """Put transitions into a TorchRL replay buffer that draws uniformly with replacement.

    Args:
        transitions: batch size ``[N]``, as the readers give them.
        batch_size: rows of each sample; the author's is 100.
        device: where the dataset lives and samples are drawn, the transitions' own if not given.
        seed: of the buffer's own generator, so that the order of rows depends on nothing else; PyTorch's global
            random state if not given.

    Raises:
        ValueError: if the transitions are not a batch of rank 1 with at least one row, or ``batch_size`` is below 1.
    """
    if len(transitions.batch_size) != 1 or not len(transitions):
        raise ValueError(
            f"transitions have batch size {tuple(transitions.batch_size)}, expected [N] with N at least 1."
        )
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected at least 1.")
    device = transitions.device or torch.device("cpu") if device is None else torch.device(device)
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(len(transitions), device=device),
        sampler=RandomSampler(),
        batch_size=batch_size,
        generator=None if seed is None else torch.Generator(device).manual_seed(seed),
    )
    buffer.extend(transitions)
    return buffer
