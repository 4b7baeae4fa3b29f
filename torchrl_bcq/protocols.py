"""What a part must offer to take the place of another one. Modules fulfil these protocols, objectives rely on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor


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
        """What to minimise for each row, ``[*B]``, and detached rows ``[*B]`` by name, to be logged.

        Args:
            tensordict: holds states and actions, batch size ``*B``; is left as it is.
            noise: what the loss draws at random, if anything; drawn if not given.
        """
        ...

    def decode(self, tensordict: TensorDictBase, latent: Tensor) -> TensorDictBase:
        """Write one action ``[*B, A]`` for each state, a function of the state and of ``latent [*B, L]`` alone."""
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
    """Compare a part with a protocol by the names of its members.

    Raises:
        TypeError: if it lacks some.
    """
    members = [*protocol.__annotations__, *(member for member in vars(protocol) if not member.startswith("_"))]
    missing = [member for member in members if not hasattr(part, member)]
    if missing:
        raise TypeError(
            f"{name} is a {type(part).__name__}, which lacks {missing}; see torchrl_bcq.protocols.{protocol.__name__}."
        )
