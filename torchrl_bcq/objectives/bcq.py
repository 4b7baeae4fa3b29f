"""The three losses of BCQ as one TorchRL objective."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.envs.utils import ExplorationType

from torchrl_bcq.functional import best_sample_value, clipped_normal
from torchrl_bcq.objectives.candidates import evaluate_in_parts
from torchrl_bcq.objectives.values import ValueLoss
from torchrl_bcq.protocols import (
    CriticEnsemble,
    GenerativeModel,
    check_networks,
    decode_action,
    perturb_action,
)


class BCQLoss(ValueLoss):
    """Losses of Batch-Constrained deep Q-learning: ``vae_loss``, ``qvalue_loss`` and ``actor_loss``.

    Each loss can be called alone and has gradients for its own network only. ``forward`` computes all three with the
    current parameters. The paper updates one network after the other, as ``OfflineOptimizationStepper`` does.

    Args:
        vae_network: model of the behaviour policy: ``ActionVAE`` as in the paper, or any ``GenerativeModel``. If the
            model is frozen or has no parameters, only the actor and the critics learn.
        actor_network: network that perturbs an action, such as ``PerturbationActor``. With None, sampled actions are
            not perturbed and there is no ``actor_loss``.
        qvalue_network: all critics in one module, such as ``QEnsemble``.
        lmbda: weight of the minimum over critics in the target; the weight of the maximum is ``1 - lmbda``.
        num_target_samples: number of actions sampled at each next state.
        delay_actor, delay_qvalue: ``delay_actor`` adds a target actor, ``delay_qvalue`` adds target critics. A target
            updater changes the weights of the target networks.
        loss_function: loss of the TD error: ``"l2"`` (paper), ``"smooth_l1"`` (Huber, threshold 1) or ``"l1"``.
        reduction: reduction of each loss over the batch: ``"mean"`` (or None), ``"sum"`` or ``"none"``.
        use_prioritized_weights: ``"auto"`` or True weights the rows by ``priority_weight`` if the batch has it.

    Reads: observations and the action ``[*B, A]``. Under ``"next"``, the loss reads the observations, and ``reward``,
    ``done`` and ``terminated`` of shape ``[*B, 1]``. If the batch has ``steps_to_next_obs [*B, 1]``, the loss also
    reads this entry (see ``ValueLoss``). The target does not bootstrap if ``terminated`` is True. Writes the largest
    absolute TD error over critics to the input tensordict, as the priority ``td_error [*B]``. Set the discount factor
    with ``loss.make_value_estimator(gamma=0.99)``.

    Returns: ``loss_vae``, ``loss_qvalue`` (summed over critics) and ``loss_actor``. The result also has detached
    metadata of each row: the absolute ``td_error [*B, C]``, ``pred_value [*B, C]``, ``target_value [*B]``, and the
    metadata of ``vae_network``, such as ``vae_reconstruction`` and ``vae_kl`` of ``ActionVAE``.

    Raises:
        TypeError: at construction, if a network lacks a member of its protocol.
        ValueError: if a setting is out of range, the networks use different action keys, or a network is recurrent. A
            call of a loss also raises this error if the batch lacks an entry or an entry has a wrong shape or dtype.

    Example:
        >>> from torchrl.envs import GymEnv
        >>> from torchrl.objectives import SoftUpdate
        >>> from torchrl_bcq import BCQLoss, make_bcq_modules
        >>> env = GymEnv("Pendulum-v1")
        >>> loss = BCQLoss(*make_bcq_modules(env.observation_spec, env.action_spec))
        >>> updater = SoftUpdate(loss, tau=0.005)
        >>> loss_qvalue, metadata = loss.qvalue_loss(env.rollout(100))
        >>> metadata["td_error"].shape
        torch.Size([100, 2])

    Source: arXiv:1812.02900, eq. 11 to 13, algorithm 1, appendix D.1.
    """

    deterministic_sampling_mode = ExplorationType.RANDOM  # a behaviour model may sample with TorchRL's modules
    target_chunk_size = 2_560  # number of candidate actions that a CPU evaluates at a time

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
        use_prioritized_weights: str | bool = "auto",
    ) -> None:
        """Build the loss from its networks."""
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
            use_prioritized_weights=use_prioritized_weights,
        )
        self.delay_actor = delay_actor and actor_network is not None
        self.delay_qvalue = delay_qvalue
        self.lmbda = lmbda
        self.num_target_samples = num_target_samples

    def vae_loss(self, tensordict: TensorDictBase, noise: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the behaviour model's loss and metadata. If ``noise`` is None, the model draws what it needs."""
        batch = self.select(tensordict)
        recorded = batch.get(self.tensor_keys.action)
        loss, metadata = self.vae_network.training_loss(batch, noise=noise)
        if batch.get(self.tensor_keys.action) is not recorded:
            raise ValueError("training_loss replaced the recorded actions; let it decode into a copy of the batch.")
        if loss.shape != batch.batch_size or set(metadata) != set(self.vae_network.loss_keys):
            raise ValueError(
                f"training_loss gave a loss of shape {tuple(loss.shape)} and metadata {[*metadata]}; it must return "
                f"one loss per row, {tuple(batch.batch_size)}, and the metadata {[*self.vae_network.loss_keys]}."
            )
        return self.reduce(loss, tensordict), metadata

    def qvalue_loss(self, tensordict: TensorDictBase, latent: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the TD loss and metadata. If ``latent [*B, n, L]`` is None, draw it for the next actions."""
        batch = self.select_transitions(tensordict)
        pred_value = self._critics(batch.copy())  # [*B, C]
        return self.td_distance(pred_value, self._target_value(batch, latent), tensordict)

    def actor_loss(self, tensordict: TensorDictBase, latent: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss ``-Q_1`` of perturbed actions. If their ``latent [*B, L]`` is None, draw it."""
        if self.actor_network is None:
            raise ValueError("there is no actor_loss, because actor_network is None; pass a network to BCQLoss.")
        batch = self.select(tensordict)
        with torch.no_grad():
            sampled = self._sample(batch.select(*self._observation_keys), latent)
        perturbed = perturb_action(self.actor_network, sampled)
        with self.detached("qvalue"):
            value = self._first_critic(perturbed)
        return self.reduce(-value, tensordict), {}

    def value(self, tensordict: TensorDictBase) -> Tensor:
        """Return the first critic's values of state-action pairs, ``[*B]``."""
        return self._first_critic(tensordict.select(*self.qvalue_network.in_keys))

    @torch.no_grad()
    def _target_value(self, batch: TensorDictBase, latent: Tensor | None) -> Tensor:
        """Compute the TD target (eq. 13) with the target actor and target critics. ``[*B] -> [*B, 1]``."""
        states = batch.get("next").select(*self._observation_keys)
        candidates = states.unsqueeze(-1).expand(*states.batch_size, self.num_target_samples)  # [*B] -> [*B, n]
        latent = self._draw_latent(candidates) if latent is None else latent
        size = candidates.numel() if self.mixes_rows else self.target_chunk_size  # BatchNorm needs all rows at once
        with self.target_autocast():
            next_value = evaluate_in_parts(self._best_value, candidates, latent, size)
        return self.td_target(batch, next_value)

    def _best_value(self, candidates: TensorDictBase, latent: Tensor) -> Tensor:
        """Sample and perturb ``n`` actions for each state. Return the best value of each state, ``[*B, 1]``."""
        shape = candidates.batch_size
        if self.mixes_rows:
            candidates, latent = candidates.reshape(shape.numel()), latent.flatten(0, -2)  # [*B, n] -> [N]
        candidates = self._sample(candidates, latent)
        if self.actor_network is not None:
            with self.target_networks("actor"):
                candidates = perturb_action(self.actor_network, candidates)
        with self.target_networks("qvalue"):
            values = self._critics(candidates)
        return best_sample_value(values.reshape(*shape, values.shape[-1]), self.lmbda)  # [*B, n, C] -> [*B, 1]

    def _sample(self, states: TensorDictBase, latent: Tensor | None) -> TensorDictBase:
        """Sample an action for each state from the behaviour model."""
        latent = self._draw_latent(states) if latent is None else latent
        return decode_action(self.vae_network, states, latent)

    def _draw_latent(self, states: TensorDictBase) -> Tensor:
        shape = (*states.batch_size, self.vae_network.latent_dim)
        return clipped_normal(shape, self.vae_network.latent_clip, like=self._like)

    def _critics(self, state_actions: TensorDictBase) -> Tensor:
        """Return the values ``[*B, C]`` of all critics in the dtype of the loss, also under autocast."""
        return self._read_values(self.qvalue_network(state_actions))

    def _first_critic(self, state_actions: TensorDictBase) -> Tensor:
        values = self._read_values(self.qvalue_network.first(state_actions))
        if values.shape[-1] != 1:
            raise ValueError(f"qvalue_network.first writes {values.shape[-1]} values for each row, expected one.")
        return values.squeeze(-1)

    def _read_values(self, written: TensorDictBase) -> Tensor:
        key = self.tensor_keys.state_action_value
        values = written.get(key)
        if values.shape[:-1] != written.batch_size:
            raise ValueError(
                f"the critics write {key!r} of shape {tuple(values.shape)}, expected {(*written.batch_size, 'C')}: one "
                "value for each row and critic."
            )
        return values.to(self._like.dtype)
