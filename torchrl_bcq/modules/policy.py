"""Policies of BCQ: sample actions that are likely in the dataset, perturb them and choose the best one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor, nn

from torchrl_bcq.functional import clipped_normal, spread_normal
from torchrl_bcq.memory import keep_freed_memory
from torchrl_bcq.modules.acting import Policy, check_dtype, check_latents, is_random, rows_of, tensor_like
from torchrl_bcq.modules.dispatch import accepts_tensors
from torchrl_bcq.protocols import (
    CriticEnsemble,
    GenerativeModel,
    check_networks,
    decode_action,
    has_batch_norm,
    perturb_action,
    require,
)

_CHOICES: dict[str, Callable[[Tensor], Tensor]] = {  # maps the critics' values to one score per candidate
    "first": lambda value: value,
    "min": lambda value: value.amin(-1, keepdim=True),
    "mean": lambda value: value.mean(-1, keepdim=True),
}


class BCQPolicy(Policy):
    """Policy of BCQ: by default, ``argmax_a Q_1(s, a)`` over perturbed samples of the behaviour model.

    The policy holds the given modules, not copies: while a loss trains them, the policy acts with the new weights.

    Under ``ExplorationType.RANDOM`` or without an exploration type, the policy draws new latents at each call, as in
    the paper. Under ``DETERMINISTIC``, ``MODE`` or ``MEAN``, it uses the fixed latents in its buffer ``latents``. With
    fixed latents, equal observations give equal actions. The fixed latents are spread evenly over the distribution of
    the random latents.

    Args:
        vae: behaviour model that samples the candidate actions.
        actor: network that perturbs the candidates; None leaves the candidates unchanged.
        critics: ensemble whose values rank the candidates (see ``choose_by``).
        num_action_samples: number of candidates for each state.
        choose_by: how candidates are ranked: by the value of the ``"first"`` critic, as in the paper, or by the
            ``"min"`` or ``"mean"`` of the values of all critics.
        chunk_size: largest number of candidates that are evaluated together. A smaller number needs less memory. The
            candidates of one state are never split between chunks.
        seed: seed of the fixed latents.
        return_value: if True, also write ``chosen_action_value [*B, 1]``.
        return_candidates: if True, also write ``candidates [*B, n, A]`` and their ``action_value [*B, n]``.

    Raises:
        TypeError: if a network lacks a method or an attribute that the policy needs.
        ValueError: if ``num_action_samples`` or ``chunk_size`` is below 1, ``choose_by`` is unknown, the networks use
            different action keys, or a network is recurrent. A call of the policy also raises this error if an
            observation and the networks have different dtypes.

    Example:
        >>> import torch
        >>> from torchrl.data import Bounded, Unbounded
        >>> from torchrl_bcq.modules import BCQPolicy, make_bcq_modules
        >>> policy = BCQPolicy(*make_bcq_modules(Unbounded((3,)), Bounded(-2, 2, (1,))), return_value=True)
        >>> action, value = policy(torch.zeros(5, 3))  # or policy(tensordict) with the entry "observation"
        >>> action.shape, value.shape
        (torch.Size([5, 1]), torch.Size([5, 1]))

    Source: arXiv:1812.02900, eq. 12 and algorithm 1.
    """

    latent_shape: tuple[int, ...]

    def __init__(
        self,
        vae: GenerativeModel,
        actor: TensorDictModuleBase | None,
        critics: CriticEnsemble,
        *,
        num_action_samples: int = 100,
        choose_by: str = "first",
        chunk_size: int = 6_400,
        seed: int = 0,
        return_value: bool = False,
        return_candidates: bool = False,
    ) -> None:
        """Build the policy from its networks."""
        super().__init__(getattr(vae, "observation_specs", None))
        if num_action_samples < 1 or chunk_size < 1:
            raise ValueError(
                f"num_action_samples is {num_action_samples} and chunk_size {chunk_size}; both must be at least 1."
            )
        if choose_by not in _CHOICES:
            raise ValueError(f"choose_by is {choose_by!r}, expected one of {[*_CHOICES]}.")
        check_networks(vae, actor, critics)
        self.choose_by = choose_by
        self.mixes_rows = has_batch_norm(vae, actor, critics)
        self.vae, self.actor, self.critics = vae, actor, critics
        self.largest_batch = max(1, chunk_size // num_action_samples)
        like = tensor_like(self, default=torch.empty(0))
        keep_freed_memory(like.device)
        self.latents = nn.Buffer(spread_normal(num_action_samples, vae.latent_dim, vae.latent_clip, seed, like))
        self.latent_shape, self.latent_clip = tuple(self.latents.shape), vae.latent_clip
        in_keys = dict.fromkeys([*vae.observation_keys, *(() if actor is None else actor.in_keys), *critics.in_keys])
        self.in_keys = [key for key in in_keys if key != vae.action_key]
        self.set_outputs(value=return_value, candidates=return_candidates)

    def set_outputs(self, *, value: bool, candidates: bool) -> None:
        """Choose what the policy writes beside the action, as ``return_value`` and ``return_candidates`` do."""
        self.return_value, self.return_candidates = value, candidates
        more = [*(["chosen_action_value"] if value else []), *(["candidates", "action_value"] if candidates else [])]
        self.out_keys = [self.vae.action_key, *more]

    @property
    def num_action_samples(self) -> int:
        """Number of candidates for each state."""
        return len(self.latents)

    @accepts_tensors
    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase, latents: Tensor | None = None) -> TensorDictBase:
        """Write the chosen action of each state, ``[*B, A]``. ``latents [*B, n, L]`` replace the policy's own ones."""
        like = tensor_like(self, default=self.latents)
        batch = rows_of(tensordict, self.in_keys)
        number = math.prod(batch)  # numel() would fix the batch size in an exported graph
        states = self._states(tensordict, len(batch), number, like.dtype)
        if latents is not None:
            latents = check_latents(latents, (*batch, *self.latent_shape))
            latents = latents.reshape(number, *self.latent_shape)
        size = self.largest_batch or number
        # a graph has no chunks, so that it accepts any number of states
        whole = torch.compiler.is_exporting() or torch.jit.is_tracing() or number <= size
        rows = [slice(None)] if whole else [slice(start, start + size) for start in range(0, number, size)]
        chosen = [
            self._choose(
                {key: value[part] for key, value in states.items()},
                None if latents is None else latents[part],
                like,
                tensordict.device,
            )
            for part in rows
        ]
        for key in self.out_keys:
            value = chosen[0][key] if len(chosen) == 1 else torch.cat([part[key] for part in chosen])
            if len(batch) != 1:
                value = value.reshape(*batch, *value.shape[1:])  # [N, ...] -> [*B, ...]
            tensordict.set(key, value)
        return tensordict

    def _states(
        self, tensordict: TensorDictBase, ndim: int, number: int, wanted: torch.dtype
    ) -> dict[NestedKey, Tensor]:
        """Check the observations' dtypes and flatten their batch dimensions. ``[*B, ...] -> [N, ...]``."""
        states = {}
        for key in self.in_keys:
            value = tensordict[key]
            check_dtype(key, value, wanted)
            states[key] = value if ndim == 1 else value.reshape(number, *value.shape[ndim:])
        return states

    def _choose(
        self, states: Mapping[NestedKey, Tensor], latents: Tensor | None, like: Tensor, device: Any
    ) -> dict[NestedKey, Tensor]:
        """Return the best candidate of each state and the other entries of ``out_keys``, each ``[N, ...]``."""
        number, n = next(iter(states.values())).shape[0], self.num_action_samples
        repeated = {key: value.unsqueeze(1).expand(number, n, *value.shape[1:]) for key, value in states.items()}
        candidates = TensorDict(repeated, (number, n), device=device)
        if latents is not None:
            latents = latents.to(like)
        elif is_random():
            latents = clipped_normal((number, *self.latents.shape), self.vae.latent_clip, like)
        else:
            latents = self.latents.to(like).expand(number, -1, -1)  # cast: users can change the networks' dtype
        if self.mixes_rows:
            candidates, latents = candidates.reshape(number * n), latents.flatten(0, 1)
        candidates = decode_action(self.vae, candidates, latents)
        if self.actor is not None:
            candidates = perturb_action(self.actor, candidates)
        actions = candidates.get(self.vae.action_key)  # [N, n, A]
        critics = self.critics.first if self.choose_by == "first" else self.critics
        value = critics(candidates).get(self.critics.out_keys[-1])  # [N, n, 1], or [N, n, C]
        if self.mixes_rows:
            actions, value = (each.reshape(number, n, each.shape[-1]) for each in (actions, value))
        if value.shape[:-1] != actions.shape[:-1] or (self.choose_by == "first" and value.shape[-1] != 1):
            one = "one value" if self.choose_by == "first" else "the values of the critics"
            found = f"the critics write values of shape {tuple(value.shape)}"
            raise ValueError(f"{found}, expected {one} for each of the candidates {tuple(actions.shape[:-1])}.")
        value = _CHOICES[self.choose_by](value)
        best = value.argmax(1, keepdim=True)  # [N, n, 1] -> [N, 1, 1]
        out = {self.vae.action_key: actions.gather(1, best.expand(-1, -1, actions.shape[-1])).squeeze(1)}
        if self.return_value:
            out["chosen_action_value"] = value.gather(1, best).squeeze(1)
        if self.return_candidates:
            out |= {"candidates": actions, "action_value": value.squeeze(-1)}
        return out


class BehaviorCloningPolicy(Policy):
    """Policy that samples one action from the behaviour model. The policy uses no actor and no critics.

    Under ``ExplorationType.DETERMINISTIC``, ``MODE`` or ``MEAN``, the latent is 0, the mean of its distribution. The
    action of this latent is not always a likely one; see ``ActionMixture`` and ``ActionFlow``.

    Args:
        vae: behaviour model that samples the action.

    Source: "VAE-BC" in the experiments of arXiv:1812.02900.
    """

    latent_shape: tuple[int, ...]

    def __init__(self, vae: GenerativeModel) -> None:
        """Build the policy from the behaviour model."""
        super().__init__(getattr(vae, "observation_specs", None))
        require("vae", vae, GenerativeModel)
        self.vae = vae
        self.in_keys = list(vae.observation_keys)
        self.out_keys = [vae.action_key]
        self.latent_shape = (vae.latent_dim,)
        self.latent_clip = vae.latent_clip

    @accepts_tensors
    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase, latents: Tensor | None = None) -> TensorDictBase:
        """Write an action for each state, ``[*B, A]``. ``latents [*B, L]`` replace the policy's own ones."""
        states = TensorDict({key: tensordict.get(key) for key in self.in_keys}, rows_of(tensordict, self.in_keys))
        shape = (*states.batch_size, *self.latent_shape)
        like = tensor_like(self, states.get(self.in_keys[0]))
        for key in self.in_keys:
            check_dtype(key, states.get(key), like.dtype)
        if latents is not None:
            latents = check_latents(latents, shape).to(like)
        elif is_random():
            latents = clipped_normal(shape, self.latent_clip, like)
        else:
            latents = like.new_zeros(shape)
        return tensordict.set(self.vae.action_key, decode_action(self.vae, states, latents).get(self.vae.action_key))
