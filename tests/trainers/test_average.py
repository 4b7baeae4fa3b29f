"""WeightAverage: the average by hand, buffers, networks that are absent, and checkpoints."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchrl.data import Bounded
from torchrl.objectives import SoftUpdate

from torchrl_bcq import (
    BCQLoss,
    BCQPolicy,
    BCQTrainer,
    CloningLoss,
    DeterministicActor,
    WeightAverage,
    make_checkpoint,
    make_replay_buffer,
)


def one_number() -> tuple[CloningLoss, nn.Parameter]:
    layer = nn.Linear(3, 1, bias=False)
    layer.weight.data = torch.zeros(1, 3)
    return CloningLoss(DeterministicActor(layer, Bounded(-1, 1, (1,)))), layer.weight


def test_average_by_hand():
    """The first step is copied; then the old average has the weight 0.75."""
    loss, weight = one_number()
    average = WeightAverage(loss, decay=0.75)
    (network,) = average.loss_module.networks
    for value, expected in ((4.0, 4.0), (8.0, 5.0), (1.0, 4.0)):
        weight.data.fill_(value)
        average()
        assert network.network.weight.tolist() == [[expected] * 3]
    assert weight.tolist() == [[1.0] * 3]


def test_buffers_are_copied():
    norm = nn.BatchNorm1d(3)
    loss = CloningLoss(DeterministicActor(nn.Sequential(norm, nn.Linear(3, 1)), Bounded(-1, 1, (1,))))
    average = WeightAverage(loss, decay=0.5)
    for value in (1.0, 5.0):
        norm.running_mean.fill_(value)
        norm.num_batches_tracked.fill_(int(value))
        average()
    copied = average.loss_module.networks[0].network[0]
    assert (copied.running_mean.tolist(), copied.num_batches_tracked.item()) == ([5.0] * 3, 5)


def test_a_network_that_is_absent(modules):
    vae, _, critics = modules
    average = WeightAverage(BCQLoss(vae, None, critics), decay=0.5)
    averaged = average.loss_module.networks
    assert averaged[1] is None
    assert averaged[0] is not vae
    assert BCQPolicy(*averaged).act([0.0, 0.0, 0.0]).shape == (2,)


def test_targets_are_copied(modules):
    loss = BCQLoss(*modules)
    SoftUpdate(loss, tau=0.5)
    average = WeightAverage(loss, decay=0.5)
    for value in (1.0, 5.0):
        for weights in (loss.qvalue_network_params, loss.target_qvalue_network_params):
            weights.data.zero_().add_(value)
        average()
    averaged = average.loss_module
    assert all((weights == 3).all() for weights in averaged.networks[2].parameters())
    assert all((weights == 5).all() for weights in averaged.target_qvalue_network_params.values(True, True))


def test_weights_that_are_too_short():
    """In bfloat16, 1 + 0.001 is 1: the average would never change."""
    loss, _ = one_number()
    with pytest.raises(ValueError, match=r"the networks have torch.bfloat16 weights, expected float32 or float64"):
        WeightAverage(loss.bfloat16(), decay=0.999)


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_decay_out_of_range(decay):
    with pytest.raises(ValueError, match=f"decay is {decay}, expected at least 0 and below 1"):
        WeightAverage(one_number()[0], decay=decay)


def test_a_resumed_trainer_has_the_same_average(modules, make_batch, tmp_path):
    def make(steps: int):
        loss = BCQLoss(*modules)
        buffer = make_replay_buffer(batch, batch_size=4, seed=0)
        updater = SoftUpdate(loss, tau=0.005)
        trainer = BCQTrainer(
            loss,
            buffer,
            target_net_updater=updater,
            total_steps=steps,
            log_interval=2,
            progress_bar=False,
            seed=0,
            save_trainer_file=tmp_path / "checkpoint",
            save_trainer_interval=1,
        )
        average = WeightAverage(loss, decay=0.9)
        average.register(trainer)
        return trainer, average, loss

    batch = make_batch(30)
    start = make_checkpoint(loss_module=BCQLoss(*modules))
    start.save(tmp_path / "start")
    trainer, whole, _ = make(8)
    trainer.train()
    expected = {name: value.clone() for name, value in whole.state_dict().items()}
    trainer, _, loss = make(4)
    make_checkpoint(loss_module=loss).load(tmp_path / "start")
    trainer.train()
    trainer, resumed, _ = make(8)
    trainer.load_from_file(tmp_path / "checkpoint")
    trainer.train()
    found = resumed.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert found["n_averaged"] == 8
