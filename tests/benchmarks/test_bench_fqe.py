"""The benchmark of fitted Q evaluation: its policies, and the numbers that it reports."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torchrl.data import Bounded, Categorical

from torchrl_bcq import policy_actions


@pytest.fixture
def modules(load):
    return load("known_policies"), load("bench_fqe")


@pytest.fixture
def folder(tmp_path):
    """Two agents of one layer: logits [0, x], and tanh(2 x) in the bounds -1 and 3."""
    weights = {"layer0_weight": np.array([[0.0], [1.0]], np.float32), "layer0_bias": np.zeros(2, np.float32)}
    np.savez(tmp_path / "discrete.npz", activation="tanh", **weights)
    weights = {"layer0_weight": np.array([[2.0]], np.float32), "layer0_bias": np.zeros(1, np.float32)}
    scales = {"obs_mean": np.ones(1), "obs_std": np.full(1, 0.5), "obs_clip": 3.0}
    np.savez(tmp_path / "continuous.npz", activation="tanh", squash="tanh", **weights, **scales)
    facts = {"discounted_no_time_limit": 5.0, "discounted_no_time_limit_sem": 0.5}
    discrete = {"file": "discrete.npz", **facts}
    policies = [
        {"name": "greedy", "kind": "greedy", "epsilon": 0.2, **discrete},
        {"name": "softmax", "kind": "softmax", "epsilon": 0.0, **discrete},
        {"name": "uniform", "kind": "uniform", "epsilon": 0.0, **facts, "file": ""},
    ]
    (tmp_path / "one-policies.json").write_text(json.dumps({"gamma": 0.9, "policies": policies}))
    policies = [
        {"name": "agent", "noise": 0.0, "file": "continuous.npz", **facts},
        {"name": "noisy", "noise": 9.0, "file": "continuous.npz", **facts},
        {"name": "random", "noise": 0.0, "file": "", **facts},
    ]
    (tmp_path / "two-policies.json").write_text(json.dumps({"gamma": 0.9, "policies": policies}))
    return tmp_path


def states(*values: float) -> torch.Tensor:
    from tensordict import TensorDict

    return TensorDict({"observation": torch.tensor(values)[:, None]}, [len(values)])


def test_probabilities_of_discrete_agents(modules, folder):
    greedy, softmax, uniform = modules[0].load(folder, "one", Categorical(2))
    assert (greedy.value, greedy.error, greedy.gamma) == (5, 0.5, 0.9)
    found = [policy_actions(one.policy, states(2.0, -2.0), Categorical(2)) for one in (greedy, softmax, uniform)]
    torch.testing.assert_close(found[0], torch.tensor([[0.1, 0.9], [0.9, 0.1]]))
    likely = 1 / (1 + np.exp(-2))
    torch.testing.assert_close(
        found[1], torch.tensor([[1 - likely, likely], [likely, 1 - likely]], dtype=torch.float32)
    )
    assert found[2].unique().tolist() == [0.5]


def test_actions_of_continuous_agents(modules, folder):
    """The observation 1.25 is scaled to 0.5, and 9 is clipped to 3."""
    spec = Bounded(-1, 3, (1,))
    agent, noisy, random = modules[0].load(folder, "two", spec)
    found = policy_actions(agent.policy, states(1.25, 9.0), spec)
    torch.testing.assert_close(found[:, 0, 0], torch.tensor([1 + 2 * np.tanh(1.0), 1 + 2 * np.tanh(6.0)]).float())
    drawn = policy_actions(noisy.policy, states(1.25), spec, num_samples=200)[0, :, 0]
    assert {drawn.min().item(), drawn.max().item()} == {-1, 3}
    even = policy_actions(random.policy, states(*[1.25] * 1000), spec)
    assert even.mean().item() == pytest.approx(1, abs=0.15)


def test_numbers_of_one_seed(modules):
    group = [{"value": v, "true": t, "true_error": 0.5} for v, t in ((1.0, 2.0), (4.0, 6.0), (5.0, 5.0), (0.0, 0.0))]
    found = modules[1].measure(group)
    assert found["error"] == pytest.approx((1 + 2 + 0 + 0) / 4)
    assert found["regret"] == 0  # 5 and 6 differ by less than two standard errors of 0.5 * sqrt(2)
    assert modules[1].merge(np.array([2.0, 6.0, 5.0, 0.0]), np.full(4, 0.5)).tolist() == [2, 5.5, 5.5, 0]
    group[0]["value"] = 9.0
    assert modules[1].measure(group)["regret"] == 3.5


def test_report(modules):
    estimate = {"interval": [0.0, 3.0], "critics": [1.0], "limits": [0.0, 9.0], "residual": 0.0, "difference": 1.0}
    estimate |= {"difference_interval": [0.5, 2.0], "far": 0.1, "effective_sample_size": None, "others": {}}
    estimate |= {"uses_critics": True, "uses_weights": False}
    shared = {"task": "cart", "seed": 0, "true_error": 0.1, "steps": 2000}
    lines = [
        {**shared, "contender": "here", "policy": str(t), "value": t + 1.0, "true": t, **estimate, "difference": d}
        for t, d in ((1.0, 1.5), (2.0, 1.5), (8.0, 0.5))  # the recorded behaviour is estimated at 0.5, 1.5 and 8.5
    ]
    lines += [{**shared, "contender": "d3rlpy", "policy": str(t), "value": -t, "true": t} for t in (1.0, 2.0, 8.0)]
    rows = modules[1].report(lines).splitlines()
    assert rows[2] == "| cart, 2,000 steps | here | 3 | 1 | 1.0 | 1.00 | 0.0 | 2 of 3 | 3 of 3 given, 1 wrong |"
    assert rows[3].startswith("| cart, 2,000 steps | d3rlpy | 3 | 1 | 7.3 | -1.00 | 7.0 |")
