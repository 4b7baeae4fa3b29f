"""How BCQ acts: sample actions that the dataset would hold, adjust them a little, take the best."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.envs.utils import ExplorationType, exploration_type

from torchrl_bcq.functional import clipped_normal, spread_normal
from torchrl_bcq.memory import keep_freed_memory
from torchrl_bcq.protocols import CriticEnsemble, GenerativeModel, check_action, check_networks, require


class BCQPolicy(TensorDictModuleBase):
    """``argmax_a Q_1(s, a)`` over perturbed samples of the behaviour, for any batch of states at once.

    It holds the modules that it is given, not copies: while a loss trains them it acts with what was just learned.

    Latents are drawn anew at each call, as in the paper, also where no exploration type is set. Under
    ``ExplorationType.DETERMINISTIC`` (or ``MODE``, ``MEAN``) they are a fixed set instead, spread evenly over the same
    distribution and held in the buffer ``latents``: the same observation then gives the same action.

    Args:
        vae: samples the candidates.
        actor: perturbs them; None takes them as they are.
        critics: the first critic chooses.
        num_action_samples: candidates for each state.
        chunk_size: candidates evaluated at a time, over all states (at least those of one state): bounds the memory.
        seed: of the fixed latents.
        return_value: also write ``chosen_action_value [*B, 1]``.
        return_candidates: also write ``candidates [*B, n, A]`` and their ``action_value [*B, n]``.

    Reads: the observations. Writes: the action, ``[*B, A]``, and what was asked for.

    Raises:
        TypeError: if a network lacks a member that is needed of it.
        ValueError: if a number is below 1, or the networks disagree about the action's key; when called, if an
            observation has another dtype than the networks.

    Source: arXiv:1812.02900, eq. 12 and algorithm 1.
    """

    latents: Tensor

    def __init__(
        self,
        vae: GenerativeModel,
        actor: TensorDictModuleBase | None,
        critics: CriticEnsemble,
        *,
        num_action_samples: int = 100,
        chunk_size: int = 6_400,
        seed: int = 0,
        return_value: bool = False,
        return_candidates: bool = False,
    ) -> None:
        super().__init__()
        if num_action_samples < 1:
            raise ValueError(f"num_action_samples is {num_action_samples}; the policy needs at least one candidate.")
        if chunk_size < 1:
            raise ValueError(f"chunk_size is {chunk_size}, expected at least 1.")
        check_networks(vae, actor, critics)
        self.vae = vae
        self.actor = actor
        self.critics = critics
        self.chunk_size = chunk_size
        self.return_value = return_value
        self.return_candidates = return_candidates
        like = next(self.parameters())
        keep_freed_memory(like.device)
        self.register_buffer("latents", spread_normal(num_action_samples, vae.latent_dim, vae.latent_clip, seed, like))
        in_keys = dict.fromkeys([*vae.observation_keys, *(() if actor is None else actor.in_keys), *critics.in_keys])
        self.in_keys = [key for key in in_keys if key != vae.action_key]
        self.out_keys = [
            vae.action_key,
            *(["chosen_action_value"] if return_value else []),
            *(["candidates", "action_value"] if return_candidates else []),
        ]

    @property
    def num_action_samples(self) -> int:
        """Candidates for each state."""
        return len(self.latents)

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the chosen action of each state, ``[*B, A]``."""
        like = next(self.parameters())
        states = self._states(tensordict, like.dtype)
        number = tensordict.batch_size.numel()
        size = max(1, self.chunk_size // self.num_action_samples)
        parts = [states]
        if number > size:
            starts = range(0, number, size)
            parts = [{key: value[start : start + size] for key, value in states.items()} for start in starts]
        chosen = [self._choose(part, like, tensordict.device) for part in parts]
        for key in self.out_keys:
            value = chosen[0][key] if len(chosen) == 1 else torch.cat([part[key] for part in chosen])
            if tensordict.ndim != 1:
                value = value.reshape(*tensordict.batch_size, *value.shape[1:])  # [N, ...] -> [*B, ...]
            tensordict.set(key, value)
        return tensordict

    def _states(self, tensordict: TensorDictBase, wanted: torch.dtype) -> dict[NestedKey, Tensor]:
        """The observations, one row for each state. ``[*B, ...] -> [N, ...]``."""
        states, batch = {}, tensordict.batch_size
        for key in self.in_keys:
            value = tensordict[key]
            if value.dtype != wanted and value.dtype.is_floating_point:
                raise ValueError(
                    f"{key} has dtype {value.dtype}, the networks {wanted}: wrap the environment in "
                    "TransformedEnv(env, DoubleToFloat()), or build the networks in the other dtype."
                )
            states[key] = value if len(batch) == 1 else value.reshape(batch.numel(), *value.shape[len(batch) :])
        return states

    def _choose(
        self, states: Mapping[NestedKey, Tensor], like: Tensor, device: torch.device | None
    ) -> dict[NestedKey, Tensor]:
        """The best candidate of each state, and what else was asked for, each ``[N, ...]``.

        Args:
            states: each ``[N, ...]``.
            like: a parameter, of whose kind latents are.
            device: of the tensordict in which networks find the candidates.
        """
        number, n = len(next(iter(states.values()))), self.num_action_samples
        repeated = {key: value.unsqueeze(1).expand(number, n, *value.shape[1:]) for key, value in states.items()}
        candidates = TensorDict(repeated, (number, n), device=device)
        candidates = self.vae.decode(candidates, self._draw_latents(number, like))
        candidates = check_action(candidates, self.vae.action_key)
        if self.actor is not None:
            candidates = self.actor(candidates)
        actions = candidates.get(self.vae.action_key)  # [N, n, A]
        value = self.critics.first(candidates).get(self.critics.out_keys[-1])  # [N, n, 1]
        best = value.argmax(1, keepdim=True)  # [N, n, 1] -> [N, 1, 1]
        out = {self.vae.action_key: actions.gather(1, best.expand(-1, -1, actions.shape[-1])).squeeze(1)}
        if self.return_value:
            out["chosen_action_value"] = value.gather(1, best).squeeze(1)
        if self.return_candidates:
            out |= {"candidates": actions, "action_value": value.squeeze(-1)}
        return out

    def _draw_latents(self, states: int, like: Tensor) -> Tensor:
        """Latents ``[N, n, L]`` of the candidates."""
        shape = (states, *self.latents.shape)
        if _is_random():
            return clipped_normal(shape, self.vae.latent_clip, like)
        return self.latents.to(like).expand(shape)  # the networks may have been cast through a loss


class BehaviorCloningPolicy(TensorDictModuleBase):
    """One sample of the behaviour, ``D(s, z)``: the generative model alone, as a baseline.

    Under ``ExplorationType.DETERMINISTIC`` (or ``MODE``, ``MEAN``) the latent is 0, its mean.

    Args:
        vae: samples the action.

    Reads: the observations. Writes: the action, ``[*B, A]``.

    Source: "VAE-BC" in the experiments of arXiv:1812.02900.
    """

    def __init__(self, vae: GenerativeModel) -> None:
        super().__init__()
        require("vae", vae, GenerativeModel)
        self.vae = vae
        self.in_keys = list(vae.observation_keys)
        self.out_keys = [vae.action_key]

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write an action for each state, ``[*B, A]``."""
        shape, like = (*tensordict.batch_size, self.vae.latent_dim), next(self.parameters())
        latent = clipped_normal(shape, self.vae.latent_clip, like) if _is_random() else like.new_zeros(shape)
        return self.vae.decode(tensordict, latent)


def _is_random() -> bool:
    return exploration_type() in (ExplorationType.RANDOM, None)
