"""How BCQ acts: sample actions that the dataset would hold, adjust them a little, take the best."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase

from torchrl_bcq.modules.perturbation import PerturbationActor
from torchrl_bcq.modules.q_ensemble import QEnsemble
from torchrl_bcq.modules.vae import ActionVAE


class BCQPolicy(TensorDictModuleBase):
    """``argmax_a Q_1(s, a)`` over perturbed samples of the behaviour, for any batch of states at once.

    It holds the modules that it is given, not copies: while a loss trains them it acts with what was just learned.

    Args:
        vae: samples the candidates.
        actor: perturbs them.
        critics: the first critic chooses.
        num_action_samples: candidates for each state.

    Reads: the observations. Writes: the action, ``[*B, A]``.

    Raises:
        ValueError: if ``num_action_samples`` is below 1.

    Source: arXiv:1812.02900, eq. 12 and algorithm 1.
    """

    def __init__(
        self, vae: ActionVAE, actor: PerturbationActor, critics: QEnsemble, *, num_action_samples: int = 100
    ) -> None:
        super().__init__()
        if num_action_samples < 1:
            raise ValueError(f"num_action_samples is {num_action_samples}; the policy needs at least one candidate.")
        self.vae = vae
        self.actor = actor
        self.critics = critics
        self.num_action_samples = num_action_samples
        in_keys = dict.fromkeys([*vae.observation_keys, *actor.in_keys, *critics.in_keys])
        self.in_keys = [key for key in in_keys if key != vae.action_key]
        self.out_keys = [vae.action_key]

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the chosen action of each state, ``[*B, A]``."""
        states = tensordict.select(*self.in_keys)
        candidates = states.unsqueeze(-1).expand(*states.batch_size, self.num_action_samples)  # [*B] -> [*B, n]
        candidates = self.actor(self.vae.decode(candidates))
        actions = candidates.get(self.out_keys[0])  # [*B, n, A]
        value = self.critics.first(candidates).get(self.critics.out_keys[0])  # [*B, n, 1]
        best = value.argmax(-2, keepdim=True)  # [*B, n, 1] -> [*B, 1, 1]
        return tensordict.set(self.out_keys[0], actions.take_along_dim(best, -2).squeeze(-2))


class BehaviorCloningPolicy(TensorDictModuleBase):
    """One sample of the behaviour, ``D(s, z)``: the VAE's decoder alone, as a baseline.

    Args:
        vae: samples the action.

    Reads: the observations. Writes: the action, ``[*B, A]``.

    Source: "VAE-BC" in the experiments of arXiv:1812.02900.
    """

    def __init__(self, vae: ActionVAE) -> None:
        super().__init__()
        self.vae = vae
        self.in_keys = list(vae.observation_keys)
        self.out_keys = [vae.action_key]

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write a sampled action for each state, ``[*B, A]``."""
        return self.vae.decode(tensordict)
