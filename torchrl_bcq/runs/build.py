"""Builds the networks, the objective, the target updater and the trainer of an algorithm."""

from __future__ import annotations

import random
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from tensordict.nn import TensorDictModuleBase
from torchrl.data import TensorSpec
from torchrl.envs import EnvBase
from torchrl.objectives.utils import TargetNetUpdater

from torchrl_bcq.modules import Normalization
from torchrl_bcq.objectives import OfflineLoss
from torchrl_bcq.runs.algorithms import find_algorithm
from torchrl_bcq.runs.signatures import taken_by
from torchrl_bcq.trainers.offline import OfflineTrainer


def make_networks(
    algorithm: str,
    *,
    env: EnvBase | None = None,
    observation_spec: TensorSpec | None = None,
    action_spec: TensorSpec | None = None,
    normalization: Any = None,
    transitions: Any = None,
    **settings: Any,
) -> tuple[Any, ...]:
    """Build the networks of an algorithm. The specs are those of ``env`` if not given.

    ``normalization`` is a :class:`~torchrl_bcq.Normalization`; True or settings of its ``fit``, to fit one to
    ``transitions`` (of batch size ``[N]``, or a replay buffer); or ``"identity"``, to load a checkpoint into.
    """
    if env is not None:
        observation_spec = env.observation_spec_unbatched if observation_spec is None else observation_spec
        action_spec = env.action_spec_unbatched if action_spec is None else action_spec
    if observation_spec is None or action_spec is None:
        raise ValueError("neither env nor both specs are set; choose one, such as env=gym env.env_name=Pendulum-v1.")
    settings["normalization"] = _make_normalization(normalization, transitions, observation_spec)
    return find_algorithm(algorithm).make_modules(observation_spec, action_spec, **settings)


def make_loss(algorithm: str, *networks: Any, **settings: Any) -> OfflineLoss:
    """Build the objective of an algorithm; settings of its value estimator are used, those of its updater ignored."""
    record = find_algorithm(algorithm)
    of_estimator = taken_by(record.loss.make_value_estimator, settings)
    of_updater = taken_by(record.make_updater, settings) if record.make_updater else {}
    own = {name: value for name, value in settings.items() if name not in {**of_estimator, **of_updater}}
    loss = record.loss(*networks, **own)
    if of_estimator:
        loss.make_value_estimator(**of_estimator)
    return loss


def make_updater(algorithm: str, loss_module: OfflineLoss, **settings: Any) -> TargetNetUpdater | None:
    """Build the target updater of an algorithm, None for a loss without targets; settings of the loss are ignored."""
    make = find_algorithm(algorithm).make_updater
    return make(loss_module, **taken_by(make, settings)) if make is not None and loss_module.delayed_names else None


def make_policy(algorithm: str, *networks: Any, **settings: Any) -> TensorDictModuleBase:
    """Build the policy of an algorithm from the networks of its loss."""
    return find_algorithm(algorithm).policy(*networks, **settings)


def make_objective(
    settings: DictConfig, observation_spec: TensorSpec, action_spec: TensorSpec, **given: Any
) -> tuple[OfflineLoss, TargetNetUpdater | None]:
    """Build the objective of a run and its target updater; ``given`` are other arguments of :func:`make_networks`."""
    plain: Any = OmegaConf.to_container(settings, resolve=True)
    specs = {"observation_spec": observation_spec, "action_spec": action_spec}
    networks = make_networks(plain["algorithm"], **specs, **given, **plain["network"])
    loss = make_loss(plain["algorithm"], *networks, **plain["loss"])
    return loss, make_updater(plain["algorithm"], loss, **plain["loss"])


def make_trainer(
    *,
    algorithm: str,
    loss_module: Any,
    replay_buffer: Any,
    target_net_updater: Any = None,
    optimization_stepper: Any = None,
    networks: Any = None,
    dataset: Any = None,
    env: Any = None,
    device: Any = None,
    seed: int | None = None,
    **settings: Any,
) -> OfflineTrainer:
    """Build a trainer from Hydra configs or built parts, in this order: buffer, networks, loss, others.

    Args:
        algorithm: name in ``ALGORITHMS``.
        loss_module, replay_buffer, target_net_updater, optimization_stepper, **settings: of ``OfflineTrainer``.
        networks: for a loss that lacks some; they may be normalized by the data of the buffer.
        dataset: the transitions, for a buffer that lacks them.
        env: its specs size the networks and check the dataset's actions; it is never stepped.
        device: of networks and buffer, unless they have their own.
        seed: of networks and training, and of the buffer unless it has its own.

    Raises:
        ValueError: if a part lacks an argument that no other part gives, or a constructor refuses one.
    """
    env = build(env)
    if OmegaConf.is_dict(replay_buffer):
        transitions = build(dataset, action_spec=None if env is None else env.action_spec_unbatched)
        is_made_empty = "transitions" not in replay_buffer.keys()  # as TorchRL's own
        replay_buffer = build(replay_buffer, device=device, seed=seed, transitions=transitions)
        if is_made_empty and transitions is not None:
            replay_buffer.extend(transitions)
    if seed is not None:
        random.seed(seed)
        torch.manual_seed(seed)
    if OmegaConf.is_dict(loss_module):
        names, given = find_algorithm(algorithm).loss.network_arguments(), {}
        if lacking := [name for name in names if name not in loss_module]:  # those at ??? are not in it
            networks = build(networks, env=env, device=device, transitions=replay_buffer)
            given = {} if networks is None else dict(zip(names, networks, strict=True))
        loss_module = build(loss_module, **{name: given[name] for name in lacking if name in given})
    elif OmegaConf.is_dict(networks) and networks.get("normalization"):
        raise ValueError("networks.normalization is set, but loss_module is built; build its own networks with it.")
    return OfflineTrainer(
        loss_module,
        replay_buffer,
        target_net_updater=build(target_net_updater, loss_module=loss_module),
        optimization_stepper=build(optimization_stepper, loss=loss_module),
        seed=seed,
        **{name: build(value) for name, value in settings.items()},
    )


def build(part: Any, **given: Any) -> Any:
    """Build a part from a Hydra config; anything else is built already. A config without ``_target_`` is plain values.

    ``given`` by other parts are arguments that the config leaves at null or ``???``. They never enter the config: Hydra
    would take a TensorSpec, which is a dataclass, for one.

    Raises:
        ValueError: if an argument is still missing.
    """
    if not OmegaConf.is_dict(part):
        return part
    if "_target_" not in part:
        return OmegaConf.to_container(part, resolve=True)
    from hydra.utils import instantiate

    given = {name: value for name, value in given.items() if name in part.keys() and part.get(name) is None}
    if absent := [name for name in part if OmegaConf.is_missing(part, name) and given.get(name) is None]:
        raise ValueError(
            f"{part._get_full_key(None)} lacks {absent}; set them, choose the dataset or the networks that give them, "
            "or hand the built part to instantiate."
        )
    return instantiate(part, _partial_=True)(**given)


def _make_normalization(setting: Any, transitions: Any, observation_spec: TensorSpec) -> Normalization | None:
    """The normalization that a setting asks for, of all that the networks read."""
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
    fit = {} if setting is True else setting
    return Normalization.fit(transitions[:], **{"observation_keys": list(identity.observations), **fit})
