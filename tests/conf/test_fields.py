"""Configs and constructors name the same settings and give them the same defaults."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
from omegaconf import MISSING, OmegaConf
from torchrl.objectives.utils import ValueEstimators, default_value_kwargs
from torchrl.trainers import Trainer

import torchrl_bcq as bcq
from torchrl_bcq import conf
from torchrl_bcq.trainers.bcq import _NOT_OFFLINE

SETTLED = {"collector", "total_frames", "optim_steps_per_batch", "auto_log_optim_steps"}  # by BCQTrainer itself
LEARNER = {"learner_backend_options", "learner_poll_interval"}  # of the Ray backend, which is not offline
NO_DEFAULT = inspect.Parameter.empty


def settings_of(*callables) -> dict:
    """Names and defaults; the first callable that has a name decides."""
    settings: dict = {}
    for call in callables:
        for name, parameter in inspect.signature(call).parameters.items():
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD and name != "self":
                settings.setdefault(name, parameter.default)
    return settings


def trainer_settings() -> dict:
    settings = settings_of(bcq.BCQTrainer.__init__, Trainer.__init__)
    return {name: value for name, value in settings.items() if name not in _NOT_OFFLINE | SETTLED | LEARNER}


def stepper_settings() -> dict:
    settings = {**settings_of(bcq.BCQOptimizationStepper.adam), **settings_of(bcq.BCQOptimizationStepper.__init__)}
    optimizers = {name: None for name in settings if name.endswith("_optimizer")}
    return {name: value for name, value in {**settings, **optimizers}.items() if name != "schedule"}


GAMMA = default_value_kwargs(ValueEstimators.TD0)["gamma"]
SPECS = {"env": None, "observation_spec": None, "action_spec": None}  # the first gives the others
FITTED_TO = {"transitions": None}  # by the normalization
TABLE = [
    (conf.ActionVAEConfig, settings_of(bcq.ActionVAE.__init__)),
    (conf.PerturbationActorConfig, settings_of(bcq.PerturbationActor.__init__)),
    (conf.QEnsembleConfig, settings_of(bcq.QEnsemble.__init__)),
    (conf.BCQModulesConfig, {**settings_of(bcq.make_bcq_modules), **SPECS, **FITTED_TO}),
    (conf.BCQPolicyConfig, settings_of(bcq.BCQPolicy.__init__)),
    (conf.BCQLossConfig, {**settings_of(bcq.BCQLoss.__init__), "gamma": GAMMA}),
    (conf.HDF5DatasetConfig, settings_of(bcq.load_hdf5)),
    (conf.NPZDatasetConfig, settings_of(bcq.load_npz)),
    (conf.TableDatasetConfig, settings_of(bcq.load_table)),
    (conf.MinariDatasetConfig, settings_of(bcq.load_minari)),
    (conf.D4RLDatasetConfig, settings_of(bcq.load_d4rl)),
    (conf.MemmapDatasetConfig, settings_of(bcq.load_memmap)),
    (conf.BCQReplayBufferConfig, settings_of(bcq.make_replay_buffer)),
    (conf.BCQOptimizationStepperConfig, stepper_settings()),
    (conf.BCQTrainerConfig, {**trainer_settings(), **dict.fromkeys(["env", "dataset", "networks", "device"])}),
]


@pytest.mark.parametrize(("config", "settings"), TABLE, ids=lambda value: getattr(value, "__name__", ""))
def test_fields_and_defaults_are_the_constructors(config, settings):
    node = OmegaConf.structured(config)
    fields = {field.name for field in dataclasses.fields(config) if not field.name.startswith("_")}
    assert fields == set(settings)
    for name, default in settings.items():
        expected = MISSING if default is NO_DEFAULT else list(default) if isinstance(default, tuple) else default
        assert OmegaConf.to_container(node)[name] == expected, name
