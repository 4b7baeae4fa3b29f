"""Recorded transitions, step by step."""

from __future__ import annotations

import math
import re

import gymnasium
import numpy as np
import pytest
import torch
from tensordict.nn import TensorDictModule
from torchrl.envs.utils import ExplorationType, exploration_type

from torchrl_bcq.errors import RunError
from torchrl_bcq.evaluation.recording import record, record_swing_up, swing_up

LOW, HIGH = [-1.0, 0.0], [3.0, 1.0]  # centre (1, 0.5), half-ranges (2, 0.5)


class Walk(gymnasium.Env):
    """``[position, time]``: an action's first number is added to the position, and is the reward; 4 is the end."""

    def __init__(self, bound=1.0):
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64)
        self.action_space = gymnasium.spaces.Box(np.float32(LOW), np.float32(HIGH) * np.float32(bound), (2,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = np.zeros(2)
        return self.state.copy(), {}

    def step(self, action):
        self.state += [action[0], 1]
        return self.state.copy(), float(action[0]), bool(self.state[0] >= 4), False, {}


@pytest.fixture
def walk():
    """An environment that ends at position 4, or is cut off after 6 steps."""
    for name, settings in (("Walk-v0", {}), ("Boundless-v0", {"bound": np.inf})):
        gymnasium.register(name, f"{__name__}:Walk", max_episode_steps=6, kwargs=settings)
    yield "Walk-v0"
    for name in ("Walk-v0", "Boundless-v0"):
        del gymnasium.registry[name]


def always(*action: float) -> TensorDictModule:
    return TensorDictModule(lambda x: torch.tensor(action).expand(*x.shape[:-1], 2), ["observation"], ["action"])


def ends(transitions, name: str) -> list[int]:
    return transitions["next", name].squeeze(-1).nonzero().squeeze(-1).tolist()


def test_swing_up_by_hand():
    states = {  # cos, sin, speed: torque
        (1.0, 0.0, 0.5): -1.0,  # upright: -2 * speed
        (math.cos(0.1), math.sin(0.1), 0.0): -1.0,  # -10 * angle
        (-1.0, 0.0, 0.5): 2.0,  # hangs: pumps with the speed
        (-1.0, 0.0, -0.5): -2.0,
        (0.0, 1.0, 8.0): -2.0,  # 64 / 6 > 5: too much energy, brakes
        (0.95, 0.0, 3.0): -2.0,  # at the limit
    }
    torques = swing_up(torch.tensor(list(states)), noise=0.0)
    assert torques.flatten().tolist() == pytest.approx(list(states.values()), abs=1e-6)


@pytest.fixture(scope="module")
def swings():
    return record_swing_up(steps=3000)


def test_swing_up_dataset_is_what_its_actions_do(swings):
    """A new environment for each level, their seeds 0, 1, 2, and whole episodes."""
    actions = iter(swings["action"].numpy())
    steps = []
    for seed in range(3):
        env = gymnasium.make("Pendulum-v1")
        env.reset(seed=seed)
        for _ in range(5):
            state = env.reset()[0]
            for _ in range(200):
                after, reward, *_ = env.step(next(actions))
                steps.append((state, after, [reward]))
                state = after
    keys = ("observation", ("next", "observation"), ("next", "reward"))
    for key, values in zip(keys, zip(*steps, strict=True), strict=True):
        assert torch.equal(swings[key], torch.tensor(np.stack(values), dtype=torch.float32)), key
    assert ends(swings, "truncated") == ends(swings, "done") == list(range(199, 3000, 200))


def test_noise_of_the_swing_up_dataset(swings):
    """Pumping is +-2 before the noise; it is turned round where the noise exceeds 4: P(z > 4 / sigma)."""
    pumps = swings["observation"][:, 0] < 0.9
    reversed_ = swings["action"] == -swing_up(swings["observation"], noise=0.0)
    levels = zip(reversed_.split(1000), pumps.split(1000), strict=True)
    shares = [part[pump].float().mean().item() for part, pump in levels]
    assert shares == pytest.approx([0.00003, 0.1587, 0.3446], abs=0.05)  # 3 standard errors


@pytest.mark.parametrize(("speed", "length", "terminated"), [(1.0, 4, [3, 7]), (0.0, 6, [])])
def test_ends_are_kept_and_the_last_episode_is_cut_off(walk, speed, length, terminated):
    transitions = record(walk, always(speed, 0.5), 10)
    cut = [9] if terminated else [5, 9]
    assert transitions.batch_size == (10,)
    assert ends(transitions, "terminated") == terminated
    assert ends(transitions, "truncated") == cut
    assert ends(transitions, "done") == sorted(terminated + cut)
    time = [step % length for step in range(10)]
    assert transitions["observation"].tolist() == [[speed * t, t] for t in time]
    assert transitions["next", "observation"].tolist() == [[speed * (t + 1), t + 1] for t in time]  # never the reset
    assert transitions["next", "reward"].flatten().tolist() == [speed] * 10
    assert transitions["observation"].dtype == torch.float32


def test_a_step_that_ends_an_episode_is_not_marked_as_cut_off(walk):
    assert ends(record(walk, always(1.0, 0.5), 8), "truncated") == []


def test_noise_is_in_half_ranges_and_keeps_the_bounds(walk):
    action = record(walk, always(1.0, 0.5), 2000, noise=0.25)["action"]
    assert action.mean(0).tolist() == pytest.approx([1.0, 0.5], abs=0.05)  # 4 standard errors of the first
    assert action.std(0).tolist() == pytest.approx([0.25 * 2.0, 0.25 * 0.5], rel=0.06)
    wild = record(walk, always(1.0, 0.5), 400, noise=20.0)["action"]
    assert (wild.amin(0).tolist(), wild.amax(0).tolist()) == (LOW, HIGH)
    assert torch.equal(record(walk, always(1.0, 0.5), 5)["action"], torch.tensor([[1.0, 0.5]] * 5))


def test_random_actions_are_uniform_over_their_bounds(walk):
    action = record(walk, None, 2000)["action"]
    assert action.amin(0).tolist() == pytest.approx(LOW, abs=0.03)
    assert action.amax(0).tolist() == pytest.approx(HIGH, abs=0.03)
    assert action.mean(0).tolist() == pytest.approx([1.0, 0.5], abs=0.1)
    assert action.std(0).tolist() == pytest.approx([4 / math.sqrt(12), 1 / math.sqrt(12)], rel=0.05)


def test_policies_explore_and_keep_no_graph(walk):
    types = []

    def act(observation):
        types.append(exploration_type())
        return torch.ones(2, requires_grad=True) * 1

    assert not record(walk, TensorDictModule(act, ["observation"], ["action"]), 5)["action"].requires_grad
    assert types[-5:] == [ExplorationType.RANDOM] * 5


@pytest.mark.parametrize("is_random", [True, False])
def test_a_seed_decides_everything_and_disturbs_nobody(is_random):
    drawn = TensorDictModule(lambda x: torch.rand(*x.shape[:-1], 1), ["observation"], ["action"])
    policy = None if is_random else drawn
    torch.manual_seed(7)
    one, after = record("Pendulum-v1", policy, 30, seed=3), torch.rand(1)
    torch.manual_seed(7)
    assert torch.equal(after, torch.rand(1))
    again, other = record("Pendulum-v1", policy, 30, seed=3), record("Pendulum-v1", policy, 30, seed=4)
    assert (one == again).all()
    assert (one["observation"] != other["observation"]).any()
    assert (one["action"] != other["action"]).all()


@pytest.mark.parametrize(
    ("env_id", "policy", "settings", "message"),
    [
        (
            "FrozenLake-v1",
            None,
            {},
            "FrozenLake-v1 has observation space Discrete(16), but only one-dimensional Box spaces, and Dict, can be",
        ),
        ("CartPole-v1", None, {"epsilon": 1.5}, "epsilon is 1.5, expected a probability between 0 and 1."),
        ("CartPole-v1", (4, 1), {"noise": 1.0}, "CartPole-v1 has discrete actions, which noise does not change; use e"),
        ("Walk-v0", (2, 2), {"epsilon": 0.5}, "Walk-v0 has continuous actions, which epsilon does not change; use no"),
        ("Boundless-v0", None, {}, ", but only bounded actions can be recorded."),
        ("Walk-v0", None, {"steps": 0}, "steps is 0, expected at least 1."),
        ("Walk-v0", None, {"seed": -1}, "seed is -1, expected at least 0."),
        ("Walk-v0", None, {"noise": math.nan}, "noise is nan, expected a finite number of at least 0."),
    ],
)
def test_refusals_come_before_anything_is_recorded(walk, monkeypatch, env_id, policy, settings, message):
    monkeypatch.setattr("torchrl_bcq.evaluation.recording._collect", lambda *_: pytest.fail("it was recorded"))
    policy = policy and TensorDictModule(torch.nn.Linear(*policy), ["observation"], ["action"])
    with pytest.raises(RunError, match=re.escape(message)):
        record(env_id, policy, **{"steps": 10, **settings})
