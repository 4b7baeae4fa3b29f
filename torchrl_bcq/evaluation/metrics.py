"""Periodic metrics of training: in environments, and on data alone."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.envs import EnvBase
from torchrl.trainers.trainers import Trainer, TrainerHookBase

from torchrl_bcq.data.episodes import episode_numbers
from torchrl_bcq.evaluation.rollouts import Policy, Value, evaluate, in_eval_mode, own_random_state, summarize
from torchrl_bcq.objectives import OfflineLoss

_CHUNK = 4_096  # rows evaluated at a time
_logger = logging.getLogger(__name__)


class _PeriodicMetrics(TrainerHookBase):
    """Measures and logs every ``interval`` gradient steps, before the first and after the last one."""

    main: str  # the metric on the progress bar

    def __init__(self, interval: int) -> None:
        if interval < 1:
            raise ValueError(f"interval is {interval}, expected at least 1 gradient step.")
        self.interval = interval
        self._trainer: Any = None

    @abstractmethod
    def measure(self) -> dict[str, float] | None:
        """The present metrics by name; None if a stop was requested meanwhile."""

    def __call__(self, batch: TensorDictBase | None = None) -> None:
        """Measure and log, if it is time."""
        trainer = self._trainer
        step = trainer.collected_frames
        if self._should_stop() or (step % self.interval and step < trainer.total_frames):
            return
        metrics = self.measure()
        if metrics is not None:
            for name, value in metrics.items():
                trainer._log(log_pbar=name == self.main, **{name: value})
            _logger.info("step %d: %s", step, ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))

    def _should_stop(self) -> bool:
        return getattr(self._trainer, "stop_requested", getattr(self._trainer, "_stop_training", False))

    def _at_the_start(self) -> None:
        """Measure before the first step, or after a stop that prevented it."""
        if self._trainer._last_log.get(self.main) != self._trainer.collected_frames:
            self()

    def register(self, trainer: Trainer, name: str = "") -> None:
        """Register with a trainer, whose ``log_interval`` must divide the interval."""
        log_interval = trainer.collector.requested_frames_per_batch
        if self.interval % log_interval:
            found = f"the interval of {type(self).__name__} is {self.interval}"
            raise ValueError(f"{found}, no multiple of log_interval {log_interval}; change one of them.")
        self._trainer = trainer
        trainer.register_op("setup", self._at_the_start)
        trainer.register_op("post_steps_log", self)


class EnvironmentMetrics(_PeriodicMetrics):
    """Logs the returns of a policy in environments, one episode in each, from the same initial states every time.

    Logs ``return`` (mean over the episodes, undiscounted) and its ``return_std``, ``episode_length`` in steps, D4RL's
    ``normalized_score`` if there are ``reference_scores``, and with ``value`` the ``value_estimate`` at the initial
    states beside the ``discounted_return`` obtained from there, which shows overestimation.

    Args:
        envs: batch size ``[E]``.
        policy: of the networks that are trained.
        interval: gradient steps between two evaluations, a multiple of the trainer's ``log_interval``.
        value: estimates the value of state-action pairs, such as ``loss.value``.
        gamma: discount.
        seed: of environments and policy.
        reference_scores: mean return of a random policy and of an expert, scaled to 0 and 100.

    ``EnvironmentMetrics(envs, policy, interval=5000, value=loss.value).register(trainer)``.

    Source: normalized scores, arXiv:2004.07219; estimates beside returns, arXiv:1802.09477, figure 1.
    """

    main = "return"

    def __init__(
        self,
        envs: EnvBase,
        policy: Policy,
        *,
        interval: int,
        value: Value | None = None,
        gamma: float = 0.99,
        seed: int = 0,
        reference_scores: Sequence[float] | None = None,
    ) -> None:
        super().__init__(interval)
        self.reference_scores = reference_scores
        settings: dict[str, Any] = {"value": value, "gamma": gamma, "seed": seed}
        self._evaluate = partial(evaluate, envs, policy, should_stop=self._should_stop, **settings)

    def measure(self) -> dict[str, float] | None:
        """Run the episodes."""
        found = self._evaluate()
        return None if found is None else summarize(found, self.reference_scores)


class DatasetMetrics(_PeriodicMetrics):
    """Logs metrics on transitions, without an environment, best on episodes that were held out.

    Logs ``action_distance`` (mean Euclidean distance of the policy's actions from those of the data, in the units of
    the actions), for an objective with values their ``initial_value`` (mean over the first states of the episodes, at
    the policy's actions), and, if the transitions are held out, ``held_out_{key}`` for each of the loss's out-keys,
    such as ``held_out_td_error``: the losses and the means of their metadata. They show that training goes wrong; none
    of them ranks policies as returns do.

    Args:
        loss_module: of the networks that are trained.
        policy: of the same networks.
        transitions: batch size ``[N]``, with ``episode`` or ``("next", "done")``.
        interval: gradient steps between two evaluations, a multiple of the trainer's ``log_interval``.
        held_out: whether nothing is learned from the transitions.
        max_rows: from more transitions (and initial states) this many are drawn once and used throughout.
        seed: of that draw, and of the actions that policy and losses sample.

    ``DatasetMetrics(loss, policy, data[held_out], interval=5000).register(trainer)``.
    """

    def __init__(
        self,
        loss_module: OfflineLoss,
        policy: Policy,
        transitions: TensorDictBase,
        *,
        interval: int,
        held_out: bool = True,
        max_rows: int = 2_000,
        seed: int = 0,
    ) -> None:
        super().__init__(interval)
        self.loss_module = loss_module
        self.policy = policy
        self.held_out = held_out
        self.seed = seed
        shown = "td_error" if "td_error" in loss_module.out_keys else loss_module.out_keys[0]
        self.main = f"held_out_{shown}" if held_out else "action_distance"
        device = next(loss_module.parameters()).device
        numbers = episode_numbers(transitions)
        starts = numbers.diff(prepend=numbers.new_tensor([-1])).nonzero().squeeze(1)
        generator = torch.Generator().manual_seed(seed)

        def some(rows: torch.Tensor) -> TensorDictBase:
            drawn = torch.randperm(len(rows), generator=generator)[:max_rows].sort().values
            return transitions[rows.cpu()[drawn]].clone().to(device)

        self._rows = some(torch.arange(len(numbers)))
        self._starts = some(starts).exclude(loss_module.tensor_keys.action)

    @property
    def names(self) -> list[str]:
        """Names of the metrics."""
        losses = [f"held_out_{key}" for key in self.loss_module.out_keys] if self.held_out else []
        return [*losses, "action_distance", *(["initial_value"] if self.loss_module.has_values else [])]

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Evaluate losses, actions and values."""
        with own_random_state(self.seed, self._rows.device), in_eval_mode(self.policy, *self.loss_module.networks):
            chunks = [(len(rows), self._measure_rows(rows)) for rows in self._rows.split(_CHUNK)]
            values = [self.loss_module.value(self.policy(states)) for states in self._starts.copy().split(_CHUNK)]
        total = len(self._rows)
        means = {name: sum(n * float(chunk[name]) for n, chunk in chunks) / total for name in chunks[0][1]}
        known = [value for value in values if value is not None]
        return {**means, "initial_value": float(torch.cat(known).mean())} if known else means

    def _measure_rows(self, rows: TensorDictBase) -> dict[str, torch.Tensor]:
        found = {}
        if self.held_out:
            found = {f"held_out_{key}": value.mean() for key, value in self.loss_module(rows.copy()).items()}
        key = self.loss_module.tensor_keys.action
        action = self.policy(rows.exclude(key)).get(key)
        return {**found, "action_distance": (action - rows.get(key)).norm(dim=-1).mean()}
