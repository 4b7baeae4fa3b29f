"""Scaling of observations and rewards as layers of the networks; all data stays in the environment's units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from tensordict import TensorDictBase, unravel_key
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.data import Composite, TensorSpec

from torchrl_bcq.functional import merge_moments

CHUNK_ROWS = 65_536  # read at a time


class Standardize(nn.Module):
    """``(x - loc) / scale``, a first layer for any network. ``[*B, D] -> [*B, D]``.

    Args:
        loc: ``[D]``, kept in a buffer, which moves with the network and is not trained.
        scale: ``[D]``, positive, kept in a buffer.

    Raises:
        ValueError: if the shapes of the two differ, ``loc`` is not finite, or ``scale`` is not positive and finite;
            when called, if ``x`` does not have ``D`` features.
    """

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        super().__init__()
        if loc.ndim != 1 or loc.shape != scale.shape:
            raise ValueError(f"loc has shape {tuple(loc.shape)} and scale {tuple(scale.shape)}; both must be [D].")
        if not loc.isfinite().all():
            raise ValueError(f"loc is {loc.tolist()} in {loc.dtype}; it must be finite.")
        _check_scale(scale)
        self.loc, self.scale = nn.Buffer(loc.clone()), nn.Buffer(scale.clone())

    def forward(self, x: Tensor) -> Tensor:
        """Standardise the last dimension."""
        if x.shape[-1:] != self.loc.shape:
            raise ValueError(f"the input has shape {tuple(x.shape)}, but the layer scales {len(self.loc)} columns.")
        return (x - self.loc) / self.scale

    def extra_repr(self) -> str:
        """The number of columns."""
        return str(len(self.loc))


class Rescale(nn.Module):
    """``x * scale``, a last layer that converts a network's output to raw units. ``[*B, D] -> [*B, D]``."""

    def __init__(self, scale: float, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.scale = nn.Buffer(torch.tensor([scale], dtype=dtype))
        _check_scale(self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply."""
        return x * self.scale


@dataclass(frozen=True, eq=False)
class Normalization:
    """Scaling of observations and rewards, for :func:`~torchrl_bcq.make_bcq_modules`; bounds scale the actions.

    Only layers of the networks scale: data, actions, values and losses stay in raw units. The critics multiply their
    output by the rewards' standard deviation; rewards are not shifted, which would change the problem where episodes
    terminate. The critics' gradients are ``reward_scale ** 2`` times those on scaled rewards. Adam cancels this factor
    (except for ``eps`` and with ``clip_norm``); plain SGD does not.

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
    ) -> Normalization:
        """Mean and standard deviation (of the population) over all rows, in float64 and in one pass.

        The scale of a column that is constant, or varies by no more than rounding at its magnitude, is 1.

        Args:
            transitions: batch size ``[N]``; may be memory-mapped and larger than memory.
            observation_keys: entries ``[N, D]`` that the networks read.
            reward_key: entry ``[N, 1]``.
            scale_observations: if False, location 0 and scale 1.
            scale_rewards: if False, scale 1.

        Raises:
            ValueError: if there is no row, or an entry is missing, has another shape, is not of floats, or has rows
                that are not finite; it names the entry, the count and the first row.
        """
        observations = [unravel_key(key) for key in observation_keys]
        keys = [*observations, *([unravel_key(reward_key)] if scale_rewards else [])]
        _check_entries(transitions, keys)
        rows = transitions.select(*keys)
        fitted = {key: _mean_and_scale(rows, key) for key in keys}
        reward_scale = fitted[keys[-1]][1].item() if scale_rewards else 1.0
        if not scale_observations:
            fitted = {key: _unscaled(rows[key].shape[-1]) for key in observations}
        return cls({key: fitted[key] for key in observations}, reward_scale)

    @classmethod
    def identity(cls, observation_spec: TensorSpec) -> Normalization:
        """No scaling; for networks whose scaling is loaded from a checkpoint.

        Load the checkpoint into the loss, or into the networks before the loss is made: its targets are copies.

        Args:
            observation_spec: spec of one observation ``[D]``, or a Composite of such.
        """
        return cls({key: _unscaled(leaf.shape[-1]) for key, leaf in observation_leaves(observation_spec).items()})

    def columns(self, sizes: Mapping[NestedKey, int]) -> tuple[Tensor, ...]:
        """Location and scale ``[D]`` of all columns that networks read, from the size of each observation in order.

        Raises:
            ValueError: if an observation was not fitted, or with another number of columns.
        """
        for key, size in sizes.items():
            if key not in self.observations:
                raise ValueError(
                    f"the networks read {key!r}, the normalization is of {[*self.observations]}; fit it with "
                    f"observation_keys={[*sizes]}."
                )
            if (fitted := len(self.observations[key][0])) != size:
                raise ValueError(f"{key!r} has {size} features, the normalization was fitted on {fitted}.")
        return tuple(torch.cat(parts).cpu() for parts in zip(*(self.observations[key] for key in sizes), strict=True))


def observation_leaves(spec: TensorSpec) -> dict[NestedKey, TensorSpec]:
    """The leaves of a Composite by key; another spec is that of ``"observation"``."""
    return dict(spec.items(True, True)) if isinstance(spec, Composite) else {"observation": spec}


def _mean_and_scale(transitions: TensorDictBase, key: NestedKey) -> tuple[Tensor, Tensor]:
    """Mean ``[D]`` and standard deviation ``[D]`` of an entry; the scale of a column that does not vary is 1."""
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


def _unscaled(width: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(width, dtype=torch.float64), torch.ones(width, dtype=torch.float64)


def _check_entries(transitions: TensorDictBase, keys: Sequence[NestedKey]) -> None:
    if len(transitions.batch_size) != 1 or not len(transitions):
        raise ValueError(
            f"transitions have batch size {tuple(transitions.batch_size)}, expected [N] with N at least 1; flatten "
            "them with transitions.reshape(-1)."
        )
    first, present = transitions[:1], transitions.keys(True, True)
    if missing := [key for key in keys if key not in present]:
        raise ValueError(
            f"transitions lack {missing}; they hold {sorted(map(str, present))}. Pass observation_keys and reward_key."
        )
    for key in keys:
        entry = first.get(key)
        if entry.ndim != 2 or not entry.dtype.is_floating_point:
            raise ValueError(
                f"{key!r} has shape {(len(transitions), *entry.shape[1:])} and dtype {entry.dtype}, expected floats "
                "[N, D]; scale images in their own encoder."
            )


def _check_scale(scale: Tensor) -> None:
    usable = (scale > 0) & scale.isfinite()
    if not usable.all():
        bad = (~usable).nonzero().flatten().tolist()
        raise ValueError(
            f"scale is {scale[bad].tolist()} in columns {bad}, in {scale.dtype}; it must be positive and finite, such "
            "as 1 where a column is constant."
        )
