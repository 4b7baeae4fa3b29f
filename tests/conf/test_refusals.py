"""Settings that are missing or have no effect are named; and Hydra is imported only when asked for."""

from __future__ import annotations

import subprocess
import sys

import h5py
import pytest
from hydra.errors import ConfigCompositionException, InstantiationException
from hydra.utils import instantiate


@pytest.mark.parametrize("override", ["loss.lamda=0.5", "trainer.lr=0.1", "networks.layers=[8]"])
def test_unknown_field(compose_bcq, override):
    with pytest.raises(ConfigCompositionException, match=f"Could not override '{override.split('=')[0]}'"):
        compose_bcq(override)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dataset.path=???"], r"dataset lacks \['path'\]; set these arguments"),
        (["trainer.dataset=null"], r"replay_buffer lacks \['transitions'\]; set these arguments, choose a dataset"),
        (["trainer.networks=null"], r"loss_module lacks \['vae_network', 'actor_network', 'qvalue_network'\]"),
        (
            ["networks.dtype=float64"],
            "'observation' has dtype torch.float32, but the networks have dtype torch.float64",
        ),
        (["trainer.env=null"], "there is no env, and not both specs are given; set env, such as env=gym"),
        (
            ["optimization_stepper.actor.optimizer=Adm"],
            r"the optimizer 'Adm' \(optim.optimizer or optim.actor.optimizer\) does not exist; ",
        ),
    ],
)
def test_what_is_missing_or_without_effect_is_named(compose_bcq, overrides, message):
    with pytest.raises(InstantiationException, match=message):
        instantiate(compose_bcq(*overrides).trainer)


def test_actions_are_checked_against_the_environment(compose_bcq, dataset):
    with h5py.File(dataset, "a") as file:
        file["actions"][7] = 2.5
    with pytest.raises(InstantiationException, match=r"actions has 1 row \(first: 7\) outside the action bounds"):
        instantiate(compose_bcq().trainer)


def test_hydra_is_imported_only_when_asked_for():
    code = (
        "import sys, torchrl_bcq\n"
        "print([m for m in ('hydra', 'omegaconf', 'torchrl_bcq.conf') if m in sys.modules])\n"
        "sys.modules['hydra'] = None\n"
        "import torchrl_bcq.conf"
    )
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert out.stdout.strip() == "[]"
    assert out.stderr.strip().endswith("ImportError: torchrl_bcq.conf needs Hydra: pip install hydra-core.")
