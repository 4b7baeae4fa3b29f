"""The three losses of BCQ as one TorchRL objective."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tensordict import TensorDict, TensorDictBase, TensorDictParams, unravel_key
from tensordict.nn import TensorDictModuleBase, dispatch
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.objectives.common import LossModule
from torchrl.objectives.utils import ValueEstimators, default_value_kwargs, dispatch_value_estimator
from torchrl.objectives.value import ValueEstimatorBase

from torchrl_bcq.functional import best_sample_value, gaussian_kl


class BCQLoss(LossModule):
    """Batch-Constrained deep Q-learning: ``vae_loss``, ``qvalue_loss`` and ``actor_loss``.

    Each can be called alone and reaches the parameters of its own network only. ``forward`` evaluates all three at the
    present parameters; the paper steps them one after the other, as
    :class:`~torchrl_bcq.trainers.BCQOptimizationStepper` does. The modules handed in are the ones that are trained.

    Args:
        vae_network: reconstructs actions when called and samples them in ``decode(tensordict, latent)``; see
            :class:`~torchrl_bcq.modules.ActionVAE`.
        actor_network: perturbs the action of a tensordict; see :class:`~torchrl_bcq.modules.PerturbationActor`.
        qvalue_network: all critics in one module; see :class:`~torchrl_bcq.modules.QEnsemble`.
        lmbda: weight of the minimum over critics in the target, the maximum has ``1 - lmbda``.
        num_target_samples: actions sampled at each next state.
        kl_weight: weight of the latent's KL divergence beside the reconstruction error.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` over the batch.
        use_prioritized_weights: ``"auto"`` weighs each row by ``priority_weight`` where a batch holds it.

    Reads: observations, action ``[*B, A]``, and under ``"next"`` observations, reward, done and terminated
    ``[*B, 1]``. The bootstrap ends at ``terminated``; a truncated episode goes on. Writes to its input ``td_error
    [*B]``, the largest over critics, as the priority. The discount belongs to the value estimator:
    ``loss.make_value_estimator(gamma=0.99)``.

    Returns: ``loss_vae``, ``loss_qvalue`` (summed over critics), ``loss_actor``, and detached, for each row:
    ``vae_reconstruction`` (squared error), ``vae_kl`` (nats, mean over latents), ``td_error [*B, C]`` (absolute),
    ``pred_value [*B, C]``, ``target_value [*B]``.

    Raises:
        TypeError: at construction, if a network lacks a method that is needed of it.
        ValueError: at construction, if a setting is out of its range.
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
        priority: NestedKey = "td_error"
        priority_weight: NestedKey = "priority_weight"

    tensor_keys: _AcceptedKeys
    default_keys = _AcceptedKeys
    default_value_estimator = ValueEstimators.TD0
    out_keys = [
        "loss_vae",
        "loss_qvalue",
        "loss_actor",
        "vae_reconstruction",
        "vae_kl",
        "td_error",
        "pred_value",
        "target_value",
    ]

    vae_network: TensorDictModuleBase
    vae_network_params: TensorDictParams
    target_vae_network_params: TensorDictParams
    actor_network: TensorDictModuleBase
    actor_network_params: TensorDictParams
    target_actor_network_params: TensorDictParams
    qvalue_network: TensorDictModuleBase
    qvalue_network_params: TensorDictParams
    target_qvalue_network_params: TensorDictParams

    def __init__(
        self,
        vae_network: TensorDictModuleBase,
        actor_network: TensorDictModuleBase,
        qvalue_network: TensorDictModuleBase,
        *,
        lmbda: float = 0.75,
        num_target_samples: int = 10,
        kl_weight: float = 0.5,
        reduction: str = "mean",
        use_prioritized_weights: str | bool = "auto",
    ) -> None:
        super().__init__()
        if not 0 <= lmbda <= 1:
            raise ValueError(f"lmbda is {lmbda}, expected a weight between 0 and 1.")
        if num_target_samples < 1:
            raise ValueError(f"num_target_samples is {num_target_samples}, expected at least 1.")
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction is {reduction!r}, expected 'mean', 'sum' or 'none'.")
        if not kl_weight >= 0:
            raise ValueError(f"kl_weight is {kl_weight}, expected 0 or more.")
        if use_prioritized_weights not in (True, False, "auto"):
            raise ValueError(f"use_prioritized_weights is {use_prioritized_weights!r}, expected True, False or 'auto'.")
        for name, network, method in (
            ("vae_network", vae_network, "decode"),
            ("qvalue_network", qvalue_network, "first"),
        ):
            if not hasattr(network, method):
                raise TypeError(
                    f"{name} is a {type(network).__name__}, which has no method {method!r}; see the docstring."
                )
        self.convert_to_functional(vae_network, "vae_network")
        self.convert_to_functional(actor_network, "actor_network", create_target_params=True)
        self.convert_to_functional(qvalue_network, "qvalue_network", create_target_params=True)
        self.lmbda = lmbda
        self.num_target_samples = num_target_samples
        self.kl_weight = kl_weight
        self.reduction = reduction
        self.use_prioritized_weights = use_prioritized_weights
        self._in_keys: list[NestedKey] | None = None
        self.tensor_keys.action = actor_network.out_keys[0]
        self.tensor_keys.state_action_value = qvalue_network.out_keys[-1]
        self.make_value_estimator()

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """All three losses, whose sum can be differentiated, and their metadata, at the present parameters."""
        loss_vae, vae_metadata = self.vae_loss(tensordict)
        loss_qvalue, qvalue_metadata = self.qvalue_loss(tensordict)
        loss_actor, actor_metadata = self.actor_loss(tensordict)
        losses = {"loss_vae": loss_vae, "loss_qvalue": loss_qvalue, "loss_actor": loss_actor}
        return TensorDict({**losses, **vae_metadata, **qvalue_metadata, **actor_metadata})

    def vae_loss(self, tensordict: TensorDictBase, noise: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Reconstruction error plus ``kl_weight`` times KL divergence. ``noise [*B, L]`` is drawn if not given."""
        batch = self._check(tensordict, self.vae_network.in_keys)
        with _run_on(self.vae_network_params, self.vae_network):
            out = self.vae_network(batch.copy(), noise=noise)
        action = batch.get(self.tensor_keys.action)
        reconstruction = (out.get("reconstruction") - action).square().mean(-1)  # [*B, A] -> [*B]
        kl = gaussian_kl(out.get("loc"), out.get("log_std")).mean(-1)  # [*B, L] -> [*B]
        loss = self._weigh(reconstruction + self.kl_weight * kl, tensordict)
        return loss, {"vae_reconstruction": reconstruction.detach(), "vae_kl": kl.detach()}

    def qvalue_loss(self, tensordict: TensorDictBase, latent: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared TD error, summed over critics. ``latent [*B, n, L]`` of the next actions is drawn if not given."""
        batch = self._check(tensordict, self.in_keys)
        with _run_on(self.qvalue_network_params, self.qvalue_network):
            pred_value = self.qvalue_network(batch.copy()).get(self.tensor_keys.state_action_value)  # [*B, C]
        target_value = self._target_value(batch, latent)  # [*B, 1]
        td_error = pred_value - target_value
        loss = self._weigh(td_error.square().sum(-1), tensordict)
        td_error = td_error.detach().abs()
        tensordict.set(self.tensor_keys.priority, td_error.amax(-1))
        metadata = {"td_error": td_error, "pred_value": pred_value.detach(), "target_value": target_value.squeeze(-1)}
        return loss, metadata

    def actor_loss(self, tensordict: TensorDictBase, latent: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """``-Q_1`` of a perturbed sample. ``latent [*B, L]`` of the sampled action is drawn if not given."""
        batch = self._check(tensordict, self.vae_network.in_keys)
        with torch.no_grad(), _run_on(self.vae_network_params, self.vae_network):
            sampled = self.vae_network.decode(batch.copy(), latent=latent)
        with _run_on(self.actor_network_params, self.actor_network):
            perturbed = self.actor_network(sampled)
        with _run_on(self.qvalue_network_params.data, self.qvalue_network):  # detached: only the actor learns
            value = self.qvalue_network.first(perturbed).get(self.tensor_keys.state_action_value)  # [*B, 1]
        return self._weigh(-value.squeeze(-1), tensordict), {}

    @torch.no_grad()
    def _target_value(self, batch: TensorDictBase, latent: Tensor | None) -> Tensor:
        """Eq. 13 at the next states, with the target actor and critics: ``[*B, 1]``."""
        states = batch.get("next").select(*self._observation_keys)
        candidates = states.unsqueeze(-1).expand(*states.batch_size, self.num_target_samples)  # [*B] -> [*B, n]
        with _run_on(self.vae_network_params, self.vae_network):
            candidates = self.vae_network.decode(candidates, latent=latent)
        with _run_on(self.target_actor_network_params, self.actor_network):
            candidates = self.actor_network(candidates)
        with _run_on(self.target_qvalue_network_params, self.qvalue_network):
            qvalue = self.qvalue_network(candidates).get(self.tensor_keys.state_action_value)  # [*B, n, C]
        next_value = best_sample_value(qvalue, self.lmbda)
        batch = batch.copy().set(("next", self.tensor_keys.state_action_value), next_value)
        return self.value_estimator.value_estimate(batch)

    def _weigh(self, loss: Tensor, tensordict: TensorDictBase) -> Tensor:
        """Importance weights, mask and reduction as TorchRL does them. ``[*B] -> []``, or ``[*B]`` for ``"none"``."""
        weights = self._maybe_get_priority_weight(tensordict)
        if weights is not None and weights.shape != loss.shape:
            key, shape = self.tensor_keys.priority_weight, tuple(weights.shape)
            raise ValueError(f"{key} has shape {shape}, expected {tuple(loss.shape)}, one weight for each row.")
        return self._reduce_loss(loss, tensordict=tensordict, weights=weights)

    def _check(self, tensordict: TensorDictBase, keys: list[NestedKey]) -> TensorDictBase:
        """Select ``keys``, with the batch size of the action; say what is missing or misshapen."""
        missing = [key for key in keys if tensordict.get(key, None) is None]
        if missing:
            present = sorted(map(str, tensordict.keys(True, True)))
            raise ValueError(f"the batch lacks {missing}; it holds {present}. Rename entries with loss.set_keys(...).")
        action = tensordict.get(self.tensor_keys.action)
        batch, dtype = action.shape[:-1], self._dtype
        reward, *flags = (unravel_key(("next", getattr(self.tensor_keys, k))) for k in ("reward", "done", "terminated"))
        for key in keys:
            value = tensordict.get(key)
            wanted = torch.bool if key in flags else dtype
            if value.dtype != wanted and (key in flags or value.dtype.is_floating_point):
                hint = "" if key in flags else " or the loss"
                raise ValueError(f"{key} has dtype {value.dtype}, expected {wanted}; cast the entry{hint}.")
            column = key == reward or key in flags
            if value.shape[: len(batch)] != batch or (column and value.shape != (*batch, 1)):
                raise ValueError(
                    f"{key} has shape {tuple(value.shape)}, which does not fit the action's {tuple(action.shape)}: "
                    "expected [*B, 1] for reward, done and terminated, and [*B, ...] for all else."
                )
        selected = tensordict.select(*keys)
        selected.batch_size = batch
        return selected

    def _apply(self, fn, recurse: bool = True):
        """Move or cast, and bind the moved tensors to the modules handed in, whose buffers would else stay behind."""
        super()._apply(fn)
        for name in ("vae_network", "actor_network", "qvalue_network"):
            _run_on(getattr(self, f"{name}_params"), getattr(self, name))
        return self

    @property
    def _dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.parameters())

    @property
    def _observation_keys(self) -> list[NestedKey]:
        networks = (self.vae_network, self.actor_network, self.qvalue_network)
        keys = dict.fromkeys(key for network in networks for key in network.in_keys)
        return [key for key in keys if key != self.tensor_keys.action]

    @property
    def in_keys(self) -> list[NestedKey]:
        """Entries that ``forward`` reads, in the order in which a keyword-less call would take them."""
        if self._in_keys is None:
            observations = self._observation_keys
            outcome = (self.tensor_keys.reward, self.tensor_keys.done, self.tensor_keys.terminated)
            following = [unravel_key(("next", key)) for key in (*observations, *outcome)]
            self._in_keys = [*observations, self.tensor_keys.action, *following]
        return self._in_keys

    @in_keys.setter
    def in_keys(self, values: list[NestedKey]) -> None:
        self._in_keys = values

    def _forward_value_estimator_keys(self, **kwargs) -> None:
        self._in_keys = None
        decided = {"action": self.actor_network.out_keys[0], "state_action_value": self.qvalue_network.out_keys[-1]}
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
        keys = self.tensor_keys
        return {
            "value": keys.state_action_value,
            "reward": keys.reward,
            "done": keys.done,
            "terminated": keys.terminated,
        }

    def make_value_estimator(self, value_type: ValueEstimators | None = None, **hyperparams) -> BCQLoss:
        """Choose the estimator of the target and its settings, such as ``gamma``. TD(0), with 0.99, is the paper's."""
        value_type = self.default_value_estimator if value_type is None else value_type
        if isinstance(value_type, (ValueEstimatorBase, type)):
            raise NotImplementedError(f"choose the estimator by its name, ValueEstimators.TD0; got {value_type}.")
        hyperparams = {**default_value_kwargs(value_type), "device": self._default_device, **hyperparams}
        dispatch_value_estimator(
            self,
            value_type,
            supported=(ValueEstimators.TD0,),
            tensor_keys=self._value_estimator_keys,
            value_network=None,
            **hyperparams,
        )
        # TorchRL rounds it to float32
        self._value_estimator.gamma = torch.as_tensor(
            hyperparams["gamma"], dtype=self._dtype, device=self._default_device
        )
        return self


def _run_on(params: TensorDictParams, network: TensorDictModuleBase):
    """Put ``params`` into ``network``, in a ``with`` until its end; tensordict's default would unfreeze them."""
    return params.to_module(network, preserve_module_state=False)
