"""The networks of the paper, from two specs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict.nn import TensorDictModule
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.data import Composite, TensorSpec
from torchrl.modules import MLP

from torchrl_bcq.modules.bounds import action_bounds
from torchrl_bcq.modules.normalization import Normalization
from torchrl_bcq.modules.perturbation import PerturbationActor
from torchrl_bcq.modules.q_ensemble import QEnsemble
from torchrl_bcq.modules.vae import ActionVAE


def make_bcq_modules(
    observation_spec: TensorSpec,
    action_spec: TensorSpec,
    *,
    hidden: Sequence[int] = (400, 300),
    vae_hidden: Sequence[int] = (750, 750),
    latent_dim: int | None = None,
    latent_clip: float = 0.5,
    kl_weight: float = 0.5,
    num_critics: int = 2,
    phi: float = 0.05,
    action_key: NestedKey = "action",
    value_key: NestedKey = "state_action_value",
    normalization: Normalization | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[ActionVAE, PerturbationActor, QEnsemble]:
    """Build the author's networks: ReLU MLPs that read the concatenated observations (and action or latent).

    Args:
        observation_spec: spec of one observation ``[D]`` (read from ``"observation"``), or a Composite of such.
        action_spec: bounded spec of one action ``[A]``.
        hidden: hidden sizes of the perturbation actor and of each critic.
        vae_hidden: hidden sizes of the encoder and of the decoder.
        latent_dim: latent size, ``2 * A`` if not given.
        latent_clip: clip of sampled latents, in standard deviations.
        kl_weight: weight of the KL divergence in the VAE's loss.
        num_critics: critics in the ensemble.
        phi: largest perturbation, as a fraction of half the action range.
        action_key: entry of the action.
        value_key: entry of the critics' values.
        normalization: of the dataset, built into the networks as layers: they read standardised observations, actions
            in half-ranges around the centre of their bounds, and learn values in units of ``reward_scale``, while all
            that goes in and comes out stays in raw units, in training, acting and fine-tuning alike. Not given, the
            networks are the paper's.
        device: where the parameters live.
        dtype: of the parameters, PyTorch's default if not given.

    Returns:
        ``(vae, actor, critics)``, each initialised on its own from PyTorch's global random state.

    Raises:
        TypeError: if ``normalization`` is anything else.
        ValueError: if an observation is not a vector of ``dtype``, the action is not a finite box, or the
            normalization is of other observations.

    Source: arXiv:1812.02900, appendix D.1, with the layer sizes of the author's code.
    """
    if normalization is not None and not isinstance(normalization, Normalization):
        raise TypeError(
            f"normalization is a {type(normalization).__name__}, expected Normalization.fit(transitions), or "
            "Normalization.identity(observation_spec) before a checkpoint is loaded."
        )
    dtype = dtype or torch.get_default_dtype()
    sizes = _observation_sizes(observation_spec, dtype)
    keys, features = list(sizes), sum(sizes.values())
    low, high = (bound.double() for bound in action_bounds(action_spec))
    actions = len(low)
    latents = 2 * actions if latent_dim is None else latent_dim
    action_input = (high + low) / 2, (high - low) / 2
    latent_input = torch.zeros(latents), torch.ones(latents)

    def mlp(beside: tuple[Tensor, Tensor], out_features: int, num_cells: Sequence[int]) -> MLP:
        """Reads the observations, and beside them what has this location and scale."""
        in_features = features + len(beside[0])
        net = MLP(
            in_features=in_features,
            out_features=out_features,
            num_cells=list(num_cells),
            activation_class=nn.ReLU,
            activation_kwargs={"inplace": True},  # on its linear layer's output, which nothing else reads
        )
        if normalization is not None:
            net.insert(0, normalization.first_layer(sizes, *beside, dtype))
        return net.to(device=device, dtype=dtype)

    def critic() -> TensorDictModule:
        net = mlp(action_input, 1, hidden)
        if normalization is not None:
            net.append(normalization.last_layer(dtype).to(device))
        return TensorDictModule(net, in_keys=[*keys, action_key], out_keys=[value_key])

    vae = ActionVAE(
        mlp(action_input, 2 * latents, vae_hidden),
        mlp(latent_input, actions, vae_hidden),
        action_spec,
        latent_dim=latents,
        latent_clip=latent_clip,
        kl_weight=kl_weight,
        error_scale=None if normalization is None else action_input[1],
        observation_keys=keys,
        action_key=action_key,
    )
    actor = PerturbationActor(
        mlp(action_input, actions, hidden),
        action_spec,
        phi=phi,
        observation_keys=keys,
        action_key=action_key,
    )
    critics = QEnsemble([critic() for _ in range(num_critics)])
    return vae.to(device=device, dtype=dtype), actor.to(device=device, dtype=dtype), critics


def _observation_sizes(spec: TensorSpec, dtype: torch.dtype) -> dict[NestedKey, int]:
    """Size of each leaf."""
    leaves = list(spec.items(True, True)) if isinstance(spec, Composite) else [("observation", spec)]
    for key, leaf in leaves:
        if len(leaf.shape) != 1 or not leaf.dtype.is_floating_point:
            raise ValueError(
                f"observation {key!r} has shape {tuple(leaf.shape)} and dtype {leaf.dtype}, expected a float "
                "vector [D]; pass the leaf or a Composite of what the networks shall read, or build them by hand."
            )
        if leaf.dtype != dtype:
            raise ValueError(
                f"observation {key!r} is {leaf.dtype}, the networks {dtype}: wrap the environment in "
                f"TransformedEnv(env, DoubleToFloat()), or pass dtype={leaf.dtype}."
            )
    return {key: leaf.shape[0] for key, leaf in leaves}
