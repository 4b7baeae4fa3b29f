"""The settings of a run: what types they have; values and meanings are in ``train.yaml``."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, is_dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf

from torchrl_bcq.cli.errors import RunError

YAML = (files("torchrl_bcq.cli") / "train.yaml").read_text(encoding="utf-8")
FILE = "config.yaml"  # of a run's folder
# what a resumed run may change, or what says nothing about its networks
FREE = ("steps", "out", "resume", "progress_bar", "threads", "device", "root", "dataset", "reader",  # a digest tells
        "compile", "precision", "cudagraph")  # fmt: skip
FREE_SECTIONS = ("evaluation", "checkpoint", "early_stopping", "logger", "logger_kwargs", "policy")


@dataclass
class NetworkConfig:
    """Sizes and settings of the networks."""

    hidden: list[int] = MISSING
    vae_hidden: list[int] = MISSING
    latent_dim: int | None = MISSING
    latent_clip: float = MISSING
    kl_weight: float = MISSING
    num_critics: int = MISSING
    phi: float = MISSING


@dataclass
class LossConfig:
    """Settings of the objective and of its targets."""

    gamma: float = MISSING
    lmbda: float = MISSING
    tau: float = MISSING
    num_target_samples: int = MISSING
    loss_function: str = MISSING


@dataclass
class OptimizerConfig:
    """An optimizer and its schedule; of one network, null is what all have."""

    optimizer: str | None = MISSING
    lr: float | None = MISSING
    kwargs: dict[str, Any] = MISSING
    scheduler: str | None = MISSING
    scheduler_kwargs: dict[str, Any] = MISSING


@dataclass
class OptimConfig(OptimizerConfig):
    """Optimizers of all networks, and when each learns."""

    vae: OptimizerConfig = field(default_factory=OptimizerConfig)
    qvalue: OptimizerConfig = field(default_factory=OptimizerConfig)
    actor: OptimizerConfig = field(default_factory=OptimizerConfig)
    clip_norm: float | None = MISSING
    vae_warmup_steps: int = MISSING
    freeze_vae_after: int | None = MISSING
    actor_update_interval: int = MISSING


@dataclass
class PolicyConfig:
    """How it acts."""

    num_action_samples: int = MISSING


@dataclass
class EvaluationConfig:
    """What is measured, and when."""

    interval: int = MISSING
    env: str | None = MISSING
    episodes: int = MISSING
    seed: int = MISSING
    reference_scores: Any = MISSING
    max_rows: int = MISSING


@dataclass
class CheckpointConfig:
    """What is kept, and when."""

    interval: int = MISSING
    keep: int = MISSING
    monitor: str | None = MISSING
    mode: str = MISSING
    wait_for: int = MISSING


@dataclass
class EarlyStoppingConfig:
    """When a run ends before its last step."""

    monitor: str | None = MISSING
    mode: str = MISSING
    patience: int = MISSING
    min_delta: float = MISSING
    wait_for: int = MISSING


@dataclass
class TrainConfig:
    """All settings of ``torchrl-bcq train``."""

    dataset: str = MISSING
    reader: dict[str, Any] = MISSING
    root: str | None = MISSING
    sampler: str = MISSING
    weights: str | None = MISSING
    n_step: int = MISSING
    normalize: bool = MISSING
    held_out: float = MISSING
    steps: int = MISSING
    batch_size: int = MISSING
    seed: int = MISSING
    seeds: list[int] | None = MISSING
    device: str = MISSING
    threads: int | None = MISSING
    compile: bool = MISSING
    precision: str | None = MISSING
    cudagraph: bool = MISSING
    network: NetworkConfig = field(default_factory=NetworkConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    log_interval: int = MISSING
    logger: list[str] = MISSING
    logger_kwargs: dict[str, Any] = MISSING
    progress_bar: bool | None = MISSING
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)
    out: str = MISSING
    resume: bool = MISSING


def default_config() -> DictConfig:
    """The settings of ``train.yaml``, whose names and types are checked from here on."""
    config: Any = OmegaConf.merge(OmegaConf.structured(TrainConfig), OmegaConf.create(YAML))
    optim = (config.optim, config.optim.vae, config.optim.qvalue, config.optim.actor)
    for part in (
        config.reader,
        config.logger_kwargs,
        *(p[key] for p in optim for key in ("kwargs", "scheduler_kwargs")),
    ):
        part._set_flag("struct", False)  # takes any names, without Hydra's +
    return config


def load_config(run: Path) -> DictConfig:
    """The settings of a run: plain values, of which nothing is executed or imported.

    Raises:
        RunError: if there is no such run, or a setting is unknown or of another type.
    """
    file = run / FILE
    if not file.is_file():
        found = sorted(path.parent.name for path in run.glob(f"*/{FILE}"))
        inside = f" It holds the runs {found}; name one of them." if found else ""
        raise RunError(f"{run} is no run of torchrl-bcq train: there is no {file}.{inside}")
    try:
        return to_config(OmegaConf.create(file.read_text(encoding="utf-8")))
    except Exception as error:  # of the YAML parser and of OmegaConf
        raise RunError(f"{file} cannot be read: {error}") from error


def to_config(settings: Any) -> DictConfig:
    """Settings with the names and types of ``train.yaml``; interpolations are taken as text.

    Raises:
        omegaconf.errors.OmegaConfBaseException: if one is unknown, or of another type.
    """
    plain = OmegaConf.to_container(settings, resolve=False) if OmegaConf.is_config(settings) else settings
    config: Any = OmegaConf.merge(default_config(), OmegaConf.create(_without_interpolations(plain)))
    return config


def _without_interpolations(value: Any) -> Any:
    """What a stranger's settings would have OmegaConf look up, such as environment variables, stays text."""
    if isinstance(value, dict):
        return {key: _without_interpolations(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_interpolations(item) for item in value]
    return value.replace("${", "\\${") if isinstance(value, str) else value


def save_config(config: DictConfig, run: Path) -> None:
    """Write the settings into a run's folder; the file is whole or not there."""
    aside = run / f".{FILE}.{os.getpid()}"
    aside.write_text(OmegaConf.to_yaml(config, resolve=True), encoding="utf-8")
    aside.replace(run / FILE)


def flat(config: DictConfig) -> dict[str, Any]:
    """Settings by dotted name; lists and free-form dictionaries are values."""
    leaves: dict[str, Any] = {}
    for name, value in config.items():
        if OmegaConf.is_dict(value) and is_dataclass(OmegaConf.get_type(value)):
            leaves |= {f"{name!s}.{key}": leaf for key, leaf in flat(value).items()}
        else:
            leaves[str(name)] = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    return leaves


def check_resumable(now: DictConfig, saved: DictConfig, run: Path) -> None:
    """Whether a run may go on with other settings than it had.

    Raises:
        RunError: if one of them would make it another run; it says which.
    """
    then, asked = flat(saved), flat(now)
    differing = [
        f"{name} is {then[name]!r} in it and {asked[name]!r} now"
        for name in asked
        if asked[name] != then[name] and name not in FREE and name.split(".")[0] not in FREE_SECTIONS
    ]
    if differing:
        raise RunError(
            f"{run} cannot go on with other settings: {'; '.join(differing)}. Leave them as they were, or begin anew "
            "in another folder with out=FOLDER."
        )
