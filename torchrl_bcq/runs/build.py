"""Builds the networks, the objective, the target updater and the trainer of an algorithm."""

from __future__ import annotations

import random
from collections.abc import Sequence
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
from torchrl_bcq.trainers.average import WeightAverage
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
    """Build the networks of an algorithm. Specs that are not given are taken from ``env``.

    ``normalization`` is a ``Normalization``, or None for no scaling. If ``normalization`` is True, a normalization is
    fitted to ``transitions``, a TensorDict of batch size ``[N]`` or a replay buffer. A dictionary also fits a
    normalization, and holds arguments of ``Normalization.fit``. ``"identity"`` makes a normalization that does not
    scale until a checkpoint is loaded into the normalization.
    """
    if env is not None:
        observation_spec = env.observation_spec_unbatched if observation_spec is None else observation_spec
        action_spec = env.action_spec_unbatched if action_spec is None else action_spec
    if observation_spec is None or action_spec is None:
        raise ValueError(
            "there is no env, and not both specs are given; set env, such as env=gym env.env_name=Pendulum-v1."
        )
    settings["normalization"] = _make_normalization(normalization, transitions, observation_spec)
    return find_algorithm(algorithm).make_modules(observation_spec, action_spec, **settings)


def make_loss(algorithm: str, *networks: Any, **settings: Any) -> OfflineLoss:
    """Build the loss and its value estimator; ignore ``settings`` that belong to the target updater."""
    record = find_algorithm(algorithm)
    of_estimator = taken_by(record.loss.make_value_estimator, settings)
    of_updater = taken_by(record.make_updater, settings) if record.make_updater else {}
    own = {name: value for name, value in settings.items() if name not in {**of_estimator, **of_updater}}
    loss = record.loss(*networks, **own)
    if of_estimator:
        loss.make_value_estimator(**of_estimator)
    return loss


def make_updater(algorithm: str, loss_module: OfflineLoss, **settings: Any) -> TargetNetUpdater | None:
    """Build the target updater, or return None if the loss has no targets; ignore the loss's ``settings``."""
    make = find_algorithm(algorithm).make_updater
    return make(loss_module, **taken_by(make, settings)) if make is not None and loss_module.delayed_names else None


def make_policy(algorithm: str, *networks: Any, **settings: Any) -> TensorDictModuleBase:
    """Build the policy of an algorithm from the networks of its loss."""
    return find_algorithm(algorithm).policy(*networks, **settings)


def make_run_policy(settings: DictConfig, networks: Sequence[Any]) -> TensorDictModuleBase:
    """Build the policy of a run. Settings that the loss and the policy share are those of the loss."""
    shared = taken_by(find_algorithm(settings.algorithm).policy, settings.loss)
    return make_policy(settings.algorithm, *networks, **{**shared, **settings.policy})


def make_average(settings: DictConfig, loss: OfflineLoss) -> WeightAverage | None:
    """Return the moving average of the weights with which the policy of a run acts, or None."""
    return None if settings.average_decay is None else WeightAverage(loss, decay=settings.average_decay)


def make_objective(
    settings: DictConfig, observation_spec: TensorSpec, action_spec: TensorSpec, **given: Any
) -> tuple[OfflineLoss, TargetNetUpdater | None]:
    """Return the loss and the target updater of a run; ``given`` is passed on to ``make_networks``."""
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
    """Build a trainer from objects or Hydra configs, in the order: buffer, networks, loss, other parts.

    Args:
        algorithm: name of an algorithm in ``ALGORITHMS``.
        loss_module, replay_buffer, target_net_updater, optimization_stepper, **settings: arguments of
            ``OfflineTrainer``.
        networks: networks of the loss, if the config of the loss contains no networks. The networks can normalize their
            inputs with the mean and scale of the buffer's data.
        dataset: transitions for the replay buffer, if the config of the buffer contains no transitions.
        env: environment whose specs define the sizes of the networks and the bounds of the actions. The trainer makes
            no steps in the environment.
        device: device of the networks and of the buffer; a device in the config of a part has priority.
        seed: seed of the networks, the training and the buffer; if the config of the buffer contains a seed, the buffer
            uses that seed.

    Raises:
        ValueError: if a part lacks a required argument, or if a constructor rejects an argument.
    """
    env = build(env)
    if OmegaConf.is_dict(replay_buffer):
        transitions = build(dataset, action_spec=None if env is None else env.action_spec_unbatched)
        is_made_empty = "transitions" not in replay_buffer.keys()  # a TorchRL buffer starts empty and is filled below
        replay_buffer = build(replay_buffer, device=device, seed=seed, transitions=transitions)
        if is_made_empty and transitions is not None:
            replay_buffer.extend(transitions)
    if seed is not None:
        random.seed(seed)
        torch.manual_seed(seed)
    if OmegaConf.is_dict(loss_module):
        names, given = find_algorithm(algorithm).loss.network_arguments(), {}
        # this includes names with the value ???, because OmegaConf's `in` is false for these names
        if lacking := [name for name in names if name not in loss_module]:
            networks = build(networks, env=env, device=device, transitions=replay_buffer)
            given = {} if networks is None else dict(zip(names, networks, strict=True))
            absent = {name: None for name in lacking if name in given and given[name] is None}  # left out
            loss_module = OmegaConf.merge(loss_module, absent)
        loss_module = build(loss_module, **{name: given[name] for name in lacking if name in given})
    elif OmegaConf.is_dict(networks) and networks.get("normalization"):
        raise ValueError(
            "networks.normalization is set, but loss_module is built already; set it where you build its networks."
        )
    return OfflineTrainer(
        loss_module,
        replay_buffer,
        target_net_updater=build(target_net_updater, loss_module=loss_module),
        optimization_stepper=build(optimization_stepper, loss=loss_module),
        seed=seed,
        **{name: build(value) for name, value in settings.items()},
    )


def build(part: Any, **given: Any) -> Any:
    """Build the object that the Hydra config ``part`` describes. Anything else is returned unchanged.

    A config without ``_target_`` becomes plain values. ``given`` holds arguments that come from other parts. An
    argument in ``given`` is used if the config has null or ``???`` for this argument. The arguments in ``given`` are
    not written into the config, because Hydra would convert a TensorSpec, which is a dataclass, to a config.

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
            f"{part._get_full_key(None)} lacks {absent}; set these arguments, choose a dataset or networks that give "
            "them, or call instantiate with a finished object in place of this config."
        )
    return instantiate(part, _partial_=True)(**given)


def _make_normalization(setting: Any, transitions: Any, observation_spec: TensorSpec) -> Normalization | None:
    """Make the normalization that a setting describes, for all observations that the networks read."""
    if setting is None or setting is False or isinstance(setting, Normalization):
        return setting or None
    identity = Normalization.identity(observation_spec)
    if setting == "identity":
        return identity
    if setting is not True and not isinstance(setting, dict):
        expected = "true, false, identity, or arguments of Normalization.fit"
        raise ValueError(f"normalization is {setting!r}, expected {expected}.")
    if transitions is None:
        raise ValueError(
            "normalization=true needs the data whose mean and scale it computes: build the networks in a trainer's "
            "config, or call instantiate(config, transitions=...). If you will load a checkpoint, set "
            "normalization=identity."
        )
    fit = {} if setting is True else setting
    rows = getattr(transitions, "storage", transitions)[:]  # a replay buffer would gather the frames of all rows
    return Normalization.fit(rows, **{"observation_keys": list(identity.observations), **fit})
