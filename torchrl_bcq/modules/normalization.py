"""Scaling of observations and rewards by layers of the networks. The dataset itself is not changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from tensordict import TensorDictBase, unravel_key
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.data import Composite, TensorSpec

from torchrl_bcq.bounds import check_spec
from torchrl_bcq.functional import merge_moments

CHUNK_ROWS = 65_536  # number of dataset rows that are read at a time
FRAME_ROWS, FRAME_CHUNK = 10_000, 100  # number of rows whose frames are read, in all and at a time


class Standardize(nn.Module):
    """First layer of a network: ``(x - loc) / scale`` standardises the input. ``[*B, D] -> [*B, D]``.

    Args:
        loc: value subtracted from each feature, ``[D]``. ``loc`` is a buffer: it moves with the network and is not
            trained.
        scale: positive divisor of each feature, ``[D]``. ``scale`` is also a buffer.

    Raises:
        ValueError: if ``loc`` and ``scale`` are not vectors of equal size, ``loc`` is not finite, or ``scale`` is not
            positive and finite. A call of the layer also raises this error if ``x`` does not have ``D`` features.
    """

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        """Build the layer from the mean and the scale of its input."""
        super().__init__()
        if loc.ndim != 1 or loc.shape != scale.shape:
            raise ValueError(f"loc has shape {tuple(loc.shape)}, scale has {tuple(scale.shape)}; both must be [D].")
        if not loc.isfinite().all():
            raise ValueError(f"loc is {loc.tolist()} in {loc.dtype}; it must be finite.")
        _check_scale(scale)
        self.loc, self.scale = nn.Buffer(loc.clone()), nn.Buffer(scale.clone())

    def forward(self, x: Tensor) -> Tensor:
        """Standardise the last dimension."""
        if x.shape[-1:] != self.loc.shape:
            raise ValueError(f"the input has shape {tuple(x.shape)}, but the layer scales {len(self.loc)} features.")
        return (x - self.loc) / self.scale

    def extra_repr(self) -> str:
        """Show the number of features."""
        return str(len(self.loc))


class Rescale(nn.Module):
    """Last layer of a critic: ``x * scale`` converts values to the rewards' units. ``[*B, D] -> [*B, D]``."""

    def __init__(self, scale: float, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.scale = nn.Buffer(torch.tensor([scale], dtype=dtype))
        _check_scale(self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the scale."""
        return x * self.scale


@dataclass(frozen=True, eq=False)
class Normalization:
    """Scaling of observations and rewards, for ``make_bcq_modules``. Actions are scaled by their bounds.

    Layers inside the networks do the scaling. Data, actions, values and losses keep the environment's units. The
    critics multiply their output by the rewards' standard deviation. Rewards are not shifted, because a shift would
    change the task if episodes terminate. The critics' gradients are ``reward_scale ** 2`` times as large as if the
    rewards were divided by ``reward_scale``. This factor changes the steps of plain SGD. The factor does not change the
    steps of Adam, except through ``eps`` and ``clip_norm``.

    Args:
        observations: for each observation key, ``(location [D], scale [D])`` on the CPU in float64. For frames, these
            are numbers of each channel, ``[C]``. Frames without an entry are divided by 255.
        reward_scale: factor by which the critics multiply their output.

    Source: the scaling of observations follows TD3+BC, arXiv:2106.06860.
    """

    observations: Mapping[NestedKey, tuple[Tensor, Tensor]]
    reward_scale: float = 1.0

    @classmethod
    def fit(
        cls,
        transitions: TensorDictBase,
        *,
        observation_keys: Sequence[NestedKey] = ("observation",),
        scale_rewards: bool = True,
    ) -> Normalization:
        """Fit the scaling: compute mean and population standard deviation of all rows, in float64, in one pass.

        The scale is 1 for a column that is constant or varies only by rounding errors, and 255 for a constant channel
        of frames.

        Args:
            transitions: dataset with the batch size ``[N]``; it may be memory-mapped and larger than memory.
            observation_keys: observation entries that the networks read: vectors ``[N, D]``, or frames ``[N, C, H, W]``
                of ``torch.uint8``, whose channels are scaled. If there are more than 10,000 rows, the mean and the
                standard deviation of the frames are those of 10,000 rows, spread evenly.
            scale_rewards: whether to read ``("next", "reward") [N, 1]``; if False, ``reward_scale`` is 1.

        Raises:
            ValueError: if there is no row, or an entry is missing, has a wrong shape or dtype, or has rows that are not
                finite. For rows that are not finite, the message names the entry, the number of rows and the first row.
        """
        observations = [unravel_key(key) for key in observation_keys]
        frames = [key for key in observations if _are_frames(transitions, key)]
        vectors = [key for key in observations if key not in frames]
        keys = [*vectors, *([("next", "reward")] if scale_rewards else [])]
        _check_entries(transitions, keys)
        rows = transitions.select(*keys)
        fitted = {key: _mean_and_scale(rows, key) for key in keys}
        reward_scale = fitted[keys[-1]][1].item() if scale_rewards else 1.0
        fitted |= {key: _byte_mean_and_scale(transitions[key]) for key in frames}
        return cls({key: fitted[key] for key in observations}, reward_scale)

    @classmethod
    def identity(cls, observation_spec: TensorSpec) -> Normalization:
        """Return a normalization without effect, for networks that later load their scaling from a checkpoint.

        Make the loss with these networks, and load the loss's checkpoint. Its target networks then get their scaling,
        too. A checkpoint of the networks alone must be loaded before you make the loss.

        Args:
            observation_spec: spec of one observation, as for ``make_bcq_modules``.
        """
        leaves = observation_leaves(observation_spec).items()
        vectors = {key: _unscaled(leaf.shape[-1]) for key, leaf in leaves if _is_vector(leaf)}
        frames = {key: _bytes_by_255(leaf.shape[0]) for key, leaf in leaves if _is_frame(leaf)}
        return cls({**vectors, **frames})

    def columns(self, sizes: Mapping[NestedKey, int]) -> tuple[Tensor, ...]:
        """Return all locations in one vector and all scales in another. ``sizes``: number of features by key.

        Raises:
            ValueError: if an observation was not fitted, or was fitted with another number of features.
        """
        for key, size in sizes.items():
            if key not in self.observations:
                raise ValueError(
                    f"the networks read {key!r}, but the normalization was fitted on {[*self.observations]}; fit it "
                    f"with observation_keys={[*sizes]}."
                )
            if (fitted := len(self.observations[key][0])) != size:
                raise ValueError(
                    f"{key!r} has {size} features, but the normalization was fitted on {fitted}; fit it again."
                )
        columns = zip(*(self.observations[key] for key in sizes), strict=True)
        return tuple(torch.cat(parts).cpu() for parts in columns) or (torch.zeros(0), torch.ones(0))

    def byte_scale(self, key: NestedKey, channels: int) -> tuple[Tensor, ...]:
        """Return the mean ``[C]`` and the scale ``[C]`` of the bytes of a frame; raise as ``columns`` does."""
        return self.columns({key: channels}) if key in self.observations else _bytes_by_255(channels)


def _is_vector(spec: TensorSpec) -> bool:
    """Return whether an entry is a vector, and not a mask."""
    return len(spec.shape) == 1 and spec.dtype.is_floating_point


def _is_frame(spec: TensorSpec) -> bool:
    return len(spec.shape) == 3 and spec.dtype == torch.uint8


def observation_leaves(spec: TensorSpec) -> dict[NestedKey, TensorSpec]:
    """Return the leaves of a Composite as a dict. Any other spec gets the key ``"observation"``."""
    check_spec("observation_spec", spec)
    return dict(spec.items(True, True)) if isinstance(spec, Composite) else {"observation": spec}


def _mean_and_scale(transitions: TensorDictBase, key: NestedKey) -> tuple[Tensor, Tensor]:
    """Return an entry's mean and scale ``[D]``: the standard deviation, or 1 for a constant column."""
    count = mean = square = torch.zeros((), dtype=torch.float64)
    bad = first_bad = 0
    for start in range(0, len(transitions), CHUNK_ROWS):
        values = transitions[start : start + CHUNK_ROWS].get(key)
        x = values.detach().cpu().double()
        if not_finite := (~x.isfinite().all(-1)).nonzero().flatten().tolist():
            first_bad = first_bad if bad else start + not_finite[0]
            bad += len(not_finite)
        rows, center = count.new_tensor(len(x)), x.mean(0)
        count, mean, square = merge_moments(count, mean, square, rows, center, (x - center).square().sum(0))
    if bad:
        raise ValueError(
            f"{key!r} has {bad} {'row' if bad == 1 else 'rows'} (first: {first_bad}) that are not finite; drop or "
            "repair them."
        )
    scale, resolution = (square / count).sqrt(), torch.finfo(values.dtype)
    rounding = (resolution.eps * mean.abs()).clamp_min(resolution.tiny)
    return mean, torch.where(scale > rounding, scale, 1.0)


def _are_frames(transitions: TensorDictBase, key: NestedKey) -> bool:
    entry = transitions.get(key, None)
    return entry is not None and entry.dtype == torch.uint8 and entry.ndim == 4


def _byte_mean_and_scale(frames: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the scale ``[C]`` of each channel: the standard deviation, or 255 for constant bytes."""
    rows = torch.linspace(0, len(frames) - 1, min(len(frames), FRAME_ROWS), dtype=torch.float64).round().long()
    moments = torch.empty((2, len(rows), frames.shape[1]), dtype=torch.float64)
    chunk = moments.new_empty((FRAME_CHUNK, *frames.shape[1:]))  # one buffer for all: new ones would fragment the heap
    for some, found in zip(rows.to(frames.device).split(FRAME_CHUNK), moments.split(FRAME_CHUNK, 1), strict=True):
        x = chunk[: len(some)].copy_(frames[some]).flatten(2)
        found[0], found[1] = torch.var_mean(x, -1, correction=0)  # [N, C]
    variance, mean = moments
    scale = (variance.mean(0) + mean.var(0, correction=0)).sqrt()
    return mean.mean(0), torch.where(scale > 0, scale, 255.0)


def _bytes_by_255(channels: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(channels, dtype=torch.float64), torch.full((channels,), 255.0, dtype=torch.float64)


def _unscaled(width: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(width, dtype=torch.float64), torch.ones(width, dtype=torch.float64)


def _check_entries(transitions: TensorDictBase, keys: Sequence[NestedKey]) -> None:
    if len(transitions.batch_size) != 1 or not len(transitions):
        raise ValueError(
            f"transitions have batch size {tuple(transitions.batch_size)}, expected [N] with N at least 1; flatten "
            "them with transitions.reshape(-1)."
        )
    first = transitions[:1]
    if missing := [key for key in keys if first.get(key, None) is None]:
        present = sorted(map(str, transitions.keys(True, True)))
        raise ValueError(
            f"transitions lack {missing}; they hold {present}. Set observation_keys, or scale_rewards=False."
        )
    for key in keys:
        entry = first.get(key)
        if entry.ndim != 2 or not entry.dtype.is_floating_point:
            raise ValueError(
                f"{key!r} has shape {(len(transitions), *entry.shape[1:])} and dtype {entry.dtype}, expected floats "
                "[N, D], or for an observation frames [N, C, H, W] of torch.uint8; scale other images in your network."
            )


def _check_scale(scale: Tensor) -> None:
    usable = (scale > 0) & scale.isfinite()
    if not usable.all():
        bad = (~usable).nonzero().flatten().tolist()
        raise ValueError(
            f"scale is {scale[bad].tolist()} in columns {bad} (in {scale.dtype}); it must be positive and finite. Use "
            "1 for a constant column."
        )
