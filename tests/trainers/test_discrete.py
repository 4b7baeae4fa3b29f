"""Discrete BCQ and discrete cloning in the OfflineTrainer: logs, resume, priorities, compilation, hard updates."""

from __future__ import annotations

import pytest
import torch
from torchrl.data import Categorical
from torchrl.objectives import HardUpdate, SoftUpdate

from torchrl_bcq import (
    DiscreteBCQLoss,
    DiscreteCloningLoss,
    OfflineTrainer,
    make_discrete_bcq_modules,
    make_discrete_cloning_modules,
    make_replay_buffer,
)

from ..conftest import OBSERVATION_SPEC, random_transitions
from .conftest import assert_same_run, weights

TERMS = ["loss_qvalue", "loss_imitation", "loss_penalty"]


def transitions(rows: int = 100):
    data = random_transitions(rows)
    data["action"] = torch.randint(4, (rows,))
    return data


def make_trainer(total_steps: int, *, name: str = "bcq", buffer=None, **settings) -> OfflineTrainer:
    """Always of the same networks and transitions."""
    torch.manual_seed(0)
    data = transitions()
    if name == "bcq":
        loss = DiscreteBCQLoss(*make_discrete_bcq_modules(OBSERVATION_SPEC, Categorical(4), hidden=(8,)))
    else:
        loss = DiscreteCloningLoss(*make_discrete_cloning_modules(OBSERVATION_SPEC, Categorical(4), hidden=(8,)))
    updater = SoftUpdate(loss, tau=0.05) if loss.delayed_names else None
    buffer = buffer or make_replay_buffer(data, batch_size=16, seed=0)
    settings = {"log_interval": 10, "progress_bar": False, "seed": 0, **settings}
    return OfflineTrainer(loss, buffer, target_net_updater=updater, total_steps=total_steps, **settings)


def test_all_terms_and_metadata_are_logged():
    trainer = make_trainer(20)
    loss = trainer.loss_module
    before = loss(transitions(50))
    trainer.train()
    assert list(trainer.optimization_stepper._logs) == loss.out_keys
    assert loss.out_keys[:3] == TERMS
    assert not any(value.requires_grad for value in trainer.optimization_stepper._logs.values())
    assert trainer.metrics.keys() == set(loss.out_keys)
    assert trainer.metrics["loss_penalty"] < 0.01
    assert trainer.metrics["loss_imitation"] == pytest.approx(before["loss_imitation"].item(), abs=0.2)


@pytest.mark.parametrize("name", ["bcq", "cloning"])
def test_a_resumed_run_equals_one_without_interruption(tmp_path, name):
    whole, half, rest = make_trainer(40, name=name), make_trainer(20, name=name), make_trainer(40, name=name)
    whole.train()
    half.train()
    half.save_trainer_file = tmp_path / "checkpoint"
    half.save_trainer(force_save=True)
    rest.load_from_file(tmp_path / "checkpoint")
    rest.train()
    assert_same_run(whole, rest)


@pytest.mark.filterwarnings("ignore:torch._dynamo.config.inline_inbuilt_nn_modules:FutureWarning")  # read by tensordict
def test_compiled_training_equals_eager_training():
    eager, compiled = make_trainer(10), make_trainer(10, compile={"backend": "aot_eager"})
    eager.train()
    compiled.train()
    torch.testing.assert_close(weights(compiled), weights(eager))


def test_a_loss_that_is_not_finite_is_reported():
    data = transitions()
    data["next", "reward"][:] = 3e38  # the sum over the batch is infinite
    with pytest.raises(FloatingPointError, match="qvalue_loss is inf in gradient step 1"):
        make_trainer(10, buffer=make_replay_buffer(data, batch_size=16, seed=0)).train()


def test_hard_updates():
    torch.manual_seed(0)
    loss = DiscreteBCQLoss(*make_discrete_bcq_modules(OBSERVATION_SPEC, Categorical(4), hidden=(8,)))
    updater, start = HardUpdate(loss, value_network_update_interval=15), loss.target_qvalue_network_params.clone()
    buffer = make_replay_buffer(transitions(), batch_size=16, seed=0)
    settings = {"target_net_updater": updater, "log_interval": 10, "progress_bar": False}
    OfflineTrainer(loss, buffer, total_steps=10, **settings).train()
    assert all(torch.equal(p, start[key]) for key, p in loss.target_qvalue_network_params.items(True, True))
    OfflineTrainer(loss, buffer, total_steps=10, **settings).train()
    assert not any(torch.equal(p, start[key]) for key, p in loss.target_qvalue_network_params.items(True, True))
