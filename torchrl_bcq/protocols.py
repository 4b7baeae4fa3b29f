"""What a part must offer to take the place of another one. Modules fulfil these protocols, objectives rely on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor
from torch.nn.parameter import is_lazy


class GenerativeModel(Protocol):
    """The behaviour that made the dataset, ``p(action | state)``: learned by a loss of its own, sampled from noise.

    Any :class:`torch.nn.Module` with these members can stand where :class:`~torchrl_bcq.ActionVAE` does, such as a
    mixture density network, a normalizing flow or a diffusion model. Derived from
    :class:`tensordict.nn.TensorDictModuleBase`, it is reached by ``loss.reset_parameters_recursive()`` too.

    Attributes:
        observation_keys: entries that it reads of a state.
        action_key: entry that it learns from and writes.
        latent_dim: ``L``, size of the noise from which one action is made.
        latent_clip: the noise is standard normal, clipped to this magnitude; ``math.inf`` leaves it alone.
        loss_keys: names of what :meth:`training_loss` reports, may be empty.
    """

    observation_keys: Sequence[NestedKey]
    action_key: NestedKey
    latent_dim: int
    latent_clip: float
    loss_keys: Sequence[str]

    def training_loss(
        self, tensordict: TensorDictBase, noise: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What to minimise for each row, ``[*B]``, and detached tensors to be logged, one for each of ``loss_keys``.

        Args:
            tensordict: holds states and actions, batch size ``*B``; is left as it is.
            noise: what the loss draws at random, if anything; drawn if not given.
        """
        ...

    def decode(self, tensordict: TensorDictBase, latent: Tensor) -> TensorDictBase:
        """Write one action ``[*B, A]`` for each state into ``tensordict``, and return that.

        It must be a function of the state and of ``latent [*B, L]`` alone: what it drew itself would make the policy
        random where it shall not be.
        """
        ...


class CriticEnsemble(Protocol):
    """``C`` critics in one module, such as :class:`~torchrl_bcq.QEnsemble`.

    Attributes:
        in_keys: observations and the action.
        out_keys: the last one is the entry of the values.
    """

    in_keys: Sequence[NestedKey]
    out_keys: Sequence[NestedKey]

    def __call__(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the values of all critics, ``[*B, C]``."""
        ...

    def first(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the value of the first critic, ``[*B, 1]``: the one that guides the actor and the policy."""
        ...


def require(name: str, part: object, protocol: type) -> None:
    """Compare a part with a protocol by the names of its members; raises a TypeError if it lacks some."""
    members = [*protocol.__annotations__, *(member for member in vars(protocol) if not member.startswith("_"))]
    missing = [member for member in members if not hasattr(part, member)]
    if missing:
        raise TypeError(
            f"{name} is a {type(part).__name__}, which lacks {missing}; see torchrl_bcq.protocols.{protocol.__name__}."
        )


def check_networks(
    vae: GenerativeModel,
    actor: TensorDictModuleBase | None,
    critics: CriticEnsemble,
    names: Sequence[str] = ("vae", "actor", "critics"),
) -> None:
    """Check that three networks fit together.

    Raises:
        TypeError: if one lacks a member that is needed of it.
        ValueError: if they disagree about the action's key, or one has lazy layers that have not seen data.
    """
    require(names[0], vae, GenerativeModel)
    require(names[2], critics, CriticEnsemble)
    action = vae.action_key
    if isinstance(vae.observation_keys, str):
        raise TypeError(f"{names[0]}.observation_keys is the string {vae.observation_keys!r}, expected a list of keys.")
    if action not in critics.in_keys:
        raise ValueError(f"{names[2]} reads {critics.in_keys}, but not {action!r}, which {names[0]} writes.")
    if actor is not None and (action not in actor.in_keys or list(actor.out_keys) != [action]):
        raise ValueError(
            f"{names[1]} maps {actor.in_keys} to {actor.out_keys}, expected to read and overwrite {action!r}, which "
            f"{names[0]} writes."
        )
    for name, network in zip(names, (vae, actor, critics), strict=True):
        if network is not None and any(map(is_lazy, network.parameters())):  # type: ignore[union-attr]
            raise ValueError(f"{name} has lazy layers without weights yet; call it once on data, or give in_features.")


def check_action(tensordict: TensorDictBase, action_key: NestedKey) -> TensorDictBase:
    """Raise a ValueError unless a generative model has written an action ``[*B, A]`` for each state."""
    action = tensordict.get(action_key, None)
    if action is None or action.shape[:-1] != tensordict.batch_size:
        found = "nothing" if action is None else f"shape {tuple(action.shape)}"
        raise ValueError(
            f"decode wrote {found} to {action_key!r}, expected an action [*B, A] for each state of "
            f"{tuple(tensordict.batch_size)}, in the tensordict that it was given."
        )
    return tensordict
