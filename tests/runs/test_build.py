"""Parts are built from settings, in which nothing is called, and trainers from Hydra configs or built parts."""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf
from torchrl.objectives import HardUpdate, SoftUpdate

from torchrl_bcq.data import make_replay_buffer
from torchrl_bcq.modules import Normalization, make_bcq_modules
from torchrl_bcq.objectives import BCQLoss, CloningLoss
from torchrl_bcq.runs.build import (
    build,
    make_loss,
    make_networks,
    make_objective,
    make_policy,
    make_trainer,
    make_updater,
)
from torchrl_bcq.runs.settings import compose
from torchrl_bcq.trainers import OfflineOptimizationStepper

from ..conftest import ACTION_SPEC, OBSERVATION_SPEC

SIZES = {"hidden": [6], "vae_hidden": [7]}
SPECS = {"observation_spec": OBSERVATION_SPEC, "action_spec": ACTION_SPEC}


@pytest.fixture
def buffer(make_batch):
    return make_replay_buffer(make_batch(40), batch_size=5, seed=0)


BOUND = {"_target_": "torch.tensor", "_convert_": "all"}


def configs(**others):
    """A trainer's parts as Hydra configs."""
    space = ACTION_SPEC.space
    bounds = {"low": {**BOUND, "data": space.low.tolist()}, "high": {**BOUND, "data": space.high.tolist()}}
    specs = {
        "observation_spec": {"_target_": "torchrl.data.Bounded", "low": -1.0, "high": 1.0, "shape": [3]},
        "action_spec": {"_target_": "torchrl.data.Bounded", "shape": [2], "_convert_": "all", **bounds},
    }
    path = "torchrl_bcq.runs"
    parts = {
        "networks": {"_target_": f"{path}.build.make_networks", "algorithm": "bcq", **specs, **SIZES},
        "loss_module": {"_target_": f"{path}.build.make_loss", "algorithm": "bcq", "lmbda": 0.5},
        "target_net_updater": {"_target_": "torchrl.objectives.SoftUpdate", "loss_module": "???", "tau": 0.25},
        "optimization_stepper": {"_target_": f"{path}.optimizers.make_stepper", "loss": "???", "lr": 0.01},
    }
    parts["loss_module"] |= dict.fromkeys(BCQLoss.network_arguments(), "???")
    return {"algorithm": "bcq", "seed": 3, **{name: OmegaConf.create(part) for name, part in parts.items()}, **others}


def make_by_hand():
    torch.manual_seed(3)
    loss = BCQLoss(*make_bcq_modules(*SPECS.values(), **SIZES), lmbda=0.5)
    return loss, SoftUpdate(loss, tau=0.25), OfflineOptimizationStepper.adam(loss, lr=0.01)


def trained(trainer) -> torch.Tensor:
    trainer.train()
    return torch.cat([value.flatten() for value in trainer.loss_module.state_dict().values()])


def test_built_parts_and_configs_give_the_same_trainer(buffer):
    rest = {"total_steps": 6, "log_interval": 3, "progress_bar": False}
    transitions = buffer[:].exclude("index")

    def new_buffer():
        return make_replay_buffer(transitions, batch_size=5, seed=0)

    loss, updater, stepper = make_by_hand()
    built = {"loss_module": loss, "target_net_updater": updater, "optimization_stepper": stepper, "networks": None}
    by_hand = trained(make_trainer(**configs(**built), replay_buffer=new_buffer(), **rest))
    torch.manual_seed(200)
    assert torch.equal(trained(make_trainer(**configs(), replay_buffer=new_buffer(), **rest)), by_hand)
    assert not torch.equal(trained(make_trainer(**configs(seed=4), replay_buffer=new_buffer(), **rest)), by_hand)


def test_settings_of_a_run_give_the_same_objective():
    loss, updater, _ = make_by_hand()
    words = ["network.hidden=[6]", "network.vae_hidden=[7]", "loss.lmbda=0.5", "loss.tau=0.25"]
    (settings,) = compose([*words, "out=run", "dataset=file.hdf5", "algorithm=bcq"])
    torch.manual_seed(3)
    made, its_updater = make_objective(settings, **SPECS)
    assert made.state_dict().keys() == loss.state_dict().keys()
    assert all(torch.equal(value, loss.state_dict()[name]) for name, value in made.state_dict().items())
    assert (made.lmbda, its_updater.eps) == (loss.lmbda, updater.eps) == (0.5, 0.75)


def test_a_target_in_plain_settings_is_never_called(tmp_path):
    file = tmp_path / "called"
    dangerous = {"_target_": "pathlib.Path.touch", "_args_": [{"_target_": "pathlib.Path", "_args_": [str(file)]}]}
    assert build(dangerous) == dangerous
    with pytest.raises(TypeError, match="_target_"):
        make_loss("cloning", *make_networks("cloning", **SPECS), **dangerous)
    assert not file.exists()
    build(OmegaConf.create(dangerous))
    assert file.exists()  # so it would have been


def test_arguments_that_no_part_gives_are_named(buffer):
    parts = configs(replay_buffer=buffer, total_steps=1)
    loss = OmegaConf.create({"loss": {"_target_": "torchrl_bcq.BCQLoss", "vae_network": "???", "lmbda": "???"}}).loss
    with pytest.raises(ValueError, match=r"loss lacks \['lmbda'\]; set these arguments"):
        make_trainer(**{**parts, "loss_module": loss})
    with pytest.raises(ValueError, match=r"loss lacks \['vae_network', 'lmbda'\]"):
        make_trainer(**{**parts, "loss_module": loss, "networks": None})
    with pytest.raises(ValueError, match="there is no env, and not both specs are given"):
        make_networks("bcq", **SIZES)


def test_a_loss_takes_its_own_settings_and_the_estimators():
    networks = make_networks("bcq", **SPECS, **SIZES)
    loss = make_loss("bcq", *networks, lmbda=0.25, gamma=0.5, tau=0.125)
    assert type(loss) is BCQLoss
    assert (loss.lmbda, float(loss.value_estimator.gamma)) == (0.25, 0.5)
    assert loss.networks == networks
    updater = make_updater("bcq", loss, lmbda=0.25, gamma=0.5, tau=0.125)
    assert (type(updater), updater.eps) == (SoftUpdate, 0.875)
    by_name = make_loss("bcq", **dict(zip(BCQLoss.network_arguments(), networks, strict=True)))
    assert float(by_name.value_estimator.gamma) == pytest.approx(0.99)
    with pytest.raises(TypeError, match="lamda"):
        make_loss("bcq", *networks, lamda=1)


def test_a_loss_without_targets_has_no_updater():
    networks = make_networks("bcq", **SPECS, **SIZES)
    assert make_updater("bcq", make_loss("bcq", *networks, delay_actor=False, delay_qvalue=False), tau=0.1) is None
    cloning = make_loss("cloning", *make_networks("cloning", **SPECS))
    assert type(cloning) is CloningLoss
    assert make_updater("cloning", cloning) is None
    assert make_policy("cloning", *cloning.networks) is cloning.actor_network


def test_another_updater_of_torchrl(buffer):
    hard = OmegaConf.create({"_target_": "torchrl.objectives.HardUpdate", "loss_module": "???", "_partial_": True})
    hard.value_network_update_interval = 2
    trainer = make_trainer(**configs(target_net_updater=hard), replay_buffer=buffer, total_steps=1)
    assert type(trainer.target_net_updater) is HardUpdate
    assert trainer.target_net_updater.loss_module is trainer.loss_module


def test_normalization_is_fitted_given_or_left_for_a_checkpoint(make_batch):
    rows = make_batch(50)
    fitted = Normalization.fit(rows)
    mean = rows["observation"].mean(0)

    def first_loc(normalization, transitions=None):
        networks = make_networks("bcq", **SPECS, **SIZES, normalization=normalization, transitions=transitions)
        return getattr(networks[0].encoder[0], "loc", torch.full((5,), -1.0))[:3]

    torch.testing.assert_close(first_loc(True, rows), mean)
    torch.testing.assert_close(first_loc(fitted), mean)
    assert first_loc("identity").tolist() == [0, 0, 0]
    assert first_loc(False).tolist() == first_loc(None).tolist() == [-1, -1, -1]
    with pytest.raises(ValueError, match="=true needs the data whose mean and scale it computes"):
        first_loc(True)
    with pytest.raises(ValueError, match="normalization is 'yes', expected true, false, identity"):
        first_loc("yes")
