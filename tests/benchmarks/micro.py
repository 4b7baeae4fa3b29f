"""Measures each part of a gradient step and of the policy alone.

pip install -e '.[bench]'
python -m pytest tests/benchmarks/micro.py --benchmark-sort=name --benchmark-columns=median,iqr,rounds
python -m pytest tests/benchmarks/micro.py --benchmark-save=NAME --benchmark-compare

Author's network sizes, batches of 256, one thread of the CPU. ``python -m pytest`` does not collect this file.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Bounded, Unbounded
from torchrl.objectives import SoftUpdate

from torchrl_bcq import BCQLoss, BCQOptimizationStepper, BCQPolicy, make_bcq_modules, make_replay_buffer

from .transitions import ACTIONS, OBSERVATIONS, make_transitions

BATCH = 256


@pytest.fixture
def modules():
    return make_bcq_modules(Unbounded((OBSERVATIONS,)), Bounded(-1, 1, (ACTIONS,)))


@pytest.fixture
def loss(modules):
    return BCQLoss(*modules)


@pytest.fixture
def updater(loss):
    return SoftUpdate(loss, tau=0.005)


@pytest.fixture
def buffer():
    return make_replay_buffer(make_transitions(), batch_size=BATCH, seed=0)


@pytest.mark.parametrize("name", ["vae", "qvalue", "actor"])
@pytest.mark.usefixtures("updater")
def test_loss_forward_and_backward(benchmark, loss, buffer, name):
    batch = buffer.sample()

    def run() -> None:
        loss.zero_grad()
        getattr(loss, f"{name}_loss")(batch)[0].backward()

    benchmark(run)
    assert any(parameter.grad is not None for parameter in getattr(loss, f"{name}_network_params").parameters())


@pytest.mark.usefixtures("updater")
def test_stepper(benchmark, loss, buffer):
    stepper = BCQOptimizationStepper.adam(loss)
    trainer = SimpleNamespace(
        loss_module=loss, clip_norm=None, compute_loss=lambda batch, method: getattr(loss, method)(batch)
    )
    logs = benchmark(stepper.step, trainer, buffer.sample())
    assert all(value.isfinite() for value in logs.values())


def test_target_update(benchmark, loss, updater):
    benchmark(updater.step)
    assert all(parameter.isfinite().all() for parameter in loss.target_qvalue_network_params.values(True, True))


@pytest.mark.parametrize("states", [1, 10, 256])
def test_policy(benchmark, modules, states):
    policy = BCQPolicy(*modules, num_action_samples=100)
    batch = TensorDict({"observation": torch.randn(states, OBSERVATIONS)}, [states])
    assert benchmark(policy, batch)["action"].shape == (states, ACTIONS)


def test_sample(benchmark, buffer):
    assert len(benchmark(buffer.sample)) == BATCH
