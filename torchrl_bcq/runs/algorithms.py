"""The list of algorithms that a run can train, with the networks, loss and policy of each."""

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
    """The networks, the loss, the policy and other facts of an algorithm that a run can train.

    The arguments of these functions and classes become the settings of a run. The keyword arguments of ``make_modules``
    become ``network.*``. The arguments of ``loss``, of its value estimator and of ``make_updater`` become ``loss.*``.
    The arguments of ``policy`` become ``policy.*``.

    Args:
        title: name of the algorithm in tables.
        loss: class of the objective, whose positional arguments are the networks.
        make_modules: function ``(observation_spec, action_spec, *, normalization, device, ...)`` that returns the
            networks of the loss.
        policy: function or class ``(*networks, ...)`` that returns the policy.
        make_updater: function ``(loss, *, ...)`` that returns the target updater; None for a loss without target
            networks.
        baseline: name of a second algorithm, or None. If the user chooses no dataset, ``torchrl-bcq train`` also trains
            this algorithm, for comparison.
        discrete: whether the actions are discrete.
        compared: more policies for ``torchrl-bcq evaluate``: dict from a title to a function ``(*networks)`` that
            returns the policy.
        meanings: explanations of logged metrics for ``torchrl-bcq evaluate``, by the start of their names.
    """

    title: str
    loss: type[OfflineLoss]
    make_modules: Callable[..., tuple[Any, ...]]
    policy: Callable[..., TensorDictModuleBase]
    make_updater: Callable[..., TargetNetUpdater] | None = None
    baseline: str | None = None
    discrete: bool = False
    compared: Mapping[str, Callable[..., TensorDictModuleBase]] = field(default_factory=dict)
    meanings: Mapping[str, str] = field(default_factory=dict)


def soft_update(loss: OfflineLoss, *, tau: float = 0.005) -> SoftUpdate:
    """Make an updater: each gradient step moves the targets a fraction ``tau`` towards the trained weights."""
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
        meanings={
            "held_out_loss_vae": "if it rises during training, the VAE overfits.",
            "held_out_vae_kl": (
                "near 0, the VAE ignores its latent, so the candidate actions in a state are almost equal; a smaller "
                "network.kl_weight, such as 0.01, varies them."
            ),
        },
    ),
    "cloning": Algorithm(
        title="cloning",
        loss=CloningLoss,
        make_modules=make_cloning_modules,
        policy=lambda network: network,
    ),
}


def find_algorithm(name: str) -> Algorithm:
    """Return the record of an algorithm; raises a RunError if the name is unknown."""
    if name not in ALGORITHMS:
        raise RunError(f"algorithm is {name!r}, expected one of {sorted(ALGORITHMS)}.")
    return ALGORITHMS[name]
