"""The generative model of the behaviour policy. The model samples actions that are likely in the dataset."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.data import TensorSpec

from torchrl_bcq.functional import gaussian_kl, scale_to_bounds
from torchrl_bcq.modules.behavior import BehaviorModel
from torchrl_bcq.modules.dispatch import accepts_tensors


class ActionVAE(BehaviorModel):
    """Conditional variational auto-encoder of actions, given the state. The class implements ``GenerativeModel``.

    ``forward`` reconstructs the action of a transition; ``decode(states)`` samples a new action for each state.

    Args:
        encoder: network ``(*observations, action [*B, A]) -> [*B, 2 * L]``; it returns the mean and the log standard
            deviation of the latent.
        decoder: network ``(*observations, latent [*B, L]) -> [*B, A]``. The VAE maps this unbounded output to the
            action bounds with tanh.
        action_spec: bounded spec of one action, shape ``[A]``.
        latent_dim: size of the latent, ``L``; the code of the paper's author uses ``2 * A``.
        latent_clip: largest magnitude of a sampled latent, in standard deviations. In ``forward``, latents are not
            clipped.
        log_std_range: range to which the encoder's log standard deviation is clamped.
        kl_weight: weight of the latent's KL divergence in ``training_loss``.
        error_scale: divisor of the reconstruction error in each action dimension, ``[A]``; None means 1, as in the
            paper.
        observation_keys: observation entries that both networks read, in this order.
        action_key: entry of the action, which the encoder reads and ``decode(states)`` writes.
        observation_specs: for each key, the spec of one observation. ``Policy.act`` checks its input with these specs.

    Writes: ``reconstruction [*B, A]``, ``loc [*B, L]``, ``log_std [*B, L]``.

    Raises:
        ValueError: if ``action_spec`` is not a finite box of rank 1, or if ``latent_dim``, ``latent_clip``,
            ``log_std_range``, ``kl_weight`` or ``error_scale`` is out of range. A call of the VAE also raises this
            error if ``noise`` has a wrong shape or a network's output has a wrong size.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.data import Bounded
        >>> from torchrl.modules import MLP
        >>> from torchrl_bcq.modules import ActionVAE
        >>> encoder = MLP(in_features=3 + 1, out_features=2 * 2, num_cells=[64])
        >>> decoder = MLP(in_features=3 + 2, out_features=1, num_cells=[64])
        >>> vae = ActionVAE(encoder, decoder, Bounded(-2, 2, (1,)), latent_dim=2)
        >>> vae.decode(TensorDict({"observation": torch.zeros(5, 3)}, [5]))["action"].shape
        torch.Size([5, 1])
        >>> reconstruction, loc, log_std = vae(observation=torch.zeros(5, 3), action=torch.zeros(5, 1))
        >>> loc.shape
        torch.Size([5, 2])

    Source: arXiv:1812.02900, section 4.1 and appendix D.1.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        action_spec: TensorSpec,
        *,
        latent_dim: int,
        latent_clip: float = 0.5,
        log_std_range: tuple[float, float] = (-4.0, 15.0),
        kl_weight: float = 0.5,
        error_scale: Tensor | Sequence[float] | None = None,
        observation_keys: Sequence[NestedKey] = ("observation",),
        action_key: NestedKey = "action",
        observation_specs: Mapping[NestedKey, TensorSpec] | None = None,
    ) -> None:
        """Build the model from its encoder and decoder."""
        super().__init__(action_spec, observation_keys, action_key, observation_specs)
        if latent_dim < 1 or not latent_clip > 0:
            raise ValueError(f"latent_dim is {latent_dim} and latent_clip {latent_clip}; both must be positive.")
        if not 0 <= kl_weight < math.inf:
            raise ValueError(f"kl_weight is {kl_weight}, expected a finite number, 0 or more.")
        if not log_std_range[0] < log_std_range[1]:
            raise ValueError(f"log_std_range is {log_std_range}, expected a lower and a higher number.")
        self.out_keys = ["reconstruction", "loc", "log_std"]
        if taken := {*observation_keys, action_key} & {*self.out_keys}:
            raise ValueError(f"the VAE writes the entries {self.out_keys}; rename the inputs {sorted(taken)}.")
        self.in_keys = [*self.observation_keys, action_key]
        self.loss_keys = ["vae_reconstruction", "vae_kl"]
        self.encoder, self.decoder = encoder, decoder
        self.latent_dim = latent_dim
        self.latent_clip = latent_clip
        self.log_std_range = log_std_range
        self.kl_weight = kl_weight
        self.error_scale = None if error_scale is None else nn.Buffer(_error_scale(error_scale, like=self.low))

    def encode(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the mean and log standard deviation of the latent: ``loc`` and ``log_std``, each ``[*B, L]``."""
        action = tensordict.get(self.action_key)
        posterior = self.encoder(*self._observations(tensordict), action)
        self._check_output(posterior, (*action.shape[:-1], 2 * self.latent_dim), "encoder")
        posterior = posterior.to(self.low.dtype)  # leave autocast's dtype, which would round small KL terms to 0
        loc, log_std = posterior.chunk(2, -1)  # [*B, 2L] -> 2 x [*B, L]
        return tensordict.set("loc", loc).set("log_std", log_std.clamp(*self.log_std_range))

    @accepts_tensors
    def forward(self, tensordict: TensorDictBase, noise: Tensor | None = None) -> TensorDictBase:
        """Encode and reconstruct the action. If ``noise [*B, L]`` is None, draw it from ``N(0, 1)``."""
        tensordict = self.encode(tensordict)
        loc, std = tensordict.get("loc"), tensordict.get("log_std").exp()
        noise = torch.randn_like(loc) if noise is None else noise
        if noise.shape != loc.shape:
            raise ValueError(f"noise has shape {tuple(noise.shape)}, expected {tuple(loc.shape)}.")
        scaled = self._decode(self._observations(tensordict), loc + std * noise)
        return tensordict.set("reconstruction", scale_to_bounds(scaled, self.low, self.high))

    def training_loss(
        self, tensordict: TensorDictBase, noise: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the negative evidence lower bound (ELBO) of each row, ``[*B]``, and its two terms.

        ``vae_reconstruction`` is the squared error, averaged over the action dimensions. ``vae_kl`` is the KL
        divergence in nats, averaged over the latent dimensions, without the factor ``kl_weight``.
        """
        out = self.forward(tensordict.copy(), noise=noise)  # a call would drop what select_out_keys drops
        reconstruction, action = out.get("reconstruction"), out.get(self.action_key)
        if reconstruction.shape != action.shape:
            raise ValueError(f"the action has shape {[*action.shape]}, expected {[*reconstruction.shape]}.")
        error = reconstruction - action
        if self.error_scale is not None:
            error = error / self.error_scale
        error = error.square().mean(-1)  # [*B, A] -> [*B]
        kl = gaussian_kl(out.get("loc"), out.get("log_std")).mean(-1)  # [*B, L] -> [*B]
        return error + self.kl_weight * kl, {"vae_reconstruction": error.detach(), "vae_kl": kl.detach()}

    def _decode(self, observations: list[Tensor], latent: Tensor) -> Tensor:
        logits = self.decoder(*observations, latent)
        self._check_output(logits, (*latent.shape[:-1], len(self.low)), "decoder")
        return logits.to(self.low.dtype).tanh()


def _error_scale(scale: Tensor | Sequence[float], like: Tensor) -> Tensor:
    """Return ``scale`` as a new tensor ``[A]``. Raise a ValueError if its size or values are wrong."""
    scale = torch.as_tensor(scale).to(like, copy=True)
    if scale.shape != like.shape or not ((scale > 0) & scale.isfinite()).all():
        raise ValueError(
            f"error_scale is {scale.tolist()}, expected {len(like)} positive numbers, one for each action dimension."
        )
    return scale
