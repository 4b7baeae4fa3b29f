"""The processes of ``test_replicas.py``: python -m tests.trainers.replica_scenarios RANK FOLDER.

Each scenario runs in the first processes, which form a process group of its size; its result is saved in the folder.
"""

from __future__ import annotations

import sys
import warnings
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torchrl.record.loggers import CSVLogger
from torchrl.trainers import EarlyStopping

from torchrl_bcq import BCQTrainer, KeepBest, OfflineOptimizationStepper, make_replay_buffer

from .conftest import AfterStep, Scripted, drawn_rows, make_trainer, weights

SCENARIOS: dict = {}  # by name: function and number of processes
WAIT = timedelta(seconds=240)


def scenario(*sizes: int):
    def add(function):
        for size in sizes:
            SCENARIOS[f"{function.__name__}-{size}"] = (function, size)
        return function

    return add


def make(transitions, rank: int, total: int = 40, buffer_seed: int | None = None, **settings) -> BCQTrainer:
    """A trainer of one rank; the replay buffers have different seeds. ``sampler`` is the buffer's."""
    sampler = settings.pop("sampler", "without_replacement")
    seed = rank if buffer_seed is None else buffer_seed
    buffer = make_replay_buffer(transitions, batch_size=16, seed=seed, sampler=sampler)
    return make_trainer(None, total, buffer=buffer, **{"data_parallel": True, **settings})


def watched(trainer: BCQTrainer) -> dict:
    """Train; return the rows, weights, logs and errors, and the next rows and noise."""
    sample, step = trainer._replay.replay_buffer.sample, trainer.optimization_stepper.step
    rows, logs = drawn_rows(trainer), []
    trainer.optimization_stepper.step = lambda *args: logs.append((out := step(*args)).clone().to_dict()) or out
    error = None
    try:
        trainer.train()
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    optimizers = {name: each.state_dict()["state"] for name, each in trainer.optimization_stepper.optimizers.items()}
    return {
        "weights": weights(trainer),
        "optimizers": optimizers,
        "rows": rows,
        "logs": logs,
        "steps": [trainer.collected_frames, trainer._optim_count, trainer.optimization_stepper.steps],
        "stop": trainer._stop_reason,
        "metrics": trainer.metrics,
        "next rows": sample()["index"].tolist(),
        "next noise": torch.randn(5),
        "error": error,
    }


def after(step: int, call, trainer: BCQTrainer) -> BCQTrainer:
    AfterStep(lambda made: call() if made == step else None).register(trainer)
    return trainer


@scenario(2)
def a_hundred_steps(rank, folder, transitions):
    """The second process begins with other weights and with the noise of the first one."""
    trainer = make(transitions, rank, 100, logger=CSVLogger(f"log{rank}", log_dir=str(folder)), sampler="uniform")
    for value in trainer.loss_module.state_dict().values():
        value.add_(rank)
    return watched(trainer)


def sgd(loss) -> OfflineOptimizationStepper:
    params = {name: getattr(loss, f"{name}_network_params").parameters() for name in loss.network_names}
    return OfflineOptimizationStepper({name: torch.optim.SGD(each, lr=0.1) for name, each in params.items()})


def one_step_without_noise(trainer: BCQTrainer) -> dict:
    zeros = {"randn": lambda shape, **like: torch.zeros(shape, **like), "randn_like": torch.zeros_like}
    with patch.multiple(torch, **zeros):
        trainer.train()
    return weights(trainer)


CLIPPED = {"stepper": sgd, "log_interval": 1, "clip_norm": 0.05}


@scenario(2)
def half_a_batch_each(rank, folder, transitions):
    return one_step_without_noise(make(transitions[16 * rank : 16 * rank + 16], rank, 1, **CLIPPED))


SCORES = [1.0, 3.0, 2.0, 0.0]  # the best is of step 20


def make_checkpointed(rank, folder, transitions, total=40, **settings) -> BCQTrainer:
    trainer = make(transitions, rank, total, save_trainer_file=folder / "checkpoint", **settings)
    if rank == 0:
        Scripted(SCORES).register(trainer)
        KeepBest(folder / "best", "score").register(trainer)
    return trainer


@scenario(2)
def undisturbed(rank, folder, transitions):
    return watched(make_checkpointed(rank, folder / "undisturbed", transitions))


@scenario(2)
def first_half(rank, folder, transitions):
    return watched(make_checkpointed(rank, folder, transitions, 20))


@scenario(1, 2, 3)
def second_half(rank, folder, transitions):
    trainer = make(transitions, rank, seed=5 + rank, buffer_seed=9 + rank, data_parallel=dist.is_initialized())
    torch.manual_seed(1234)  # a new process has another random state
    return watched(trainer.load_from_file(folder / "checkpoint"))


@scenario(2)
def from_the_best(rank, folder, transitions):
    trainer = make(transitions, rank, buffer_seed=9 + rank, save_trainer_file=folder / "other")
    return watched(trainer.load_from_file(folder / "undisturbed" / "best" / f"checkpoint-{20:012d}"))


@scenario(1)
def first_half_alone(rank, folder, transitions):
    return watched(make(transitions, 0, 20, data_parallel=False, save_trainer_file=folder / "alone"))


@scenario(3)
def second_half_of_one(rank, folder, transitions):
    trainer = make(transitions, rank, seed=5 + rank, buffer_seed=9 + rank)
    return watched(trainer.load_from_file(folder / "alone"))


@scenario(3)
def second_half_of_one_again(rank, folder, transitions):
    trainer = make(transitions, rank, seed=7 + rank, buffer_seed=3 + rank)
    return watched(trainer.load_from_file(folder / "alone"))


@scenario(2)
def a_stop_in_the_second(rank, folder, transitions):
    trainer = make(transitions, rank, save_trainer_file=folder / "stopped")
    return watched(after(17, lambda: trainer.request_stop("enough") if rank == 1 else None, trainer))


@scenario(2)
def a_stop_before_the_first_step(rank, folder, transitions):
    trainer = make(transitions, rank)
    if rank == 1:
        trainer.request_stop()
    return watched(trainer)


@scenario(2)
def early_stopping_in_the_first(rank, folder, transitions):
    trainer = make(transitions, rank, 90)
    if rank == 0:
        Scripted([9.0, *range(8)]).register(trainer)
        EarlyStopping(monitor="score", patience=20, wait_for=0).register(trainer)
    return watched(trainer)


def broken(trainer: BCQTrainer, name: str, call: int) -> BCQTrainer:
    """A loss is NaN at one of its calls, counted from 1."""
    loss, calls = getattr(trainer.loss_module, name), []

    def nan(batch):
        calls.append(1)
        value, metadata = loss(batch)
        return (value * torch.nan if len(calls) == call else value), metadata

    setattr(trainer.loss_module, name, nan)
    return trainer


@scenario(2)
def not_finite_in_the_second(rank, folder, transitions):
    """From then on weights of both are not finite."""
    (folder / "nan").mkdir(exist_ok=True)
    trainer = make(transitions, rank, save_trainer_file=folder / "nan" / "checkpoint")
    return watched(broken(trainer, "qvalue_loss", 13) if rank == 1 else trainer)


@scenario(2)
def not_finite_in_the_last_loss(rank, folder, transitions):
    """Of a log interval."""
    trainer = make(transitions, rank)
    return watched(broken(trainer, "actor_loss", 10) if rank == 1 else trainer)


@scenario(2)
def a_full_disk(rank, folder, transitions):
    (folder / "file").touch()
    return watched(make(transitions, rank, save_trainer_file=folder / "file" / "checkpoint", save_trainer_interval=9))


@scenario(2)
def the_same_seed(rank, folder, transitions):
    return watched(make(transitions, rank, buffer_seed=3))


@scenario(2)
def other_log_intervals(rank, folder, transitions):
    return watched(make(transitions, rank, log_interval=10 + rank))


@scenario(2)
def one_leaves_an_interval(rank, folder, transitions):
    def leave(batch):
        if rank == 1 and trainer._optim_count == 13:
            raise StopIteration

    trainer = make(transitions, rank)
    trainer.register_op("process_optim_batch", leave)
    return watched(trainer)


@scenario(2)
def one_raises(rank, folder, transitions):
    def fail() -> None:
        if rank == 1:
            raise KeyError("of its own")

    return watched(after(13, fail, make(transitions, rank)))


def make_transitions() -> TensorDict:
    """The same in each process."""
    generator = torch.Generator().manual_seed(0)
    flag = torch.zeros(100, 1, dtype=torch.bool)
    columns = {
        "observation": torch.randn(100, 3, generator=generator),
        "action": torch.rand(100, 2, generator=generator),
        "next": {
            "observation": torch.randn(100, 3, generator=generator),
            "reward": torch.randn(100, 1, generator=generator),
            "done": flag,
            "terminated": flag.clone(),
        },
    }
    return TensorDict(columns, [100])


def main() -> None:
    warnings.simplefilter("ignore")
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    transitions = make_transitions()
    for name, (function, size) in SCENARIOS.items():
        if rank >= size:
            continue
        if size > 1:
            store = f"file://{folder}/{name}.store"
            dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=WAIT)
        torch.save(function(rank, folder, transitions), folder / f"{name}.{rank}")
        if size > 1:
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
