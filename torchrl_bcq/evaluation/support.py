"""Measures how many actions of a policy are far from the recorded ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.data import TensorSpec

from torchrl_bcq.actions import number_of
from torchrl_bcq.bounds import action_bounds
from torchrl_bcq.evaluation.policy_actions import join_entries, recorded_actions, scale_of

_QUANTILE = 0.95
_LARGEST = 100_000  # number of recorded pairs that are searched


class Support:
    """Compares state-action pairs with recorded ones.

    The distance of a pair is its distance to the nearest pair of ``transitions``. A pair is far if its distance is
    above the 95 % quantile of the distances of the recorded pairs of ``rows``. So about 5 % of the recorded pairs of
    ``rows`` are far. The distance is Euclidean:
    observations are divided by their standard deviations, and continuous actions by half of their range. Discrete
    actions are compared only with pairs of the same action.

    Args:
        transitions: recorded transitions, ``[N]``. If there are more than 100,000, a random subset is searched.
        rows: recorded transitions of other episodes, ``[M]``.
        action_spec: spec of one action.
        observation_keys: entries of the observations, which must be vectors.
    """

    def __init__(
        self,
        transitions: TensorDictBase,
        rows: TensorDictBase,
        action_spec: TensorSpec,
        observation_keys: Sequence[NestedKey] = ("observation",),
    ) -> None:
        from scipy.spatial import cKDTree

        drawn = torch.randperm(len(transitions), generator=torch.Generator().manual_seed(0))[:_LARGEST]
        transitions = transitions[drawn.sort().values]
        states = join_entries(transitions, observation_keys)
        self._scale = scale_of(states)
        self._number, states = number_of(action_spec), states / self._scale
        _, choices = recorded_actions(transitions, action_spec)
        if self._number is None:
            low, high = action_bounds(action_spec)
            self._half = ((high - low) / 2).double().cpu().numpy()
            self._trees = [cKDTree(np.concatenate([states, choices[:, 0].double().cpu().numpy() / self._half], 1))]
        else:
            taken = choices.argmax(-1).cpu().numpy()
            self._trees = [cKDTree(states[taken == k]) if (taken == k).any() else None for k in range(self._number)]
        self._rows = join_entries(rows, observation_keys) / self._scale
        distance, weight = self._distances(recorded_actions(rows, action_spec)[1])
        known = distance[(weight > 0) & np.isfinite(distance)]  # infinite: the action was never recorded
        self._limit = np.quantile(known, _QUANTILE) if len(known) else 0.0

    def share_far(self, choices: Tensor) -> float:
        """Return the share of a policy's actions in the states of ``rows`` that are far from the recorded ones.

        Args:
            choices: result of ``policy_actions`` for ``rows``, ``[M, n, A]`` or ``[M, K]``.
        """
        distance, weight = self._distances(choices)
        return float(((distance > self._limit) * weight).sum() / weight.sum())

    def _distances(self, choices: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Return the distance of each pair of a state and an action to the nearest recorded pair, and its weight."""
        values = choices.double().cpu().numpy()
        if self._number is None:
            states = np.repeat(self._rows[:, None], values.shape[1], 1)
            distance, _ = self._trees[0].query(np.concatenate([states, values / self._half], -1))
            return distance, np.ones_like(distance)
        found = [
            np.full(len(self._rows), np.inf) if tree is None else tree.query(self._rows)[0] for tree in self._trees
        ]
        return np.stack(found, 1), values
