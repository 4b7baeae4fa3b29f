"""The scaling of a dataset as layers of the networks, so that all else stays in the units of the environment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from tensordict import TensorDictBase, unravel_key
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.data import Composite, TensorSpec


class Standardize(nn.Module):
    """``(x - loc) / scale``, a first layer for any network. ``[*B, D] -> [*B, D]``.

    Both are buffers: they are saved, loaded, moved, cast and exported with the network, and never trained.

    Args:
        loc: ``[D]``.
        scale: ``[D]``, positive.

    Raises:
        ValueError: if the two do not fit, or one has values that cannot be used; when called, if ``x`` has not ``D``
            features.
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        super().__init__()
        if loc.ndim != 1 or loc.shape != scale.shape:
            raise ValueError(f"loc has shape {tuple(loc.shape)} and scale {tuple(scale.shape)}; both must be [D].")
        if not loc.isfinite().all():
            raise ValueError(f"loc is {loc.tolist()} in {loc.dtype}; it must be finite.")
        _check_scale(scale)
        self.register_buffer("loc", loc.detach().clone())
        self.register_buffer("scale", scale.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Standardise the last dimension."""
        if x.shape[-1:] != self.loc.shape:
            raise ValueError(
                f"the input has shape {tuple(x.shape)}, but the statistics are of {len(self.loc)} columns."
            )
        return (x - self.loc) / self.scale

    def extra_repr(self) -> str:
        """The number of columns."""
        return str(len(self.loc))


class Rescale(nn.Module):
    """``x * scale``, a last layer that brings a network's output back to its units. ``[*B, D] -> [*B, D]``.

    Args:
        scale: one positive number, kept in a buffer ``[1]``.
        dtype: of the buffer.

    Raises:
        ValueError: if ``scale`` is not positive and finite.
    """

    scale: Tensor

    def __init__(self, scale: float, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor([scale], dtype=dtype))
        _check_scale(self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply."""
        return x * self.scale


@dataclass(frozen=True, eq=False)
class Normalization:
    """Scaling of observations and rewards, for :func:`~torchrl_bcq.make_bcq_modules`; actions have their bounds.

    Datasets, environments, collectors, fine-tuning, and what policy and critics write stay in raw units: nothing but
    the networks' own layers knows of the scaling, so nothing can disagree with them about it.

    Rewards are divided by their standard deviation and not shifted, since a shift changes the problem where episodes
    terminate. They are scaled from the other end, by critics that multiply their output, so that values and losses
    are in raw units too. The critics' gradients are ``reward_scale ** 2`` times those on scaled rewards, which Adam
    takes back (but for its ``eps``, and where ``clip_norm`` is set); plain SGD does not.

    Args:
        observations: ``(location [D], scale [D])`` of each observation key, on the CPU in float64.
        reward_scale: unit of the critics' output.

    Source: observations as in TD3+BC, arXiv:2106.06860.
    """

    observations: Mapping[NestedKey, tuple[Tensor, Tensor]]
    reward_scale: float = 1.0

    @classmethod
    def fit(
        cls,
        transitions: TensorDictBase,
        *,
        observation_keys: Sequence[NestedKey] = ("observation",),
        reward_key: NestedKey = ("next", "reward"),
        scale_observations: bool = True,
        scale_rewards: bool = True,
        chunk_size: int = 65_536,
    ) -> Normalization:
        """Mean and standard deviation (of the population) over all rows, in float64 and in one pass.

        A column that is constant, or varies by no more than rounding at its magnitude, keeps a scale of 1; so do
        constant rewards.

        Args:
            transitions: batch size ``[N]``; may be memory-mapped, and larger than the memory.
            observation_keys: entries ``[N, D]`` that the networks read.
            reward_key: entry ``[N, 1]``.
            scale_observations: False leaves them as they are: location 0, scale 1.
            scale_rewards: False leaves them as they are: scale 1.
            chunk_size: rows that are read at a time.

        Raises:
            ValueError: if there is no row, or an entry is missing, has another shape, is not of floats, or has rows
                that are not finite; it names the entry, the count and the first row.
        """
        observations, reward = [unravel_key(key) for key in observation_keys], unravel_key(reward_key)
        widths = _widths(transitions, [*observations, *([reward] if scale_rewards else [])])
        keys = [*(observations if scale_observations else []), *([reward] if scale_rewards else [])]
        moments = {key: _Moments(key) for key in keys}
        columns = transitions.select(*keys)
        for start in range(0, len(transitions), chunk_size):
            rows = columns[start : start + chunk_size]
            for key in keys:
                moments[key].update(rows.get(key))
        fitted = {key: moments[key].finish() for key in keys}
        return cls(
            {key: fitted[key] if scale_observations else _unscaled(widths[key]) for key in observations},
            fitted[reward][1].item() if scale_rewards else 1.0,
        )

    @classmethod
    def identity(cls, observation_spec: TensorSpec) -> Normalization:
        """No scaling yet: for networks that get theirs from a checkpoint, where the dataset is not at hand.

        Load it into the loss, or into the networks before the loss is made of them: its targets hold copies.

        Args:
            observation_spec: spec of one observation ``[D]``, or a Composite of such.
        """
        is_composite = isinstance(observation_spec, Composite)
        leaves = observation_spec.items(True, True) if is_composite else [("observation", observation_spec)]
        return cls({key: _unscaled(leaf.shape[-1]) for key, leaf in leaves})

    def first_layer(
        self, sizes: Mapping[NestedKey, int], loc: Tensor, scale: Tensor, dtype: torch.dtype
    ) -> Standardize:
        """What standardises the input of a network that reads observations and something beside them.

        Args:
            sizes: features of each observation that the network reads, in its order.
            loc: location of what follows them, ``[K]``: the centre of the action's range, or a latent's 0.
            scale: its scale, ``[K]``.
            dtype: of the buffers.

        Raises:
            ValueError: if an observation was not fitted, or with another number of columns.
        """
        for key, size in sizes.items():
            if key not in self.observations:
                raise ValueError(
                    f"the networks read {key!r}, the normalization is of {[*self.observations]}; fit it with "
                    f"observation_keys={[*sizes]}."
                )
            fitted = len(self.observations[key][0])
            if fitted != size:
                raise ValueError(f"{key!r} has {size} features, the normalization was fitted on {fitted}.")
        columns = zip(*(self.observations[key] for key in sizes), (loc, scale), strict=True)
        return Standardize(*(torch.cat([part.cpu().to(dtype) for part in parts]) for parts in columns))

    def last_layer(self, dtype: torch.dtype) -> Rescale:
        """What brings a critic's output to the units of the rewards."""
        return Rescale(self.reward_scale, dtype)


class _Moments:
    """Mean and variance of columns, merged chunk by chunk.

    Source: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
    """

    def __init__(self, key: NestedKey) -> None:
        self.key = key
        self.rows = self.bad = 0
        self.first_bad = -1

    def update(self, values: Tensor) -> None:
        """Take in rows ``[n, D]``; those that are not finite are counted."""
        x = values.detach().cpu().double()
        bad = ~x.isfinite().all(-1)
        if not self.rows:
            self.mean, self.squares = x.new_zeros(2, x.shape[-1])
            self.resolution = torch.finfo(values.dtype)
        if bad.any() and not self.bad:
            self.first_bad = self.rows + int(bad.int().argmax())
        self.bad += int(bad.sum())
        mean = x.mean(0)
        delta, total = mean - self.mean, self.rows + len(x)
        self.mean = self.mean + delta * (len(x) / total)
        self.squares = self.squares + (x - mean).square().sum(0) + delta.square() * (self.rows * len(x) / total)
        self.rows = total

    def finish(self) -> tuple[Tensor, Tensor]:
        """Mean ``[D]`` and standard deviation ``[D]``, which is 1 where there is none to speak of."""
        if self.bad:
            raise ValueError(
                f"{self.key!r} has {self.bad} {'row' if self.bad == 1 else 'rows'} (first: {self.first_bad}) that are "
                "not finite; drop or repair them."
            )
        scale = (self.squares / self.rows).sqrt()
        rounding = (self.resolution.eps * self.mean.abs()).clamp_min(self.resolution.tiny)
        return self.mean, torch.where(scale > rounding, scale, 1.0)


def _unscaled(width: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(width, dtype=torch.float64), torch.ones(width, dtype=torch.float64)


def _widths(transitions: TensorDictBase, keys: Sequence[NestedKey]) -> dict[NestedKey, int]:
    """Columns of each entry, all of which must be ``[N, D]`` and of floats."""
    if len(transitions.batch_size) != 1 or not len(transitions):
        raise ValueError(
            f"transitions have batch size {tuple(transitions.batch_size)}, expected [N] with N at least 1; flatten "
            "them with transitions.reshape(-1)."
        )
    first = transitions[:1]
    missing = [key for key in keys if first.get(key, None) is None]
    if missing:
        present = sorted(map(str, transitions.keys(True, True)))
        raise ValueError(f"transitions lack {missing}; they hold {present}. Pass observation_keys and reward_key.")
    for key in keys:
        entry = first.get(key)
        if entry.ndim != 2 or not entry.dtype.is_floating_point:
            raise ValueError(
                f"{key!r} has shape {(len(transitions), *entry.shape[1:])} and dtype {entry.dtype}, expected floats "
                "[N, D]; scale images in their own encoder."
            )
    return {key: first.get(key).shape[-1] for key in keys}


def _check_scale(scale: Tensor) -> None:
    usable = (scale > 0) & scale.isfinite()
    if not usable.all():
        bad = (~usable).nonzero().flatten().tolist()
        raise ValueError(
            f"scale is {scale[bad].tolist()} in columns {bad}, in {scale.dtype}; it must be positive and finite, such "
            "as 1 where a column is constant."
        )
