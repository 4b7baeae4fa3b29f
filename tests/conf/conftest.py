"""A small file in D4RL's layout, and the trainer of the example, by hand and by config."""

from __future__ import annotations

import h5py
import numpy as np
import pytest
import torch
from hydra import compose, initialize
from torchrl.envs import GymEnv
from torchrl.objectives import SoftUpdate

import torchrl_bcq as bcq
import torchrl_bcq.conf

STEPS = 5


@pytest.fixture
def dataset(tmp_path):
    rng, n = np.random.default_rng(0), 60
    with h5py.File(tmp_path / "pendulum.hdf5", "w") as file:
        for name, width in (("observations", 3), ("actions", 1), ("next_observations", 3)):
            file[name] = rng.uniform(-1, 1, (n, width))
        file["rewards"], file["terminals"], file["timeouts"] = rng.normal(size=n), np.zeros(n), np.arange(n) % 20 == 19
    return tmp_path / "pendulum.hdf5"


@pytest.fixture
def choices(tmp_path):
    """A file with the discrete actions of CartPole."""
    rng, n = np.random.default_rng(0), 60
    with h5py.File(tmp_path / "cartpole.hdf5", "w") as file:
        file["observations"], file["next_observations"] = rng.uniform(-1, 1, (2, n, 4))
        file["actions"], file["rewards"] = np.arange(n) % 2, rng.normal(size=n)
        file["terminals"], file["timeouts"] = np.zeros(n), np.arange(n) % 20 == 19
    return tmp_path / "cartpole.hdf5"


@pytest.fixture
def compose_bcq(dataset):
    """``cfg`` of the root config of an algorithm, on the file, with these overrides."""

    def compose_(*overrides, root="bcq"):
        chosen = ["env=gym", "env.env_name=Pendulum-v1", "dataset=hdf5", f"dataset.path={dataset}"]
        settings = [f"trainer.total_steps={STEPS}", "trainer.seed=3", "trainer.progress_bar=false"]
        with initialize(version_base=None, config_path=None):
            return compose(root, overrides=[*chosen, *settings, *overrides])

    return compose_


@pytest.fixture
def by_hand(dataset):
    """The trainer as in examples/train_offline.py; each part can be made in another way."""

    def build(
        *,
        make_buffer=lambda transitions: bcq.make_replay_buffer(transitions, seed=3),
        make_modules=bcq.make_bcq_modules,
        make_loss=bcq.BCQLoss,
        make_updater=lambda loss: SoftUpdate(loss, tau=0.005),
        make_stepper=lambda loss: None,
        seed=3,
        **settings,
    ):
        env = GymEnv("Pendulum-v1")
        buffer = make_buffer(bcq.load_hdf5(dataset, action_spec=env.action_spec))
        torch.manual_seed(seed)
        loss = make_loss(*make_modules(env.observation_spec, env.action_spec))
        return bcq.BCQTrainer(
            loss,
            buffer,
            target_net_updater=make_updater(loss),
            optimization_stepper=make_stepper(loss),
            total_steps=STEPS,
            seed=seed,
            progress_bar=False,
            **settings,
        )

    return build


@pytest.fixture
def assert_learn_the_same():
    """Build and train two, from different random states: all weights and targets are equal bit by bit afterwards."""

    def check(*builds):
        states = []
        for i, build in enumerate(builds):
            torch.manual_seed(100 + i)
            trainer = build()
            before = {name: value.clone() for name, value in trainer.loss_module.state_dict().items()}
            trainer.train()
            states.append(trainer.loss_module.state_dict())
            assert trainer.collected_frames == STEPS
            assert not all(torch.equal(before[name], value) for name, value in states[-1].items())
        assert states[0].keys() == states[1].keys()
        different = [name for name, value in states[0].items() if not torch.equal(value, states[1][name])]
        assert not different

    return check
