"""Discrete BCQ on small datasets with a known solution."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Binary, Categorical, Composite, Unbounded
from torchrl.objectives import SoftUpdate

from torchrl_bcq import (
    DiscreteBCQLoss,
    DiscreteBCQPolicy,
    DiscreteCloningLoss,
    DiscreteCloningPolicy,
    make_discrete_bcq_modules,
    make_discrete_cloning_modules,
)

pytestmark = pytest.mark.no_cover  # training steps by the thousand, which coverage's tracing makes five times as slow


def transitions(state, action, reward, following, *, states: int, terminated=False, **masks) -> TensorDict:
    """Columns as lists; states are one-hot vectors."""

    def one_hot(numbers) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.tensor(numbers), states).float()

    rows = len(state)
    ended = torch.tensor(terminated).expand(rows).reshape(rows, 1).clone()
    outcome = {"reward": torch.tensor(reward, dtype=torch.float32).reshape(-1, 1), "terminated": ended}
    columns = {
        "observation": one_hot(state),
        "action": torch.tensor(action),
        "next": {"observation": one_hot(following), "done": torch.ones_like(ended), **outcome},
    }
    made = TensorDict(columns, [rows])
    if masks:
        made["action_mask"] = torch.tensor(masks["now"])[torch.tensor(state)]
        made["next", "action_mask"] = torch.tensor(masks["now"])[torch.tensor(following)]
    return made


def train(loss, data: TensorDict, steps: int, lr: float = 1e-2) -> None:
    """Steps on the whole dataset, so that the solution is exact."""
    updater = SoftUpdate(loss, tau=0.1) if loss.delayed_names else None
    optimizer = torch.optim.Adam(loss.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        getattr(loss, f"{loss.network_names[0]}_loss")(data)[0].backward()
        optimizer.step()
        if updater is not None:
            updater.step()


def learn(data: TensorDict, number: int, steps: int = 300, gamma: float = 0.9, **settings):
    """Train a small network; return the network."""
    (network,) = make_discrete_bcq_modules(
        Unbounded(data["observation"].shape[-1:]), Categorical(number), hidden=(32, 32)
    )
    train(DiscreteBCQLoss(network, **settings).make_value_estimator(gamma=gamma), data, steps)
    return network


def scores(network, states: int) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        return network(torch.eye(states))


def test_an_action_that_never_occurs_is_taken_at_the_threshold_0_alone():
    """A bandit with the rewards -1 (action 0, 90%) and -2 (action 1, 10%); action 2 never occurs.

    Nothing corrects the value of action 2. Here its bias is raised before the training, as extrapolation may do.
    """
    data = transitions([0] * 200, [0] * 180 + [1] * 20, [-1] * 180 + [-2] * 20, [0] * 200, states=1, terminated=True)
    (network,) = make_discrete_bcq_modules(Unbounded((1,)), Categorical(3), hidden=(32, 32))
    network.heads[0][-1].bias.data[2] = 5.0
    train(DiscreteBCQLoss(network), data, 300)
    value, logits = scores(network, 1)
    assert value[0, :2].tolist() == pytest.approx([-1, -2], abs=0.02)
    assert value[0, 2] > 2
    # where the gradient is 0: p - share + 2 * 0.01 * logit / 3 = 0
    probability = torch.tensor([0.9, 0.1, 0.0]) - 0.02 * logits[0] / 3
    torch.testing.assert_close(logits.softmax(-1)[0], probability, rtol=0, atol=1e-3)
    chosen = {
        threshold: int(DiscreteBCQPolicy(network, unlikely_action_threshold=threshold).act([1.0]))
        for threshold in (0.0, 0.05, 0.3, 0.99)
    }
    assert chosen == {0.0: 2, 0.05: 0, 0.3: 0, 0.99: 0}


def test_the_best_of_the_likely_actions_is_taken_and_the_threshold_says_which_are_likely():
    """Shares 0.6, 0.3, 0.1 (ratios 1, 0.5, 0.17) and rewards 0, 1, 2."""
    actions = [0] * 120 + [1] * 60 + [2] * 20
    data = transitions([0] * 200, actions, actions, [0] * 200, states=1, terminated=True)
    network = learn(data, 3)
    chosen = [
        int(DiscreteBCQPolicy(network, unlikely_action_threshold=threshold).act([1.0])) for threshold in (0.1, 0.3, 0.6)
    ]
    assert chosen == [2, 1, 0]
    (cloned,) = make_discrete_cloning_modules(Unbounded((1,)), Categorical(3), hidden=(32, 32))
    train(DiscreteCloningLoss(cloned), data, 300)
    probability = cloned(torch.ones(1, 1)).softmax(-1)[0]
    assert probability.tolist() == pytest.approx([0.6, 0.3, 0.1], abs=1e-3)
    assert int(DiscreteCloningPolicy(cloned).act([1.0])) == 0


def chain() -> dict[str, list]:
    """Three states; action 0 advances, action 1 stays; the reward is 1 for advancing from the last state, which ends.

    With gamma 0.9, Q*(s, 0) is 0.81, 0.9, 1 and Q*(s, 1) is 0.9 * Q*(s, 0).
    """
    rows = [(s, a) for s in range(3) for a in range(2) for _ in range(40)]
    return {
        "state": [s for s, _ in rows],
        "action": [a for _, a in rows],
        "reward": [float(s == 2 and a == 0) for s, a in rows],
        "following": [min(s + (a == 0), 2) for s, a in rows],
        "terminated": [s == 2 and a == 0 for s, a in rows],
    }


EXACT = torch.tensor([[0.81, 0.729], [0.9, 0.81], [1.0, 0.9]])


def test_values_of_a_chain():
    network = learn(transitions(**chain(), states=3), 2, steps=600)
    torch.testing.assert_close(scores(network, 3)[0], EXACT, rtol=0, atol=0.02)


def test_values_of_a_chain_where_advancing_is_unlikely():
    """Advancing has the share 0.1. At the threshold 0.3 the next action is to stay, so only the last step has value."""
    columns = {key: [] for key in chain()}
    for name, values in chain().items():
        for i, value in enumerate(values):
            columns[name] += [value] * (9 if chain()["action"][i] == 1 else 1)
    network = learn(transitions(**columns, states=3), 2, steps=600)
    value, logits = scores(network, 3)
    assert logits.softmax(-1)[:, 0].tolist() == pytest.approx([0.1] * 3, abs=0.03)
    torch.testing.assert_close(value, torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]]), rtol=0, atol=0.03)


def test_values_of_a_chain_with_a_mask():
    """In state 2 only staying is available: nothing can be earned, and no value of advancing there is bootstrapped."""
    columns = chain()
    keep = [not (s == 2 and a == 0) for s, a in zip(columns["state"], columns["action"], strict=True)]
    columns = {
        name: [v for v, k in zip(values, keep, strict=True) if k]
        for name, values in columns.items()
        if name != "terminated"
    }
    columns["reward"] = [float(s == 0 and a == 0) for s, a in zip(columns["state"], columns["action"], strict=True)]
    mask = [[True, True], [True, True], [False, True]]
    (network,) = make_discrete_bcq_modules(
        Composite(observation=Unbounded((3,)), action_mask=Binary(2, dtype=torch.bool)), Categorical(2), hidden=(32, 32)
    )
    network.heads[0][-1].bias.data[0] = 50.0  # without the mask, this value would be bootstrapped from
    network.heads[1][-1].bias.data[0] = 5.0  # and its action would seem the more likely one
    train(DiscreteBCQLoss(network).make_value_estimator(gamma=0.9), transitions(**columns, states=3, now=mask), 600)
    value = scores(network, 3)[0]
    assert value[2, 1].item() == pytest.approx(0.0, abs=0.05)
    assert value[:2].flatten().tolist() == pytest.approx([1.0, 0.9, 0.0, 0.0], abs=0.05)
    policy = DiscreteBCQPolicy(network)
    states = {"observation": torch.eye(3), "action_mask": torch.tensor(mask)}
    assert policy.act(states)[[0, 2]].tolist() == [0, 1]


@pytest.mark.parametrize(("terminated", "exact"), [(True, 1.0), (False, 2.0)])
def test_values_at_the_end_of_an_episode(terminated, exact):
    """One state that leads to itself, a reward of 1, gamma 0.5; ``done`` is True in all rows."""
    data = transitions([0] * 128, [0, 1] * 64, [1.0] * 128, [0] * 128, states=1, terminated=terminated)
    network = learn(data, 2, gamma=0.5)
    assert scores(network, 1)[0].tolist() == [pytest.approx([exact, exact], abs=0.02)]
