"""The base class of objectives that learn state-action values."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDictBase, unravel_key
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.objectives.utils import ValueEstimators, default_value_kwargs, dispatch_value_estimator, distance_loss
from torchrl.objectives.value import TD1Estimator, TDLambdaEstimator, ValueEstimatorBase

from torchrl_bcq.objectives.base import OfflineLoss
from torchrl_bcq.objectives.inputs import check_choice, check_gamma, check_time_dimension

_SUPPORTED = (ValueEstimators.TD0, ValueEstimators.TD1, ValueEstimators.TDLambda)
# TD(1) is TD(lambda) with lambda = 1; with torch.compile, TorchRL's TD1Estimator ignores gamma (0.14.1)
_TD1 = {ValueEstimators.TD1: ValueEstimators.TDLambda, TD1Estimator: TDLambdaEstimator}


class ValueLoss(OfflineLoss):
    """Base class of offline objectives that learn state-action values from a bootstrapped target.

    Args:
        networks: networks by name, as in ``OfflineLoss``.
        value_key: entry of the state-action values, ``[*B, C]``.
        loss_function: loss of the TD error: ``"l2"``, ``"smooth_l1"`` (Huber loss with threshold 1) or ``"l1"``.
        **settings: other arguments of ``OfflineLoss``.

    The target bootstraps if an episode is only truncated, but not if ``terminated`` is True. Set
    the discount factor with ``loss.make_value_estimator(gamma=0.99)``. ``multi_step`` writes
    ``steps_to_next_obs``, ``[*B]`` or ``[*B, 1]``. If the batch has this entry, the value of the next state is
    multiplied by ``gamma ** steps_to_next_obs``.
    """

    @dataclass
    class _AcceptedKeys(OfflineLoss._AcceptedKeys):
        """Keys of the batch's entries. ``set_keys`` can change all keys, except those of action and value."""

        state_action_value: NestedKey = "state_action_value"
        reward: NestedKey = "reward"
        done: NestedKey = "done"
        terminated: NestedKey = "terminated"
        steps_to_next_obs: NestedKey = "steps_to_next_obs"

    tensor_keys: _AcceptedKeys
    default_keys = _AcceptedKeys
    default_value_estimator = ValueEstimators.TD0

    def __init__(
        self,
        networks: Mapping[str, TensorDictModuleBase | None],
        *,
        value_key: NestedKey,
        loss_function: str = "l2",
        **settings: Any,
    ) -> None:
        """Build the loss from its networks."""
        super().__init__(networks, **settings)
        check_choice("loss_function", loss_function, ("l2", "smooth_l1", "l1"))
        self.loss_function = loss_function
        self._decay: dict[str, float] = {}  # discount and decay of the estimator, in full precision
        self._decided_keys["state_action_value"] = value_key
        self.tensor_keys.state_action_value = value_key
        self.make_value_estimator()

    def select_transitions(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Check a batch; return its states, actions, next states, rewards and flags with batch size ``*B``."""
        reward, *flags = self._outcome_keys
        steps = self.tensor_keys.steps_to_next_obs
        keys = [*self.in_keys, *([steps] if steps in tensordict.keys(True) else [])]
        batch = self._select(tensordict, keys, reward_key=reward, flag_keys=flags)
        if self._sums_steps:  # of the given batch, whose entries may have more dimensions, such as one for agents
            check_time_dimension(tensordict, steps)
        if steps in keys:
            number = batch.get(steps)
            if number.shape not in (batch.shape, (*batch.shape, 1)):
                shape = tuple(number.shape)
                raise ValueError(f"{steps} has shape {shape}, expected {(*batch.shape, 1)}: one number for each row.")
            batch.set(steps, number.reshape(*batch.shape, 1))  # TorchRL's transforms write [*B]
        return batch

    def td_target(self, batch: TensorDictBase, next_value: Tensor) -> Tensor:
        """Compute the target from the values of the next states, with the value estimator. ``[*B, C] -> [*B, C]``."""
        if (critics := next_value.shape[-1]) > 1:  # TorchRL's estimators need rewards and flags of the same shape
            batch = batch.copy()
            steps = self.tensor_keys.steps_to_next_obs
            for key in [*self._outcome_keys, *([steps] if steps in batch.keys(True) else [])]:
                batch.set(key, batch.get(key).expand(*batch.shape, critics))
        if self._sums_steps:
            next_value = next_value.to(torch.promote_types(self._like.dtype, torch.float32))
        # autocast would round the sums to bfloat16
        with torch.autocast(next_value.device.type, enabled=False) if self._sums_steps else nullcontext():
            return self.value_estimator.value_estimate(batch, next_value=next_value).to(self._like.dtype)

    def td_distance(
        self, pred_value: Tensor, target_value: Tensor, tensordict: TensorDictBase
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the TD loss of values ``[*B, C]``, summed over critics, and metadata.

        The target is one for all critics, ``[*B, 1]``, or one for each, ``[*B, C]``. Also write the largest absolute
        TD error over critics, ``[*B]``, to ``tensordict`` as the priority.
        """
        distance = distance_loss(pred_value, target_value.expand_as(pred_value), self.loss_function)
        td_error = (pred_value.detach() - target_value).abs()
        tensordict.set(self.tensor_keys.priority, td_error.amax(-1).float())  # the dtype of prioritized samplers
        metadata = {"td_error": td_error, "pred_value": pred_value.detach(), "target_value": target_value.squeeze(-1)}
        return self.reduce(distance.sum(-1), tensordict), metadata

    def _find_in_keys(self) -> list[NestedKey]:
        following = [unravel_key(("next", key)) for key in self._observation_keys]
        return [*self._state_action_keys, *following, *self._outcome_keys]

    @property
    def _sums_steps(self) -> bool:
        """Whether the target sums the rewards of several rows, so that the batch needs a time dimension."""
        return isinstance(self.value_estimator, (TD1Estimator, TDLambdaEstimator))

    @property
    def _outcome_keys(self) -> list[NestedKey]:
        return [unravel_key(("next", getattr(self.tensor_keys, name))) for name in ("reward", "done", "terminated")]

    def _forward_value_estimator_keys(self, **kwargs: Any) -> None:
        super()._forward_value_estimator_keys(**kwargs)
        if self._value_estimator is not None:
            self._value_estimator.set_keys(**self._value_estimator_keys)

    @property
    def _value_estimator_keys(self) -> dict[str, NestedKey]:
        shared = ("reward", "done", "terminated", "steps_to_next_obs")
        return {"value": self.tensor_keys.state_action_value, **{k: getattr(self.tensor_keys, k) for k in shared}}

    def make_value_estimator(
        self,
        value_type: ValueEstimators | ValueEstimatorBase | type[ValueEstimatorBase] | None = None,
        *,
        gamma: float = 0.99,
        **hyperparams: Any,
    ) -> ValueLoss:
        """Choose the value estimator that computes the target.

        Args:
            value_type: ``ValueEstimators.TD0`` (the default), ``ValueEstimators.TD1`` or ``ValueEstimators.TDLambda``.
                An estimator class of TorchRL, or an instance of such a class, is also possible. With an instance,
                ``gamma`` and ``hyperparams`` have no effect. ``TD1`` and ``TDLambda`` need slices of trajectories ``[B,
                T]``. Their targets sum rewards of several steps of the dataset, without an off-policy correction.
            gamma: discount factor, from 0 to 1.
            **hyperparams: other arguments of the estimator.

        Discount and decay are settings of the loss: its state dict does not contain them, and a cast does not round
        them, unless you pass an instance. ``TD1`` is built as TD(lambda) with ``lmbda=1``.

        Raises:
            ValueError: if ``gamma`` or ``lmbda`` is out of range. The loss then keeps its value estimator.
            NotImplementedError: if the loss does not support the estimator, such as ``ValueEstimators.GAE``.
        """
        check_gamma(gamma)
        check_gamma(hyperparams.get("lmbda", 1), "lmbda")
        if isinstance(value_type, str):
            value_type = {one.name.lower(): one for one in ValueEstimators}.get(value_type.lower(), value_type)
        value_type = asked = self.default_value_estimator if value_type is None else value_type
        keys = self._value_estimator_keys
        of_class = type(value_type) if isinstance(value_type, ValueEstimatorBase) else value_type
        estimate: Any = getattr(of_class, "value_estimate", None)
        if estimate is not None and "next_value" not in inspect.signature(estimate).parameters:
            raise NotImplementedError(f"{estimate.__qualname__} ignores the values that the loss computes; use TD0.")
        if isinstance(value_type, ValueEstimatorBase):
            value_type.set_keys(**keys)  # before the loss takes it, because it may fail
            super().make_value_estimator(value_type)
            self._decay = {}
            return self
        if value_type in _TD1:
            value_type, hyperparams = _TD1[value_type], {**hyperparams, "lmbda": 1.0}
        if value_type in _TD1.values():  # the vectorized form fails for small lmbda, and waits for the GPU
            hyperparams = {"vectorized": False, **hyperparams}
        settings = {"gamma": gamma, "device": self._like.device, **hyperparams}
        hyperparams = {"value_network": None, **settings}
        if isinstance(value_type, type):
            super().make_value_estimator(value_type, **hyperparams)
            self._value_estimator.set_keys(**keys)
        else:
            hyperparams = {**default_value_kwargs(value_type), **hyperparams}
            dispatch_value_estimator(self, value_type, supported=_SUPPORTED, tensor_keys=keys, **hyperparams)
        self.value_type = asked
        self._decay = {name: float(hyperparams[name]) for name in {"gamma", "lmbda"} & hyperparams.keys()}
        for name in self._decay.keys() & self._value_estimator._buffers.keys():
            self._value_estimator.register_buffer(name, self._value_estimator._buffers[name], persistent=False)
        self._set_decay()
        return self

    def _set_decay(self) -> None:
        """Write discount and decay to the estimator: TorchRL rounds them to float32, and a cast to its own dtype."""
        dtype = torch.promote_types(self._like.dtype, torch.float32)
        for name, value in self._decay.items():
            old = getattr(self._value_estimator, name, None)
            if isinstance(old, Tensor) and (old.dtype, old.device) == (dtype, self._like.device):
                old.fill_(value)  # in place, because a CUDA graph may have captured it
            else:
                setattr(self._value_estimator, name, torch.tensor(value, dtype=dtype, device=self._like.device))

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn)
        self._set_decay()
        return self
