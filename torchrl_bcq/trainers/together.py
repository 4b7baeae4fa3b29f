"""Several independent agents trained together in one process."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from torchrl_bcq.functional import clipped_normal
from torchrl_bcq.modules.stacked import stack_networks
from torchrl_bcq.objectives import BCQLoss
from torchrl_bcq.trainers.bcq import BCQTrainer
from torchrl_bcq.trainers.execution import Execution
from torchrl_bcq.trainers.randomness import RandomState
from torchrl_bcq.trainers.stepper import BCQOptimizationStepper

_logger = logging.getLogger(__name__)
_LOSS_SETTINGS = (
    "lmbda",
    "num_target_samples",
    "delay_actor",
    "delay_qvalue",
    "loss_function",
    "reduction",
    "use_prioritized_weights",
)
_SCHEDULE = ("vae_warmup_steps", "freeze_vae_after", "actor_update_interval", "steps")


def train_together(trainers: Sequence[BCQTrainer]) -> None:
    """Train independent agents, each as if alone, with batched matrix products over all of them.

    Each trainer keeps its own networks, optimizers, random numbers, logs, hooks and checkpoints, and makes the steps
    that ``trainer.train()`` would make, to rounding; only losses and their gradients are computed for all at once. One
    may stop early, or fail, and the others go on. Replay buffers can share one dataset, which ``make_replay_buffer``
    does not copy.

    Args:
        trainers: of agents that may differ in seeds, weights, rows, learning rates and hooks. Their networks, losses,
            schedules and batches must be alike, all parameters those of linear layers, and all at the same step.

    Raises:
        ImportError: if ``greenlet`` is not installed.
        ValueError: if the agents do not fit together.
        RuntimeError: in the end, if some agents failed; it says which, and is caused by the first one's error.
    """
    try:
        from greenlet import getcurrent, greenlet
    except ImportError as error:
        raise ImportError("training agents together needs greenlet: python -m pip install greenlet") from error
    _check(trainers)
    here, before = getcurrent(), RandomState(_device(trainers[0]))
    agents = [_Agent(trainer, greenlet, here.switch) for trainer in trainers]
    try:
        with trainers[0]._execution.active():
            _run(agents)
    finally:
        for agent in agents:
            agent.leave()
        before.restore()
    if failed := {number: agent.error for number, agent in enumerate(agents) if agent.error is not None}:
        first = next(iter(failed.values()))
        raise RuntimeError(f"of {len(agents)} agents, {[*failed]} failed; the first one: {first}") from first


def _run(agents: list[_Agent]) -> None:
    joint = None
    for agent in agents:
        agent.go_on()
    while running := [agent for agent in agents if agent.batch is not None]:
        if joint is None or joint.agents != running:
            joint = _Joint(running)
        joint.step()
        for agent in running:
            agent.go_on()


class _Agent:
    """One trainer, whose ``train`` runs in a greenlet of its own, and waits there in each gradient step.

    Args:
        trainer: of the agent.
        greenlet: the class.
        hand_over: switches back, with the batch and the networks that are due, and returns what is to be logged.
    """

    def __init__(self, trainer: BCQTrainer, greenlet: type, hand_over: Callable) -> None:
        self.trainer = trainer
        self.loss = trainer.loss_module
        self.stepper = trainer.optimization_stepper
        self.batch: Any = None  # a TensorDict while it waits, None after its end
        self.due: tuple[str, ...] = ()
        self.logs: dict[str, Tensor] = {}
        self.error: Exception | None = None
        self._random_state = trainer.random_state or self._draw_random_state()
        self._greenlet = greenlet(self._train)
        self.stepper._update = lambda trainer, batch, due: hand_over((batch, due))

    def _train(self, _: dict[str, Tensor]) -> tuple[None, tuple[()]]:
        try:
            self.trainer.train()
        except Exception as error:
            _logger.error("an agent failed, the others go on: %s", error)
            self.error = error
        return None, ()

    def _draw_random_state(self) -> RandomState:
        """That of a seed drawn from the present one."""
        seed = int(torch.randint(2**31, ()))
        before = RandomState(_device(self.trainer))
        torch.manual_seed(seed)
        state = RandomState(_device(self.trainer))
        before.restore()
        return state

    def go_on(self) -> None:
        """Let it run to its next gradient step, or to its end."""
        self._random_state.restore()
        self.batch, self.due = self._greenlet.switch(self.logs)
        self._random_state = RandomState(_device(self.trainer))

    def draw_noise(self) -> dict[str, Tensor]:
        """What its losses draw at random in one step, in their order."""
        rows, vae, like = self.batch.batch_size, self.loss.vae_network, next(self.loss.parameters())
        samples = {"qvalue": (*rows, self.loss.num_target_samples), "actor": rows}
        self._random_state.restore()
        noise = {}
        for name in self.due:
            if name == "vae":
                noise[name] = torch.randn((*rows, vae.latent_dim), dtype=like.dtype, device=like.device)
            else:
                noise[name] = clipped_normal((*samples[name], vae.latent_dim), vae.latent_clip, like)
        self._random_state = RandomState(like.device)
        return noise

    def leave(self) -> None:
        """Give its tensors memory of their own again, and end what has not ended."""
        del self.stepper._update
        for tensor in _tensors(self.loss).values():
            tensor.data, tensor.grad = tensor.data.clone(), None
        if self._greenlet and not self._greenlet.dead:
            self._greenlet.throw()


class _Joint:
    """Makes a gradient step of several agents; their tensors are views of those of one stacked loss.

    Args:
        agents: that are at a gradient step.
    """

    def __init__(self, agents: list[_Agent]) -> None:
        self.agents = agents
        self._loss = _stack_losses([agent.loss for agent in agents])
        first = agents[0].trainer
        self._execution = Execution(self._loss, first._execution.compile, first._execution.precision)
        shared = _tensors(self._loss)
        own = [_tensors(agent.loss) for agent in agents]
        with torch.no_grad():
            for name, stacked in shared.items():
                if stacked.ndim == own[0][name].ndim:
                    continue  # the same for all, such as the bounds of actions
                stacked.copy_(torch.stack([tensors[name] for tensors in own]))
                for tensors, part in zip(own, stacked.data.unbind(0), strict=True):
                    tensors[name].data = part
        self._parameters = {
            network: [
                (stacked, [tensors[name] for tensors in own])
                for name, stacked in shared.items()
                if name[0] == f"{network}_network_params" and stacked.requires_grad
            ]
            for network in self._loss.network_names
        }

    def step(self) -> None:
        """One step of each network that is due."""
        due = self.agents[0].due
        if any(agent.due != due for agent in self.agents):
            raise ValueError("the agents' schedules have come apart; they must be at the same step.")
        noise = [agent.draw_noise() for agent in self.agents]
        batch: Any = torch.stack([agent.batch.exclude("index") for agent in self.agents])
        for agent in self.agents:
            agent.logs = {}
        for name in due:
            stacked_noise = torch.stack([drawn[name] for drawn in noise])
            loss, metadata = self._execution.compute(batch, f"{name}_loss", stacked_noise)  # [K]
            loss.sum().backward()
            means = {f"loss_{name}": loss.detach()}
            means |= {key: value.flatten(1).mean(1) for key, value in metadata.items()}
            self._step_optimizers(name, means)
        priority_key = self._loss.tensor_keys.priority
        if (priority := batch.get(priority_key, None)) is not None:
            for agent, own in zip(self.agents, priority.unbind(0), strict=True):
                agent.batch.set(priority_key, own)

    def _step_optimizers(self, network: str, means: dict[str, Tensor]) -> None:
        """Hand each agent its gradients, and step its optimizer."""
        for stacked, own in self._parameters[network]:
            if stacked.grad is not None:
                for parameter, gradient in zip(own, stacked.grad.unbind(0), strict=True):
                    parameter.grad = gradient
                stacked.grad = None
        own_means = {key: value.unbind(0) for key, value in means.items()}
        for k, agent in enumerate(self.agents):
            agent.stepper.step_optimizer(network, agent.trainer)
            agent.logs |= {key: values[k] for key, values in own_means.items()}
            agent.trainer.remember_losses({f"{network}_loss": own_means[f"loss_{network}"][k]})


class _StackedLoss(BCQLoss):
    """The losses of ``K`` agents, ``[K]``, on batches ``[K, *B]``."""

    def _weigh(self, loss: Tensor, tensordict: TensorDictBase) -> Tensor:
        rows = zip(loss.unbind(0), tensordict.unbind(0), strict=True)
        return torch.stack([super(_StackedLoss, self)._weigh(own, batch) for own, batch in rows])


def _stack_losses(losses: Sequence[BCQLoss]) -> _StackedLoss:
    first = losses[0]
    actor = None if first.actor_network is None else stack_networks([loss.actor_network for loss in losses])
    stacked = _StackedLoss(
        stack_networks([loss.vae_network for loss in losses]),
        actor,
        stack_networks([loss.qvalue_network for loss in losses]),
        **{name: getattr(first, name) for name in _LOSS_SETTINGS},
    )
    stacked.set_keys(**asdict(first.tensor_keys))
    stacked._has_update_associated = dict.fromkeys(stacked._has_update_associated, True)  # each agent has its own
    stacked.value_type, stacked._value_estimator = first.value_type, first._value_estimator
    return stacked


def _tensors(loss: BCQLoss) -> dict[Any, Tensor]:
    """Parameters, targets and buffers of all networks, by the name of their group and their key in it."""
    groups = {name: group for name, group in loss.named_children() if name.endswith("_params")}
    return {(name, key): tensor for name, group in groups.items() for key, tensor in group.items(True, True)}


def _device(trainer: BCQTrainer) -> torch.device:
    return next(trainer.loss_module.parameters()).device


def _check(trainers: Sequence[BCQTrainer]) -> None:
    if not trainers:
        raise ValueError("there are no agents; pass a trainer for each.")
    for k, trainer in enumerate(trainers):
        if type(trainer.loss_module) is not BCQLoss or type(trainer.optimization_stepper) is not BCQOptimizationStepper:
            raise ValueError(
                f"agent {k} has a {type(trainer.loss_module).__name__} and a "
                f"{type(trainer.optimization_stepper).__name__}; together train only a BCQLoss and a "
                "BCQOptimizationStepper."
            )
        if trainer.optimization_stepper.parallel is not None:
            raise ValueError(f"agent {k} has data_parallel=True, which cannot be combined with training together.")
        if trainer.optimization_stepper.captured:
            raise ValueError(f"agent {k} has cudagraph=True, which cannot be combined with training together.")
        if any(trainer.loss_module is other.loss_module for other in trainers[:k]):
            raise ValueError(f"agent {k} has the same loss as another one; build one for each.")
    settings = [_settings(trainer) for trainer in trainers]
    for k, other in enumerate(settings[1:], 1):
        if differing := [name for name, value in other.items() if value != settings[0][name]]:
            found = {name: (settings[0][name], other[name]) for name in differing}
            raise ValueError(f"agents 0 and {k} differ in {found}; make them alike to train them together.")


def _settings(trainer: BCQTrainer) -> dict[str, Any]:
    """What must be the same in all agents."""
    loss, stepper, execution = trainer.loss_module, trainer.optimization_stepper, trainer._execution
    parameter = next(loss.parameters())
    return {
        **{name: getattr(loss, name) for name in _LOSS_SETTINGS},
        **{name: getattr(stepper, name) for name in _SCHEDULE},
        "keys": loss.tensor_keys,
        "value_type": loss.value_type,
        "value_estimator": {name: value.tolist() for name, value in loss._value_estimator.state_dict().items()},
        "batch_size": trainer._replay.replay_buffer.batch_size,
        "device": parameter.device,
        "dtype": parameter.dtype,
        "compile": execution.compile,
        "precision": execution.precision,
    }
