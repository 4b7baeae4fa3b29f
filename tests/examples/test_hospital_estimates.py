"""Estimates of eleven policies on simulated hospital data, against the exact values from the tables of the model."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from tensordict.nn import TensorDictModule
from torch.distributions import Categorical as Choice
from torchrl.data import Categorical
from torchrl.modules import ProbabilisticActor

from torchrl_bcq import OffPolicyEvaluation

pytestmark = [
    pytest.mark.no_cover,
    pytest.mark.skipif(find_spec("icu_sepsis") is None, reason="the package icu-sepsis is not installed"),
]
FIT = {"steps": 1500, "hidden": (64, 64), "num_critics": 2}
ENOUGH = 100  # effective sample size from which importance sampling alone is compared
IMPORTANCE = ("importance_sampling", "weighted_importance_sampling")


@pytest.fixture(scope="module")
def model():
    folder = str(Path(__file__).parents[2] / "examples")
    sys.path.insert(0, folder)
    try:
        from sepsis_model import SepsisModel
    finally:
        sys.path.remove(folder)
    return SepsisModel.load()


@pytest.fixture(scope="module")
def tables(model) -> dict[str, np.ndarray]:
    """Probabilities of all treatments in each state, ``[S, A]``; the best and worst ones by value iteration."""
    n, clinicians = model.living, model.clinicians
    gains = np.einsum("sax,sax->sa", model.transitions[:n], model.rewards[:n])
    chances = np.ascontiguousarray(model.transitions[:n, :, :n])

    def values(choose, gamma: float = 1.0) -> np.ndarray:
        value = np.zeros(n)
        for _ in range(150):
            found = gains + gamma * chances @ value
            value = choose(found)
        return found

    def greedy(found: np.ndarray) -> np.ndarray:
        table = np.full_like(clinicians, 1 / clinicians.shape[1])
        table[:n] = np.eye(clinicians.shape[1])[found.argmax(-1)]
        return table

    optimal = greedy(values(lambda found: found.max(-1)))
    admissible = model.admissible / model.admissible.sum(1, keepdims=True).clip(1)
    usual = clinicians * model.admissible
    mixed = {f"{share:.0%} optimal": (1 - share) * clinicians + share * optimal for share in (0.05, 0.25, 0.5)}
    return {
        "worst": greedy(-values(lambda found: found.min(-1))),
        "random": np.full_like(clinicians, 1 / clinicians.shape[1]),
        "random, admissible": admissible,
        "clinicians": clinicians,
        "clinicians, admissible": usual / usual.sum(1, keepdims=True).clip(1e-12),
        **mixed,
        "best against clinicians": greedy(values(lambda found: (clinicians[:n] * found).sum(-1))),
        "optimal": optimal,
        "optimal, gamma 0.99": greedy(values(lambda found: found.max(-1), 0.99)),
    }


def make_policy(model, table: np.ndarray) -> ProbabilisticActor:
    """A policy that finds the number of the state by its features."""
    features = torch.from_numpy(model.features).float()[: model.living]
    chances = torch.from_numpy(table).float()
    network = TensorDictModule(
        lambda state: chances[torch.cdist(state, features).argmin(-1)], ["observation"], ["probs"]
    )
    return ProbabilisticActor(network, in_keys=["probs"], distribution_class=Choice)


def test_estimates_of_known_policies(model, tables):
    """The exact value lies in the interval, or beyond it by less than its width."""
    data = model.simulate(20_000, seed=0)
    evaluation = OffPolicyEvaluation(data, Categorical(25), gamma=1.0, held_out=0.5, **FIT)
    compared, wrong = 0, []
    for name, table in tables.items():
        found, exact = evaluation.estimate(make_policy(model, table)), model.value(table)
        estimates = {"fqe": (found.value, *found.interval), **found.others}
        print(f"{name:<24} exact {exact:.3f}, effective sample size {found.effective_sample_size:6.1f}", end="")
        for kind, (value, low, high) in estimates.items():
            print(f", {kind} {value:.3f} ({low:.3f} to {high:.3f})", end="")
            if kind not in IMPORTANCE or found.effective_sample_size >= ENOUGH:
                compared += 1
                if not low - (high - low) <= exact <= high + (high - low):
                    wrong.append((name, kind))
        print()
    assert compared >= 3 * len(tables)
    assert wrong == []
    own = evaluation.estimate(make_policy(model, tables["clinicians"]))
    assert own.others["importance_sampling"][0] == pytest.approx(evaluation.recorded_return)
    assert own.effective_sample_size == pytest.approx(len(evaluation._first))
