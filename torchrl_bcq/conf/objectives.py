"""Configs of the objective and of its target networks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING
from torchrl.trainers.algorithms.configs.objectives import LossConfig, SoftUpdateConfig

from torchrl_bcq.objectives import BCQLoss


@dataclass
class BCQLossConfig(LossConfig):
    """:class:`~torchrl_bcq.BCQLoss` with its discount. A trainer's config fills in the networks that are missing."""

    vae_network: Any = MISSING  # the behaviour
    actor_network: Any = MISSING  # perturbs sampled actions, or null
    qvalue_network: Any = MISSING  # all critics in one module
    lmbda: float = 0.75  # weight of the minimum over critics in the target
    num_target_samples: int = 10  # actions sampled at each next state
    delay_actor: bool = True  # whether the target has an actor of its own
    delay_qvalue: bool = True  # whether the target has critics of its own
    loss_function: str = "l2"  # of the TD error: l2, smooth_l1 (Huber's) or l1
    reduction: str | None = "mean"  # mean, sum or none, over the batch
    deactivate_vmap: bool = False  # handed to the value estimator
    use_prioritized_weights: str | bool = "auto"  # whether priority_weight weighs the rows
    gamma: float = 0.99  # discount of the value estimator
    _target_: str = "torchrl_bcq.conf.objectives._make_loss"


@dataclass
class BCQSoftUpdateConfig(SoftUpdateConfig):
    """TorchRL's soft update of the target networks, at the author's pace."""

    loss_module: Any = MISSING  # a trainer's config fills in its own
    tau: float | None = 0.005  # share of the trained weights in each update


def _make_loss(*, gamma: float, **settings: Any) -> BCQLoss:
    return BCQLoss(**settings).make_value_estimator(gamma=gamma)
