"""Environments are made in float32, or refused with what the user can do."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch
from torchrl.data import Bounded

from torchrl_bcq.errors import RunError
from torchrl_bcq.evaluation.environments import check_fits, make_env, make_envs, steps_to_compare, time_limit


class Counter(gymnasium.Env):
    """Counts in float64, from a number that is an argument."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, start=0.0):
        self.start = start

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = np.full(2, self.start)
        return self.state.copy(), {}

    def step(self, action):
        self.state += 1
        return self.state.copy(), 0.5, False, False, {}


class Graph(Counter):
    observation_space = gymnasium.spaces.Graph(gymnasium.spaces.Box(-1, 1, (1,)), None)


@pytest.fixture(autouse=True)
def _registered():
    for name, kind in {"Counter-v0": Counter, "Graph-v0": Graph}.items():
        gymnasium.register(name, kind, max_episode_steps=3)
    yield
    for name in ("Counter-v0", "Graph-v0"):
        del gymnasium.registry[name]


def test_observations_and_rewards_are_float32_and_settings_reach_the_environment():
    steps = make_env("Counter-v0", start=4.0).rollout(10)
    assert steps["observation"].dtype == steps["next", "reward"].dtype == torch.float32
    assert steps["observation"].tolist() == [[4, 4], [5, 5], [6, 6]]
    assert steps["next", "truncated"].flatten().tolist() == [False, False, True]


IMAGE = gymnasium.spaces.Box(0, 255, (36, 36, 3), np.uint8)
SPACES = {  # observation spaces, and the joined observation
    "integers": (gymnasium.spaces.Box(0, 9, (2,), np.int64), [3, 3]),
    "bytes": (gymnasium.spaces.Box(0, 255, (2,), np.uint8), [3, 3]),
    "an integer first": (
        gymnasium.spaces.Dict(gear=gymnasium.spaces.Box(0, 9, (1,), np.int64), speed=gymnasium.spaces.Box(-9, 9, (1,))),
        [3, 0.75],
    ),
    "state": (
        gymnasium.spaces.Dict(state=gymnasium.spaces.Box(-9, 9, (1,)), goal=gymnasium.spaces.Box(-9, 9, (1,))),
        [0.75, 0.75],
    ),
    "state and frames": (gymnasium.spaces.Dict(state=gymnasium.spaces.Box(-9, 9, (2,)), image=IMAGE), [0.75, 0.75]),
}


@pytest.mark.parametrize("name", SPACES)
def test_vectors_of_any_dtype_and_name_become_float32(name):
    """TorchRL renames an entry ``state``, and gives joined entries the dtype of the first one."""
    space, expected = SPACES[name]

    def observe(one):
        if isinstance(one, gymnasium.spaces.Dict):
            return {key: observe(each) for key, each in one.spaces.items()}
        return np.full(one.shape, 0.75 if one.dtype == np.float32 else 3, one.dtype)

    class Constant(Counter):
        observation_space = space

        def reset(self, *, seed=None, options=None):
            return observe(space), super().reset(seed=seed)[1]

        def step(self, action):
            return observe(space), 0.5, False, False, {}

    gymnasium.register("Constant-v0", Constant, max_episode_steps=3)
    try:
        for made in (make_env("Constant-v0"), make_envs("Constant-v0", 2)):
            steps = made.rollout(2)
            assert steps["observation"].dtype == steps["next", "observation"].dtype == torch.float32
            assert steps["observation"].reshape(-1, 2).unique(dim=0).tolist() == [expected]
            assert ("pixels" in steps.keys()) == (name == "state and frames")
    finally:
        del gymnasium.registry["Constant-v0"]


def test_as_many_environments_as_episodes():
    envs = make_envs("Counter-v0", 3, "cpu")
    assert envs.rollout(10)["next", "observation"][..., 0].tolist() == [[1, 2, 3]] * 3
    envs.close()


def test_with_a_discount_episodes_go_on_past_the_time_limit():
    """0.5 ** 8 is the first power below 0.005; 0.1 ** 3 is below it at the limit of 3 steps; 0.999 ** 1000 is not."""
    assert time_limit("Counter-v0") == 3
    for gamma, steps in {0.5: 8, 0.1: 3, 1: 3, 0: 3, 0.999: 1000}.items():
        assert steps_to_compare(3, gamma) == steps
    envs = make_envs("Counter-v0", 2, max_steps=8)
    assert envs.rollout(10).shape == (2, 8)
    envs.close()
    gymnasium.register("Endless-v0", Counter)
    assert time_limit("Endless-v0") is None
    assert steps_to_compare(None, 0.5) is None
    del gymnasium.registry["Endless-v0"]


@pytest.mark.parametrize(
    ("env_id", "message"),
    [
        ("Nonsense-v1", "Environment `Nonsense` doesn't exist"),
        ("nowhere:Counter-v0", "No module named 'nowhere'"),
        ("Graph-v0", "No conversion tool could be found with the gym space"),
    ],
)
def test_what_cannot_be_made_is_refused(env_id, message):
    with pytest.raises(RunError, match=f"^environment '{env_id}' cannot be made: .*{message}.*; choose --env ID\\.$"):
        make_env(env_id, remedy="choose --env ID")


def test_observations_of_another_shape_are_refused():
    made = make_env("Counter-v0")
    one, two = (Bounded(-1, 1, (size,)) for size in (1, 2))
    check_fits(made, "Counter-v0", "choose another", whose="the dataset", shapes={"observation": (2,)}, action_spec=one)
    message = r"^Counter-v0 has observations of shape \(2,\), but the dataset has \(3,\); choose another\.$"
    with pytest.raises(RunError, match=message):
        check_fits(made, "Counter-v0", "choose another", whose="the dataset", shapes={"observation": (3,)})
    message = r"^Counter-v0 has actions of shape \(1,\), but the run has actions of shape \(2,\); choose another\.$"
    with pytest.raises(RunError, match=message):
        check_fits(made, "Counter-v0", "choose another", whose="the run", shapes={"observation": (2,)}, action_spec=two)
