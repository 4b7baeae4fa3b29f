"""One record per algorithm: training, evaluation, resuming and loading read it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tensordict.nn import TensorDictModuleBase
from torchrl.objectives import SoftUpdate
from torchrl.objectives.utils import TargetNetUpdater

from torchrl_bcq.errors import RunError
from torchrl_bcq.modules import BCQPolicy, BehaviorCloningPolicy, make_bcq_modules, make_cloning_modules
from torchrl_bcq.objectives import BCQLoss, CloningLoss, OfflineLoss


@dataclass(frozen=True)
class Algorithm:
    """What a training run knows of an algorithm.

    The settings of a run follow from the signatures: ``network.*`` are the keyword-only arguments of ``make_modules``,
    ``loss.*`` those of ``loss``, of its value estimator and of ``make_updater``, ``policy.*`` those of ``policy``.

    Args:
        title: name in tables.
        loss: class of the objective. Its positional arguments are networks.
        make_modules: ``(observation_spec, action_spec, *, normalization, device, ...)`` to the networks of the loss.
        policy: ``(*networks, ...)`` to the policy.
        make_updater: ``(loss, *, ...)`` to the target updater; None for a loss without targets.
        baseline: name of the algorithm to compare with.
        discrete: whether actions are discrete.
        compared: other policies of the same networks by title, each made from ``(*networks)``.
    """

    title: str
    loss: type[OfflineLoss]
    make_modules: Callable[..., tuple[Any, ...]]
    policy: Callable[..., TensorDictModuleBase]
    make_updater: Callable[..., TargetNetUpdater] | None = None
    baseline: str | None = None
    discrete: bool = False
    compared: Mapping[str, Callable[..., TensorDictModuleBase]] = field(default_factory=dict)


def soft_update(loss: OfflineLoss, *, tau: float = 0.005) -> SoftUpdate:
    """Move the targets by ``tau`` of the way to the trained weights after each gradient step."""
    return SoftUpdate(loss, tau=tau)


ALGORITHMS: dict[str, Algorithm] = {
    "bcq": Algorithm(
        title="BCQ",
        loss=BCQLoss,
        make_modules=make_bcq_modules,
        policy=BCQPolicy,
        make_updater=soft_update,
        baseline="cloning",
        compared={"VAE-BC": lambda vae, actor, critics: BehaviorCloningPolicy(vae)},
    ),
    "cloning": Algorithm(
        title="cloning",
        loss=CloningLoss,
        make_modules=make_cloning_modules,
        policy=lambda network: network,
    ),
}


def find_algorithm(name: str) -> Algorithm:
    """The record of an algorithm; raises a RunError if there is none of that name."""
    if name not in ALGORITHMS:
        raise RunError(f"algorithm is {name!r}, expected one of {sorted(ALGORITHMS)}.")
    return ALGORITHMS[name]
