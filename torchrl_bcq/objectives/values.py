"""What objectives that learn state-action values share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDictBase, unravel_key
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.objectives.utils import ValueEstimators, default_value_kwargs, dispatch_value_estimator, distance_loss
from torchrl.objectives.value import TD0Estimator, ValueEstimatorBase

from torchrl_bcq.objectives.base import OfflineLoss
from torchrl_bcq.objectives.inputs import check_choice, check_time_dimension

_SUPPORTED = (ValueEstimators.TD0, ValueEstimators.TD1, ValueEstimators.TDLambda)


class ValueLoss(OfflineLoss):
    """Base of offline objectives that learn state-action values from a bootstrapped target.

    Args:
        networks: see :class:`OfflineLoss`.
        value_key: entry of the state-action values, ``[*B, C]``.
        loss_function: of the TD error, ``"l2"``, ``"smooth_l1"`` (Huber's, with threshold 1) or ``"l1"``.
        deactivate_vmap: TorchRL's switch for the value estimator.
        **settings: of :class:`OfflineLoss`.

    The bootstrap ends at ``terminated``; a truncated episode goes on. The discount belongs to the value estimator:
    ``loss.make_value_estimator(gamma=0.99)``. ``steps_to_next_obs [*B, 1]`` of TorchRL's multi-step transforms is read.
    """

    @dataclass
    class _AcceptedKeys(OfflineLoss._AcceptedKeys):
        """Entries of the tensordict. The networks decide those of action and value; ``set_keys`` renames the others."""

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
        deactivate_vmap: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(networks, **settings)
        check_choice("loss_function", loss_function, ("l2", "smooth_l1", "l1"))
        self.loss_function = loss_function
        self.deactivate_vmap = deactivate_vmap
        self._decided_keys["state_action_value"] = value_key
        self.tensor_keys.state_action_value = value_key
        self.make_value_estimator()

    def select_transitions(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Check and select states, actions, next states, rewards and flags of a batch, ``[*B]``."""
        reward, *flags = self._outcome_keys
        steps = self.tensor_keys.steps_to_next_obs
        keys = [*self.in_keys, *([steps] if steps in tensordict.keys(True) else [])]
        return self._select(tensordict, keys, reward_key=reward, flag_keys=flags)

    def td_target(self, batch: TensorDictBase, next_value: Tensor) -> Tensor:
        """The value estimator's target from the values of the next states, ``[*B, 1]``."""
        if not isinstance(self.value_estimator, TD0Estimator):
            check_time_dimension(batch)
        batch = batch.copy().set(("next", self.tensor_keys.state_action_value), next_value)
        return self.value_estimator.value_estimate(batch)

    def td_distance(
        self, pred_value: Tensor, target_value: Tensor, tensordict: TensorDictBase
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Distance of values ``[*B, C]`` from their target ``[*B, 1]``, summed over critics, and the metadata.

        Writes the largest absolute TD error over critics as the priority ``[*B]`` to ``tensordict``.
        """
        td_error = pred_value - target_value
        if self.loss_function == "l2":
            distance = td_error.square()
        else:
            distance = distance_loss(td_error, torch.zeros_like(td_error), self.loss_function)
        td_error = td_error.detach().abs()
        tensordict.set(self.tensor_keys.priority, td_error.amax(-1))
        metadata = {"td_error": td_error, "pred_value": pred_value.detach(), "target_value": target_value.squeeze(-1)}
        return self.reduce(distance.sum(-1), tensordict), metadata

    def _find_in_keys(self) -> list[NestedKey]:
        following = [unravel_key(("next", key)) for key in self._observation_keys]
        return [*self._state_action_keys, *following, *self._outcome_keys]

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
        """Choose the estimator of the target.

        Args:
            value_type: ``ValueEstimators.TD0`` by default; or ``TD1`` or ``TDLambda``, which read slices of
                trajectories ``[B, T]`` and follow the dataset's actions for several steps without a correction; or one
                of TorchRL's estimator classes, or an instance, which is used as it is.
            gamma: discount.
            **hyperparams: other arguments of the estimator.
        """
        value_type = self.default_value_estimator if value_type is None else value_type
        like, keys = self._like, self._value_estimator_keys
        if isinstance(value_type, ValueEstimatorBase):
            super().make_value_estimator(value_type)
            self._value_estimator.set_keys(**keys)
            return self
        settings = {"gamma": gamma, "device": like.device, "deactivate_vmap": self.deactivate_vmap, **hyperparams}
        hyperparams = {"value_network": None, **settings}
        if isinstance(value_type, type):
            super().make_value_estimator(value_type, **hyperparams)
            self._value_estimator.set_keys(**keys)
        else:
            hyperparams = {**default_value_kwargs(value_type), **hyperparams}
            dispatch_value_estimator(self, value_type, supported=_SUPPORTED, tensor_keys=keys, **hyperparams)
        for name in {"gamma", "lmbda"} & hyperparams.keys():  # TorchRL rounds them to float32
            rounded = torch.as_tensor(hyperparams[name], dtype=like.dtype, device=like.device)
            setattr(self._value_estimator, name, rounded)
        return self
