"""Estimates the value of a policy with discrete actions from recorded returns, by importance sampling."""

from __future__ import annotations

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from torchrl_bcq.data.episodes import check_single_steps, episode_numbers, first_rows
from torchrl_bcq.functional import (
    doubly_robust_values,
    effective_sample_size,
    log_importance_weights,
    normalized_weights,
    per_decision_values,
)

_LARGEST = torch.finfo(torch.float64).max  # in place of an infinite weight: infinity times the reward 0 would be NaN


class ImportanceSampling:
    """Importance-sampling estimates of a policy's value, over ``E`` recorded episodes.

    Args:
        transitions: recorded transitions, ``[N]``.
        ratio: probability of each recorded action under the policy, divided by its probability under the policy that
            recorded it, ``[N]``.
        gamma: discount factor.
        values: for the doubly robust estimates, the policy's values of the recorded actions, of the states and of the
            next states, each ``[N]``, for example from the critics of ``fit_fqe``.

    Raises:
        DatasetError: if the episodes are not known (see ``episode_numbers``), or a row spans several steps.
        ValueError: if ``ratio`` or ``values`` have another shape than ``[N]``.

    Source: see the functions of ``torchrl_bcq.functional``, which this class calls.
    """

    def __init__(
        self,
        transitions: TensorDictBase,
        ratio: Tensor,
        gamma: float,
        values: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> None:
        check_single_steps(transitions)
        for name, given in {"ratio": (ratio,), "values": values or ()}.items():
            if odd := [tuple(each.shape) for each in given if each.shape != (len(transitions),)]:
                raise ValueError(f"{name} has shape {odd[0]}, expected one number for each row: ({len(transitions)},).")
        numbers = episode_numbers(transitions)
        step = torch.arange(len(numbers), device=numbers.device) - first_rows(numbers)[numbers]
        shape = (int(numbers[-1]) + 1, int(step.max()) + 1)  # [E, T]

        def pad(rows: Tensor, fill: float = 0.0) -> Tensor:
            return rows.new_full(shape, fill).index_put_((numbers, step), rows)

        padded = {"reward": pad(transitions["next", "reward"].squeeze(-1).double())}
        if values is not None:
            value, state_value, following = (each.double() for each in values)
            following = following * ~transitions["next", "terminated"].squeeze(-1)
            padded |= {"value": pad(value), "state_value": pad(state_value), "next_value": pad(following)}
        self._padded = TensorDict(padded, shape)
        self._log_weights = log_importance_weights(pad(ratio, 1.0))  # after its end, an episode keeps its weight
        self._gamma = gamma

    @property
    def effective_sample_size(self) -> float:
        """Number of equally weighted episodes that would give the same variance."""
        return effective_sample_size(self._log_weights[:, -1]).item()

    def estimate(self, episodes: np.ndarray | None = None) -> dict[str, float]:
        """Return the estimates by name, over all episodes or over those with the given numbers."""
        chosen = slice(None) if episodes is None else torch.from_numpy(episodes.astype(np.int64))
        padded, log_weights = self._padded[chosen], self._log_weights[chosen]
        kinds = {"": log_weights.exp().clamp_max(_LARGEST), "weighted_": normalized_weights(log_weights)}
        out = {
            f"{kind}importance_sampling": per_decision_values(w, padded["reward"], self._gamma)
            for kind, w in kinds.items()
        }
        if "value" in padded.keys():
            reward, value, state_value, next_value = (
                padded[name] for name in ("reward", "value", "state_value", "next_value")
            )
            for kind, w in kinds.items():
                robust = doubly_robust_values(w, reward, value, state_value, next_value, self._gamma)
                out[f"{kind}doubly_robust"] = robust
        return {name: values.mean().item() for name, values in out.items()}
