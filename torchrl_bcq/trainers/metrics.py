"""What a policy is worth while it learns: in environments, or, where there are none, on data alone."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import nn
from torchrl.envs import EnvBase
from torchrl.trainers.trainers import Trainer, TrainerHookBase

from torchrl_bcq.data.episodes import episode_numbers
from torchrl_bcq.functional import discounted_sum
from torchrl_bcq.objectives import BCQLoss
from torchrl_bcq.protocols import CriticEnsemble

_STEPS = 1_000_000  # of an episode at most, where the environment has no limit
_CHUNK = 4_096  # rows evaluated at a time
_logger = logging.getLogger(__name__)
Policy = Callable[[TensorDictBase], TensorDictBase]


class _BrokenOff(Exception):
    """Leaves a rollout."""


def evaluate(
    envs: EnvBase,
    policy: Policy | None,
    *,
    critics: CriticEnsemble | None = None,
    gamma: float = 0.99,
    seed: int = 0,
    should_stop: Callable[[], bool] = lambda: False,
) -> TensorDict | None:
    """Run one episode in each of ``E`` environments; PyTorch's random state is left alone.

    The same seed gives the same initial states, so that policies, and moments of a run, can be compared.

    Args:
        envs: batch size ``[E]``, such as TorchRL's ``SerialEnv`` or ``ParallelEnv``.
        policy: acts; None acts uniformly at random.
        critics: the first one estimates the value of the policy's first actions.
        gamma: discount of the return that is compared with the estimate.
        seed: of environments and policy.
        should_stop: asked before each step; if true, the episodes are broken off.

    Returns:
        Batch size ``[E]``, each entry ``[E]``: ``return`` (undiscounted), ``length`` in steps, ``discounted_return``,
        and, with critics, ``value_estimate``. None if it was broken off.
    """

    def watch(*_: Any) -> None:
        if should_stop():
            raise _BrokenOff

    with _apart(seed, envs.device), _in_eval_mode(policy), torch.no_grad():
        envs.set_seed(seed)
        try:
            steps = envs.rollout(_STEPS, policy, watch, break_when_any_done=False, break_when_all_done=True)  # [E, T]
        except _BrokenOff:
            return None
        done = steps["next", "done"].squeeze(-1).long()
        running = done.cumsum(1) == done  # up to the first end; an environment idles from there until all have ended
        rewards = steps["next", "reward"].squeeze(-1).double() * running
        out = {
            "return": rewards.sum(1),
            "length": running.sum(1),
            "discounted_return": discounted_sum(rewards, gamma),
        }
        if critics is not None:
            out["value_estimate"] = _values(critics, steps[:, 0])
        return TensorDict(out, envs.batch_size)


class _PeriodicMetrics(TrainerHookBase):
    """Measures every ``interval`` gradient steps, before the first and after the last one, and logs it."""

    main: str  # the first metric, shown on the progress bar

    def __init__(self, interval: int) -> None:
        if interval < 1:
            raise ValueError(f"interval is {interval}, expected at least 1 gradient step.")
        self.interval = interval
        self._trainer: Any = None

    @abstractmethod
    def measure(self) -> dict[str, float] | None:
        """The metrics at present, by name; None if a stop was requested meanwhile."""

    def __call__(self, tick: TensorDictBase | None = None) -> None:
        """Measure and log, if it is time."""
        trainer = self._trainer
        step = trainer.collected_frames
        if self._should_stop() or (step % self.interval and step < trainer.total_frames):
            return
        metrics = self.measure()
        if metrics is not None:
            trainer._log(log_pbar=True, **{self.main: metrics[self.main]})
            trainer._log(**{name: value for name, value in metrics.items() if name != self.main})
            _logger.info("step %d: %s", step, ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))

    def _should_stop(self) -> bool:
        """Whether there is no time left to measure."""
        return getattr(self._trainer, "stop_requested", getattr(self._trainer, "_stop_training", False))

    def _at_the_start(self) -> None:
        """Measure before the first step, or what a stop did not leave the time for."""
        if self._trainer._last_log.get(self.main) != self._trainer.collected_frames:
            self()

    def register(self, trainer: Trainer, name: str = "") -> None:
        """Register with a trainer, whose ``log_interval`` must divide the interval."""
        ticks = trainer.collector.requested_frames_per_batch
        if self.interval % ticks:
            raise ValueError(
                f"the interval of {type(self).__name__} is {self.interval}, no multiple of log_interval {ticks}; "
                "change one of them."
            )
        self._trainer = trainer
        trainer.register_op("setup", self._at_the_start)
        trainer.register_op("post_steps_log", self)

    def state_dict(self) -> dict[str, Any]:
        """Nothing changes from one time to the next."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to restore."""


class EnvironmentMetrics(_PeriodicMetrics):
    """Logs what a policy reaches in environments, one episode in each, from the same initial states every time.

    Logs ``return`` (mean over the episodes, undiscounted) and its ``return_std``, ``episode_length`` in steps, with
    ``reference_scores`` D4RL's ``normalized_score``, and with critics their ``value_estimate`` at the initial states
    beside the ``discounted_return`` really obtained from there, which shows overestimation.

    Args:
        envs: batch size ``[E]``.
        policy: of the networks that are trained.
        interval: gradient steps between two evaluations, a multiple of the trainer's ``log_interval``.
        critics: of the networks that are trained, if their estimate is wanted.
        gamma: discount.
        seed: of environments and policy.
        reference_scores: mean return of a random policy and of an expert, scaled to 0 and 100.

    ``EnvironmentMetrics(envs, policy, interval=5000).register(trainer)``.

    Source: normalized scores, arXiv:2004.07219; estimates beside returns, arXiv:1802.09477, figure 1.
    """

    main = "return"

    def __init__(
        self,
        envs: EnvBase,
        policy: Policy,
        *,
        interval: int,
        critics: CriticEnsemble | None = None,
        gamma: float = 0.99,
        seed: int = 0,
        reference_scores: tuple[float, float] | None = None,
    ) -> None:
        super().__init__(interval)
        self.envs = envs
        self.policy = policy
        self.critics = critics
        self.gamma = gamma
        self.seed = seed
        self.reference_scores = reference_scores

    def measure(self) -> dict[str, float] | None:
        """Run the episodes."""
        found = evaluate(
            self.envs,
            self.policy,
            critics=self.critics,
            gamma=self.gamma,
            seed=self.seed,
            should_stop=self._should_stop,
        )
        return None if found is None else summarize(found, self.reference_scores)


def summarize(episodes: TensorDictBase, reference_scores: tuple[float, float] | None = None) -> dict[str, float]:
    """Means over what :func:`evaluate` gives, under the names of :class:`EnvironmentMetrics`."""
    means = {name: float(values.double().mean()) for name, values in episodes.items()}
    metrics = {"return": means["return"]}
    if reference_scores is not None:
        random, expert = reference_scores
        metrics["normalized_score"] = 100 * (means["return"] - random) / (expert - random)
    metrics["return_std"] = float(episodes["return"].std(correction=0))
    metrics["episode_length"] = means["length"]
    return metrics | {name: means[name] for name in ("value_estimate", "discounted_return") if name in means}


class DatasetMetrics(_PeriodicMetrics):
    """Logs what can be known without an environment, on transitions, best on episodes that were held out.

    Logs ``held_out_td_error`` (mean absolute TD error over critics), ``held_out_vae_loss``, ``initial_value`` (the
    first critic's, of the policy's actions at the first state of each episode) and ``action_distance`` (mean Euclidean
    distance of the policy's actions from those of the data, in the units of the actions). They tell whether a run goes
    astray; none of them ranks policies as returns do.

    Args:
        loss_module: of the networks that are trained.
        policy: of the same networks.
        transitions: batch size ``[N]``, with ``episode`` or ``("next", "done")``.
        interval: gradient steps between two evaluations, a multiple of the trainer's ``log_interval``.
        held_out: whether nothing is learned from the transitions; else the two losses are left out.
        max_rows: of more transitions (and initial states), so many are drawn once and used throughout.
        seed: of that draw, and of the actions that policy and losses sample.

    ``DatasetMetrics(loss, policy, data[held_out], interval=5000).register(trainer)``.
    """

    def __init__(
        self,
        loss_module: BCQLoss,
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
        self.main = "held_out_td_error" if held_out else "action_distance"
        self.seed = seed
        device = next(loss_module.parameters()).device
        numbers = episode_numbers(transitions)
        starts = torch.ones_like(numbers, dtype=torch.bool)
        starts[1:] = numbers[1:] != numbers[:-1]
        generator = torch.Generator().manual_seed(seed)

        def some(rows: torch.Tensor) -> TensorDictBase:
            drawn = torch.randperm(len(rows), generator=generator)[:max_rows].sort().values
            return transitions[rows.cpu()[drawn]].clone().to(device)

        self._rows = some(torch.arange(len(numbers)))
        self._starts = some(starts.nonzero().squeeze(1))

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Evaluate losses, values and actions."""
        vae, critics = self.loss_module.vae_network, self.loss_module.qvalue_network
        with _apart(self.seed, self._rows.device), _in_eval_mode(self.policy):
            chunks = [self._measure_rows(rows) for rows in self._rows.split(_CHUNK)]
            starts = [states.select(*vae.observation_keys) for states in self._starts.split(_CHUNK)]
            values = torch.cat([_values(critics, self.policy(states)) for states in starts])
        means = {name: float(torch.cat([chunk[name] for chunk in chunks]).mean()) for name in chunks[0]}
        return {**means, "initial_value": float(values.mean())}

    def _measure_rows(self, rows: TensorDictBase) -> dict[str, torch.Tensor]:
        vae = self.loss_module.vae_network
        found = {}
        if self.held_out:
            found["held_out_td_error"] = self.loss_module.qvalue_loss(rows.copy())[1]["td_error"].mean(-1)
            found["held_out_vae_loss"] = vae.training_loss(rows.copy())[0]
        action = self.policy(rows.select(*vae.observation_keys)).get(vae.action_key)
        found["action_distance"] = (action - rows.get(vae.action_key)).norm(dim=-1)
        return found


def _values(critics: CriticEnsemble, state_actions: TensorDictBase) -> torch.Tensor:
    """The first critic's values. ``[N]``."""
    return critics.first(state_actions.select(*critics.in_keys)).get(critics.out_keys[-1]).squeeze(-1)


@contextmanager
def _apart(seed: int, device: torch.device | None) -> Iterator[None]:
    """A random state of its own, so that training draws what it would have drawn anyway."""
    device = device or torch.device("cpu")
    others = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(others, device_type="cuda" if device.type == "cpu" else device.type):
        torch.manual_seed(seed)
        yield


@contextmanager
def _in_eval_mode(policy: Any) -> Iterator[None]:
    """Without the dropout of networks that have it, during evaluation."""
    training = [part for part in policy.modules() if part.training] if isinstance(policy, nn.Module) else []
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True
