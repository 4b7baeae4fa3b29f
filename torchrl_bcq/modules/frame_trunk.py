"""Reads frames by convolutions, alone or beside vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.data import TensorSpec
from torchrl.modules import MLP, ConvNet

from torchrl_bcq.errors import remedy


class FrameTrunk(nn.Module):
    """Joins vectors and the features of frames: ``[*B, D], [*B, C, H, W] -> [*B, F]``.

    Frames are bytes. The trunk scales them, and passes them through the convolutions of Nature DQN.

    Args:
        num_vectors: number of vectors, which come before the frames.
        shapes: shape ``(C, H, W)`` of each frame; ``H`` and ``W`` are at least 36.
        scales: for each frame, the mean ``[C]`` that is subtracted from its bytes, and the scale ``[C]`` by which they
            are then divided.

    Raises:
        ValueError: if the shape of a frame does not fit the convolutions. A call raises this error if a frame holds no
            bytes.

    Source: Mnih et al., "Human-level control through deep reinforcement learning", 2015.
    """

    def __init__(self, num_vectors: int, shapes: Sequence[Sequence[int]], scales: Sequence[Sequence[Tensor]]) -> None:
        """Build the convolutions of each frame."""
        super().__init__()
        for shape in shapes:
            if len(shape) != 3 or min(shape[1:]) < 36:
                how = remedy(
                    "move the channels with PermuteTransform, enlarge the frames, or build your own network",
                    "enlarge the frames in the dataset",
                )
                raise ValueError(f"a frame has shape {tuple(shape)}, expected [C, H, W] with H and W >= 36; {how}.")
        self.num_vectors = num_vectors
        self.scales = nn.ModuleList(_ByteScale(*scale) for scale in scales)
        self.convolutions = nn.ModuleList(
            ConvNet(
                channels,
                num_cells=[32, 64, 64],
                kernel_sizes=[8, 4, 3],
                strides=[4, 2, 1],
                activation_class=nn.ReLU,
                activation_kwargs={"inplace": True},  # safe, because nothing else uses the ReLU's input
            )
            for channels, *_ in shapes
        )
        self.num_frame_features = sum(64 * _reduced(height) * _reduced(width) for _, height, width in shapes)

    def forward(self, *observations: Tensor) -> Tensor:
        """Return the vectors and the features of the frames in one vector."""
        features = [*observations[: self.num_vectors]]
        frames = observations[self.num_vectors :]
        for frame, scale, convolutions in zip(frames, self.scales, self.convolutions, strict=True):
            if frame.dtype != torch.uint8:
                raise ValueError(
                    f"a frame has dtype {frame.dtype}, expected torch.uint8: the network scales the bytes."
                )
            features.append(_features(frame, scale, convolutions))
        return torch.cat(features, -1)


class FrameNetwork(nn.Module):
    """MLP of observations, the features of frames, and other inputs, such as an action: ``(*observations, *others)``.

    Args:
        trunk: joins the vectors and the features of the frames.
        mlp: reads the output of the trunk and the other inputs, as one concatenated vector.
    """

    def __init__(self, trunk: FrameTrunk, mlp: MLP) -> None:
        """Build the network from its parts."""
        super().__init__()
        self.trunk, self.mlp = trunk, mlp

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the output of the MLP, ``[*B, out]``."""
        number = self.trunk.num_vectors + len(self.trunk.convolutions)
        return self.mlp(self.trunk(*inputs[:number]), *inputs[number:])


def split_frames(
    specs: Mapping[NestedKey, TensorSpec],
) -> tuple[dict[NestedKey, TensorSpec], dict[NestedKey, TensorSpec]]:
    """Split observation specs into vectors and frames, which have three dimensions.

    Raises:
        ValueError: if frames do not hold bytes.
    """
    frames = {key: leaf for key, leaf in specs.items() if len(leaf.shape) == 3}
    for key, leaf in frames.items():
        if leaf.dtype != torch.uint8:
            raise ValueError(
                f"frame {key!r} has dtype {leaf.dtype}, expected torch.uint8: the network scales the bytes; leave out "
                "transforms such as ToTensorImage, or build your own network."
            )
    return {key: leaf for key, leaf in specs.items() if key not in frames}, frames


class _ByteScale(nn.Module):
    """Scales the bytes of frames by channel: ``[*B, C, H, W] -> [*B, C, H, W]``."""

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.loc, self.scale = (nn.Buffer(part.cpu().view(-1, 1, 1)) for part in (loc, scale))

    def forward(self, frames: Tensor, dtype: torch.dtype) -> Tensor:
        return frames.to(dtype).sub_(self.loc.to(dtype)).div_(self.scale.to(dtype))


def _features(frames: Tensor, scale: nn.Module, convolutions: Any) -> Tensor:
    """Return the features of frames, ``[*B, C, H, W] -> [*B, F]``.

    The frames of expanded dimensions are equal, as for the candidate actions of a state; they are processed once.
    """
    batch, once = frames.shape[:-3], frames
    for dim, (size, stride) in enumerate(zip(batch, frames.stride(), strict=False)):
        once = once.narrow(dim, 0, 1) if size > 1 and stride == 0 else once
    dtype = convolutions[0].weight.dtype  # parameters() is empty while TorchRL's losses use target weights
    return convolutions(scale(once, dtype)).expand(*batch, -1)


def _reduced(size: int) -> int:
    """Height or width after the three convolutions."""
    return ((size - 8) // 4 + 1 - 4) // 2 + 1 - 3 + 1
