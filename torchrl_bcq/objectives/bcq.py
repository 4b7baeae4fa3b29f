"""The three losses of BCQ as one TorchRL objective."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase, TensorDictParams, unravel_key
from tensordict.nn import TensorDictModuleBase, dispatch
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.envs.utils import ExplorationType
from torchrl.objectives.common import LossModule
from torchrl.objectives.utils import (
    ValueEstimators,
    default_value_kwargs,
    dispatch_value_estimator,
    distance_loss,
)
from torchrl.objectives.value import ValueEstimatorBase

from torchrl_bcq.functional import best_sample_value, clipped_normal
from torchrl_bcq.objectives.inputs import check_state_dict, check_time_dimension, select_inputs
from torchrl_bcq.objectives.weights import RunOn, find_slots, put
from torchrl_bcq.protocols import CriticEnsemble, GenerativeModel, check_action, check_networks


class BCQLoss(LossModule):
    """Batch-Constrained deep Q-learning: ``vae_loss``, ``qvalue_loss`` and ``actor_loss``.

    Each can be called alone and reaches the parameters of its own network only. ``forward`` evaluates all three at the
    present parameters; the paper steps them one after the other, as
    :class:`~torchrl_bcq.trainers.BCQOptimizationStepper` does. The modules handed in are the ones that are trained.

    Args:
        vae_network: the behaviour, any :class:`~torchrl_bcq.protocols.GenerativeModel`; the paper's is
            :class:`~torchrl_bcq.modules.ActionVAE`.
        actor_network: perturbs the action of a tensordict; see :class:`~torchrl_bcq.modules.PerturbationActor`.
            ``None`` takes sampled actions as they are; then there is no ``actor_loss``.
        qvalue_network: all critics in one module; see :class:`~torchrl_bcq.modules.QEnsemble`.
        lmbda: weight of the minimum over critics in the target, the maximum has ``1 - lmbda``.
        num_target_samples: actions sampled at each next state.
        delay_actor: whether the target has an actor of its own, moved by a target updater.
        delay_qvalue: whether the target has critics of its own.
        loss_function: of the TD error, ``"l2"`` (the paper's), ``"smooth_l1"`` (Huber's, with threshold 1) or ``"l1"``.
        reduction: ``"mean"`` (or None), ``"sum"`` or ``"none"`` over the batch.
        deactivate_vmap: TorchRL's switch, handed to the value estimator; nothing else here uses vmap.
        use_prioritized_weights: ``"auto"`` weighs each row by ``priority_weight`` where a batch holds it.

    Reads: observations, action ``[*B, A]``, and under ``"next"`` observations, reward, done and terminated
    ``[*B, 1]``; ``steps_to_next_obs [*B, 1]`` where TorchRL's multi-step transforms wrote it. The bootstrap ends at
    ``terminated``; a truncated episode goes on. Writes to its input ``td_error [*B]``, the largest over critics, as
    the priority. The discount belongs to the value estimator: ``loss.make_value_estimator(gamma=0.99)``.

    Returns: ``loss_vae``, ``loss_qvalue`` (summed over critics), ``loss_actor``, and detached, for each row: what the
    behaviour's training reports (``vae_reconstruction``, ``vae_kl``), ``td_error [*B, C]`` (absolute),
    ``pred_value [*B, C]``, ``target_value [*B]``.

    Raises:
        TypeError: at construction, if a network lacks a member that is needed of it.
        ValueError: at construction, if a setting is out of its range, or the networks disagree about the action's key.
        ValueError: if a batch lacks an entry, or its shapes or dtypes do not fit; nothing is broadcast.

    Source: arXiv:1812.02900, eq. 11 to 13, algorithm 1, appendix D.1.
    """

    @dataclass
    class _AcceptedKeys:
        """Entries of the tensordict. The modules decide the first two, ``set_keys`` can rename the others."""

        action: NestedKey = "action"
        state_action_value: NestedKey = "state_action_value"
        reward: NestedKey = "reward"
        done: NestedKey = "done"
        terminated: NestedKey = "terminated"
        steps_to_next_obs: NestedKey = "steps_to_next_obs"
        priority: NestedKey = "td_error"
        priority_weight: NestedKey = "priority_weight"

    tensor_keys: _AcceptedKeys
    default_keys = _AcceptedKeys
    default_value_estimator = ValueEstimators.TD0
    deterministic_sampling_mode = ExplorationType.RANDOM  # TorchRL's default would make all candidates alike

    target_dtype: torch.dtype | None = None  # of autocast in the target, which has no gradient
    target_chunk_size = 2_560  # next actions that are evaluated together on a CPU
    target_tensors: tuple[list[Tensor], list[Tensor]]  # weights of the targets, and what they follow

    vae_network: GenerativeModel
    vae_network_params: TensorDictParams
    target_vae_network_params: TensorDictParams
    actor_network: TensorDictModuleBase | None
    actor_network_params: TensorDictParams
    target_actor_network_params: TensorDictParams
    qvalue_network: TensorDictModuleBase
    qvalue_network_params: TensorDictParams
    target_qvalue_network_params: TensorDictParams

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
        super().__init__()
        if not 0 <= lmbda <= 1:
            raise ValueError(f"lmbda is {lmbda}, expected a weight between 0 and 1.")
        if num_target_samples < 1:
            raise ValueError(f"num_target_samples is {num_target_samples}, expected at least 1.")
        if loss_function not in ("l2", "smooth_l1", "l1"):
            raise ValueError(f"loss_function is {loss_function!r}, expected 'l2', 'smooth_l1' or 'l1'.")
        if reduction not in ("mean", "sum", "none", None):
            raise ValueError(f"reduction is {reduction!r}, expected 'mean', 'sum' or 'none'.")
        if use_prioritized_weights not in (True, False, "auto"):
            raise ValueError(f"use_prioritized_weights is {use_prioritized_weights!r}, expected True, False or 'auto'.")
        check_networks(vae_network, actor_network, qvalue_network, ("vae_network", "actor_network", "qvalue_network"))
        self.convert_to_functional(vae_network, "vae_network")
        if actor_network is None:
            self.actor_network = None
        else:
            self.convert_to_functional(actor_network, "actor_network", create_target_params=delay_actor)
        self.convert_to_functional(qvalue_network, "qvalue_network", create_target_params=delay_qvalue)
        self.lmbda = lmbda
        self.num_target_samples = num_target_samples
        self.delay_actor = delay_actor and actor_network is not None
        self.delay_qvalue = delay_qvalue
        self.loss_function = loss_function
        self.reduction = reduction or "mean"
        self.deactivate_vmap = deactivate_vmap
        self.use_prioritized_weights = use_prioritized_weights
        losses = [f"loss_{name}" for name in self.network_names]
        self.out_keys = [*losses, *vae_network.loss_keys, "td_error", "pred_value", "target_value"]
        self._in_keys: list[NestedKey] | None = None
        self._bind()
        self.tensor_keys.action = vae_network.action_key
        self.tensor_keys.state_action_value = qvalue_network.out_keys[-1]
        self.make_value_estimator()

    @property
    def network_names(self) -> tuple[str, ...]:
        """The networks that are trained, in the paper's order: each has a ``{name}_loss`` and its parameters."""
        return ("vae", "qvalue") if self.actor_network is None else ("vae", "qvalue", "actor")

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """All losses, whose sum can be differentiated, and their metadata, at the present parameters."""
        out: dict[str, Tensor] = {}
        for name in self.network_names:
            loss, metadata = getattr(self, f"{name}_loss")(tensordict)
            out.update({f"loss_{name}": loss, **metadata})
        return TensorDict(out)

    def vae_loss(self, tensordict: TensorDictBase, noise: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """What the behaviour is trained by, for a VAE the negative ELBO. ``noise [*B, L]`` is drawn if not given."""
        batch = self._select(tensordict, self._state_action_keys)
        loss, metadata = self.vae_network.training_loss(batch, noise=noise)
        if loss.shape != batch.batch_size or set(metadata) != set(self.vae_network.loss_keys):
            raise ValueError(
                f"training_loss gave shape {tuple(loss.shape)} and {[*metadata]}, expected one loss for each row, "
                f"{tuple(batch.batch_size)}, and loss_keys, {[*self.vae_network.loss_keys]}."
            )
        return self._weigh(loss, tensordict), metadata

    def qvalue_loss(self, tensordict: TensorDictBase, latent: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared TD error, summed over critics. ``latent [*B, n, L]`` of the next actions is drawn if not given."""
        steps = self.tensor_keys.steps_to_next_obs
        batch = self._select(tensordict, [*self.in_keys, *([steps] if steps in tensordict.keys(True) else [])])
        pred_value = self._value(self.qvalue_network(batch.copy()))  # [*B, C]
        target_value = self._target_value(batch, latent)  # [*B, 1]
        td_error = pred_value - target_value
        if self.loss_function == "l2":
            distance = td_error.square()
        else:
            distance = distance_loss(td_error, torch.zeros_like(td_error), self.loss_function)
        loss = self._weigh(distance.sum(-1), tensordict)
        td_error = td_error.detach().abs()
        tensordict.set(self.tensor_keys.priority, td_error.amax(-1))
        metadata = {"td_error": td_error, "pred_value": pred_value.detach(), "target_value": target_value.squeeze(-1)}
        return loss, metadata

    def actor_loss(self, tensordict: TensorDictBase, latent: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """``-Q_1`` of a perturbed sample. ``latent [*B, L]`` of the sampled action is drawn if not given."""
        if self.actor_network is None:
            raise ValueError("this loss was made without an actor_network; there is no actor_loss.")
        batch = self._select(tensordict, self._state_action_keys)
        with torch.no_grad():
            sampled = self._sample(batch.select(*self._observation_keys), latent)
        perturbed = self.actor_network(sampled)
        with RunOn(self._critics, detached=True):  # only the actor learns
            value = self._value(self.qvalue_network.first(perturbed))  # [*B, 1]
        return self._weigh(-value.squeeze(-1), tensordict), {}

    @torch.no_grad()
    def _target_value(self, batch: TensorDictBase, latent: Tensor | None) -> Tensor:
        """Eq. 13 at the next states, with the target actor and critics: ``[*B, 1]``."""
        if self.value_type is not ValueEstimators.TD0:
            check_time_dimension(batch)
        states = batch.get("next").select(*self._observation_keys)
        candidates = states.unsqueeze(-1).expand(*states.batch_size, self.num_target_samples)  # [*B] -> [*B, n]
        latent = self._draw_latent(candidates) if latent is None else latent
        with self._target_autocast(), self._on_target("actor"), self._on_target("qvalue"):
            values = [self._best_value(*part) for part in self._split(candidates, latent)]
        next_value = values[0] if len(values) == 1 else torch.cat(values, batch.ndim - 1)
        batch = batch.copy().set(("next", self.tensor_keys.state_action_value), next_value)
        return self.value_estimator.value_estimate(batch)

    def _best_value(self, candidates: TensorDictBase, latent: Tensor) -> Tensor:
        """Of the candidates of each state, with the networks as they are. ``[*B, n] -> [*B, 1]``."""
        candidates = self._sample(candidates, latent)
        if self.actor_network is not None:
            candidates = self.actor_network(candidates)
        return best_sample_value(self._value(self.qvalue_network(candidates)), self.lmbda)  # [*B, n, C]

    def _split(self, candidates: TensorDictBase, latent: Tensor) -> list[tuple[TensorDictBase, Tensor]]:
        """Parts of the last batch dimension that a CPU's caches hold; another device takes all at once."""
        parts = -(-candidates.numel() // self.target_chunk_size)
        if latent.device.type != "cpu" or parts == 1 or candidates.ndim == 1:
            return [(candidates, latent)]
        dim = candidates.ndim - 2
        size = -(-candidates.shape[dim] // parts)
        return list(zip(candidates.split(size, dim), latent.split(size, dim), strict=True))

    def _on_target(self, name: str) -> AbstractContextManager:
        if name not in self._targets:
            return nullcontext()
        getattr(self, f"target_{name}_network_params")  # where TorchRL warns of targets that nobody updates
        return RunOn(self._targets[name])

    def _target_autocast(self) -> AbstractContextManager:
        if self.target_dtype is None:
            return nullcontext()  # leaves an autocast around the loss as it is
        return torch.autocast(self._first_parameter.device.type, self.target_dtype)

    def _sample(self, states: TensorDictBase, latent: Tensor | None) -> TensorDictBase:
        """Write an action of the behaviour for each state."""
        latent = self._draw_latent(states) if latent is None else latent
        return check_action(self.vae_network.decode(states, latent), self.tensor_keys.action)

    def _draw_latent(self, states: TensorDictBase) -> Tensor:
        shape = (*states.batch_size, self.vae_network.latent_dim)
        return clipped_normal(shape, self.vae_network.latent_clip, like=self._first_parameter)

    def _value(self, written: TensorDictBase) -> Tensor:
        """What the critics wrote, in the dtype of the loss; that of the networks is autocast's."""
        return written.get(self.tensor_keys.state_action_value).to(self._first_parameter.dtype)

    def _weigh(self, loss: Tensor, tensordict: TensorDictBase) -> Tensor:
        """Importance weights, mask and reduction as TorchRL does them. ``[*B] -> []``, or ``[*B]`` for ``"none"``."""
        weights = self._maybe_get_priority_weight(tensordict)
        if weights is not None and weights.shape != loss.shape:
            key, shape = self.tensor_keys.priority_weight, tuple(weights.shape)
            raise ValueError(f"{key} has shape {shape}, expected {tuple(loss.shape)}, one weight for each row.")
        return self._reduce_loss(loss, tensordict=tensordict, weights=weights)

    def _select(self, tensordict: TensorDictBase, keys: list[NestedKey]) -> TensorDictBase:
        reward, *flags = (unravel_key(("next", getattr(self.tensor_keys, k))) for k in ("reward", "done", "terminated"))
        return select_inputs(
            tensordict,
            keys,
            action_key=self.tensor_keys.action,
            reward_key=reward,
            flag_keys=flags,
            dtype=self._first_parameter.dtype,
        )

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load as any module does; entries of the networks that differ are an error, too, which tensordict skips."""
        check_state_dict(self.state_dict(), state_dict, strict=strict)
        result = super().load_state_dict(state_dict, strict=strict, assign=assign)
        self._bind()
        return result

    def _apply(self, fn, recurse: bool = True):
        """Move or cast, the modules handed in too."""
        super()._apply(fn)
        self._bind()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a copy's state."""
        super().__setstate__(state)
        self._bind()

    def _bind(self) -> None:
        """Have the modules handed in hold this loss's very parameters, which were copied, moved, cast or replaced."""
        for name in self.network_names:
            put(getattr(self, f"{name}_network_params"), getattr(self, f"{name}_network"))
        self._like = (next(self.parameters()),)  # in a tuple, else it would be one more parameter of this module
        self._critics = find_slots(self.qvalue_network_params, self.qvalue_network)
        delayed = [name for name in ("actor", "qvalue") if getattr(self, f"delay_{name}")]
        targets = {name: self._modules[f"target_{name}_network_params"] for name in delayed}
        self._targets = {name: find_slots(params, getattr(self, f"{name}_network")) for name, params in targets.items()}
        pairs = [
            (target, getattr(self, f"{name}_network_params").get(key))
            for name, params in targets.items()
            for key, target in params.items(True, True)
        ]
        self.target_tensors = [target for target, _ in pairs], [source for _, source in pairs]

    @property
    def _first_parameter(self) -> Tensor:
        return self._like[0]

    @property
    def _state_action_keys(self) -> list[NestedKey]:
        return [*self._observation_keys, self.tensor_keys.action]

    @property
    def _observation_keys(self) -> list[NestedKey]:
        actor_keys = [] if self.actor_network is None else self.actor_network.in_keys
        keys = dict.fromkeys([*self.vae_network.observation_keys, *actor_keys, *self.qvalue_network.in_keys])
        return [key for key in keys if key != self.tensor_keys.action]

    @property
    def in_keys(self) -> list[NestedKey]:
        """Entries that ``forward`` reads, in the order in which a keyword-less call would take them."""
        if self._in_keys is None:
            outcome = (self.tensor_keys.reward, self.tensor_keys.done, self.tensor_keys.terminated)
            following = [unravel_key(("next", key)) for key in (*self._observation_keys, *outcome)]
            self._in_keys = [*self._state_action_keys, *following]
        return self._in_keys

    @in_keys.setter
    def in_keys(self, values: list[NestedKey]) -> None:
        self._in_keys = values

    def _make_vmap(self) -> None:
        """TorchRL rebuilds vmapped calls when ``set_vmap_randomness`` is called; there are none."""

    def _forward_value_estimator_keys(self, **kwargs) -> None:
        self._in_keys = None
        decided = {"action": self.vae_network.action_key, "state_action_value": self.qvalue_network.out_keys[-1]}
        for name, key in decided.items():
            if (asked := getattr(self.tensor_keys, name)) != key:
                setattr(self.tensor_keys, name, key)
                raise ValueError(
                    f"the modules handed in write the {name} to {key!r}; rename it there, not to {asked!r} here."
                )
        if self._value_estimator is not None:
            self._value_estimator.set_keys(**self._value_estimator_keys)

    @property
    def _value_estimator_keys(self) -> dict[str, NestedKey]:
        shared = ("reward", "done", "terminated", "steps_to_next_obs")
        return {"value": self.tensor_keys.state_action_value, **{k: getattr(self.tensor_keys, k) for k in shared}}

    def make_value_estimator(self, value_type: ValueEstimators | None = None, **hyperparams) -> BCQLoss:
        """Choose the estimator of the target and its settings, such as ``gamma``.

        ``ValueEstimators.TD0`` with 0.99 is the paper's. ``TD1`` and ``TDLambda`` read whole slices of trajectories,
        ``[B, T]``; they follow the dataset's actions for several steps, uncorrected.
        """
        value_type = self.default_value_estimator if value_type is None else value_type
        if isinstance(value_type, (ValueEstimatorBase, type)):
            raise NotImplementedError(f"choose the estimator by its name, ValueEstimators.TD0; got {value_type}.")
        like = self._first_parameter
        defaults = {**default_value_kwargs(value_type), "device": like.device, "deactivate_vmap": self.deactivate_vmap}
        hyperparams = {**defaults, **hyperparams}
        dispatch_value_estimator(
            self,
            value_type,
            supported=(ValueEstimators.TD0, ValueEstimators.TD1, ValueEstimators.TDLambda),
            tensor_keys=self._value_estimator_keys,
            value_network=None,
            **hyperparams,
        )
        for name in {"gamma", "lmbda"} & hyperparams.keys():  # TorchRL rounds them to float32
            setattr(
                self._value_estimator, name, torch.as_tensor(hyperparams[name], dtype=like.dtype, device=like.device)
            )
        return self
