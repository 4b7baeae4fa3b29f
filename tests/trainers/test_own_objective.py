"""An objective that is defined outside the package, trained by OfflineTrainer."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
from pathlib import Path
from shutil import which

import pytest
import torch
from torchrl.checkpoint import Checkpoint
from torchrl.objectives import SoftUpdate

from torchrl_bcq import DatasetMetrics, OfflineTrainer, make_replay_buffer

from ..conftest import ACTION_SPEC, OBSERVATION_SPEC, random_transitions
from ..own_objective import OwnLoss, make_own_modules
from .conftest import assert_same_run, drawn_rows, prioritised_buffer, weights

ROOT = Path(__file__).parents[2]


def make_own_trainer(total_steps: int, *, rank: int = 0, buffer=None, new: float = 1.0, **settings) -> OfflineTrainer:
    """Always of the same networks and transitions."""
    torch.manual_seed(0)
    transitions = random_transitions(100)
    loss = OwnLoss(*make_own_modules(OBSERVATION_SPEC, ACTION_SPEC), new=new)
    buffer = buffer or make_replay_buffer(transitions, batch_size=16, seed=rank, sampler="without_replacement")
    settings = {"log_interval": 10, "progress_bar": False, "seed": rank, **settings}
    updater = SoftUpdate(loss, tau=0.05)
    return OfflineTrainer(loss, buffer, target_net_updater=updater, total_steps=total_steps, **settings)


def run_as_processes(folder: Path, *kinds: str) -> list[int]:
    """Run ``main`` in a process for each kind; their exit codes."""
    processes = []
    for rank, kind in enumerate(kinds):
        command = [sys.executable, "-W", "ignore", "-m", "tests.trainers.test_own_objective", kind, folder, str(rank)]
        processes.append(subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}))
    try:
        return [process.wait(300) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def main(kind: str, folder: Path, rank: int) -> None:
    """A run that kills itself in step 37, or one of two processes."""
    if kind == "killed":
        trainer = make_own_trainer(60, save_trainer_file=folder / "checkpoint", save_trainer_interval=9)
        trainer.register_op("post_optim", lambda: trainer._optim_count == 37 and os.kill(os.getpid(), signal.SIGKILL))
    else:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
        trainer = make_own_trainer(30, rank=rank, data_parallel=True)
    trainer.train()
    torch.save({"weights": weights(trainer), "metrics": trainer.metrics}, folder / str(rank))


def test_twenty_steps_equal_those_of_plain_pytorch():
    """Adam at 1e-3, the policy first, then the critic on a target at the new policy's action, then the targets."""
    trainer = make_own_trainer(20, new=2.0)
    policy, critic = (copy.deepcopy(network) for network in trainer.loss_module.networks)
    target = copy.deepcopy(critic)
    optimizers = [torch.optim.Adam(network.parameters(), lr=1e-3) for network in (policy, critic)]
    transitions, rows = trainer._replay.replay_buffer[:], drawn_rows(trainer)
    trainer.train()

    def value(network, observation, action) -> torch.Tensor:
        return network.critics[0].module(observation, action)

    for drawn in rows:
        batch = transitions[torch.tensor(drawn)]
        after = batch["next"]
        cloned = policy(observation=batch["observation"])
        step(optimizers[0], 2 * (cloned - batch["action"]).square().sum(1).mean())
        with torch.no_grad():
            following = value(target, after["observation"], policy(observation=after["observation"]))
            expected = after["reward"] + 0.99 * (~after["terminated"]).float() * following
        step(optimizers[1], (value(critic, batch["observation"], batch["action"]) - expected).square().mean())
        with torch.no_grad():
            for delayed, trained in zip(target.parameters(), critic.parameters(), strict=True):
                delayed.mul_(0.95).add_(0.05 * trained)
    loss = trainer.loss_module
    for found, network in zip(loss.networks, (policy, critic), strict=True):
        torch.testing.assert_close(found.state_dict(), network.state_dict(), rtol=1e-5, atol=1e-6)
    targets = {".".join(key): value for key, value in loss.target_critic_network_params.items(True, True)}
    torch.testing.assert_close(targets, dict(target.state_dict()), rtol=1e-5, atol=1e-6)
    assert trainer.metrics.keys() == set(loss.out_keys)


def step(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def test_a_killed_run_is_resumed_bit_for_bit(tmp_path):
    undisturbed = make_own_trainer(60)
    undisturbed.train()
    assert run_as_processes(tmp_path, "killed") == [-signal.SIGKILL]
    torch.manual_seed(1234)  # a new process has another random state
    resumed = make_own_trainer(60, rank=9).load_from_file(tmp_path / "checkpoint")
    assert resumed.collected_frames == 30
    resumed.train()
    assert_same_run(resumed, undisturbed)
    assert resumed.metrics == undisturbed.metrics
    assert not (tmp_path / "0").exists()


def test_checkpoints_hold_the_objective(tmp_path):
    trainer = make_own_trainer(20, save_trainer_file=tmp_path / "checkpoint")
    trainer.train()
    loss = OwnLoss(*make_own_modules(OBSERVATION_SPEC, ACTION_SPEC))
    Checkpoint(loss_module=loss).load(tmp_path / "checkpoint")
    torch.testing.assert_close(dict(loss.state_dict()), weights(trainer), rtol=0, atol=0)


@pytest.mark.skipif(which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:torch._dynamo.config.inline_inbuilt_nn_modules:FutureWarning")  # tensordict's
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # PyTorch's, 2.13
def test_it_compiles_to_the_same_steps():
    """Up to rounding; nothing in this objective is drawn at random."""
    runs = [make_own_trainer(20, compile=compile) for compile in (False, True)]
    for trainer in runs:
        trainer.train()
    torch.testing.assert_close(weights(runs[1]), weights(runs[0]), rtol=0, atol=1e-5)
    assert set(runs[1]._execution._compiled) == {"policy_loss", "critic_loss"}


def test_prioritised_replay_draws_the_rows_with_large_errors():
    torch.manual_seed(0)
    transitions = random_transitions(100)
    transitions["next", "reward"][7] = 100.0
    buffer = prioritised_buffer(transitions)
    make_own_trainer(60, buffer=buffer).train()
    drawn = torch.cat([buffer.sample()["index"] for _ in range(50)])
    assert (drawn == 7).float().mean() > 0.3  # 1 in 100 if drawn uniformly


def test_held_out_metrics():
    trainer = make_own_trainer(20)
    torch.manual_seed(5)
    held_out = random_transitions(30)
    held_out["next", "done"][9::10] = True
    metrics = DatasetMetrics(trainer.loss_module, trainer.loss_module.policy_network, held_out, interval=10)
    metrics.register(trainer)
    trainer.train()
    losses = trainer.loss_module(held_out.clone())
    expected = {f"held_out_{key}": value.mean().item() for key, value in losses.items()}
    assert {name: trainer.metrics[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    starts = held_out[::10].select("observation")
    value = trainer.loss_module.value(trainer.loss_module.policy_network(starts))
    assert trainer.metrics["initial_value"] == pytest.approx(value.mean().item(), rel=1e-5)
    assert trainer.logged_at("held_out_td_error") == 20


def test_two_processes_hold_equal_replicas(tmp_path):
    assert run_as_processes(tmp_path, "parallel", "parallel") == [0, 0]
    first, second = (torch.load(tmp_path / str(rank), weights_only=True) for rank in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    alone = make_own_trainer(30)
    alone.train()
    key = "policy_network_params.network.0.weight"
    assert not torch.equal(first["weights"][key], weights(alone)[key])


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
