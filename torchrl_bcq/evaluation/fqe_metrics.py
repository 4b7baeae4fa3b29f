"""Estimates the value of a policy periodically during training, without an environment."""

from __future__ import annotations

from typing import Any

from tensordict import TensorDictBase
from torchrl.data import TensorSpec

from torchrl_bcq.evaluation.metrics import PeriodicMetrics
from torchrl_bcq.evaluation.selection import OffPolicyEvaluation
from torchrl_bcq.modules.acting import Policy


class FQEMetrics(PeriodicMetrics):
    """Logs ``fqe``, the value of the policy by fitted Q evaluation, and ``fqe_difference``.

    ``fqe_difference`` is ``fqe`` minus the estimated value of the recorded behaviour. Each measurement trains new
    critics with ``fqe_steps`` gradient steps. The first measurement also trains the critics of the recorded behaviour.

    Args:
        transitions: the whole dataset, ``[N]``, including the held-out episodes.
        policy: policy to measure; it uses the networks that the trainer trains.
        action_spec: spec of one action.
        interval: number of gradient steps between two measurements, a multiple of the trainer's ``log_interval``.
        fqe_steps: number of gradient steps of the critics.
        **settings: other arguments of ``OffPolicyEvaluation``, such as ``gamma``, ``held_out`` and ``seed``.

    Usage: ``FQEMetrics(data, policy, spec, interval=5000).register(trainer)``, and then
    ``KeepBest("run/best", "fqe").register(trainer)``.
    """

    main = "fqe"
    names = ("fqe", "fqe_difference")

    def __init__(
        self,
        transitions: TensorDictBase,
        policy: Policy,
        action_spec: TensorSpec,
        *,
        interval: int,
        fqe_steps: int = 10_000,
        **settings: Any,
    ) -> None:
        super().__init__(interval)
        if "estimator" in settings:
            raise ValueError("FQEMetrics estimates by fitted Q evaluation; leave out the argument estimator.")
        self.policy = policy
        self._evaluation = OffPolicyEvaluation(transitions, action_spec, steps=fqe_steps, **settings)

    def measure(self) -> dict[str, float]:
        """Estimate the value of the policy, and return the metrics by name."""
        found = self._evaluation.estimate(self.policy, details=False)
        return {"fqe": found.value, "fqe_difference": float(found.difference or 0)}
