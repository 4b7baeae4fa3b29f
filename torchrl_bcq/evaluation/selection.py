"""Estimates the values of policies on a fixed dataset, and compares them with the recorded behaviour."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.data import TensorSpec

from torchrl_bcq.actions import number_of
from torchrl_bcq.data import split_episodes
from torchrl_bcq.data.episodes import (
    check_single_steps,
    episode_numbers,
    episode_returns,
    first_rows,
    group_numbers,
    last_rows,
)
from torchrl_bcq.errors import DatasetError, remedy
from torchrl_bcq.evaluation.estimate import Estimate, bootstrap_interval
from torchrl_bcq.evaluation.fqe import clone_probabilities, fit_fqe, next_values, value_range, values_in_parts
from torchrl_bcq.evaluation.importance import ImportanceSampling
from torchrl_bcq.evaluation.policy_actions import (
    add_policy_actions,
    add_recorded_actions,
    like_data,
    policy_actions,
    recorded_actions,
)
from torchrl_bcq.evaluation.support import Support

ESTIMATORS = ("fqe", "importance_sampling", "weighted_importance_sampling", "doubly_robust", "weighted_doubly_robust")
_DISTANCE_ROWS = 2_000
_CLONED = ("steps", "batch_size", "lr", "hidden", "device")  # settings that fit_fqe and clone_probabilities share


class OffPolicyEvaluation:
    """Estimates the values of policies on one dataset, always on the same held-out episodes.

    The critics of fitted Q evaluation learn from the episodes that are not held out. The estimate is the mean value of
    the initial states of the held-out episodes. For discrete actions, importance-sampling estimates are also computed
    from the held-out episodes. They use the logged probabilities of the recorded actions (``action_probability [N]``),
    or if there are none, the probabilities of a policy that is cloned from the other episodes.

    The recorded behaviour is the policy, or the mixture of policies, that recorded the transitions.

    Args:
        transitions: recorded transitions, ``[N]``, with the entry ``episode`` or ``("next", "done")``. If they have the
            entry ``group``, groups are held out and resampled instead of episodes.
        action_spec: spec of one action.
        gamma: discount factor.
        held_out: fraction of the episodes, or of the groups, that are held out.
        seed: seed of the critics and of the policies' random actions.
        split_seed: seed of the split, as in ``split_episodes``. By default, ``seed``.
        num_samples: number of actions that are drawn in each state from a stochastic policy. It has no effect for
            discrete policies with ``get_dist``, whose exact probabilities are used.
        observation_keys: entries that the critics read.
        estimator: estimator of ``Estimate.value`` and of the verdict: ``"fqe"``, or for discrete actions
            ``"importance_sampling"``, ``"weighted_importance_sampling"``, ``"doubly_robust"`` or
            ``"weighted_doubly_robust"``. ``Estimate.difference`` says with which value each estimator
            compares the policy.
        progress_bar: whether to show progress bars.
        **fit: other arguments of ``fit_fqe``, such as ``steps``. The clone uses them as well, if it has them.

    Raises:
        DatasetError, ValueError: if the transitions have defects, or a setting is out of range.

    Example:
        >>> import torch
        >>> from torchrl.envs import GymEnv
        >>> from torchrl_bcq import OffPolicyEvaluation, make_cloning_modules
        >>> env = GymEnv("Pendulum-v1")
        >>> data = torch.cat([env.rollout(50) for _ in range(10)])
        >>> data["episode"] = torch.arange(10).repeat_interleave(50)
        >>> evaluation = OffPolicyEvaluation(data, env.action_spec, steps=5)
        >>> (policy,) = make_cloning_modules(env.observation_spec, env.action_spec)
        >>> evaluation.estimate(policy).verdict.split(":")[0]
        'cannot tell'
    """

    def __init__(
        self,
        transitions: TensorDictBase,
        action_spec: TensorSpec,
        *,
        gamma: float = 0.99,
        held_out: float = 0.2,
        seed: int = 0,
        split_seed: int | None = None,
        num_samples: int = 1,
        observation_keys: Sequence[NestedKey] = ("observation",),
        estimator: str = "fqe",
        progress_bar: bool = False,
        **fit: Any,
    ) -> None:
        allowed = ESTIMATORS[:1] if number_of(action_spec) is None else ESTIMATORS
        if estimator not in allowed:
            kind = "continuous" if number_of(action_spec) is None else "discrete"
            raise ValueError(f"estimator is {estimator!r}, expected one of {[*allowed]} for {kind} actions.")
        self.estimator = estimator
        self.action_spec, self.gamma, self.seed = like_data(action_spec, transitions), gamma, seed
        self._keys = observation_keys
        shared = {"observation_keys": observation_keys, "seed": seed, "progress_bar": progress_bar}
        self._fit: dict[str, Any] = {**shared, **fit, "gamma": gamma}
        self._clone: dict[str, Any] = {name: self._fit[name] for name in (*_CLONED, *shared) if name in self._fit}
        self._sampling: dict[str, Any] = {"num_samples": num_samples, "seed": seed, "progress_bar": progress_bar}
        self._check_episodes(transitions)
        split_seed = seed if split_seed is None else split_seed
        self._train_rows, self._held_rows = split_episodes(transitions, held_out, seed=split_seed)
        self._transitions = transitions
        self._held = transitions[self._held_rows]
        self._first = first_rows(episode_numbers(self._held))
        groups = group_numbers(self._held)
        self._groups = None if groups is None else groups[self._first].cpu().numpy()
        drawn = torch.randperm(len(self._held), generator=torch.Generator().manual_seed(seed))[:_DISTANCE_ROWS]
        self._near = drawn.sort().values  # rows whose actions are compared with the recorded ones

    @cached_property
    def behaviour(self) -> Estimate:
        """The value with which policies are compared: by fitted Q evaluation, or the mean of the recorded returns."""
        values = self._behaviour_values if self.estimator == "fqe" else self._returns_for(self.estimator).unsqueeze(-1)
        return Estimate(**self._summarize(values), residual=self._behaviour_residual)

    @property
    def units(self) -> str:
        """Unit that is held out, and drawn for the intervals: ``"episodes"`` or ``"groups"``."""
        return "episodes" if self._groups is None else "groups"

    @property
    def recorded_return(self) -> float:
        """Mean discounted return of the held-out episodes. It leaves out rewards after an episode was cut off."""
        return self._returns.mean().item()

    @cached_property
    def _returns(self) -> Tensor:
        return episode_returns(self._held, self.gamma)

    def _returns_for(self, estimator: str) -> Tensor:
        # doubly robust estimates count what follows a cut-off, so they are compared with returns that do, too
        return self._continued_returns if "robust" in estimator else self._returns

    @cached_property
    def _continued_returns(self) -> Tensor:
        """Recorded returns; if an episode was cut off, its last reward is replaced by the value of the last action."""
        reward, critics = self._held["next", "reward"].clone(), self._behaviour_critics
        last = last_rows(episode_numbers(self._held))
        last = last[~self._held["next", "terminated"].squeeze(-1)[last]]
        if len(last):
            value = values_in_parts(critics, critics.values, self._held[last])
            reward[last] = value.mean(-1, keepdim=True).to(reward.dtype)
        return episode_returns(self._held.copy().set(("next", "reward"), reward), self.gamma)

    def estimate(self, policy: TensorDictModuleBase, *, details: bool = True) -> Estimate:
        """Estimate the value of a policy, and compare it with the recorded behaviour.

        If ``details`` is False and ``estimator`` is ``"fqe"``, then ``far``, ``effective_sample_size`` and ``others``
        are not computed. This saves some seconds.
        """
        labelled = add_policy_actions(self._transitions, policy, self.action_spec, **self._sampling)
        critics = fit_fqe(labelled[self._train_rows], self.action_spec, **self._fit)
        held = labelled[self._held_rows]
        held = held.set(critics.policy_key, policy_actions(policy, held, self.action_spec, **self._sampling))
        values = values_in_parts(critics, critics.state_values, held[self._first])
        found = self._summarize(values, self._behaviour_values)
        found["residual"] = self._residual(critics, held)
        found["behaviour_residual"] = self._behaviour_residual
        if not details and self.estimator == "fqe":
            return Estimate(**found)
        if self._support is not None:
            found["far"] = self._support.share_far(held[self._near][critics.policy_key])
        if number_of(self.action_spec) is not None:
            found |= self._weigh(critics, held)
        return Estimate(**found)

    def _check_episodes(self, transitions: TensorDictBase) -> None:
        check_single_steps(transitions)
        groups = group_numbers(transitions)
        numbers = episode_numbers(transitions) if groups is None else groups
        if not int(numbers.max()):
            what = "episode" if groups is None else "group"
            raise DatasetError(
                f"the dataset has one {what}, but an estimate needs at least two: one from which the critics learn, "
                f"and one that is held out. Add more {what}s, or correct "
                + remedy(f"the entry {what!r} of the transitions.", f"the {what}s in the dataset and train again.")
            )

    @cached_property
    def _behaviour_critics(self) -> Any:
        return fit_fqe(self._add_recorded(self._transitions[self._train_rows]), self.action_spec, **self._fit)

    def _add_recorded(self, rows: TensorDictBase) -> TensorDictBase:
        return add_recorded_actions(rows, self.action_spec, observation_keys=self._keys, seed=self.seed)

    @cached_property
    def _behaviour_values(self) -> Tensor:
        """Values of the initial states by each critic of the recorded behaviour, ``[E, C]``."""
        critics = self._behaviour_critics
        return values_in_parts(critics, critics.values, self._held[self._first])

    @cached_property
    def _behaviour_residual(self) -> float:
        return self._residual(self._behaviour_critics, self._add_recorded(self._held))

    def _residual(self, critics: Any, held: TensorDictBase) -> float:
        following = next_values(critics, held).masked_fill(held["next", "terminated"], 0)
        error = held["next", "reward"] + self.gamma * following - values_in_parts(critics, critics.values, held)
        return error.double().mean().item() * self._horizon

    @cached_property
    def _support(self) -> Support | None:
        if any(self._held.get(key).dtype == torch.uint8 for key in self._keys):  # frames
            return None
        train = self._transitions[self._train_rows]
        return Support(train, self._held[self._near], self.action_spec, self._keys)

    @cached_property
    def _probability(self) -> Tensor:
        """Probabilities of the recorded actions of the held-out rows, ``[M]``."""
        if (logged := self._held.get("action_probability", None)) is not None:
            logged = logged.reshape(len(self._held))
            bad = ~((logged > 0) & (logged <= 1 + 1e-6))
            if bad.any():
                found = f"is not above 0 and at most 1 in {int(bad.sum())} held-out rows, such as {logged[bad][0]}"
                advice = "give the probability with which the recorded policy chose the action"
                raise DatasetError(f"action_probability {found}; {advice}.")
            return logged
        return clone_probabilities(self._transitions[self._train_rows], self._held, self.action_spec, **self._clone)

    def _weigh(self, critics: Any, held: TensorDictBase) -> dict[str, Any]:
        """Compute the importance-sampling and doubly robust estimates; return fields of ``Estimate`` by name.

        ``held`` are the held-out rows with the policy's probabilities in their states and next states.
        """
        taken = (recorded_actions(held, self.action_spec)[1] * held[critics.policy_key]).sum(-1)
        value, state_value = (
            values_in_parts(critics, part, held).mean(-1) for part in (critics.values, critics.state_values)
        )
        next_value = next_values(critics, held).mean(-1)
        ratio = taken.double() / self._probability
        sampling = ImportanceSampling(held, ratio, self.gamma, (value, state_value, next_value))
        own = [self._returns_for(name) for name in sampling.estimate()]
        returns = torch.stack(own, -1).cpu().numpy()  # [E, estimators]

        def compute(drawn: np.ndarray) -> np.ndarray:
            estimates = np.array([*sampling.estimate(drawn).values()])
            return np.stack([estimates, estimates - returns[drawn].mean(0)])

        names, everything = [*sampling.estimate()], compute(np.arange(len(returns)))
        low, high = self._bootstrap(compute)
        each = zip(names, everything[0].tolist(), low[0].tolist(), high[0].tolist(), strict=True)
        found: dict[str, Any] = {"others": {name: (value, *ends) for name, value, *ends in each}}
        found["effective_sample_size"] = sampling.effective_sample_size
        if self.estimator != "fqe":
            i = names.index(self.estimator)
            ends = np.stack([low, high], -1)[:, i].tolist()  # of the value and of the difference
            found |= {"value": float(everything[0, i]), "interval": tuple(ends[0])}
            found |= {"difference": float(everything[1, i]), "difference_interval": tuple(ends[1])}
            found |= {"uses_critics": "robust" in self.estimator, "uses_weights": True}
        return found

    def _summarize(self, values: Tensor, behaviour: Tensor | None = None) -> dict[str, Any]:
        """Return the estimate by fitted Q evaluation, from the initial values by each critic, ``[E, C]``."""
        numbers = (values if behaviour is None else torch.cat([values, values - behaviour], -1)).double().cpu().numpy()
        mean, count = numbers.mean(0), values.shape[-1]
        low, high = self._bootstrap(lambda drawn: numbers[drawn].mean(0))
        found: dict[str, Any] = {"value": float(mean[:count].mean()), "critics": tuple(mean[:count].tolist())}
        found |= {"interval": (float(low[:count].min()), float(high[:count].max())), "limits": self._limits}
        if behaviour is not None:
            found["difference"] = float(mean[count:].mean())
            found["difference_interval"] = float(low[count:].min()), float(high[count:].max())
        return found

    @cached_property
    def _horizon(self) -> float:
        """Mean discounted length of the episodes.

        For ``gamma < 1``, an episode that was cut off counts as infinitely long: ``1 / (1 - gamma)``.
        """
        last = last_rows(episode_numbers(self._held))
        lengths, ends = last - self._first + 1, self._held["next", "terminated"].squeeze(-1)[last]
        sums = lengths.double() if self.gamma == 1 else (1 - self.gamma ** lengths.double()) / (1 - self.gamma)
        if self.gamma < 1:
            sums = torch.where(ends, sums, 1 / (1 - self.gamma))
        return float(sums.mean())

    @cached_property
    def _limits(self) -> tuple[float, float]:
        return value_range(self._transitions, self.gamma)

    def _bootstrap(self, statistic: Callable[[np.ndarray], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        return bootstrap_interval(statistic, len(self._first), self._groups, seed=self.seed)
