"""The three losses of BCQ as one TorchRL objective."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from torchrl_bcq.functional import best_sample_value, clipped_normal
from torchrl_bcq.objectives.candidates import evaluate_in_parts
from torchrl_bcq.objectives.values import ValueLoss
from torchrl_bcq.protocols import CriticEnsemble, GenerativeModel, check_action, check_networks


class BCQLoss(ValueLoss):
    """Batch-Constrained deep Q-learning: ``vae_loss``, ``qvalue_loss`` and ``actor_loss``.

    Each can be called alone and has gradients for its own network only. ``forward`` evaluates all three at the present
    parameters; the paper steps them one after the other, as :class:`~torchrl_bcq.BCQOptimizationStepper` does.

    Args:
        vae_network: model of the behaviour, any :class:`~torchrl_bcq.GenerativeModel`; the paper's is
            :class:`~torchrl_bcq.ActionVAE`. Actor and critics learn too if it is frozen or has no parameters.
        actor_network: perturbs the action of a tensordict; see :class:`~torchrl_bcq.PerturbationActor`. None leaves
            sampled actions as they are; then there is no ``actor_loss``.
        qvalue_network: all critics in one module; see :class:`~torchrl_bcq.QEnsemble`.
        lmbda: weight of the minimum over critics in the target; the maximum has ``1 - lmbda``.
        num_target_samples: actions sampled at each next state.
        delay_actor: whether the target uses an actor of its own, moved by a target updater.
        delay_qvalue: whether the target uses critics of its own.
        loss_function: of the TD error: ``"l2"`` (the paper's), ``"smooth_l1"`` (Huber's, with threshold 1) or ``"l1"``.
        reduction: ``"mean"`` (or None), ``"sum"`` or ``"none"`` over the batch.
        deactivate_vmap: TorchRL's switch for the value estimator; nothing else here uses vmap.
        use_prioritized_weights: ``"auto"`` weighs each row by ``priority_weight`` if a batch holds it.

    Reads: observations, action ``[*B, A]``, and under ``"next"`` observations, reward, done and terminated
    ``[*B, 1]``; ``steps_to_next_obs [*B, 1]`` of TorchRL's multi-step transforms. The bootstrap ends at
    ``terminated``; a truncated episode goes on. Writes ``td_error [*B]`` to its input, the largest over critics, as
    the priority. The discount belongs to the value estimator: ``loss.make_value_estimator(gamma=0.99)``.

    Returns: ``loss_vae``, ``loss_qvalue`` (summed over critics), ``loss_actor``, and detached, for each row: the
    metadata of the behaviour model (``vae_reconstruction``, ``vae_kl``), ``td_error [*B, C]`` (absolute),
    ``pred_value [*B, C]``, ``target_value [*B]``.

    Raises:
        TypeError: at construction, if a network lacks a member of its protocol.
        ValueError: at construction, if a setting is out of range, or the networks disagree about the action's key;
            later, if a batch lacks an entry, or its shapes or dtypes do not fit.

    >>> from torchrl.data import Bounded, Unbounded
    >>> from torchrl_bcq import BCQLoss, make_bcq_modules
    >>> loss = BCQLoss(*make_bcq_modules(Unbounded((3,)), Bounded(-1, 1, (2,))))
    >>> loss.network_names
    ('vae', 'qvalue', 'actor')

    Source: arXiv:1812.02900, eq. 11 to 13, algorithm 1, appendix D.1.
    """

    target_chunk_size = 2_560  # next actions evaluated together on a CPU

    def __init__(
        self,
        vae_network: GenerativeModel,
        actor_network: TensorDictModuleBase | None,
        qvalue_network: CriticEnsemble,
        *,
        lmbda: float = 0.75,
        num_target_samples: int = 10,
        delay_actor: bool = True,
        delay_qvalue: bool = True,
        loss_function: str = "l2",
        reduction: str | None = "mean",
        deactivate_vmap: bool = False,
        use_prioritized_weights: str | bool = "auto",
    ) -> None:
        if not 0 <= lmbda <= 1:
            raise ValueError(f"lmbda is {lmbda}, expected a weight between 0 and 1.")
        if num_target_samples < 1:
            raise ValueError(f"num_target_samples is {num_target_samples}, expected at least 1.")
        check_networks(vae_network, actor_network, qvalue_network, ("vae_network", "actor_network", "qvalue_network"))
        super().__init__(
            {"vae": vae_network, "qvalue": qvalue_network, "actor": actor_network},
            delayed=[*(["qvalue"] if delay_qvalue else []), *(["actor"] if delay_actor else [])],
            metadata={"vae": vae_network.loss_keys, "qvalue": ("td_error", "pred_value", "target_value")},
            action_key=vae_network.action_key,
            value_key=qvalue_network.out_keys[-1],
            loss_function=loss_function,
            reduction=reduction,
            deactivate_vmap=deactivate_vmap,
            use_prioritized_weights=use_prioritized_weights,
        )
        self.delay_actor = delay_actor and actor_network is not None
        self.delay_qvalue = delay_qvalue
        self.lmbda = lmbda
        self.num_target_samples = num_target_samples

    def vae_loss(self, tensordict: TensorDictBase, noise: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The behaviour model's training loss, for a VAE the negative ELBO. ``noise [*B, L]`` is drawn if not given."""
        batch = self.select(tensordict)
        loss, metadata = self.vae_network.training_loss(batch, noise=noise)
        if loss.shape != batch.batch_size or set(metadata) != set(self.vae_network.loss_keys):
            raise ValueError(
                f"training_loss gave shape {tuple(loss.shape)} and {[*metadata]}, expected one loss for each row, "
                f"{tuple(batch.batch_size)}, and loss_keys, {[*self.vae_network.loss_keys]}."
            )
        return self.reduce(loss, tensordict), metadata

    def qvalue_loss(self, tensordict: TensorDictBase, latent: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Distance of all critics from the target. ``latent [*B, n, L]`` of the next actions is drawn if not given."""
        batch = self.select_transitions(tensordict)
        pred_value = self._critics(batch.copy())  # [*B, C]
        return self.td_distance(pred_value, self._target_value(batch, latent), tensordict)

    def actor_loss(self, tensordict: TensorDictBase, latent: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """``-Q_1`` of a perturbed sample. ``latent [*B, L]`` of the sampled action is drawn if not given."""
        if self.actor_network is None:
            raise ValueError("this loss was made without an actor_network; there is no actor_loss.")
        batch = self.select(tensordict)
        with torch.no_grad():
            sampled = self._sample(batch.select(*self._observation_keys), latent)
        perturbed = self.actor_network(sampled)
        with self.detached("qvalue"):
            value = self._first_critic(perturbed)
        return self.reduce(-value, tensordict), {}

    def value(self, tensordict: TensorDictBase) -> Tensor:
        """The first critic's value of state-action pairs: ``[*B]``."""
        return self._first_critic(tensordict.select(*self.qvalue_network.in_keys))

    @torch.no_grad()
    def _target_value(self, batch: TensorDictBase, latent: Tensor | None) -> Tensor:
        """Eq. 13 at the next states, with the target actor and critics: ``[*B, 1]``."""
        states = batch.get("next").select(*self._observation_keys)
        candidates = states.unsqueeze(-1).expand(*states.batch_size, self.num_target_samples)  # [*B] -> [*B, n]
        latent = self._draw_latent(candidates) if latent is None else latent
        size = candidates.numel() if self.mixes_rows else self.target_chunk_size  # batch statistics need all rows
        with self.target_autocast(), self.target_networks():
            next_value = evaluate_in_parts(self._best_value, candidates, latent, size)
        return self.td_target(batch, next_value)

    def _best_value(self, candidates: TensorDictBase, latent: Tensor) -> Tensor:
        """Value of the best candidate of each state. ``[*B, n] -> [*B, 1]``."""
        candidates = self._sample(candidates, latent)
        if self.actor_network is not None:
            candidates = self.actor_network(candidates)
        return best_sample_value(self._critics(candidates), self.lmbda)  # [*B, n, C]

    def _sample(self, states: TensorDictBase, latent: Tensor | None) -> TensorDictBase:
        """Write an action of the behaviour model for each state."""
        latent = self._draw_latent(states) if latent is None else latent
        return check_action(self.vae_network.decode(states, latent), self.tensor_keys.action)

    def _draw_latent(self, states: TensorDictBase) -> Tensor:
        shape = (*states.batch_size, self.vae_network.latent_dim)
        return clipped_normal(shape, self.vae_network.latent_clip, like=self._like)

    def _critics(self, state_actions: TensorDictBase) -> Tensor:
        """Values of all critics ``[*B, C]``, in the dtype of the loss: under autocast the networks' differs."""
        return self.qvalue_network(state_actions).get(self.tensor_keys.state_action_value).to(self._like.dtype)

    def _first_critic(self, state_actions: TensorDictBase) -> Tensor:
        written = self.qvalue_network.first(state_actions)  # [*B, 1]
        return written.get(self.tensor_keys.state_action_value).to(self._like.dtype).squeeze(-1)
