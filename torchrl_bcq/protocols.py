"""Protocols: methods and attributes that your own networks need to work with the losses and policies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torchrl.modules import BatchRenorm1d


class GenerativeModel(Protocol):
    """Model of the behaviour policy ``p(action | state)``: the model has its own loss and computes actions from noise.

    Any ``torch.nn.Module`` with the members of ``GenerativeModel`` can replace ``ActionVAE``, such as a mixture density
    network, a normalizing flow or a diffusion model. If the module is a ``tensordict.nn.TensorDictModuleBase``,
    ``loss.reset_parameters_recursive()`` also resets the parameters of this module.

    Attributes:
        observation_keys: observation entries that the model reads.
        action_key: entry of the action, which ``training_loss`` reads and ``decode`` writes.
        latent_dim: size of the noise for one action, ``L``.
        latent_clip: largest magnitude of the standard normal noise. ``math.inf`` means no clipping.
        loss_keys: names of the metadata that ``training_loss`` returns; may be empty.
    """

    observation_keys: Sequence[NestedKey]
    action_key: NestedKey
    latent_dim: int
    latent_clip: float
    loss_keys: Sequence[str]

    def training_loss(
        self, tensordict: TensorDictBase, noise: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of each row, ``[*B]``, and its metadata: one detached tensor for each of ``loss_keys``.

        Args:
            tensordict: states and actions with the batch size ``*B``; the method must not change this tensordict.
            noise: random numbers for a loss that needs them; if ``noise`` is None, the method draws the numbers.
        """
        ...

    def decode(self, tensordict: TensorDictBase, latent: Tensor) -> TensorDictBase:
        """Write one action for each state, ``[*B, A]``, into ``tensordict``, and return ``tensordict``.

        The action must depend only on the state and on ``latent [*B, L]``. If the method drew its own random numbers, a
        deterministic policy would not be possible.
        """
        ...


class CriticEnsemble(Protocol):
    """``C`` critics in one module, such as ``QEnsemble``.

    Attributes:
        in_keys: entries of the observations and of the action.
        out_keys: entries that the module writes. The last entry holds the values.
    """

    in_keys: Sequence[NestedKey]
    out_keys: Sequence[NestedKey]

    def __call__(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the values of all critics, ``[*B, C]``."""
        ...

    def first(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the first critic's value, ``[*B, 1]``, which the actor's loss and by default the policy use."""
        ...


class DiscreteNetwork(Protocol):
    """Network that scores ``K`` discrete actions, such as ``MultiHeadNetwork`` or any ``TensorDictModule``.

    Attributes:
        in_keys: observation entries that the network reads.
        out_keys: entries ``[*B, K]`` that the network writes. For BCQ: the values and the logits of the behaviour
            policy, in this order. For cloning: the logits. Logits are unbounded: no softmax, no ReLU.

    The network may also have the attributes ``action_key`` (``"action"`` if the network lacks it), ``action_space``
    (which can also be passed to the loss and the policy), ``action_mask_key`` (entry ``[*B, K]`` of the available
    actions), ``observation_specs`` (see ``Policy``), and the method ``first``, which writes the first output alone and
    makes the target faster.
    """

    in_keys: Sequence[NestedKey]
    out_keys: Sequence[NestedKey]

    def __call__(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the scores of all actions, each ``[*B, K]``."""
        ...


def require(name: str, part: object, protocol: type) -> None:
    """Raise a TypeError if ``part`` lacks an attribute or a method of ``protocol``. Types are not checked."""
    members = [*protocol.__annotations__, *(member for member in vars(protocol) if not member.startswith("_"))]
    missing = [member for member in members if not hasattr(part, member)]
    if missing:
        raise TypeError(
            f"{name} is a {type(part).__name__}, which lacks {missing}; add the members of "
            f"torchrl_bcq.protocols.{protocol.__name__}."
        )


def check_networks(
    vae: GenerativeModel,
    actor: TensorDictModuleBase | None,
    critics: CriticEnsemble,
    names: Sequence[str] = ("vae", "actor", "critics"),
) -> None:
    """Check that the three networks of BCQ can be used together.

    Raises:
        TypeError: if a network lacks a member of its protocol, or ``observation_keys`` is a string.
        ValueError: if the networks use different action keys, or a network has recurrent or uninitialised lazy layers.
    """
    require(names[0], vae, GenerativeModel)
    require(names[2], critics, CriticEnsemble)
    action = vae.action_key
    if isinstance(vae.observation_keys, str):
        raise TypeError(f"{names[0]}.observation_keys is the string {vae.observation_keys!r}, expected a list of keys.")
    if action not in critics.in_keys:
        raise ValueError(
            f"{names[2]} reads {critics.in_keys}, but not the action {action!r}, which {names[0]} writes; use one "
            "action key for all networks."
        )
    if actor is not None and not (hasattr(actor, "in_keys") and hasattr(actor, "out_keys")):
        raise TypeError(f"{names[1]} is a {type(actor).__name__}, expected a TensorDictModule, or None for no actor.")
    if actor is not None and (action not in actor.in_keys or list(actor.out_keys) != [action]):
        raise ValueError(
            f"{names[1]} reads {actor.in_keys} and writes {actor.out_keys}; it must read and overwrite only the action "
            f"{action!r}, which {names[0]} writes."
        )
    for name, network in zip(names, (vae, actor, critics), strict=True):
        if network is not None:
            check_initialized(name, network)
            check_not_recurrent(name, network)


def check_discrete_network(name: str, network: DiscreteNetwork, outputs: Sequence[str]) -> None:
    """Check that a network writes the given outputs for each discrete action.

    Raises:
        TypeError: if the network lacks a member of ``DiscreteNetwork``.
        ValueError: if the network writes another number of entries, or has uninitialised lazy layers.
    """
    require(name, network, DiscreteNetwork)
    if len(network.out_keys) != len(outputs):
        raise ValueError(
            f"{name} writes {[*network.out_keys]}, expected {len(outputs)} "
            f"{'entry' if len(outputs) == 1 else 'entries'}: {' and '.join(outputs)}, each [*B, K]."
        )
    check_initialized(name, network)


def setting_of(network: Any, name: str, default: Any = None) -> Any:
    """Return an attribute of a network or, if it lacks the attribute, of the first layer that has it."""
    found = (getattr(module, name, None) for module in network.modules())
    return next((value for value in found if value is not None), default)


def recurrent_layers(network: Any) -> list[str]:
    """List the class names of the network's recurrent layers of TorchRL."""
    return [type(layer).__name__ for layer in network.modules() if hasattr(layer, "recurrent_mode")]


def check_not_recurrent(name: str, network: Any) -> None:
    """Raise a ValueError if a network has a recurrent layer of TorchRL, which would take candidates for time steps."""
    if found := recurrent_layers(network):
        raise ValueError(
            f"{name} has a recurrent layer ({found[0]}), which would take the actions that are compared in a state for "
            "a time series; give the network the last observations instead, as stack_observations does."
        )


def has_batch_norm(*networks: Any) -> bool:
    """Whether a layer normalizes over the rows of a batch, so that it needs all rows in one dimension."""
    layers = (layer for network in networks if network is not None for layer in network.modules())
    return any(isinstance(layer, (_BatchNorm, BatchRenorm1d)) for layer in layers)


def check_initialized(name: str, network: Any) -> None:
    """Raise a ValueError if a network has lazy layers that are not initialised."""
    if any(map(is_lazy, network.parameters())):
        raise ValueError(f"{name} has uninitialised lazy layers; call {name} once with data, or set in_features.")


def decode_action(model: GenerativeModel, tensordict: TensorDictBase, latent: Tensor) -> TensorDictBase:
    """Let a behaviour model write an action ``[*B, A]`` for each state, and check its shape."""
    return _take_action("decode", model.decode(tensordict, latent), tensordict, model.action_key)


def perturb_action(actor: TensorDictModuleBase, tensordict: TensorDictBase) -> TensorDictBase:
    """Let an actor overwrite the action ``[*B, A]`` of each state, and check its shape."""
    # a copy, because select_out_keys drops entries that the actor does not read
    return _take_action("the actor", actor(tensordict.copy()), tensordict, actor.out_keys[0])


def _take_action(
    name: str, written: TensorDictBase | None, tensordict: TensorDictBase, action_key: NestedKey
) -> TensorDictBase:
    action = None if written is None else written.get(action_key, None)
    if action is None or action.shape[:-1] != tensordict.batch_size:
        found = "nothing" if action is None else f"a tensor of shape {tuple(action.shape)}"
        raise ValueError(
            f"{name} wrote {found} to {action_key!r}; it must write one action for each state, [*B, A] with *B = "
            f"{tuple(tensordict.batch_size)}, into the given tensordict and return this tensordict."
        )
    return tensordict if written is tensordict else tensordict.set(action_key, action)
