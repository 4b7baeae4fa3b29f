"""Random transitions and network sizes that the benchmarks share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tensordict import TensorDict

OBSERVATIONS, ACTIONS, LATENTS, ROWS = 17, 6, 12, 10_000  # sizes of HalfCheetah and Walker2d
FRAME, FRAME_ROWS = (4, 84, 84), 2_000  # of Atari games, with as many discrete actions


@dataclass(frozen=True)
class Sizes:
    """Sizes of the networks; the defaults are the author's hidden layers, and the sizes of HalfCheetah."""

    hidden: Sequence[int] = (400, 300)  # actor and critics
    vae_hidden: Sequence[int] = (750, 750)  # encoder and decoder
    observations: int = OBSERVATIONS
    actions: int = ACTIONS
    bound: float = 1.0  # largest magnitude of an action

    @property
    def latents(self) -> int:
        return 2 * self.actions


@dataclass(frozen=True)
class Settings:
    """Hidden layers of each head and settings of training in the author's code of discrete BCQ."""

    hidden: Sequence[int]
    lr: float
    eps: float
    tau: float | None  # None: the target is copied
    copy_every: int = 8_000  # steps


DISCRETE = {"vectors": Settings((256, 256), 3e-4, 1e-8, 0.005), "frames": Settings((512,), 6.25e-5, 1.5e-4, None)}


def make_transitions() -> TensorDict:
    generator = torch.Generator().manual_seed(0)

    def normal(width: int) -> torch.Tensor:
        return torch.randn(ROWS, width, generator=generator)

    flags = torch.zeros(ROWS, 1, dtype=torch.bool)
    following = {"observation": normal(OBSERVATIONS), "reward": normal(1), "done": flags, "terminated": flags.clone()}
    columns = {"observation": normal(OBSERVATIONS), "action": normal(ACTIONS).clamp(-1, 1), "next": following}
    return TensorDict(columns, [ROWS])


def make_discrete_transitions(kind: str) -> TensorDict:
    """Transitions with actions ``[N]`` from 0 to ACTIONS - 1; the observations are vectors, or frames of bytes."""
    generator, data = torch.Generator().manual_seed(1), make_transitions()
    if kind == "frames":
        data = data[:FRAME_ROWS]
        for key in ("observation", ("next", "observation")):
            data[key] = torch.randint(256, (FRAME_ROWS, *FRAME), dtype=torch.uint8, generator=generator)
    data["action"] = torch.randint(ACTIONS, data.shape, generator=generator)
    return data
