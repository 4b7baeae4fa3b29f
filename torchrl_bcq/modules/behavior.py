"""Models of the behaviour policy: their base class, a mixture of Gaussians and a flow-matching model."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal
from torch.nn.functional import softplus
from torchrl.data import TensorSpec

from torchrl_bcq.bounds import action_bounds
from torchrl_bcq.functional import clipped_normal, scale_to_bounds
from torchrl_bcq.modules.dispatch import accepts_tensors


class BehaviorModel(TensorDictModuleBase, ABC):
    """Stores the action bounds and the keys. Subclasses work with actions that are scaled to [-1, 1]."""

    latent_clip: float = math.inf  # no clipping
    latent_dim: int

    def __init__(
        self,
        action_spec: TensorSpec,
        observation_keys: Sequence[NestedKey],
        action_key: NestedKey,
        observation_specs: Mapping[NestedKey, TensorSpec] | None,
    ) -> None:
        super().__init__()
        self.observation_keys, self.action_key = list(observation_keys), action_key
        self.observation_specs = observation_specs
        self.in_keys, self.out_keys = [*self.observation_keys], [action_key]
        self.low, self.high = map(nn.Buffer, action_bounds(action_spec))

    @accepts_tensors
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write a random action ``[*B, A]`` for each state."""
        return self.decode(tensordict)

    def decode(self, tensordict: TensorDictBase, latent: Tensor | None = None) -> TensorDictBase:
        """Write an action ``[*B, A]`` for each state. If ``latent [*B, L]`` is None, draw it from ``N(0, 1)``."""
        if latent is None:
            latent = clipped_normal((*tensordict.batch_size, self.latent_dim), self.latent_clip, like=self.low)
        if latent.shape[-1] != self.latent_dim:
            raise ValueError(f"latent has {latent.shape[-1]} numbers for each state, expected {self.latent_dim}.")
        scaled = self._decode(self._observations(tensordict), latent).to(self.low.dtype).clamp(-1, 1)
        return tensordict.set(self.action_key, scale_to_bounds(scaled, self.low, self.high))

    def _scaled_action(self, tensordict: TensorDictBase) -> Tensor:
        action = tensordict.get(self.action_key)
        if action.shape[-1] != len(self.low):
            raise ValueError(f"the action has shape {tuple(action.shape)}, expected {len(self.low)} dimensions.")
        return (2 * action - self.low - self.high) / (self.high - self.low)

    def _observations(self, tensordict: TensorDictBase) -> list[Tensor]:
        return [tensordict.get(key) for key in self.observation_keys]

    def _check_output(self, output: Tensor, expected: tuple[int, ...], name: str = "network") -> None:
        if output.shape != expected:
            raise ValueError(
                f"{name} returns the shape {tuple(output.shape)}, expected {tuple(expected)}; change its output size, "
                "and let it return a row for each state."
            )

    @abstractmethod
    def _decode(self, observations: list[Tensor], latent: Tensor) -> Tensor:
        """Return scaled actions. The caller clips them to [-1, 1]. ``[*B, L] -> [*B, A]``."""


class ActionMixture(BehaviorModel):
    """Mixture of Gaussians with diagonal covariance (mixture density network). It implements ``GenerativeModel``.

    The first number of the latent selects the component. The other numbers are the Gaussian noise. Samples outside the
    action bounds are clipped to the bounds. The latent 0 selects the component at which the cumulative weight
    reaches 1/2, which is not always the most likely one.

    Args:
        network: network ``(*observations) -> [*B, K * (1 + 2 * A)]``: for each of ``K`` components, the logit of its
            weight, the means, and the logarithms of the standard deviations.
        action_spec: bounded spec of one action, shape ``[A]``. In the network's output, actions are scaled to [-1, 1].
        noise_clip: largest magnitude of the Gaussian noise of a sampled action, in standard deviations.
        log_std_range: smooth bounds of the logarithms of the standard deviations (softplus, as in arXiv:1805.12114).
        observation_keys, action_key, observation_specs: as in ``ActionVAE``.

    Raises:
        ValueError: if ``action_spec`` is not a finite box of rank 1, ``noise_clip`` is negative, or ``log_std_range``
            is empty. A call raises this error if the network's output has a wrong shape.

    Example:
        >>> import torch
        >>> from torchrl.data import Bounded
        >>> from torchrl.modules import MLP
        >>> from torchrl_bcq.modules import ActionMixture
        >>> mixture = ActionMixture(MLP(in_features=3, out_features=4 * 3, num_cells=[64]), Bounded(-2, 2, (1,)))
        >>> mixture(observation=torch.zeros(5, 3)).shape
        torch.Size([5, 1])

    Source: Bishop, "Mixture Density Networks", 1994.
    """

    loss_keys = ("negative_log_likelihood",)

    def __init__(
        self,
        network: nn.Module,
        action_spec: TensorSpec,
        *,
        noise_clip: float = math.inf,
        log_std_range: tuple[float, float] = (-4.0, 1.0),
        observation_keys: Sequence[NestedKey] = ("observation",),
        action_key: NestedKey = "action",
        observation_specs: Mapping[NestedKey, TensorSpec] | None = None,
    ) -> None:
        """Build the model from its network."""
        super().__init__(action_spec, observation_keys, action_key, observation_specs)
        if not noise_clip >= 0:
            raise ValueError(f"noise_clip is {noise_clip}, expected 0 or more.")
        if not log_std_range[0] < log_std_range[1]:
            raise ValueError(f"log_std_range is {log_std_range}, expected a lower and a higher number.")
        self.network, self.noise_clip, self.log_std_range = network, noise_clip, log_std_range
        self.latent_dim = 1 + len(self.low)

    def training_loss(
        self, tensordict: TensorDictBase, noise: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the negative log-likelihood of each row's action, scaled to [-1, 1], in nats, ``[*B]``."""
        action = self._scaled_action(tensordict)
        logits, mean, std = self._components(self._observations(tensordict), action.shape[:-1])
        mixture = MixtureSameFamily(
            Categorical(logits=logits, validate_args=False),
            Independent(Normal(mean, std, validate_args=False), 1, validate_args=False),
            validate_args=False,
        )
        loss = -mixture.log_prob(action)
        return loss, {"negative_log_likelihood": loss.detach()}

    def _decode(self, observations: list[Tensor], latent: Tensor) -> Tensor:
        logits, mean, std = self._components(observations, latent.shape[:-1])
        uniform = torch.special.ndtr(latent[..., :1])
        chosen = (logits.softmax(-1).cumsum(-1)[..., :-1] < uniform).sum(-1)[..., None, None]  # [*B, 1, 1]
        noise = latent[..., 1:].clamp(-self.noise_clip, self.noise_clip)
        chosen = chosen.expand(*chosen.shape[:-1], mean.shape[-1])  # take_along_dim would fix the batch in a graph
        return mean.gather(-2, chosen).squeeze(-2) + std.gather(-2, chosen).squeeze(-2) * noise

    def _components(self, observations: list[Tensor], batch: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits ``[*B, K]``, means and standard deviations ``[*B, K, A]``."""
        output, size = self.network(*observations).to(self.low.dtype), len(self.low)
        if not output.shape[-1] or output.shape[-1] % (1 + 2 * size):
            raise ValueError(
                f"network returns {output.shape[-1]} features, expected a multiple of 1 + 2 * {size}, one logit, "
                "the means and the deviations of each component; change its output size."
            )
        self._check_output(output, (*batch, output.shape[-1]))
        logits, mean, log_std = output.unflatten(-1, (-1, 1 + 2 * size)).split([1, size, size], -1)
        low, high = self.log_std_range
        log_std = low + softplus(high - softplus(high - log_std) - low)
        return logits.squeeze(-1), mean, log_std.exp()


class ActionFlow(BehaviorModel):
    """Flow-matching model: turns noise into an action by integrating a learned velocity, as a ``GenerativeModel``.

    The latent is the noise. The latent 0 can become an action between the recorded ones, if they form several groups.

    Args:
        network: network ``(*observations, point [*B, A + 1]) -> [*B, A]``; it returns the velocity. ``point`` is the
            scaled, partly denoised action, followed by the time.
        action_spec: bounded spec of one action, shape ``[A]``.
        steps: number of Euler steps from the noise (time 0) to the action (time 1).
        latent_clip: largest magnitude of the noise from which an action is sampled.
        observation_keys, action_key, observation_specs: as in ``ActionVAE``.

    Raises:
        ValueError: if ``action_spec`` is not a finite box of rank 1, or ``steps`` is below 1. A call raises this error
            if the network's output has a wrong shape.

    Example:
        >>> import torch
        >>> from torchrl.data import Bounded
        >>> from torchrl.modules import MLP
        >>> from torchrl_bcq.modules import ActionFlow
        >>> flow = ActionFlow(MLP(in_features=3 + 2, out_features=1, num_cells=[64]), Bounded(-2, 2, (1,)))
        >>> flow(observation=torch.zeros(5, 3)).shape
        torch.Size([5, 1])

    Source: Lipman et al., "Flow Matching for Generative Modeling", arXiv:2210.02747, with straight paths.
    """

    loss_keys = ("velocity_error",)

    def __init__(
        self,
        network: nn.Module,
        action_spec: TensorSpec,
        *,
        steps: int = 10,
        latent_clip: float = math.inf,
        observation_keys: Sequence[NestedKey] = ("observation",),
        action_key: NestedKey = "action",
        observation_specs: Mapping[NestedKey, TensorSpec] | None = None,
    ) -> None:
        """Build the model from its network."""
        super().__init__(action_spec, observation_keys, action_key, observation_specs)
        if steps < 1 or not latent_clip > 0:
            raise ValueError(f"steps is {steps} and latent_clip {latent_clip}; both must be positive.")
        self.network, self.steps, self.latent_clip = network, steps, latent_clip
        self.latent_dim = len(self.low)

    def training_loss(
        self, tensordict: TensorDictBase, noise: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the squared error of the velocity, averaged over the action dimensions, ``[*B]``.

        ``noise [*B, A + 1]``: standard normal numbers; the normal distribution function maps the last number to the
        time, which is uniform in [0, 1].
        """
        action = self._scaled_action(tensordict)
        shape = (*action.shape[:-1], action.shape[-1] + 1)
        if noise is None:
            noise = torch.randn(shape, dtype=action.dtype, device=action.device)
        if noise.shape != shape:
            raise ValueError(f"noise has shape {tuple(noise.shape)}, expected {tuple(shape)}.")
        start, time = noise[..., :-1], torch.special.ndtr(noise[..., -1:])
        point = (1 - time) * start + time * action
        error = self._velocity(self._observations(tensordict), point, time) - (action - start)
        loss = error.square().mean(-1)
        return loss, {"velocity_error": loss.detach()}

    def _decode(self, observations: list[Tensor], latent: Tensor) -> Tensor:
        point = latent
        for step in range(self.steps):
            time = torch.full_like(point[..., :1], step / self.steps)
            point = point + self._velocity(observations, point, time) / self.steps
        return point

    def _velocity(self, observations: list[Tensor], point: Tensor, time: Tensor) -> Tensor:
        velocity = self.network(*observations, torch.cat([point, time], -1)).to(point.dtype)
        self._check_output(velocity, point.shape)
        return velocity
