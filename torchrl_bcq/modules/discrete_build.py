"""Builds the networks for discrete actions from the observation spec and the action spec."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tensordict.utils import NestedKey
from torch import nn
from torchrl.data import TensorSpec

from torchrl_bcq.actions import DiscreteActions
from torchrl_bcq.modules.build import NetworkBuilder
from torchrl_bcq.modules.multi_head import MultiHeadNetwork
from torchrl_bcq.modules.normalization import Normalization, Rescale, observation_leaves


def make_discrete_bcq_modules(
    observation_spec: TensorSpec,
    action_spec: TensorSpec,
    *,
    hidden: Sequence[int] = (256, 256),
    frame_hidden: Sequence[int] = (512,),
    action_key: NestedKey = "action",
    action_mask_key: NestedKey = "action_mask",
    value_key: NestedKey = "action_value",
    logits_key: NestedKey = "imitation_logits",
    normalization: Normalization | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[MultiHeadNetwork]:
    """Build the network of the author's code, which writes the values of all actions and the logits of the behaviour.

    If all observations are vectors, the two outputs come from two separate ReLU MLPs that read the concatenated
    vectors. Frames pass through the convolutions of Nature DQN, which both outputs share. Each output then has its own
    ReLU MLP, which reads the features of the frames and the vectors.

    Args:
        observation_spec: spec of one observation, which the network reads from the entry ``"observation"``: a vector
            ``[D]``, or a frame ``[C, H, W]`` of ``torch.uint8``, which the network divides by 255. Or a Composite with
            one such spec for each entry.
        action_spec: spec of one action, ``Categorical`` or ``OneHot``.
        hidden: sizes of the hidden layers of each output, if there is no frame.
        frame_hidden: sizes of the hidden layers of each output after the convolutions, if there is a frame.
        action_key: entry of the action.
        action_mask_key: entry of the available actions. If ``observation_spec`` has this entry, booleans ``[K]``,
            losses and policies of the network read it.
        value_key, logits_key: entries of the outputs, each ``[*B, K]``.
        normalization: scaling that was fitted to the dataset. The network gets it as additional layers, which
            standardise vectors and the channels of frames, and multiply values by ``reward_scale``.
        device, dtype: device and dtype of the parameters, as in ``make_bcq_modules``.

    Returns:
        ``(network,)``: a tuple with the only network of ``DiscreteBCQLoss`` and ``DiscreteBCQPolicy``.

    Raises:
        TypeError: if ``observation_spec`` is not a spec of TorchRL, or ``normalization`` is not a ``Normalization``.
        ValueError: if an observation is neither a vector of ``dtype`` nor a frame, actions are not discrete, the mask
            has a wrong shape or dtype, or the normalization was fitted to other observations.

    Example:
        >>> import torch
        >>> from torchrl.data import Categorical, Unbounded
        >>> from torchrl_bcq.modules import make_discrete_bcq_modules
        >>> (network,) = make_discrete_bcq_modules(Unbounded((8,)), Categorical(4))
        >>> action_value, imitation_logits = network(torch.zeros(5, 8))
        >>> action_value.shape, imitation_logits.shape
        (torch.Size([5, 4]), torch.Size([5, 4]))
        >>> (network,) = make_discrete_bcq_modules(Unbounded((4, 84, 84), dtype=torch.uint8), Categorical(6))
        >>> [output.shape for output in network(torch.zeros(2, 4, 84, 84, dtype=torch.uint8))]
        [torch.Size([2, 6]), torch.Size([2, 6])]

    Source: the networks of the author's code of arXiv:1910.01708.
    """
    builder = DiscreteNetworkBuilder(observation_spec, action_spec, action_mask_key, normalization, device, dtype)
    heads = {value_key: builder.value_head(hidden, frame_hidden), logits_key: builder.head(hidden, frame_hidden)}
    return builder.network(heads, action_key)


def make_discrete_cloning_modules(
    observation_spec: TensorSpec,
    action_spec: TensorSpec,
    *,
    hidden: Sequence[int] = (256, 256),
    frame_hidden: Sequence[int] = (512,),
    action_key: NestedKey = "action",
    action_mask_key: NestedKey = "action_mask",
    logits_key: NestedKey = "imitation_logits",
    normalization: Normalization | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[MultiHeadNetwork]:
    """Build the network of behaviour cloning of discrete actions: that of ``make_discrete_bcq_modules`` without values.

    Args:
        observation_spec, action_spec, hidden, frame_hidden, action_key, action_mask_key, logits_key, normalization,
            device, dtype: as in ``make_discrete_bcq_modules``.

    Returns:
        ``(network,)``: a tuple with the only network of ``DiscreteCloningLoss`` and ``DiscreteCloningPolicy``.

    Raises:
        TypeError, ValueError: in the same cases as ``make_discrete_bcq_modules``.
    """
    builder = DiscreteNetworkBuilder(observation_spec, action_spec, action_mask_key, normalization, device, dtype)
    return builder.network({logits_key: builder.head(hidden, frame_hidden)}, action_key)


class DiscreteNetworkBuilder:
    """Builds the trunk and the heads of a network for discrete actions."""

    def __init__(
        self,
        observation_spec: TensorSpec,
        action_spec: TensorSpec,
        action_mask_key: NestedKey,
        normalization: Normalization | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        actions = DiscreteActions.of(action_spec)
        if actions.number is None:
            raise ValueError(
                f"action_spec is {action_spec!r}, expected the spec of one action, such as Categorical(4)."
            )
        self.action_spec, self.number = action_spec, actions.number
        leaves = observation_leaves(observation_spec)
        self.mask = {key: leaf for key, leaf in leaves.items() if key == action_mask_key}
        for key, leaf in self.mask.items():
            if leaf.dtype != torch.bool or tuple(leaf.shape) != (self.number,):
                raise ValueError(
                    f"{key!r} has shape {tuple(leaf.shape)} and dtype {leaf.dtype}, expected booleans "
                    f"({self.number},): True for each available action; if it is an observation, pass another "
                    "action_mask_key."
                )
        observations = {key: leaf for key, leaf in leaves.items() if key not in self.mask}
        if not observations:
            raise ValueError(f"observation_spec has the entries {[*leaves]}, expected an observation.")
        self.layers = NetworkBuilder(observations, normalization, device, dtype)
        self.trunk = self.layers.trunk()

    def head(self, hidden: Sequence[int], frame_hidden: Sequence[int]) -> nn.Sequential:
        """Build the MLP of one output."""
        if self.trunk is None:
            return self.layers.mlp(self.number, hidden)
        features = self.trunk.num_frame_features
        scaled = bool(self.layers.width)  # features of frames are not scaled
        return self.layers.mlp(self.number, frame_hidden, torch.zeros(features), torch.ones(features), scaled=scaled)

    def value_head(self, hidden: Sequence[int], frame_hidden: Sequence[int]) -> nn.Sequential:
        """Build the MLP of an output of values, which are in the units of the rewards."""
        head = self.head(hidden, frame_hidden)
        if self.layers.reward_scale is not None:
            head.append(Rescale(self.layers.reward_scale, self.layers.dtype))
        return head

    def network(self, heads: Mapping[Any, nn.Module], action_key: NestedKey) -> tuple[MultiHeadNetwork]:
        """Join the heads, and place the network on its device."""
        made = MultiHeadNetwork(
            heads,
            self.action_spec,
            trunk=self.trunk,
            observation_keys=self.layers.keys,
            action_key=action_key,
            action_mask_key=next(iter(self.mask), None),
            observation_specs={**self.layers.specs, **self.mask},
        )
        return self.layers.place(made)
