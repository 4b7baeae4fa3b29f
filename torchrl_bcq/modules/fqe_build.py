"""Builds the critics of fitted Q evaluation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict.utils import NestedKey
from torchrl.data import Categorical, OneHot, TensorSpec

from torchrl_bcq.bounds import action_bounds
from torchrl_bcq.modules.build import NetworkBuilder
from torchrl_bcq.modules.discrete_build import DiscreteNetworkBuilder
from torchrl_bcq.modules.multi_head import MultiHeadNetwork
from torchrl_bcq.modules.normalization import Normalization, observation_leaves
from torchrl_bcq.modules.q_ensemble import QEnsemble

_VALUE = "state_action_value"  # entry of the values; for discrete actions, the number of the critic is appended


def make_fqe_modules(
    observation_spec: TensorSpec,
    action_spec: TensorSpec,
    *,
    hidden: Sequence[int] = (256, 256),
    num_critics: int = 3,
    action_key: NestedKey = "action",
    action_mask_key: NestedKey = "action_mask",
    normalization: Normalization | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[QEnsemble | MultiHeadNetwork]:
    """Build the critics of fitted Q evaluation: ReLU MLPs, behind convolutions if there are frames.

    For discrete actions with frames, the critics share the convolutions.

    Args:
        observation_spec, action_key, action_mask_key, device, dtype: as in ``make_bcq_modules`` or
            ``make_discrete_bcq_modules``.
        action_spec: spec of one action: a bounded vector ``[A]``, ``Categorical`` or ``OneHot``.
        hidden: sizes of the hidden layers of each critic. For discrete actions with frames, one layer of 512, as in
            ``make_discrete_bcq_modules``, is used instead.
        num_critics: number of critics, which differ in their initial weights.
        normalization: scaling that was fitted to the dataset, as in ``make_bcq_modules``.

    Returns:
        ``(critics,)``: a tuple with the only network of ``FQELoss``, or of ``DiscreteFQELoss`` for discrete actions.

    Raises:
        TypeError, ValueError: in the same cases as ``make_bcq_modules`` and ``make_discrete_bcq_modules``, or if
            ``num_critics`` is below 1.

    Example:
        >>> import torch
        >>> from torchrl.data import Categorical, Unbounded
        >>> from torchrl_bcq.modules import make_fqe_modules
        >>> (critics,) = make_fqe_modules(Unbounded((8,)), Categorical(4), num_critics=2)
        >>> [values.shape for values in critics(torch.zeros(5, 8))]
        [torch.Size([5, 4]), torch.Size([5, 4])]
    """
    if num_critics < 1:
        raise ValueError(f"num_critics is {num_critics}, expected at least 1.")
    if isinstance(action_spec, (Categorical, OneHot)):
        scoring = DiscreteNetworkBuilder(observation_spec, action_spec, action_mask_key, normalization, device, dtype)
        heads = {f"{_VALUE}_{i}": scoring.value_head(hidden, (512,)) for i in range(num_critics)}
        return scoring.network(heads, action_key)
    networks = NetworkBuilder(observation_leaves(observation_spec), normalization, device, dtype)
    low, high = (bound.double() for bound in action_bounds(networks.bounded(action_spec)))
    action_input = (high + low) / 2, (high - low) / 2
    return networks.place(networks.critics(num_critics, hidden, action_input, action_key, _VALUE))
