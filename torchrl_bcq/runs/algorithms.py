"""The list of algorithms that a run can train, with the networks, loss and policy of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tensordict.nn import TensorDictModuleBase
from torchrl.objectives import HardUpdate, SoftUpdate
from torchrl.objectives.utils import TargetNetUpdater

from torchrl_bcq.errors import RunError
from torchrl_bcq.modules import (
    BCQPolicy,
    BehaviorCloningPolicy,
    DiscreteBCQPolicy,
    DiscreteCloningPolicy,
    make_bcq_modules,
    make_cloning_modules,
    make_discrete_bcq_modules,
    make_discrete_cloning_modules,
)
from torchrl_bcq.objectives import BCQLoss, CloningLoss, DiscreteBCQLoss, DiscreteCloningLoss, OfflineLoss

_DISCRETE = {"optim.lr": 3e-4, "batch_size": 64}  # the author's settings for vectors, arXiv:1910.01708
_MOST_LIKELY = 1 - 1e-6  # with this threshold, only the most likely action passes


@dataclass(frozen=True)
class Algorithm:
    """The networks, the loss, the policy and other facts of an algorithm that a run can train.

    The arguments of these functions and classes become the settings of a run. The keyword arguments of ``make_modules``
    become ``network.*``. The arguments of ``loss``, of its value estimator and of ``make_updater`` become ``loss.*``.
    The arguments of ``policy`` become ``policy.*``; those that the loss also has remain settings of the loss.

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
        defaults: defaults of settings that differ from the defaults of the code that uses them, by dotted name.
        compared: more policies for ``torchrl-bcq evaluate``: dict from a title to a function ``(*networks)`` that
            returns the policy.
        requires: settings that have an effect only with one value of another setting: dict from a name to the other
            name and this value.
        meanings: explanations of logged metrics for ``torchrl-bcq evaluate``, by the start of their names.
    """

    title: str
    loss: type[OfflineLoss]
    make_modules: Callable[..., tuple[Any, ...]]
    policy: Callable[..., TensorDictModuleBase]
    make_updater: Callable[..., TargetNetUpdater] | None = None
    baseline: str | None = None
    discrete: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    compared: Mapping[str, Callable[..., TensorDictModuleBase]] = field(default_factory=dict)
    requires: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    meanings: Mapping[str, str] = field(default_factory=dict)


def soft_update(loss: OfflineLoss, *, tau: float = 0.005) -> SoftUpdate:
    """Make an updater: each gradient step moves the targets a fraction ``tau`` towards the trained weights."""
    return SoftUpdate(loss, tau=tau)


def soft_or_hard_update(loss: OfflineLoss, *, tau: float = 0.005, copy_interval: int | None = None) -> TargetNetUpdater:
    """Make a soft updater; with ``copy_interval``, one that copies the weights every ``copy_interval`` steps."""
    if copy_interval is None:
        return SoftUpdate(loss, tau=tau)
    if copy_interval < 1:
        raise RunError(f"loss.copy_interval is {copy_interval}, expected at least 1 step, or null for soft updates.")
    return HardUpdate(loss, value_network_update_interval=copy_interval - 1)  # TorchRL copies one step later


ALGORITHMS: dict[str, Algorithm] = {
    "bcq": Algorithm(
        title="BCQ",
        loss=BCQLoss,
        make_modules=make_bcq_modules,
        policy=BCQPolicy,
        make_updater=soft_update,
        baseline="cloning",
        requires={
            "network.latent_dim": ("network.behavior", "vae"),
            "network.latent_clip": ("network.behavior", "vae"),
            "network.kl_weight": ("network.behavior", "vae"),
            "network.num_components": ("network.behavior", "mixture"),
            "network.noise_clip": ("network.behavior", "mixture"),
            "network.flow_steps": ("network.behavior", "flow"),
        },
        compared={"behaviour model": lambda behavior, actor, critics: BehaviorCloningPolicy(behavior)},
        meanings={
            "held_out_loss_vae": "if it rises during training, the behaviour model overfits.",
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
    "discrete_bcq": Algorithm(
        title="discrete BCQ",
        loss=DiscreteBCQLoss,
        make_modules=make_discrete_bcq_modules,
        policy=DiscreteBCQPolicy,
        make_updater=soft_or_hard_update,
        baseline="discrete_cloning",
        discrete=True,
        defaults=_DISCRETE,
        compared={"imitation": lambda network: DiscreteBCQPolicy(network, unlikely_action_threshold=_MOST_LIKELY)},
        meanings={
            "held_out_imitation_accuracy": "share of the recorded actions that the behaviour model finds most likely.",
            "held_out_allowed_share": (
                "share of the actions that pass the threshold: if it is near 1 / (number of actions), the policy "
                "clones; if it is near 1, it is Q-learning."
            ),
        },
    ),
    "discrete_cloning": Algorithm(
        title="cloning",
        loss=DiscreteCloningLoss,
        make_modules=make_discrete_cloning_modules,
        policy=DiscreteCloningPolicy,
        discrete=True,
        defaults=_DISCRETE,
        meanings={
            "held_out_imitation_accuracy": "share of the recorded actions that the network finds most likely.",
        },
    ),
}


def algorithms_of(discrete: bool) -> list[str]:
    """Return the names of the algorithms for discrete or for continuous actions, the main one first."""
    return [name for name, record in ALGORITHMS.items() if record.discrete == discrete]


def find_algorithm(name: str) -> Algorithm:
    """Return the record of an algorithm; raises a RunError if the name is unknown."""
    if name not in ALGORITHMS:
        found = f"algorithm is {name!r}, expected one of {sorted(ALGORITHMS)}"
        raise RunError(f"{found}. If a script defines it, run this script in place of torchrl-bcq.")
    return ALGORITHMS[name]
