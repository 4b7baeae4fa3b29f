"""Random transitions and network sizes that the benchmarks share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tensordict import TensorDict

OBSERVATIONS, ACTIONS, LATENTS, ROWS = 17, 6, 12, 10_000  # sizes of HalfCheetah and Walker2d


@dataclass(frozen=True)
class Sizes:
    """Hidden layers; the defaults are the author's sizes."""

    hidden: Sequence[int] = (400, 300)  # actor and critics
    vae_hidden: Sequence[int] = (750, 750)  # encoder and decoder


def make_transitions() -> TensorDict:
    generator = torch.Generator().manual_seed(0)

    def normal(width: int) -> torch.Tensor:
        return torch.randn(ROWS, width, generator=generator)

    flags = torch.zeros(ROWS, 1, dtype=torch.bool)
    following = {"observation": normal(OBSERVATIONS), "reward": normal(1), "done": flags, "terminated": flags.clone()}
    columns = {"observation": normal(OBSERVATIONS), "action": normal(ACTIONS).clamp(-1, 1), "next": following}
    return TensorDict(columns, [ROWS])
