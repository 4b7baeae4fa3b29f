"""The example of hospital data, on a small model whose values are computed by hand, and on the published model."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

# clinicians: 0.66 in state 1, 0.6 * 0.66 in state 0; first and most likely treatments: 0.5 in both; best: 0.9 in both
CLINICIANS = 0.5 * 0.66 + 0.5 * 0.6 * 0.66
MOST_LIKELY, BEST = 0.5, 0.9


@pytest.fixture
def load(monkeypatch):
    """Import an example as a script does."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")
    from importlib import import_module

    return import_module


@pytest.fixture
def model(load):
    """Two living states, two treatments: from state 0, treatment 0 leads to state 1, and treatment 1 to death."""
    transitions, rewards = np.zeros((2, 5, 2, 5))
    transitions[0, 0, 1] = transitions[0, 1, 2] = transitions[2:, :, 4] = 1
    transitions[1, 0, 2:4] = 0.1, 0.9
    transitions[1, 1, 2:4] = 0.5, 0.5
    rewards[:2, :, 3] = 1
    clinicians = np.full((5, 2), 0.5)
    clinicians[:2] = [[0.6, 0.4], [0.4, 0.6]]
    start = np.array([0.5, 0.5, 0, 0, 0])
    admissible = np.array([[True, True], [False, True], *[[True, True]] * 3])
    return load("sepsis_model").SepsisModel(transitions, rewards, start, clinicians, np.eye(5), admissible)


def test_exact_values(model):
    assert model.value(model.clinicians) == pytest.approx(CLINICIANS)
    assert model.value(np.array([[1, 0]] * 5)) == pytest.approx(BEST)
    assert model.value(np.array([[1, 0], [0, 1], *[[1, 0]] * 3])) == pytest.approx(MOST_LIKELY)
    assert model.value(np.array([[0, 1], [1, 0], *[[1, 0]] * 3])) == pytest.approx(0.5 * 0.9)


def test_simulated_transitions(model):
    data = model.simulate(3000, seed=0)
    ended = data["next", "terminated"].squeeze(1)
    assert 3000 <= len(data) <= 3001
    assert ended[-1]
    assert data["next", "reward"].sum() / ended.sum() == pytest.approx(CLINICIANS, abs=0.04)
    state = data["observation"].argmax(1)
    assert torch.equal(state[1:][~ended[:-1]], data["next", "observation"].argmax(1)[:-1][~ended[:-1]])
    expected = torch.from_numpy(model.clinicians)[state, data["action"]].float()
    assert torch.equal(data["action_probability"], expected)
    assert (data["action"][state == 0] == 0).float().mean() == pytest.approx(0.6, abs=0.04)
    assert data["action_mask"][state == 1].float().mean(0).tolist() == [0, 1]


def test_short_form(load, model, capsys):
    values = load("hospital").main(["--rows", "1000", "--steps", "150"], model)
    assert values["clinicians"] == pytest.approx(CLINICIANS)
    for name in ("cloning", "BCQ, threshold 0.9"):  # of the actions, only the most likely one passes
        assert values[name] == pytest.approx(MOST_LIKELY)
    for name in ("BCQ, threshold 0.0", "BCQ, threshold 0.3", "BCQ, threshold 0.5"):
        assert values[name] == pytest.approx(BEST)
    assert capsys.readouterr().out.splitlines()[2] == "BCQ, threshold 0.0    0.9000"


def test_policies_choose_admissible_treatments_only(load, model):
    values = load("hospital").main(["--rows", "500", "--steps", "30", "--admissible"], model)
    assert values.pop("clinicians") == pytest.approx(CLINICIANS)
    assert [*values.values()] == pytest.approx([MOST_LIKELY] * 6)


def test_tables_are_read_without_importing_the_package(load, model, monkeypatch, tmp_path):
    folder = tmp_path / "envs" / "assets"
    folder.mkdir(parents=True)
    names = ("tx_mat", "r_mat", "d_0", "expert_policy", "state_cluster_centers")
    tables = (model.transitions, model.rewards, model.start, model.clinicians, model.features)
    np.savez(folder / "dynamics.npz", **dict(zip(names, tables, strict=True)))
    (folder / "admissible_actions.txt").write_text("2 1 2 2 2 \n0 1 \n1 \n0 1 \n0 1 \n0 1 \n")
    module = load("sepsis_model")
    monkeypatch.setattr(module, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=[str(tmp_path)]))
    read = module.SepsisModel.load()
    for name, expected in vars(model).items():
        assert np.array_equal(getattr(read, name), expected), name


def test_a_missing_package_is_named(load, monkeypatch):
    module = load("sepsis_model")
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r'icu-sepsis is missing; run: pip install -e "\.\[hospital\]"'):
        module.SepsisModel.load()


@pytest.mark.skipif(find_spec("icu_sepsis") is None, reason="the package icu-sepsis is not installed")
def test_values_of_the_published_model(load):
    """Its authors state 0.78, 0.78 and 0.88 for random, clinicians' and optimal treatments."""
    model = load("sepsis_model").SepsisModel.load()
    assert model.value(model.clinicians) == pytest.approx(0.781845, abs=1e-6)
    assert model.value(np.full_like(model.clinicians, 1 / 25)) == pytest.approx(0.780071, abs=1e-6)
    assert model.admissible[: model.living].sum() == 2238
    n = model.living
    gains = np.einsum("sax,sax->sa", model.transitions[:n], model.rewards[:n])
    chances, optimal = np.ascontiguousarray(model.transitions[:n, :, :n]), np.zeros(n)
    for _ in range(150):  # value iteration
        optimal = (gains + chances @ optimal).max(-1)
    assert model.start[:n] @ optimal == pytest.approx(0.8751, abs=1e-4)
