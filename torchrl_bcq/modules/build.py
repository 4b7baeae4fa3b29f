"""Builds the networks of each algorithm from the observation spec and the action spec."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tensordict.nn import TensorDictModule
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.data import Bounded, TensorSpec
from torchrl.modules import MLP

from torchrl_bcq.bounds import action_bounds
from torchrl_bcq.modules.actors import DeterministicActor, PerturbationActor
from torchrl_bcq.modules.behavior import ActionFlow, ActionMixture
from torchrl_bcq.modules.frame_trunk import FrameNetwork, FrameTrunk, split_frames
from torchrl_bcq.modules.normalization import Normalization, Rescale, Standardize, observation_leaves
from torchrl_bcq.modules.q_ensemble import QEnsemble
from torchrl_bcq.modules.vae import ActionVAE


def make_bcq_modules(
    observation_spec: TensorSpec,
    action_spec: TensorSpec,
    *,
    behavior: str = "vae",
    hidden: Sequence[int] = (400, 300),
    vae_hidden: Sequence[int] = (750, 750),
    latent_dim: int | None = None,
    latent_clip: float = 0.5,
    kl_weight: float = 0.5,
    num_components: int = 8,
    noise_clip: float | None = None,
    flow_steps: int = 10,
    num_critics: int = 2,
    layer_norm: bool = False,
    phi: float | None = 0.05,
    action_key: NestedKey = "action",
    value_key: NestedKey = "state_action_value",
    normalization: Normalization | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Any, PerturbationActor | None, QEnsemble]:
    """Build the networks of the BCQ author's code: ReLU MLPs that read their inputs as one concatenated vector.

    In each network, frames pass through convolutions of its own, those of Nature DQN. The MLP reads their features.

    Args:
        observation_spec: spec of one observation, which the networks read from the entry ``"observation"``: a vector
            ``[D]``, or a frame ``[C, H, W]`` of ``torch.uint8``, which the networks divide by 255. Or a Composite with
            one such spec for each entry that the networks read.
        action_spec: bounded spec of one action ``[A]``.
        behavior: model of the behaviour policy: ``"vae"`` (``ActionVAE``, as in the paper), ``"mixture"``
            (``ActionMixture``) or ``"flow"`` (``ActionFlow``).
        hidden: sizes of the hidden layers of the perturbation actor and of each critic.
        vae_hidden: sizes of the hidden layers of the behaviour model (both networks of the VAE; the only network of a
            mixture or flow).
        latent_dim: size of the VAE's latent; ``2 * A`` if not given.
        latent_clip: largest magnitude of a sampled latent of the VAE, in standard deviations.
        kl_weight: weight of the KL divergence in the VAE's loss.
        num_components: number of Gaussians of the mixture.
        noise_clip: largest magnitude of the Gaussian noise of an action that the mixture samples, in standard
            deviations; None means no limit.
        flow_steps: number of Euler steps of the flow.
        num_critics: number of critics in the ensemble.
        layer_norm: whether each hidden layer of the critics is normalised (``torch.nn.LayerNorm``).
        phi: largest perturbation, as a fraction of half the action range; None builds no perturbation actor, as in EMaQ
            (arXiv:2007.11091).
        action_key: entry of the action.
        value_key: entry of the critics' values.
        normalization: scaling that was fitted to the dataset. The networks get it as additional layers. These layers
            standardise vectors and the channels of frames, scale actions to [-1, 1], and multiply values by
            ``reward_scale``. Without ``normalization``, the networks are those of the BCQ paper.
        device: device of the parameters.
        dtype: dtype of the parameters; PyTorch's default dtype if not given.

    Returns:
        ``(vae, actor, critics)``, each with its own random initial weights, drawn with PyTorch's global generator.
        ``vae`` is the chosen behaviour model, and ``actor`` is None if ``phi`` is None.

    Raises:
        TypeError: if a spec is not one of TorchRL, or ``normalization`` is not a ``Normalization``.
        ValueError: if an observation is neither a vector of ``dtype`` nor a frame, the action space is not a finite
            box, the normalization was fitted to other observations, or ``behavior`` is unknown.

    Example:
        >>> from torchrl.data import Bounded, Unbounded
        >>> from torchrl_bcq.modules import make_bcq_modules
        >>> vae, actor, critics = make_bcq_modules(Unbounded((3,)), Bounded(-2, 2, (1,)), hidden=(64, 64))
        >>> vae.latent_dim, len(critics.critics)
        (2, 2)

    Source: arXiv:1812.02900, appendix D.1, with the layer sizes of the author's code.
    """
    networks = NetworkBuilder(observation_leaves(observation_spec), normalization, device, dtype)
    action_spec = networks.bounded(action_spec)
    low, high = (bound.double() for bound in action_bounds(action_spec))
    actions = len(low)
    latents = 2 * actions if latent_dim is None else latent_dim
    numbers = {"latent_dim": latents, "num_components": num_components, "flow_steps": flow_steps}
    if wrong := [f"{name} is {value}" for name, value in numbers.items() if value < 1]:
        raise ValueError(f"{' and '.join(wrong)}, expected at least 1.")
    if not latent_clip > 0:
        raise ValueError(f"latent_clip is {latent_clip}, expected a positive number.")
    action_input = (high + low) / 2, (high - low) / 2
    keys: dict[str, Any] = {"observation_keys": networks.keys, "action_key": action_key}
    shared = {**keys, "observation_specs": networks.specs}
    vae: Any
    if behavior == "vae":
        vae = ActionVAE(
            networks.network(2 * latents, vae_hidden, *action_input),
            networks.network(actions, vae_hidden, torch.zeros(latents), torch.ones(latents)),
            action_spec,
            latent_dim=latents,
            latent_clip=latent_clip,
            kl_weight=kl_weight,
            error_scale=None if normalization is None else action_input[1],
            **shared,
        )
    elif behavior == "mixture":
        network = networks.network(num_components * (1 + 2 * actions), vae_hidden)
        limit = math.inf if noise_clip is None else noise_clip
        vae = ActionMixture(network, action_spec, noise_clip=limit, **shared)
    elif behavior == "flow":
        point = torch.zeros(actions + 1), torch.ones(actions + 1)
        vae = ActionFlow(networks.network(actions, vae_hidden, *point), action_spec, steps=flow_steps, **shared)
    else:
        raise ValueError(f"behavior is {behavior!r}, expected vae, mixture or flow.")
    actor = None
    if phi is not None:
        actor = PerturbationActor(networks.network(actions, hidden, *action_input), action_spec, phi=phi, **keys)
    critics = networks.critics(num_critics, hidden, action_input, action_key, value_key, layer_norm)
    return networks.place(vae, actor, critics)


def make_cloning_modules(
    observation_spec: TensorSpec,
    action_spec: TensorSpec,
    *,
    hidden: Sequence[int] = (400, 300),
    action_key: NestedKey = "action",
    normalization: Normalization | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[DeterministicActor]:
    """Build the network of behaviour cloning: a ReLU MLP that reads the concatenated observations.

    Frames pass through convolutions, as in ``make_bcq_modules``.

    Args:
        observation_spec: as in ``make_bcq_modules``.
        action_spec: bounded spec of one action ``[A]``.
        hidden: hidden sizes of the network.
        action_key, device, dtype: as in ``make_bcq_modules``.
        normalization: scaling that was fitted to the dataset. The network applies this scaling in its first layer.

    Returns:
        ``(actor,)``: a tuple with the only network of ``CloningLoss``.

    Raises:
        TypeError, ValueError: in the same cases as ``make_bcq_modules``.
    """
    networks = NetworkBuilder(observation_leaves(observation_spec), normalization, device, dtype)
    action_spec = networks.bounded(action_spec)
    network = networks.network(action_spec.shape[0], hidden)
    keys = {"observation_keys": networks.keys, "action_key": action_key}
    return networks.place(DeterministicActor(network, action_spec, **keys, observation_specs=networks.specs))


class NetworkBuilder:
    """Builds networks that all read the same observations: ReLU MLPs, behind convolutions if there are frames.

    Args:
        specs: spec of one vector ``[D]`` or frame ``[C, H, W]`` for each key that the networks read.
        normalization, device, dtype: as in ``make_bcq_modules``.
    """

    def __init__(
        self,
        specs: Mapping[NestedKey, TensorSpec],
        normalization: Normalization | None,
        device: Any,
        dtype: torch.dtype | None,
    ) -> None:
        if normalization is not None and not isinstance(normalization, Normalization):
            raise TypeError(
                f"normalization is a {type(normalization).__name__}, expected the result of "
                "Normalization.fit(transitions), or of Normalization.identity(observation_spec) if you load a "
                "checkpoint afterwards."
            )
        self.device = device
        self.dtype = dtype or torch.get_default_dtype()
        vectors, self.frames = split_frames(specs)
        for key, leaf in vectors.items():
            if len(leaf.shape) != 1 or not leaf.dtype.is_floating_point:
                raise ValueError(
                    f"observation {key!r} has shape {tuple(leaf.shape)} and dtype {leaf.dtype}, expected a float "
                    "vector [D], or a frame [C, H, W] of torch.uint8; pass only the leaves that the networks should "
                    "read, or build your own networks."
                )
            if leaf.dtype != self.dtype:
                raise ValueError(
                    f"observation {key!r} has dtype {leaf.dtype}, but the networks have dtype {self.dtype}: wrap the "
                    f"environment in TransformedEnv(env, DoubleToFloat()), or pass dtype={leaf.dtype}."
                )
        self.specs = {**vectors, **self.frames}  # in the order in which a trunk reads them
        self.keys = list(self.specs)
        sizes = {key: leaf.shape[0] for key, leaf in vectors.items()}
        self.width = sum(sizes.values())
        self.statistics = None if normalization is None else normalization.columns(sizes)
        self.reward_scale = None if normalization is None else normalization.reward_scale
        fitted = normalization or Normalization({})
        self.byte_scales = [fitted.byte_scale(key, leaf.shape[0]) for key, leaf in self.frames.items()]

    def bounded(self, action_spec: TensorSpec) -> Bounded:
        """Return the action spec in ``self.dtype``; its bounds are rounded inwards."""
        low, high = action_bounds(action_spec, self.dtype)
        return Bounded(low, high, low.shape, dtype=self.dtype)

    def network(
        self, out_features: int, num_cells: Sequence[int], *other: Tensor, layer_norm: bool = False
    ) -> MLP | FrameNetwork:
        """Build a network of the observations. ``other`` and ``layer_norm``: as for ``mlp``."""
        trunk = self.trunk()
        if trunk is None:
            return self.mlp(out_features, num_cells, *other, layer_norm=layer_norm)
        features = torch.zeros(trunk.num_frame_features), torch.ones(trunk.num_frame_features)
        joined = [torch.cat(pair) for pair in zip(features, other, strict=True)] if other else features
        scaled = bool(self.width or other)  # features of frames are not scaled
        return FrameNetwork(trunk, self.mlp(out_features, num_cells, *joined, layer_norm=layer_norm, scaled=scaled))

    def critics(
        self,
        number: int,
        hidden: Sequence[int],
        action_input: tuple[Tensor, Tensor],
        action_key: NestedKey,
        value_key: NestedKey,
        layer_norm: bool = False,
    ) -> QEnsemble:
        """Build critics of state-action pairs. ``action_input``: mean ``[A]`` and scale ``[A]`` of the actions."""
        critics = []
        for _ in range(number):
            network = self.network(1, hidden, *action_input, layer_norm=layer_norm)
            if self.reward_scale is not None:
                last = network.mlp if isinstance(network, FrameNetwork) else network
                last.append(Rescale(self.reward_scale, self.dtype))
            critics.append(TensorDictModule(network, in_keys=[*self.keys, action_key], out_keys=[value_key]))
        return QEnsemble(critics)

    def trunk(self) -> FrameTrunk | None:
        """Build the convolutions of the frames; None if there is no frame."""
        shapes = [leaf.shape for leaf in self.frames.values()]
        return FrameTrunk(len(self.keys) - len(shapes), shapes, self.byte_scales) if shapes else None

    def mlp(
        self,
        out_features: int,
        num_cells: Sequence[int],
        *other: Tensor,
        layer_norm: bool = False,
        scaled: bool = True,
    ) -> MLP:
        """Build an MLP of the vectors. ``other``: mean ``[F]`` and scale ``[F]`` of a second input.

        ``layer_norm``: whether a ``LayerNorm`` follows each hidden layer, before its ReLU. ``scaled``: whether a
        normalization scales the inputs.
        """
        loc, scale = other or (torch.zeros(0), torch.ones(0))
        network = MLP(
            in_features=self.width + len(loc),
            out_features=out_features,
            num_cells=list(num_cells),
            activation_class=nn.ReLU,
            activation_kwargs={"inplace": True},  # safe, because nothing else uses the ReLU's input
            norm_class=nn.LayerNorm if layer_norm else None,
            norm_kwargs=[{"normalized_shape": size} for size in num_cells] if layer_norm else None,
        )
        if self.statistics is not None and scaled:
            columns = zip(self.statistics, (loc, scale), strict=True)
            network.insert(0, Standardize(*(torch.cat([one, other.cpu()]).to(self.dtype) for one, other in columns)))
        return network

    def place(self, *modules: nn.Module | None) -> Any:
        """Move the modules to ``self.device`` and ``self.dtype``, and return them as a tuple."""
        placed = (None if module is None else module.to(device=self.device, dtype=self.dtype) for module in modules)
        return tuple(placed)
