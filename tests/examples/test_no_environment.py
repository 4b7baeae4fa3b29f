"""A run is watched, and a checkpoint chosen, where no environment can be made at all."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.checkpoint import Checkpoint
from torchrl.data import Bounded, Unbounded
from torchrl.objectives import SoftUpdate

import torchrl_bcq as bcq


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")
    import no_environment

    return no_environment


def test_trips_are_transitions_of_the_cart(example):
    data = example.log_trips()
    assert data.batch_size == (200 * 40,)
    assert data["next", "truncated"].sum() == 200
    assert not data["next", "terminated"].any()
    np.testing.assert_allclose(
        data["next", "observation"], example.move(data["observation"].numpy(), data["action"].numpy()), atol=1e-6
    )
    goes_on = ~data["next", "done"].squeeze(1)[:-1]
    assert torch.equal(data["next", "observation"][:-1][goes_on], data["observation"][1:][goes_on])


@pytest.mark.no_cover  # training steps by the hundred
def test_the_chosen_checkpoint_is_the_one_of_the_highest_estimate(example, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gymnasium, "make", None)
    monkeypatch.setattr(sys, "argv", ["no_environment.py", "--steps", "1000", "--out", str(tmp_path)])
    example.main()
    rows = list(csv.reader((tmp_path / "log" / "scalars" / "fqe.csv").read_text().splitlines()))
    estimates = {int(step): float(estimate) for step, estimate in rows}
    assert list(estimates) == [0, 200, 400, 600, 800, 1000]
    step = max((step for step in estimates if step > 0), key=estimates.__getitem__)
    (best,) = (tmp_path / "best").glob("checkpoint-*")
    assert Checkpoint.manifest(best)["metadata"]["optim_steps"] == step
    assert f"{best} pushes -" in capsys.readouterr().out

    networks = bcq.make_bcq_modules(Unbounded((2,)), Bounded(-1, 1, (1,)), hidden=(64, 64), vae_hidden=(64, 64))
    loss = bcq.BCQLoss(*networks)
    SoftUpdate(loss, tau=0.1)  # TorchRL warns without one
    bcq.make_checkpoint(loss_module=loss).load(best)
    logged = example.log_trips()["next", "reward"].sum().item() / example.TRIPS
    assert reached(example, bcq.BCQPolicy(*networks)) > logged / 2  # costs, so half of them or less


def reached(example, policy) -> float:
    """Mean return of the policy on the trips' initial states."""
    state, total = example.log_trips()["observation"][:: example.STEPS].numpy(), 0.0
    for _ in range(example.STEPS):
        states = TensorDict({"observation": torch.from_numpy(state).float()}, [len(state)])
        state = example.move(state, policy(states)["action"].numpy())
        total -= (state[:, 0] ** 2).mean()
    return total


def test_an_existing_table_is_not_replaced(example, monkeypatch, tmp_path, capsys):
    table = tmp_path / "trips.csv"
    monkeypatch.setattr(sys, "argv", ["no_environment.py", "--table", str(table)])
    example.main()
    before = table.read_text()
    assert capsys.readouterr().out == f"{example.TRIPS} trips are in {table}.\n"
    with pytest.raises(SystemExit):
        example.main()
    assert "exists already; pass another --table" in capsys.readouterr().err
    assert table.read_text() == before


def test_a_second_run_does_not_mix_with_the_first(example, monkeypatch, tmp_path, capsys):
    (tmp_path / "log").mkdir()
    monkeypatch.setattr(sys, "argv", ["no_environment.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        example.main()
    assert "holds another run; pass another --out" in capsys.readouterr().err
