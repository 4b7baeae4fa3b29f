"""Configs of the networks and of the policy. A nested key is a list: ``action_key: [agent, action]``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from omegaconf import MISSING
from tensordict.nn import TensorDictModuleBase
from torchrl.data import TensorSpec
from torchrl.envs import EnvBase
from torchrl.trainers.algorithms.configs.common import _normalize_hydra_key, _normalize_hydra_keys
from torchrl.trainers.algorithms.configs.modules import NetworkConfig

from torchrl_bcq.modules import ActionVAE, Normalization, PerturbationActor, QEnsemble, make_bcq_modules

# TorchRL's ModelConfig would add in_keys, out_keys and shared, which the modules here do not take


@dataclass
class ActionVAEConfig(NetworkConfig):
    """:class:`~torchrl_bcq.ActionVAE` from networks of your own."""

    encoder: Any = MISSING  # (*observations, action) -> mean and log standard deviation, 2 * latent_dim
    decoder: Any = MISSING  # (*observations, latent) -> action before its squash
    action_spec: Any = MISSING  # bounds of one action, such as a config of torchrl.data.Bounded
    latent_dim: int = MISSING  # the author's is twice the action size
    latent_clip: float = 0.5  # of sampled latents, in standard deviations
    log_std_range: tuple[float, float] = (-4.0, 15.0)  # clamp of the encoder's log standard deviation
    kl_weight: float = 0.5  # of the KL divergence beside the reconstruction error
    error_scale: Any = None  # unit of that error in each action dimension, a list; 1
    observation_keys: list[Any] = field(default_factory=lambda: ["observation"])  # read by both networks
    action_key: Any = "action"  # read by the encoder, written when decoding
    _convert_: str = "all"
    _target_: str = "torchrl_bcq.conf.modules._make_action_vae"


@dataclass
class PerturbationActorConfig(NetworkConfig):
    """:class:`~torchrl_bcq.PerturbationActor` from a network of your own."""

    network: Any = MISSING  # (*observations, action) -> move of the action before its squash
    action_spec: Any = MISSING  # bounds of one action, such as a config of torchrl.data.Bounded
    phi: float = 0.05  # largest move, as a fraction of half the action range
    observation_keys: list[Any] = field(default_factory=lambda: ["observation"])  # read before the action
    action_key: Any = "action"  # read and overwritten
    _convert_: str = "all"
    _target_: str = "torchrl_bcq.conf.modules._make_perturbation_actor"


@dataclass
class QEnsembleConfig(NetworkConfig):
    """:class:`~torchrl_bcq.QEnsemble` from critics of your own."""

    critics: list[Any] = MISSING  # such as TorchRL's tensordict_module configs; the first guides actor and policy
    _convert_: str = "all"
    _target_: str = "torchrl_bcq.modules.QEnsemble"


@dataclass
class BCQModulesConfig(NetworkConfig):
    """The author's three networks, ``(vae, actor, critics)``, by :func:`~torchrl_bcq.make_bcq_modules`.

    An environment can be handed to ``instantiate``. A spec cannot, being a dataclass, which Hydra takes for a config:
    ``instantiate(cfg.networks, _partial_=True)(observation_spec=..., action_spec=...)``.
    """

    env: Any = None  # where the specs come from, if not given; a trainer's config fills in its own
    observation_spec: Any = None  # spec of one observation, or a Composite of such
    action_spec: Any = None  # bounded spec of one action
    hidden: list[int] = field(default_factory=lambda: [400, 300])  # layers of the actor and of each critic
    vae_hidden: list[int] = field(default_factory=lambda: [750, 750])  # layers of the encoder and of the decoder
    latent_dim: int | None = None  # twice the action size
    latent_clip: float = 0.5  # of sampled latents, in standard deviations
    kl_weight: float = 0.5  # of the KL divergence beside the reconstruction error
    num_critics: int = 2  # in the ensemble
    phi: float = 0.05  # largest perturbation, as a fraction of half the action range
    action_key: Any = "action"  # entry of the action
    value_key: Any = "state_action_value"  # entry of the critics' values
    normalization: Any = None  # true fits it to the transitions, a mapping says how, identity awaits a checkpoint
    transitions: Any = None  # what it is fitted to; a trainer's config fills in its replay buffer
    device: Any = None  # of the parameters; a trainer's config fills in its own
    dtype: str | None = None  # of the parameters, such as float64; PyTorch's default
    _convert_: str = "all"
    _target_: str = "torchrl_bcq.conf.modules._make_modules"


@dataclass
class BCQPolicyConfig(NetworkConfig):
    """:class:`~torchrl_bcq.BCQPolicy`; its three networks are handed to ``instantiate``, to share what is trained."""

    vae: Any = MISSING  # samples the candidates
    actor: Any = MISSING  # perturbs them, or null
    critics: Any = MISSING  # the first one chooses
    num_action_samples: int = 100  # candidates for each state
    chunk_size: int = 6_400  # candidates evaluated at a time
    seed: int = 0  # of the fixed latents
    return_value: bool = False  # also write chosen_action_value
    return_candidates: bool = False  # also write candidates and their action_value
    _target_: str = "torchrl_bcq.modules.BCQPolicy"


def _make_action_vae(**settings: Any) -> ActionVAE:
    return ActionVAE(**_with_nested_keys(settings))


def _make_perturbation_actor(**settings: Any) -> PerturbationActor:
    return PerturbationActor(**_with_nested_keys(settings))


def _make_modules(
    *,
    env: EnvBase | None,
    observation_spec: TensorSpec | None,
    action_spec: TensorSpec | None,
    normalization: Any,
    transitions: Any,
    dtype: Any,
    **settings: Any,
) -> tuple[ActionVAE, TensorDictModuleBase, QEnsemble]:
    if env is not None:
        observation_spec = env.observation_spec_unbatched if observation_spec is None else observation_spec
        action_spec = env.action_spec_unbatched if action_spec is None else action_spec
    if observation_spec is None or action_spec is None:
        raise ValueError("neither env nor both specs are set; choose one, such as env=gym env.env_name=Pendulum-v1.")
    dtype = None if dtype is None else getattr(torch, dtype.removeprefix("torch."))
    normalization = _make_normalization(normalization, transitions, observation_spec)
    settings = {"normalization": normalization, "dtype": dtype, **_with_nested_keys(settings)}
    return make_bcq_modules(observation_spec, action_spec, **settings)


def _make_normalization(setting: Any, transitions: Any, observation_spec: TensorSpec) -> Normalization | None:
    """What ``normalization`` stands for, fitted to all that the networks read."""
    if setting is None or setting is False or isinstance(setting, Normalization):
        return setting or None
    identity = Normalization.identity(observation_spec)
    if setting == "identity":
        return identity
    if setting is not True and not isinstance(setting, dict):
        raise ValueError(f"normalization is {setting!r}, expected true, false, identity or settings of its fit.")
    if transitions is None:
        raise ValueError(
            "normalization is to be fitted, but transitions is not set: build the networks by a trainer's config, "
            "hand transitions to instantiate, or choose normalization=identity to load a checkpoint into them."
        )
    keys = {"observation_keys": list(identity.observations)}
    given = {} if setting is True else _with_nested_keys(setting)
    return Normalization.fit(transitions[:], **{**keys, **given})


def _with_nested_keys(settings: dict[str, Any]) -> dict[str, Any]:
    """Lists of a file to the tuples of TensorDict."""
    normalize = {"observation_keys": _normalize_hydra_keys}
    return {
        name: normalize.get(name, _normalize_hydra_key)(value) if name.endswith(("_key", "_keys")) else value
        for name, value in settings.items()
    }
