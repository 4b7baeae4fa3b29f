"""Fitted Q evaluation: targets by hand, exact values of a small task, and twenty updates in plain PyTorch."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Binary, Bounded, Categorical, Composite, Unbounded
from torchrl.objectives import SoftUpdate

from torchrl_bcq import DiscreteFQELoss, FQELoss, MultiHeadNetwork, QEnsemble, make_fqe_modules

from ..conftest import ACTION_SPEC, OBSERVATION_SPEC, random_transitions

STATES, K = 4, 3


def outcomes(reward, terminated) -> dict[str, torch.Tensor]:
    terminated = torch.tensor(terminated).unsqueeze(-1)
    return {"reward": torch.tensor(reward).unsqueeze(-1), "terminated": terminated, "done": terminated}


def table(values) -> nn.Linear:
    """Reads the row of ``values [S, K]`` that belongs to a one-hot state."""
    layer = nn.Linear(len(values), len(values[0]), bias=False)
    layer.weight.data = torch.tensor(values).T.clone()
    return layer


def discrete_batch() -> TensorDict:
    """Two states; the policy takes the second action with the probability 3/4. The second row ends."""
    states = torch.eye(2)
    following = {"observation": states[[1, 1]], "policy_probability": torch.tensor([[0.25, 0.75]]).expand(2, 2)}
    following |= outcomes([1.0, 2.0], [False, True])
    return TensorDict({"observation": states, "action": torch.tensor([0, 1]), "next": following}, [2])


def test_discrete_targets_by_hand():
    """Expected values 4/4 + 3 * 8/4 = 7 and 0 + 3 * 4/4 = 3; targets 1 + 7/2, 1 + 3/2, and 2 after an end."""
    heads = {"q0": table([[1.0, 2.0], [4.0, 8.0]]), "q1": table([[3.0, 5.0], [0.0, 4.0]])}
    loss = DiscreteFQELoss(MultiHeadNetwork(heads, Categorical(2)), delay_qvalue=False)
    loss.make_value_estimator(gamma=0.5)
    out = loss(discrete_batch())
    assert out["target_value"].tolist() == [[4.5, 2.5], [2, 2]]
    assert out["pred_value"].tolist() == [[1, 3], [8, 4]]
    assert out["td_error"].tolist() == [[3.5, 0.5], [6, 2]]
    assert out["loss_qvalue"].item() == (3.5**2 + 0.5**2 + 6**2 + 2**2) / 2
    assert loss.value(discrete_batch()).tolist() == [2, 6]  # the means over critics


def test_targets_are_clipped_to_the_range_of_values():
    """The same targets as above: 4.5 and 2.5 become 3 and 2.5, and 2 stays."""
    heads = {"q0": table([[1.0, 2.0], [4.0, 8.0]]), "q1": table([[3.0, 5.0], [0.0, 4.0]])}
    network = MultiHeadNetwork(heads, Categorical(2))
    loss = DiscreteFQELoss(network, delay_qvalue=False, value_range=(0.0, 3.0)).make_value_estimator(gamma=0.5)
    assert loss(discrete_batch())["target_value"].tolist() == [[3, 2.5], [2, 2]]
    with pytest.raises(ValueError, match=r"value_range is \(1.0, 0.0\), expected \(low, high\)"):
        DiscreteFQELoss(network, value_range=(1.0, 0.0))


def test_states_without_the_choices_of_the_policy_are_refused():
    (critics,) = make_fqe_modules(Unbounded((2,)), Categorical(2), hidden=(4,))
    loss = DiscreteFQELoss(critics)
    with pytest.raises(ValueError, match="the states lack 'policy_probability'; add it with add_policy_act"):
        loss.state_values(TensorDict({"observation": torch.eye(2)}, [2]))


def test_continuous_targets_by_hand():
    """Q_c(s, a) = s + c a. Of the actions 1 and 3 in state 10, the values are 11 and 13, or 12 and 16."""
    critics = []
    for weight in (1.0, 2.0):
        layer = nn.Linear(2, 1, bias=False)
        layer.weight.data = torch.tensor([[1.0, weight]])
        network = nn.Sequential(layer)
        keys = {"in_keys": ["observation", "action"], "out_keys": ["state_action_value"]}
        critics.append(TensorDictModule(Joined(network), **keys))
    loss = FQELoss(QEnsemble(critics), delay_qvalue=False)
    loss.make_value_estimator(gamma=0.5)
    following = {"observation": torch.full((2, 1), 10.0), "policy_action": torch.tensor([[[1.0], [3.0]]] * 2)}
    following |= outcomes([1.0, 1.0], [False, True])
    batch = TensorDict({"observation": torch.ones(2, 1), "action": torch.ones(2, 1), "next": following}, [2])
    out = loss(batch)
    assert out["target_value"].tolist() == [[1 + 12 / 2, 1 + 14 / 2], [1, 1]]
    assert out["pred_value"].tolist() == [[2, 3], [2, 3]]
    assert loss.state_values(batch["next"]).tolist() == [[12, 14], [12, 14]]


class Joined(nn.Module):
    """A network of the concatenated inputs."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.network(torch.cat(inputs, -1))


@pytest.mark.parametrize("gamma", [0.9, 1.0])
@pytest.mark.parametrize("cut", [False, True])
def test_the_values_of_a_small_task_are_exact(gamma, cut):
    """One row for each pair of state and action; a gradient step with this rate sets each value to its target.

    A truncated row has a value, a terminated one does not. The state 3 always ends the episode.
    """
    rng = np.random.default_rng(0)
    following = rng.integers(STATES, size=(STATES, K))
    following[:3, 0] = [1, 2, 3]  # the end can be reached
    reward, probability = rng.normal(size=(STATES, K)), rng.dirichlet(np.ones(K), STATES)
    ends = np.zeros((STATES, K), bool)
    ends[3] = True
    moves = np.zeros((STATES * K, STATES * K))  # from pair to pair
    for state, action in np.ndindex(STATES, K):
        if not ends[state, action]:
            there = following[state, action]
            moves[state * K + action, there * K : there * K + K] = probability[there]
    exact = np.linalg.solve(np.eye(STATES * K) - gamma * moves, reward.ravel()).reshape(STATES, K)

    eye, pairs = torch.eye(STATES, dtype=torch.float64), list(np.ndindex(STATES, K))
    there = torch.tensor(following.ravel())
    flags = torch.tensor(ends.ravel()).unsqueeze(-1)
    outcome = {
        "observation": eye[there],
        "policy_probability": torch.tensor(probability)[there],
        "reward": torch.tensor(reward.ravel()).unsqueeze(-1),
        "terminated": flags,
        "done": flags | torch.tensor(cut),
    }
    columns = {"observation": eye[[s for s, _ in pairs]], "action": torch.tensor([a for _, a in pairs])}
    batch = TensorDict({**columns, "next": outcome}, [len(pairs)])
    heads = {name: nn.Linear(STATES, K, bias=False, dtype=torch.float64) for name in ("q0", "q1")}
    loss = DiscreteFQELoss(MultiHeadNetwork(heads, Categorical(K)), delay_qvalue=False)
    loss.make_value_estimator(gamma=gamma)
    optimizer = torch.optim.SGD(loss.parameters(), lr=len(pairs) / 2)
    for _ in range(1000):
        optimizer.zero_grad()
        loss(batch)["loss_qvalue"].backward()
        optimizer.step()
    for head in heads.values():
        np.testing.assert_allclose(head.weight.detach().T, exact, rtol=1e-9, atol=1e-9)


class Plain:
    """FQE with two critics, one tensor operation after the other."""

    def __init__(self, critics, gamma, tau, lr) -> None:
        self.nets = [[copy.deepcopy(m) for m in critic.modules() if isinstance(m, nn.Linear)] for critic in critics]
        self.targets = copy.deepcopy(self.nets)
        self.optimizer = torch.optim.Adam([p for net in self.nets for layer in net for p in layer.parameters()], lr=lr)
        self.gamma, self.tau = gamma, tau

    @staticmethod
    def q(net, s, a):
        x = torch.cat([s, a], -1)
        for layer in net[:-1]:
            x = torch.relu(layer(x))
        return net[-1](x)

    def update(self, s, a, r, s2, a2, ended):
        total = 0
        for net, target in zip(self.nets, self.targets, strict=True):
            with torch.no_grad():
                following = sum(self.q(target, s2, a2[:, i]) for i in range(a2.shape[1])) / a2.shape[1]
                y = r + self.gamma * (1 - ended) * following
            total = total + nn.functional.mse_loss(self.q(net, s, a), y)
        self.optimizer.zero_grad()
        total.backward()
        self.optimizer.step()
        for net, target in zip(self.nets, self.targets, strict=True):
            for layer, slow in zip(net, target, strict=True):
                for p, q in zip(layer.parameters(), slow.parameters(), strict=True):
                    q.data = self.tau * p.data + (1 - self.tau) * q.data


def test_twenty_updates_equal_plain_pytorch(show_figure):
    specs = Unbounded((3,), dtype=torch.float64), Bounded(-1, 1, (2,), dtype=torch.float64)
    (critics,) = make_fqe_modules(*specs, hidden=(16, 16), num_critics=2, dtype=torch.float64)
    plain = Plain(critics.critics, gamma=0.97, tau=0.05, lr=1e-3)
    loss = FQELoss(critics)
    loss.make_value_estimator(gamma=0.97)
    updater, optimizer = SoftUpdate(loss, tau=0.05), torch.optim.Adam(loss.qvalue_network_params.parameters(), lr=1e-3)
    largest = 0.0
    for _ in range(20):
        real = {"dtype": torch.float64}
        s, a, r, s2, a2 = (torch.randn(8, *shape, **real) for shape in ((3,), (2,), (1,), (3,), (4, 2)))
        ended = torch.rand(8, 1) < 0.3
        following = {"observation": s2, "policy_action": a2, "reward": r, "terminated": ended, "done": ended}
        optimizer.zero_grad()
        loss(TensorDict({"observation": s, "action": a, "next": following}, [8]))["loss_qvalue"].backward()
        optimizer.step()
        updater.step()
        plain.update(s, a, r, s2, a2, ended.double())
        ours = [p for critic in critics.critics for p in critic.parameters()]
        theirs = [p for net in plain.nets for layer in net for p in layer.parameters()]
        largest = max(largest, *((x - y).abs().max().item() for x, y in zip(ours, theirs, strict=True)))
    show_figure(f"fitted Q evaluation: parity with plain PyTorch, float64, 20 updates: largest deviation {largest:.1e}")
    assert largest < 1e-9


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("policy_probability", torch.ones(2, 3), r"'policy_probability' has shape \(2, 3\), expected \(2, 2\)"),
        ("policy_probability", torch.ones(2, 2, dtype=torch.float64), "policy_probability.* has dtype torch.float64"),
        ("policy_probability", None, "the batch lacks .*policy_probability"),
    ],
)
def test_wrong_probabilities(entry, value, message):
    heads = {"q0": nn.Linear(2, 2)}
    loss = DiscreteFQELoss(MultiHeadNetwork(heads, Categorical(2)), delay_qvalue=False)
    batch = discrete_batch()
    batch["next"].pop(entry)
    if value is not None:
        batch["next", entry] = value
    with pytest.raises(ValueError, match=message):
        loss(batch)


def test_actions_without_samples_are_refused(make_batch):
    (critics,) = make_fqe_modules(Unbounded((3,)), Bounded(-1, 1, (2,)), hidden=(8,))
    loss, batch = FQELoss(critics, delay_qvalue=False), make_batch(5)
    batch["next", "policy_action"] = batch["action"]
    with pytest.raises(ValueError, match=r"'policy_action' has shape \(5, 2\), expected \(5, 'n', 'A'\)"):
        loss(batch)


def test_n_step_targets_of_several_critics():
    """Two steps to the next state: 1 + 0.25 * 7, and 1 + 0.25 * 3."""
    heads = {"q0": table([[1.0, 2.0], [4.0, 8.0]]), "q1": table([[3.0, 5.0], [0.0, 4.0]])}
    loss = DiscreteFQELoss(MultiHeadNetwork(heads, Categorical(2)), delay_qvalue=False)
    loss.make_value_estimator(gamma=0.5)
    batch = discrete_batch().set("steps_to_next_obs", torch.full((2, 1), 2))
    assert loss(batch)["target_value"].tolist() == [[2.75, 1.75], [2, 2]]


def test_masks_are_not_read():
    spec = Composite(observation=Unbounded((2,)), action_mask=Binary(2, dtype=torch.bool))
    loss = DiscreteFQELoss(*make_fqe_modules(spec, Categorical(2), hidden=(8,)), delay_qvalue=False)
    assert not any("mask" in str(key) for key in loss.in_keys)
    assert loss(discrete_batch())["loss_qvalue"].isfinite()


def test_numbers_of_steps_are_columns():
    """TorchRL's transforms write them as [*B]; one number for each critic would be another target."""
    loss = FQELoss(*make_fqe_modules(OBSERVATION_SPEC, ACTION_SPEC, hidden=(8,), num_critics=3), delay_qvalue=False)
    loss.make_value_estimator(gamma=0.5)
    batch = random_transitions(3)
    batch["next", "policy_action"] = batch["action"].unsqueeze(1)
    steps = torch.tensor([1, 2, 3])
    batches = [batch.copy().set("steps_to_next_obs", each) for each in (steps, steps[:, None])]
    flat, column = (loss(each)["target_value"] for each in batches)
    assert torch.equal(flat, column)
    with pytest.raises(ValueError, match=r"steps_to_next_obs has shape \(3, 2\), expected \(3, 1\)"):
        loss(batch.copy().set("steps_to_next_obs", torch.ones(3, 2)))


def test_batch_norm_with_a_time_dimension_is_refused():
    value = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    loss = DiscreteFQELoss(MultiHeadNetwork({"value": value}, Categorical(2)))
    SoftUpdate(loss, tau=0.5)
    batch = torch.cat([discrete_batch(), discrete_batch()])
    loss(batch)
    with pytest.raises(ValueError, match=r"the batch has size \(2, 2\), but a network has BatchNorm"):
        loss(batch.reshape(2, 2))
