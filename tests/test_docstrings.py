"""The examples in the docstrings of the package run and print what they say."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

import torchrl_bcq
from torchrl_bcq import modules

ROOT = Path(torchrl_bcq.__file__).parent
MODULES = [
    ".".join(file.relative_to(ROOT.parent).with_suffix("").parts)
    for file in sorted(ROOT.rglob("*.py"))
    if ">>>" in file.read_text()
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    failed, attempted = doctest.testmod(importlib.import_module(name))
    assert attempted > 0
    assert failed == 0


@pytest.mark.parametrize(
    "name", ["ActionVAE", "BCQPolicy", "DeterministicActor", "PerturbationActor", "QEnsemble", "make_bcq_modules"]
)
def test_modules_that_people_build_first_have_an_example(name):
    assert ">>> " in getattr(modules, name).__doc__
