"""The networks of the paper, from two specs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict.nn import TensorDictModule
from tensordict.utils import NestedKey
from torch import nn
from torchrl.data import Composite, TensorSpec
from torchrl.modules import MLP

from torchrl_bcq.modules.bounds import action_bounds
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
        device: where the parameters live.
        dtype: of the parameters, PyTorch's default if not given.

    Returns:
        ``(vae, actor, critics)``, each initialised on its own from PyTorch's global random state.

    Raises:
        ValueError: if an observation is not a vector of ``dtype``, or the action is not a finite box.

    Source: arXiv:1812.02900, appendix D.1, with the layer sizes of the author's code.
    """
    dtype = dtype or torch.get_default_dtype()
    keys, features = _observation_sizes(observation_spec, dtype)
    actions = action_bounds(action_spec)[0].numel()
    latents = 2 * actions if latent_dim is None else latent_dim

    def mlp(in_features: int, out_features: int, num_cells: Sequence[int]) -> MLP:
        net = MLP(
            in_features=in_features, out_features=out_features, num_cells=list(num_cells), activation_class=nn.ReLU
        )
        return net.to(device=device, dtype=dtype)

    vae = ActionVAE(
        mlp(features + actions, 2 * latents, vae_hidden),
        mlp(features + latents, actions, vae_hidden),
        action_spec,
        latent_dim=latents,
        latent_clip=latent_clip,
        kl_weight=kl_weight,
        observation_keys=keys,
        action_key=action_key,
    )
    actor = PerturbationActor(
        mlp(features + actions, actions, hidden),
        action_spec,
        phi=phi,
        observation_keys=keys,
        action_key=action_key,
    )
    critics = QEnsemble(
        [
            TensorDictModule(mlp(features + actions, 1, hidden), in_keys=[*keys, action_key], out_keys=[value_key])
            for _ in range(num_critics)
        ]
    )
    return vae.to(device=device, dtype=dtype), actor.to(device=device, dtype=dtype), critics


def _observation_sizes(spec: TensorSpec, dtype: torch.dtype) -> tuple[list[NestedKey], int]:
    """Keys of all leaves, and the sum of their sizes."""
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
    return [key for key, _ in leaves], sum(leaf.shape[0] for _, leaf in leaves)
