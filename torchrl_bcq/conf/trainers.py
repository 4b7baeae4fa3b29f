"""Config of the trainer, which knows how the other configs fit together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import MISSING, OmegaConf
from torchrl.trainers.algorithms.configs.hooks import HookConfig
from torchrl.trainers.algorithms.configs.trainers import TrainerConfig

from torchrl_bcq.objectives import BCQLoss
from torchrl_bcq.trainers import BCQOptimizationStepper, BCQTrainer

_NETWORKS = ("vae_network", "actor_network", "qvalue_network")


@dataclass
class BCQOptimizationStepperConfig(HookConfig):
    """:class:`~torchrl_bcq.BCQOptimizationStepper`; a network's own optimizer is one of TorchRL's configs."""

    loss: Any = MISSING  # a trainer's config fills in its own
    lr: float = 1e-3  # of the author's Adam optimizers
    vae_optimizer: Any = None  # in place of the VAE's
    qvalue_optimizer: Any = None  # in place of the critics'
    actor_optimizer: Any = None  # in place of the actor's
    vae_warmup_steps: int = 0  # gradient steps of the VAE alone, before critics and actor begin
    freeze_vae_after: int | None = None  # gradient steps after which the VAE stays as it is
    actor_update_interval: int = 1  # gradient steps of the critics for each of the actor
    _target_: str = "torchrl_bcq.conf.trainers._make_stepper"


@dataclass
class BCQTrainerConfig(TrainerConfig):
    """:class:`~torchrl_bcq.BCQTrainer` with all its parts, each a config, built in order after ``seed`` is set.

    ``instantiate(cfg.trainer, replay_buffer=buffer)`` takes a built part in place of a config, here and for each other
    part; what it would have been built from is then left aside. (Built networks, a tuple, are no value that a config
    can take: ``instantiate(cfg.trainer, _partial_=True)(networks=networks)``.)
    """

    total_steps: int = MISSING  # gradient steps in all, those before a resumed checkpoint included
    replay_buffer: Any = MISSING  # holds the transitions and knows its batch size
    loss_module: Any = MISSING  # the objective
    target_net_updater: Any = MISSING  # of its target networks, null where nothing is delayed
    optimization_stepper: Any = None  # the author's Adam optimizers
    dataset: Any = None  # the transitions, for a replay buffer that lacks them
    networks: Any = None  # gives (vae, actor, critics), for a loss that lacks some; may normalize what the buffer holds
    env: Any = None  # its specs size the networks and check the dataset's actions; it is never stepped
    device: Any = None  # of networks and replay buffer, where they do not say
    seed: int | None = None  # of networks and training, and of the replay buffer where it does not say
    log_interval: int = 100  # gradient steps between two updates of progress bar and logger
    compile: Any = False  # whether losses are compiled, or keywords of torch.compile
    precision: str | None = None  # of matrix products: highest, high, medium, bf16-target or bf16-mixed
    cudagraph: bool = False  # whether gradient steps are captured into CUDA graphs
    logger: Any = None  # one of TorchRL's
    progress_bar: bool = True  # needs tqdm
    clip_grad_norm: bool = True  # whether clip_norm bounds the norm of the gradients, else their values
    clip_norm: float | None = None  # null does not clip
    save_trainer_file: Any = None  # folder of the checkpoint
    save_trainer_interval: int = 10_000  # a checkpoint is written once more gradient steps than that have passed
    checkpoint: Any = None  # BCQTrainer's own
    checkpoint_rotation: Any = None  # TorchRL's, keeps several checkpoints in place of save_trainer_file
    checkpoint_metadata: Any = None  # callable that describes each of them
    log_timings: bool = False  # whether TorchRL's timers are logged
    data_parallel: bool = False  # for torchrun; each process then needs replay_buffer.seed=${oc.env:RANK}
    _recursive_: bool = False  # parts are built below, after the seed is set
    _target_: str = "torchrl_bcq.conf.trainers._make_trainer"


def _make_stepper(*, loss: BCQLoss, lr: float, **settings: Any) -> BCQOptimizationStepper:
    own = {name: settings.pop(name) for name in [*settings] if name.endswith("_optimizer")}
    stepper = BCQOptimizationStepper.adam(loss, lr=lr, **settings)
    for name, make_optimizer in own.items():
        network = name.removesuffix("_optimizer")
        if make_optimizer is None:
            continue
        if network not in loss.network_names:
            raise ValueError(f"{name} is set, but the loss trains {loss.network_names} only; leave it null.")
        stepper.optimizers[network] = make_optimizer(getattr(loss, f"{network}_network_params").parameters())
    return stepper


def _make_trainer(
    *,
    env: Any,
    dataset: Any,
    replay_buffer: Any,
    networks: Any,
    loss_module: Any,
    target_net_updater: Any,
    optimization_stepper: Any,
    device: Any,
    seed: int | None,
    **settings: Any,
) -> BCQTrainer:
    env = _build(env)
    if OmegaConf.is_dict(replay_buffer):
        replay_buffer = _build_buffer(replay_buffer, dataset, env, unset={"device": device, "seed": seed})
    if seed is not None:
        torch.manual_seed(seed)
    if OmegaConf.is_dict(loss_module):
        lacking = [name for name in _NETWORKS if OmegaConf.is_missing(loss_module, name)]
        unset = {"env": env, "device": device, "transitions": replay_buffer}
        modules = _build(networks, unset) if lacking else None
        given = {} if modules is None else dict(zip(_NETWORKS, modules, strict=True))
        loss_module = _build(loss_module, **given)
    elif OmegaConf.is_dict(networks) and networks.get("normalization"):
        raise ValueError("networks.normalization is set, but loss_module is built; build its own networks with it.")
    built = {name: instantiate(value) if OmegaConf.is_config(value) else value for name, value in settings.items()}
    return BCQTrainer(
        loss_module,
        replay_buffer,
        target_net_updater=_build(target_net_updater, loss_module=loss_module),
        optimization_stepper=_build(optimization_stepper, loss=loss_module),
        seed=seed,
        **{name: value for name, value in built.items() if value is not None},  # null is the constructor's own default
    )


def _build_buffer(part: Any, dataset: Any, env: Any, unset: Mapping[str, Any]) -> Any:
    """Build the replay buffer from the dataset; one of TorchRL's own, which is built empty, is filled with it."""
    transitions = _build(dataset, unset={"action_spec": None if env is None else env.action_spec_unbatched})
    if transitions is None:
        return _build(part, unset)
    replay_buffer = _build(part, unset, transitions=transitions)
    if "transitions" not in part.keys():
        replay_buffer.extend(transitions)
    return replay_buffer


def _build(part: Any, unset: Mapping[str, Any] | None = None, **missing: Any) -> Any:
    """Build a part from its config, if it is one.

    Live objects never enter the config: Hydra would take a TensorSpec, a dataclass, for a config of its own.

    Args:
        part: a config or an object.
        unset: for fields that the config has and leaves at null.
        missing: for fields that the config leaves at ``???``.

    Raises:
        ValueError: if a field is still missing.
    """
    if not OmegaConf.is_dict(part):
        return part
    given = {name: value for name, value in (unset or {}).items() if name in part and part[name] is None}
    given |= {name: value for name, value in missing.items() if OmegaConf.is_missing(part, name)}
    if absent := [name for name in part if OmegaConf.is_missing(part, name) and name not in given]:
        raise ValueError(
            f"{part._get_full_key(None)} lacks {absent}; set them, choose the dataset or the networks that give them, "
            "or hand the built part to instantiate."
        )
    return instantiate(part, _partial_=True)(**given)
