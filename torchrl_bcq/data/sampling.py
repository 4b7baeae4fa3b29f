"""Computes weights and masks for the rows of a fixed dataset, and samples rows by their weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import Storage
from torchrl.data.replay_buffers.samplers import Sampler

from torchrl_bcq.data.defects import Rows
from torchrl_bcq.data.episodes import check_finite, episode_numbers, episode_returns, group_numbers
from torchrl_bcq.errors import remedy


class WeightedSampler(Sampler):
    """A TorchRL sampler that draws rows with replacement, in proportion to fixed weights.

    The sampler stores 8 bytes per row. Unlike ``torch.multinomial``, it can draw from more than 2^24 rows and does not
    sum all weights at each draw.

    Args:
        weights: one weight per row, ``[N]``, boolean or of any real dtype. A row with weight 0 is never drawn.

    Raises:
        ValueError: if a weight is negative or not finite, all weights are zero, or their shape is not ``[N]``.
            ``sample`` raises a ValueError if the storage does not have ``N`` rows. ``load_state_dict`` raises a
            ValueError if the saved sampler had other weights than this one.
    """

    def __init__(self, weights: Tensor) -> None:
        weights = torch.as_tensor(weights).detach().cpu()
        _check_weights(weights)
        # on the CPU, cumsum adds in order: a weight 0 leaves the sum unchanged, so its row is never drawn
        self._cumulative = (weights.double() / weights.max()).cumsum(0)
        self._total, self._moment = self._cumulative[-1].item(), self._cumulative.sum().item()

    def sample(self, storage: Storage, batch_size: int) -> tuple[Tensor, dict[str, Any]]:
        """Draw the indices of ``batch_size`` rows; return the indices and an empty info dictionary."""
        if len(storage) != len(self._cumulative):
            found = f"there are {len(self._cumulative)} weights for the {len(storage)} rows of the storage"
            raise ValueError(f"{found}; pass one weight for each row.")
        self._cumulative = self._cumulative.to(storage.device)
        draw = {"dtype": torch.float64, "generator": self._rng, "device": storage.device}
        point = torch.rand((batch_size,), **draw) * self._total
        return torch.searchsorted(self._cumulative, point, right=True), {}

    def state_dict(self) -> dict[str, Any]:
        """Return three numbers that identify the weights. The sampler has no other state."""
        return {"rows": len(self._cumulative), "total": self._total, "moment": self._moment}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that the saved sampler had the same weights as this sampler."""
        own = self.state_dict()
        if any(abs(own[name] - state_dict[name]) > 1e-9 * own[name] for name in own):
            raise ValueError(
                f"the saved sampler had other weights (saved: {state_dict}, here: {own}); make the replay buffer with "
                "the same weights as before."
            )

    def dumps(self, path: str | Path) -> None:
        """Write the state into a folder."""
        Path(path).mkdir(parents=True, exist_ok=True)
        (Path(path) / "weights.json").write_text(json.dumps(self.state_dict()))

    def loads(self, path: str | Path) -> None:
        """Read the state from a folder and check that the saved sampler had the same weights as this one."""
        self.load_state_dict(json.loads((Path(path) / "weights.json").read_text()))

    def _empty(self) -> None:
        """Do nothing: the sampler keeps its weights when the buffer is emptied."""


def episode_weights(transitions: TensorDictBase) -> Tensor:
    """Return weights ``[N]`` that make all episodes equally likely to be drawn: 1 / length of the episode.

    Args:
        transitions: TensorDict of batch size ``[N]``, with ``episode [N]`` or ``("next", "done") [N, 1]``.

    Raises:
        DatasetError: if ``episode`` and ``done`` are both missing, or if the rows of an episode do not directly follow
            each other.
    """
    numbers = episode_numbers(transitions)
    return numbers.bincount().double().reciprocal()[numbers]


def return_weights(transitions: TensorDictBase, temperature: float = 0.1) -> Tensor:
    """Compute weights ``[N]`` that prefer episodes of high return: ``exp(scaled return / temperature)``.

    The undiscounted returns are scaled linearly: the lowest return of the dataset becomes -1, the highest becomes 0.
    The highest weight is therefore 1. As in the source paper, all rows of an episode have the same weight, so longer
    episodes are drawn more often. To remove the effect of the length, use ``return_weights(data) *
    episode_weights(data)``.

    Args:
        transitions: TensorDict as for ``episode_weights``; it must also contain ``("next", "reward") [N, 1]``.
        temperature: a lower value gives episodes with high returns more weight. With 0.1, the value in the source
            paper, a row of the best episode is drawn e^10 times as often as a row of the worst episode.

    Raises:
        ValueError: if ``temperature`` is not above 0.
        DatasetError: as in ``episode_weights``, if a row spans several steps, or if the reward is missing or not
            finite.

    Source: return-weighted sampling of arXiv:2306.13085.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, expected above 0; to ignore returns, use episode_weights.")
    returns = episode_returns(transitions)
    check_finite("('next', 'reward')", transitions["next", "reward"])
    low, high = returns.aminmax()
    scaled = (returns - high) / (high - low) if high > low else torch.zeros_like(returns)  # [-1, 0]
    return (scaled / temperature).exp()[episode_numbers(transitions)]


def split_episodes(transitions: TensorDictBase, fraction: float = 0.1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Split the episodes into training and held-out episodes; return one row mask for each of the two.

    If the transitions have an entry ``group [N]``, all episodes of a group, such as a patient, are on the same side.
    To draw only training rows, pass the first mask as ``weights`` to ``make_replay_buffer``. The transitions are not
    copied. To combine a mask with other weights, multiply the mask by these weights.

    Args:
        transitions: as for ``episode_weights``.
        fraction: fraction of the episodes, or of the groups, to hold out. The number of held-out episodes or groups is
            rounded. At least one is held out, and at least one is kept for training.
        seed: seed for the random choice of the held-out episodes or groups.

    Returns:
        Two boolean masks ``[N]``: the training rows and the held-out rows.

    Raises:
        ValueError: if there are fewer than two episodes or groups, or ``fraction`` is not between 0 and 1.
        DatasetError: as in ``episode_weights``, or if the rows of an episode have several groups.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction is {fraction}, expected a number between 0 and 1.")
    numbers, what = group_numbers(transitions), "group"
    if numbers is None:
        numbers, what = episode_numbers(transitions), "episode"
    total = int(numbers.max()) + 1
    if total < 2:
        found = f"the transitions are one {what}; a split by {what} needs at least two {what}s"
        cut = "cut a long recording by reader.max_episode_steps=N, without a column of episodes"
        raise ValueError(found + remedy(".", f"; set held_out=0, so that the run holds out no episodes, or {cut}."))
    count = min(max(round(fraction * total), 1), total - 1)
    chosen = torch.zeros(total, dtype=torch.bool)
    chosen[torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count]] = True
    held_out = chosen.to(numbers.device)[numbers]
    return ~held_out, held_out


def _check_weights(weights: Tensor) -> None:
    if weights.ndim != 1 or not len(weights) or weights.is_complex():
        found = f"shape {tuple(weights.shape)} and dtype {weights.dtype}"
        raise ValueError(f"weights have {found}; expected real numbers of shape [N] with N at least 1.")
    bad = ~(weights.isfinite() & (weights >= 0))
    if bad.any():
        rows = Rows(int(bad.sum()), int(bad.int().argmax()))
        raise ValueError(
            f"weights has {rows} that are negative or not finite, such as {weights[bad][0].item()}; use 0 to leave a "
            "row out."
        )
    if not weights.any():
        raise ValueError(f"weights are zero in all {len(weights)} rows, so no row can be drawn; make one positive.")
