"""Networks that score all discrete actions of a state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.data import TensorSpec
from torchrl.modules import ConvNet

from torchrl_bcq.modules.dispatch import accepts_tensors


class MultiHeadNetwork(TensorDictModuleBase):
    """Network with one output ``[*B, K]`` per head, such as the values and the logits of ``K`` discrete actions.

    Args:
        heads: network of each output, by the key of the output's entry. A head gets the observations, or the trunk's
            output.
        action_space: spec of one action, or ``"categorical"`` or ``"one-hot"``; losses and policies read it.
        trunk: network ``(*observations) -> features`` that all heads share; None means that the heads share nothing.
        observation_keys: observation entries that the network reads, in this order.
        action_key: entry of the action, which losses read and policies write.
        action_mask_key: entry of the available actions, booleans ``[*B, K]``, which losses and policies read; None
            means that all actions are always available.
        observation_specs: spec of one observation for each key; ``Policy.act`` uses them to check its input.

    Raises:
        ValueError: if there is no head.

    Example:
        >>> import torch
        >>> from torchrl.modules import MLP
        >>> from torchrl_bcq import DiscreteBCQLoss, DiscreteBCQPolicy, MultiHeadNetwork
        >>> trunk = torch.nn.Sequential(torch.nn.Linear(3, 64), torch.nn.ReLU())
        >>> heads = {"action_value": torch.nn.Linear(64, 5), "imitation_logits": torch.nn.Linear(64, 5)}
        >>> network = MultiHeadNetwork(heads, "categorical", trunk=trunk)
        >>> loss, policy = DiscreteBCQLoss(network), DiscreteBCQPolicy(network)
        >>> policy(torch.zeros(7, 3)).shape
        torch.Size([7])
    """

    def __init__(
        self,
        heads: Mapping[NestedKey, nn.Module],
        action_space: str | TensorSpec,
        *,
        trunk: nn.Module | None = None,
        observation_keys: Sequence[NestedKey] = ("observation",),
        action_key: NestedKey = "action",
        action_mask_key: NestedKey | None = None,
        observation_specs: Mapping[NestedKey, TensorSpec] | None = None,
    ) -> None:
        """Build the network from its trunk and its heads."""
        super().__init__()
        if not heads:
            raise ValueError("heads is empty, expected a network for each output.")
        self.in_keys = list(observation_keys)
        self.out_keys = list(heads)
        self.trunk = trunk
        self.heads = nn.ModuleList(heads.values())
        self.action_space = action_space
        self.action_key = action_key
        self.action_mask_key = action_mask_key
        self.observation_specs = observation_specs

    @accepts_tensors
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write all outputs, each ``[*B, K]``."""
        return self._write(tensordict, len(self.heads))

    def first(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the first output alone, ``[*B, K]``: the values, which are all that a target network is used for."""
        return self._write(tensordict, 1)

    def _write(self, tensordict: TensorDictBase, number: int) -> TensorDictBase:
        inputs = [tensordict.get(key) for key in self.in_keys]
        if self.trunk is not None:
            inputs = [self.trunk(*inputs)]
        for key, head in zip(self.out_keys[:number], self.heads, strict=False):
            tensordict.set(key, head(*inputs))
        return tensordict


class FrameTrunk(nn.Module):
    """Joins vectors and the features of frames: ``[*B, D], [*B, C, H, W] -> [*B, F]``.

    Frames are bytes. The trunk divides them by 255, and passes them through the convolutions of Nature DQN.

    Args:
        num_vectors: number of vectors, which come before the frames.
        shapes: shape ``(C, H, W)`` of each frame; ``H`` and ``W`` are at least 36.

    Raises:
        ValueError: if the shape of a frame does not fit the convolutions. A call raises this error if a frame holds no
            bytes.

    Source: Mnih et al., "Human-level control through deep reinforcement learning", 2015.
    """

    def __init__(self, num_vectors: int, shapes: Sequence[Sequence[int]]) -> None:
        """Build the convolutions of each frame."""
        super().__init__()
        for shape in shapes:
            if len(shape) != 3 or min(shape[1:]) < 36:
                raise ValueError(
                    f"a frame has shape {tuple(shape)}, expected [C, H, W] with H and W of at least 36; move the "
                    "channels with torchrl.envs.PermuteTransform, enlarge the frames, or build your own network."
                )
        self.num_vectors = num_vectors
        self.convolutions = nn.ModuleList(
            ConvNet(
                channels, num_cells=[32, 64, 64], kernel_sizes=[8, 4, 3], strides=[4, 2, 1], activation_class=nn.ReLU
            )
            for channels, *_ in shapes
        )
        self.num_frame_features = sum(64 * _reduced(height) * _reduced(width) for _, height, width in shapes)

    def forward(self, *observations: Tensor) -> Tensor:
        """Return the vectors and the features of the frames in one vector."""
        features = [*observations[: self.num_vectors]]
        for frame, convolutions in zip(observations[self.num_vectors :], self.convolutions, strict=True):
            if frame.dtype != torch.uint8:
                raise ValueError(
                    f"a frame has dtype {frame.dtype}, expected torch.uint8: the network scales the bytes."
                )
            dtype = next(convolutions.parameters()).dtype
            features.append(convolutions(frame.to(dtype) / 255))
        return torch.cat(features, -1)


def _reduced(size: int) -> int:
    """Height or width after the three convolutions."""
    return ((size - 8) // 4 + 1 - 4) // 2 + 1 - 3 + 1
