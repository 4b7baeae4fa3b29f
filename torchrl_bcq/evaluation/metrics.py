"""Metrics that are measured periodically during training, in environments or on a dataset."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.envs import EnvBase
from torchrl.trainers.trainers import Trainer, TrainerHookBase

from torchrl_bcq.data.episodes import episode_numbers, first_rows
from torchrl_bcq.data.frame_stack import gather_frames
from torchrl_bcq.evaluation.rollouts import Policy, Value, evaluate, in_eval_mode, own_random_state, summarize
from torchrl_bcq.objectives import OfflineLoss

_CHUNK = 4_096  # number of rows that are evaluated at a time
_logger = logging.getLogger(__name__)


class PeriodicMetrics(TrainerHookBase):
    """Measures and logs metrics every ``interval`` gradient steps, and before the first and after the last step."""

    main: str  # name of the metric that the progress bar shows

    def __init__(self, interval: int) -> None:
        if interval < 1:
            raise ValueError(f"interval is {interval}, expected at least 1 gradient step.")
        self.interval = interval
        self._trainer: Any = None

    @abstractmethod
    def measure(self) -> dict[str, float] | None:
        """Return the current metrics by name, or None if training was stopped during the measurement."""

    def __call__(self, batch: TensorDictBase | None = None) -> None:
        """Measure and log the metrics if a measurement is due at this step."""
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
        """Measure at the start of training, unless a resumed run has already measured at this step."""
        if self._trainer._last_log.get(self.main) != self._trainer.collected_frames:
            self()

    def register(self, trainer: Trainer, name: str = "") -> None:
        """Register the hook with a trainer; ``interval`` must be a multiple of the trainer's ``log_interval``."""
        log_interval = trainer.collector.requested_frames_per_batch
        if self.interval % log_interval:
            found = f"the interval of {type(self).__name__} is {self.interval}"
            raise ValueError(f"{found}, which is not a multiple of log_interval {log_interval}; change one of them.")
        self._trainer = trainer
        trainer.register_op("setup", self._at_the_start)
        trainer.register_op("post_steps_log", self)


class EnvironmentMetrics(PeriodicMetrics):
    """Logs the returns of a policy in one episode per environment, always from the same initial states.

    The hook logs ``return`` (mean undiscounted return of the episodes), the standard deviation ``return_std`` of the
    returns, ``episode_length`` in steps, and D4RL's ``normalized_score`` if ``reference_scores`` are given. If
    ``value`` is given, the hook also logs the ``value_estimate`` at the initial states and the ``discounted_return``
    from these states. An estimate above this return means that the critics overestimate. To compare ``value_estimate``
    and ``discounted_return``, let the environments run past their time limit, because a critic estimates the return
    without a time limit.

    Args:
        envs: environments of batch size ``[E]``.
        policy: policy to measure; it uses the networks that the trainer trains.
        interval: number of gradient steps between two evaluations, a multiple of the trainer's ``log_interval``.
        value: function that estimates the value of state-action pairs, such as ``loss.value``.
        gamma: discount factor.
        seed: random seed of the environments and the policy.
        time_limit: number of steps. If an episode is longer, ``return`` and ``episode_length`` leave out the later
            steps.
        reward: function that changes rewards as in training. ``discounted_return`` is the sum of the changed rewards,
            because ``value_estimate`` estimates this sum. ``return`` is the sum of the environment's rewards.
        reference_scores: mean returns of a random policy (score 0) and of an expert (score 100).

    Usage: ``EnvironmentMetrics(envs, policy, interval=5000, value=loss.value).register(trainer)``.

    Source: arXiv:2004.07219 for normalized scores; arXiv:1802.09477, figure 1, for estimates compared with returns.
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
        time_limit: int | None = None,
        reward: Callable[[torch.Tensor], torch.Tensor] | None = None,
        reference_scores: Sequence[float] | None = None,
    ) -> None:
        super().__init__(interval)
        if reference_scores is not None and not reference_scores[0] < reference_scores[1]:
            raise ValueError(f"reference_scores is {reference_scores}, expected (random, expert) with random < expert.")
        self.reference_scores = reference_scores
        settings: dict[str, Any] = {"value": value, "gamma": gamma, "seed": seed, "time_limit": time_limit}
        settings["reward"] = reward
        self._evaluate = partial(evaluate, envs, policy, should_stop=self._should_stop, **settings)

    def measure(self) -> dict[str, float] | None:
        """Run one episode in each environment and return the metrics, or None if training was stopped."""
        found = self._evaluate()
        return None if found is None else summarize(found, self.reference_scores)


class DatasetMetrics(PeriodicMetrics):
    """Logs metrics on transitions, without an environment. If possible, pass held-out episodes.

    The hook logs ``action_distance``, the mean Euclidean distance between the policy's actions and the dataset's
    actions, in the units of the actions. For discrete actions, the hook logs ``action_agreement`` instead, the share of
    rows in which both are equal. If the objective learns values, the hook also logs ``initial_value``, the mean
    value of the policy's actions in the first states of the episodes. For held-out transitions, the hook also logs
    ``held_out_{key}``, the mean of each out-key of the loss module, such as ``held_out_td_error``. The metrics on a
    dataset can show that training goes wrong. To compare policies, use returns, or ``OffPolicyEvaluation`` if there is
    no environment.

    Args:
        loss_module: loss of the networks that are trained.
        policy: policy that acts with the networks of ``loss_module``.
        transitions: transitions of batch size ``[N]``, with the entry ``episode`` or ``("next", "done")``.
        interval: number of gradient steps between two evaluations, a multiple of the trainer's ``log_interval``.
        held_out: whether the transitions are excluded from training.
        max_rows: largest number of transitions, and of initial states, to evaluate. If there are more, a random subset
            is drawn once and used in all evaluations.
        seed: random seed of the random subset and of the actions that the policy and the losses sample.

    Usage: ``DatasetMetrics(loss, policy, data[held_out], interval=5000).register(trainer)``.
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
        self.main = f"held_out_{shown}" if held_out else loss_module.action_metric
        device = next(loss_module.parameters()).device
        starts = first_rows(episode_numbers(transitions))
        generator = torch.Generator().manual_seed(seed)

        def some(rows: torch.Tensor) -> TensorDictBase:
            drawn = torch.randperm(len(rows), generator=generator)[:max_rows].sort().values
            return transitions[rows.cpu()[drawn]].clone().to(device)

        self._rows = some(torch.arange(len(transitions)))
        self._starts = some(starts).exclude(loss_module.tensor_keys.action)

    @property
    def names(self) -> list[str]:
        """Names of the metrics that ``measure`` returns."""
        losses = [f"held_out_{key}" for key in self.loss_module.out_keys] if self.held_out else []
        return [*losses, self.loss_module.action_metric, *(["initial_value"] if self.loss_module.has_values else [])]

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Compute the metrics on the transitions and return them by name."""
        with own_random_state(self.seed, self._rows.device), in_eval_mode(self.policy, *self.loss_module.networks):
            parts = map(gather_frames, self._rows.split(_CHUNK))
            chunks = [(len(rows), self._measure_rows(rows)) for rows in parts]
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
        loss = self.loss_module
        return {**found, loss.action_metric: loss.compare_actions(action, rows.get(key)).mean()}
