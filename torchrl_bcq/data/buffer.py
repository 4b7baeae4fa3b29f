"""Makes the replay buffer of a fixed dataset."""

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

from torchrl_bcq.data.episodes import check_finite, check_outcomes, check_rows
from torchrl_bcq.data.frame_stack import gather_frames
from torchrl_bcq.data.sampling import WeightedSampler
from torchrl_bcq.errors import remedy

PRIORITY_ALPHA, PRIORITY_BETA = 0.6, 0.4  # as in arXiv:1511.05952 (proportional variant), but beta stays constant
_SAMPLERS = ("uniform", "without_replacement", "prioritized")


class _FixedWriter(ImmutableDatasetWriter):
    WRITING_ERR = (
        "the dataset is fixed; put new rows into a buffer of your own, such as a ReplayBuffer with a LazyTensorStorage."
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
        transitions: TensorDict of batch size ``[N]``, as the readers return it. Transitions that are already on
            ``device`` are not copied. Frames that are stored once stay so; each batch gets ordinary tensors.
        batch_size: number of rows in each sample. The default is the batch size in the code of the BCQ author.
        device: device of the dataset and of the samples. By default, the device of ``transitions``.
        seed: seed for the buffer's own random generator. By default, the buffer uses PyTorch's global random state.
        sampler: ``"uniform"`` draws with replacement. ``"without_replacement"`` draws each row once in a pass over the
            data, and each pass has a new order. The last batch of a pass may have fewer rows than ``batch_size``.
            ``"prioritized"`` draws rows with a large ``td_error`` more often. The loss writes ``td_error`` into each
            batch, and ``OfflineTrainer`` passes it on to the buffer; in a loop of your own, call
            ``buffer.update_tensordict_priority(batch)`` after ``qvalue_loss``. As in the paper on prioritised replay,
            alpha is 0.6 and beta is 0.4. A TorchRL sampler is also accepted.
        weights: one weight per row, ``[N]``, such as a mask or the result of ``episode_weights`` or
            ``return_weights``. Rows are drawn with replacement, in proportion to their weights.

    Raises:
        DatasetError: if a value is not finite, if a flag under ``"next"`` is not boolean, or if a flag or the reward
            under ``"next"`` has another shape than ``[N, 1]``.
        ValueError: if the transitions have no rows or another batch size than ``[N]``, if ``batch_size`` is below 1, if
            ``sampler`` is unknown, if ``weights`` are invalid, or if both ``weights`` and ``sampler`` are passed.
        ImportError: if ``sampler="prioritized"``, and TorchRL's compiled extension does not fit the installed torch, or
            the data is on a GPU and the extension has no CUDA code.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl_bcq import make_replay_buffer
        >>> rows = TensorDict({"observation": torch.arange(6.0)[:, None]}, [6])
        >>> buffer = make_replay_buffer(rows, batch_size=4, seed=0, weights=torch.tensor([1.0, 1, 1, 0, 0, 0]))
        >>> batch = buffer.sample()
        >>> batch["observation"].shape, bool((batch["index"] < 3).all())
        (torch.Size([4, 1]), True)

    Source: prioritized replay, arXiv:1511.05952.
    """
    rows = check_rows(transitions)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected at least 1.")
    device = transitions.device or torch.device("cpu") if device is None else torch.device(device)
    chosen = _make_sampler(sampler, weights, rows, device)
    check_outcomes(transitions)
    for key, value in transitions.items(include_nested=True, leaves_only=True):
        check_finite(repr(key), value)
    held = transitions.to(device)
    if not held.is_memmap():
        held = held.detach().contiguous()  # the buffer gets its own TensorDict, without a copy of the tensors
        held.names = None  # the rows of a batch are no longer successive steps
    return TensorDictReplayBuffer(
        storage=TensorStorage(held, device=device),
        sampler=chosen,
        writer=_FixedWriter(),
        collate_fn=gather_frames,
        batch_size=batch_size,
        generator=None if seed is None else torch.Generator(device).manual_seed(seed),
    )


def _make_sampler(sampler: str | Sampler, weights: Tensor | None, rows: int, device: torch.device) -> Sampler:
    if weights is not None:
        if sampler != "uniform":
            raise ValueError(f"weights and sampler={sampler!r} both choose the rows to draw; pass only one of them.")
        weighted = WeightedSampler(weights)
        if len(weights) != rows:
            raise ValueError(f"there are {len(weights)} weights for {rows} transitions; pass one weight for each.")
        return weighted
    if isinstance(sampler, Sampler):
        return sampler
    if sampler not in _SAMPLERS:
        raise ValueError(f"sampler is {sampler!r}, expected one of {[*_SAMPLERS]} or a TorchRL sampler.")
    if sampler != "prioritized":
        return RandomSampler() if sampler == "uniform" else SamplerWithoutReplacement()
    try:
        where = device if device.type == "cuda" else None  # where TorchRL keeps the priorities
        return PrioritizedSampler(rows, alpha=PRIORITY_ALPHA, beta=PRIORITY_BETA, device=where)
    except RuntimeError as error:
        if "CUDA" in str(error):
            raise ImportError(
                "prioritized sampling of data on a GPU needs TorchRL built with CUDA, but the package of PyPI is built "
                "without it; " + remedy("use sampler='uniform', or device='cpu'.", "set sampler=uniform or device=cpu.")
            ) from error
        raise ImportError(
            f"prioritized sampling needs TorchRL's compiled extension, but it does not fit torch {torch.__version__}. "
            "torchrl 0.14 is built for torch 2.14: install torch 2.14, or "
            + remedy("use sampler='uniform'.", "set sampler=uniform.")
        ) from error
