"""Weights and masks of the rows of a fixed dataset, and the sampler that draws by them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import Storage
from torchrl.data.replay_buffers.samplers import Sampler

from torchrl_bcq.data.checks import Rows, check_finite
from torchrl_bcq.data.episodes import episode_numbers, episode_returns


class WeightedSampler(Sampler):
    """A TorchRL sampler that draws rows with replacement, in proportion to fixed weights.

    It takes 8 bytes per row. ``torch.multinomial`` is limited to 2^24 rows and sums all weights at each draw.

    Args:
        weights: ``[N]``, of any real dtype or boolean; a row of weight 0 is never drawn.

    Raises:
        ValueError: if weights are negative, not finite, all zero or not ``[N]``; later, if the storage has another
            number of rows, or the saved sampler had other weights.
    """

    def __init__(self, weights: Tensor) -> None:
        weights = torch.as_tensor(weights).detach().cpu()
        _check_weights(weights)
        # sequential on the CPU: the sum never decreases, and stays the same at weight 0
        self._cumulative = (weights.double() / weights.max()).cumsum(0)
        self._total, self._moment = self._cumulative[-1].item(), self._cumulative.sum().item()

    def sample(self, storage: Storage, batch_size: int) -> tuple[Tensor, dict[str, Any]]:
        """Draw the indices of ``batch_size`` rows, without further information about them."""
        if len(storage) != len(self._cumulative):
            raise ValueError(f"there are {len(self._cumulative)} weights for the {len(storage)} rows of the storage.")
        self._cumulative = self._cumulative.to(storage.device)
        draw = {"dtype": torch.float64, "generator": self._rng, "device": storage.device}
        point = torch.rand((batch_size,), **draw) * self._total
        return torch.searchsorted(self._cumulative, point, right=True), {}

    def state_dict(self) -> dict[str, Any]:
        """Three numbers that identify the weights, which are the only state."""
        return {"rows": len(self._cumulative), "total": self._total, "moment": self._moment}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that the saved sampler had the same weights."""
        own = self.state_dict()
        if any(abs(own[name] - state_dict[name]) > 1e-9 * own[name] for name in own):
            raise ValueError(
                f"the saved sampler had other weights ({state_dict}, here {own}); make the buffer with the same ones."
            )

    def dumps(self, path: str | Path) -> None:
        """Write the state into a folder."""
        Path(path).mkdir(parents=True, exist_ok=True)
        (Path(path) / "weights.json").write_text(json.dumps(self.state_dict()))

    def loads(self, path: str | Path) -> None:
        """Read the state from a folder and compare it."""
        self.load_state_dict(json.loads((Path(path) / "weights.json").read_text()))

    def _empty(self) -> None:
        """Do nothing: the weights are kept when the buffer is emptied."""


def episode_weights(transitions: TensorDictBase) -> Tensor:
    """Weights ``[N]`` with which each episode is equally likely, and so is each of its rows: 1 / length.

    Args:
        transitions: batch size ``[N]``, with ``episode [N]`` or ``("next", "done") [N, 1]``.

    Raises:
        DatasetError: if nothing tells episodes apart, or their rows are not together.
    """
    numbers = episode_numbers(transitions)
    return numbers.bincount().double().reciprocal()[numbers]


def return_weights(transitions: TensorDictBase, temperature: float = 0.1) -> Tensor:
    """Weights ``[N]`` that prefer episodes of high return: ``exp(return / temperature)``, the highest scaled to 1.

    Returns are undiscounted and scaled to [0, 1] over the dataset. As published, each row has its episode's weight, so
    longer episodes are drawn more often; ``return_weights(data) * episode_weights(data)`` corrects that.

    Args:
        transitions: as for :func:`episode_weights`, with ``("next", "reward") [N, 1]``.
        temperature: at the published 0.1, the best episode's rows are drawn e^10 times as often as the worst's.

    Raises:
        ValueError: if the temperature is not above 0.
        DatasetError: as in :func:`episode_weights`, or if there is no reward or one is not finite.

    Source: return-weighted sampling of arXiv:2306.13085.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, expected a number above 0; episode_weights ignores returns.")
    returns = episode_returns(transitions)
    check_finite("('next', 'reward')", transitions["next", "reward"])
    low, high = returns.aminmax()
    scaled = (returns - high) / (high - low) if high > low else torch.zeros_like(returns)  # [-1, 0]
    return (scaled / temperature).exp()[episode_numbers(transitions)]


def split_episodes(transitions: TensorDictBase, fraction: float = 0.1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Hold out whole episodes for validation: boolean masks ``[N]`` of the training rows and of the held-out rows.

    ``make_replay_buffer(transitions, weights=train)`` draws training rows only, without copying them; masks can be
    multiplied with other weights.

    Args:
        transitions: as for :func:`episode_weights`.
        fraction: of the episodes to hold out, rounded, but at least one on each side.
        seed: of the choice of episodes.

    Raises:
        ValueError: if there are fewer than two episodes, or the fraction is not between 0 and 1.
        DatasetError: as in :func:`episode_weights`.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction is {fraction}, expected a number between 0 and 1.")
    numbers = episode_numbers(transitions)
    episodes = int(numbers[-1]) + 1
    if episodes < 2:
        raise ValueError("the transitions are one episode; a split by episode needs at least two.")
    count = min(max(round(fraction * episodes), 1), episodes - 1)
    chosen = torch.zeros(episodes, dtype=torch.bool)
    chosen[torch.randperm(episodes, generator=torch.Generator().manual_seed(seed))[:count]] = True
    held_out = chosen.to(numbers.device)[numbers]
    return ~held_out, held_out


def _check_weights(weights: Tensor) -> None:
    if weights.ndim != 1 or not len(weights) or weights.is_complex():
        raise ValueError(f"weights have shape {tuple(weights.shape)} ({weights.dtype}), expected [N] real numbers.")
    bad = ~(weights.isfinite() & (weights >= 0))
    if bad.any():
        rows = Rows(int(bad.sum()), int(bad.int().argmax()))
        raise ValueError(
            f"weights has {rows} negative or not finite, such as {weights[bad][0].item()}; 0 leaves a row out."
        )
    if not weights.any():
        raise ValueError(f"weights are zero in all {len(weights)} rows; nothing could be drawn.")
