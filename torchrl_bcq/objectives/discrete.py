"""The base class of objectives that learn from discrete actions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Size, Tensor, nn
from torchrl.data import TensorSpec

from torchrl_bcq.actions import DiscreteActions, check_available, check_mask
from torchrl_bcq.functional import available_logits, imitation_nll
from torchrl_bcq.objectives.base import OfflineLoss
from torchrl_bcq.objectives.values import ValueLoss
from torchrl_bcq.protocols import DiscreteNetwork, setting_of


class DiscreteLoss(OfflineLoss):
    """Base class of offline objectives with one network that scores ``K`` discrete actions.

    Args:
        networks: name of the network and the network.
        action_space: ``"categorical"`` for indices ``[*B]`` or ``[*B, 1]``, ``"one-hot"`` for vectors ``[*B, K]``, or
            the spec of one action, such as ``env.action_spec``. By default, ``network.action_space``.
        **settings: other arguments of the next base class.

    If the network has an ``action_mask_key``, or after ``loss.set_keys(action_mask="action_mask")``, the loss reads the
    mask of the available actions, booleans ``[*B, K]``, of each state and next state.
    """

    @dataclass
    class _AcceptedKeys(OfflineLoss._AcceptedKeys):
        """Keys of the batch's entries. ``action_mask`` is None if all actions are always available."""

        action_mask: NestedKey | None = None

    tensor_keys: _AcceptedKeys
    default_keys = _AcceptedKeys
    action_metric = "action_agreement"

    def __init__(
        self, networks: Mapping[str, DiscreteNetwork], *, action_space: str | TensorSpec | None = None, **settings: Any
    ) -> None:
        """Build the loss from its network."""
        ((self._scorer, network),) = networks.items()
        own_space = setting_of(network, "action_space")
        self.actions = DiscreteActions.of(own_space if action_space is None else action_space)
        own_key = setting_of(network, "action_key")
        super().__init__(networks, action_key=own_key or "action", **settings)
        if own_key is None:
            del self._decided_keys["action"]  # the network does not decide it, so set_keys may change it
        self.tensor_keys.action_mask = setting_of(network, "action_mask_key")
        self._in_keys = None

    def scores(self, states: TensorDictBase) -> list[Tensor]:
        """Return all outputs of the network, each ``[*B, K]``, in the dtype of the loss, also under autocast."""
        network = getattr(self, f"{self._scorer}_network")
        return self._read(states, network, network.out_keys)

    def first_scores(self, states: TensorDictBase) -> Tensor:
        """Return the first output of the network, ``[*B, K]``. A network without ``first`` computes all outputs."""
        network = getattr(self, f"{self._scorer}_network")
        first = getattr(network, "first", network)
        first = network if isinstance(first, nn.Module) else first  # a layer with this name, of a wrapped network
        (scores,) = self._read(states, first, network.out_keys[:1])
        return scores

    def _read(self, states: TensorDictBase, network: Callable, keys: Sequence[NestedKey]) -> list[Tensor]:
        written = network(states.exclude(self.tensor_keys.action))
        scores = [written.get(key).to(self._like.dtype) for key in keys]
        if self.actions.number not in (None, number := scores[0].shape[-1]):
            raise ValueError(f"the network scores {number} actions, but action_space has {self.actions.number}.")
        for key, score in zip(keys, scores, strict=True):
            if score.ndim != states.ndim + 1 or score.shape != (*states.batch_size, scores[0].shape[-1]):
                raise ValueError(
                    f"the network writes {key!r} of shape {tuple(score.shape)}, expected one number for each state and "
                    f"action: {(*states.batch_size, 'K')}, with the same K in each output."
                )
        return scores

    def mask(self, states: TensorDictBase, scores: Tensor, ended: Tensor | None = None) -> Tensor | None:
        """Return the mask of the available actions, ``[*B, K]``, or None if all are always available."""
        if self.tensor_keys.action_mask is None:
            return None
        mask = states.get(self.tensor_keys.action_mask)
        check_mask(mask, scores, str(self.tensor_keys.action_mask), ended)
        return mask

    def action_index(self, tensordict: TensorDictBase, scores: Tensor) -> Tensor:
        """Return the indices of the batch's actions. ``[*B, ...] -> [*B, 1]``."""
        action = tensordict.get(self.tensor_keys.action)
        return self.actions.to_index(action, scores.shape[:-1], scores.shape[-1])

    def imitation(self, logits: Tensor, index: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return ``-log p`` of the actions ``index [*B, 1]``, and whether each is the most likely one. Both ``[*B]``.

        Raises:
            ValueError: if the mask excludes an action of the batch; checked only on the CPU.
        """
        if mask is not None:
            check_available(mask, index, str(self.tensor_keys.action_mask))
        best = available_logits(logits, mask).argmax(-1, keepdim=True)
        return imitation_nll(logits, index, mask), (best == index).squeeze(-1).to(logits.dtype)

    def compare_actions(self, action: Tensor, recorded: Tensor) -> Tensor:
        """Return 1 where an action equals the recorded action, else 0. ``[*B, ...], [*B, ...] -> [*B, ...]``."""
        if not self.actions.one_hot:  # [*B] or [*B, 1]; never broadcast one against the other
            action = action.reshape(recorded.shape)
        is_equal = action == recorded
        return (is_equal.all(-1) if self.actions.one_hot else is_equal).to(self._like.dtype)

    def _batch_of(self, action: Tensor, ndim: int) -> Size:
        return self.actions.batch_size(action, ndim)

    def _other_state_keys(self) -> list[NestedKey]:
        mask = self.tensor_keys.action_mask
        return [] if mask is None else [mask]


class DiscreteValueLoss(DiscreteLoss, ValueLoss):
    """Base class of objectives that learn the values of discrete actions; see its two base classes."""

    @dataclass
    class _AcceptedKeys(DiscreteLoss._AcceptedKeys, ValueLoss._AcceptedKeys):
        """Keys of the batch's entries."""

    tensor_keys: _AcceptedKeys
    default_keys = _AcceptedKeys  # type: ignore[assignment]
