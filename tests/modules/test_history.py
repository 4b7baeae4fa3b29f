"""States made outside TorchRL's environments are equal to those of ``CatFrames``."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch
from torchrl.data import Bounded, Unbounded
from torchrl.envs import CatFrames, GymEnv, SerialEnv, TransformedEnv

from torchrl_bcq import BCQPolicy, History, make_bcq_modules


def make_pendulum():
    return GymEnv("Pendulum-v1", max_episode_steps=7)


@pytest.mark.parametrize("number", [1, 2, 5])
def test_equal_to_cat_frames_in_a_rollout(number):
    catting = CatFrames(number, dim=-1, in_keys=["observation"], out_keys=["stacked"])
    steps = TransformedEnv(make_pendulum(), catting).rollout(30, break_when_any_done=False)
    history = History(number)
    for step in steps:
        assert torch.equal(history(step["observation"]), step["stacked"])
        if step["next", "done"]:
            assert torch.equal(history(step["next", "observation"]), step["next", "stacked"])
            history.reset()


@pytest.mark.parametrize("as_array", [True, False])
def test_some_of_several_environments_start_a_new_episode(as_array):
    """Three environments, where the first and the third end an episode before the others."""
    catting = CatFrames(3, dim=-1, in_keys=["observation"], out_keys=["stacked"])
    env, history, ended = TransformedEnv(SerialEnv(3, make_pendulum), catting), History(3), 0
    state = env.reset()
    for step in range(20):
        observation = state["observation"].numpy() if as_array else state["observation"]
        found = history(observation)
        assert isinstance(found, np.ndarray if as_array else torch.Tensor)
        assert torch.equal(torch.as_tensor(found), state["stacked"])
        stepped, state = env.step_and_maybe_reset(env.rand_action(state))
        done = stepped["next", "done"].squeeze(-1)
        if step == 3:  # so that the environments do not end together
            done = torch.tensor([True, False, True])
            state = env.reset(state.set("_reset", done[:, None]))
        history.reset(done.numpy() if as_array else done)
        ended += int(done.sum())
    env.close()
    assert ended == 3 + 2 + 3  # after the steps 3, 10, 17; 6, 13; 3, 10, 17


def test_a_second_reset_keeps_the_first():
    history = History(2)
    history([[1.0], [2.0]])
    history.reset([True, False])
    history.reset([False, False])
    assert history([[3.0], [4.0]]).tolist() == [[3, 3], [2, 4]]


def test_the_vector_environments_of_gymnasium():
    """Their next step resets: the observation after ``done`` is the first one of the next episode."""
    single = gymnasium.wrappers.FrameStackObservation
    make = [lambda limit=limit: gymnasium.make("Pendulum-v1", max_episode_steps=limit) for limit in (3, 5)]
    plain = gymnasium.vector.SyncVectorEnv(make)
    stacked = gymnasium.vector.SyncVectorEnv([lambda one=one: single(one(), 4, padding_type="reset") for one in make])
    history = History(4)
    observation, state = plain.reset(seed=0)[0], stacked.reset(seed=0)[0]
    ended, ends, action = np.zeros(2, bool), 0, np.ones((2, 1), np.float32)
    for _ in range(14):
        assert np.array_equal(history(observation), state.reshape(2, -1))
        history.reset(ended)
        state = stacked.step(action)[0]
        observation, _, terminated, truncated, _ = plain.step(action)
        ended = terminated | truncated
        ends += ended
    assert ends.tolist() == [3, 2]
    plain.close()
    stacked.close()


def test_nothing_is_shared_with_the_caller():
    """SLM-Lab#313: whoever changed a returned state changed the history; environments reuse their arrays too."""
    for make in (np.array, torch.tensor):
        for number in (1, 2):
            history, observation = History(number), make([1.0])
            history(observation)[:] = 7.0
            observation[:] = 2.0
            assert history(observation).tolist() == [1.0, 2.0][-number:]


def test_types_and_shapes():
    assert History(2)([1.0]).dtype == np.float64
    assert History(2)(np.float32([1])).dtype == np.float32
    assert History(2)(torch.zeros(5, 4, 3)).shape == (5, 4, 6)
    read_only = np.zeros((4, 3))[::-1]
    read_only.flags.writeable = False
    assert History(2)(read_only).shape == (4, 6)
    history = History(2)
    history.reset([True, False])  # before the first observation, all environments start
    history([1.0])
    history.reset(False)
    assert history([2.0]).tolist() == [1, 2]
    history.reset(np.True_)
    assert history([3.0]).tolist() == [3, 3]


@pytest.mark.parametrize("number", [0, -1, 2.5, "2", None])
def test_numbers_of_frames_that_are_refused(number):
    with pytest.raises(ValueError, match=f"^num_frames is {number!r}, expected a whole number of at least 1\\.$"):
        History(number)


def test_refusals():
    history = History(2)
    history(np.zeros((3, 2)))
    with pytest.raises(ValueError, match=r"has shape \(3, 4\), but the one before has \(3, 2\); call reset\(\)\.$"):
        history(np.zeros((3, 4)))
    with pytest.raises(ValueError, match=r"has shape \(2,\), but the one before has \(3, 2\)"):
        history(np.zeros(2))
    with pytest.raises(
        ValueError, match=r"^mask has shape \(3, 1\), expected \(3,\), one boolean for each environment"
    ):
        history.reset(np.zeros((3, 1), bool))
    with pytest.raises(ValueError, match=r"^mask is \[0, 2\], expected booleans: true where a new episode starts.$"):
        history.reset([0, 2])
    for odd in (1.0, {"observation": [1.0]}):
        with pytest.raises(
            ValueError, match=r"^the observation is .*, expected an array of numbers, \[D\] or \[B, D\]"
        ):
            history(odd)


def test_a_policy_of_stacked_states_tells_what_it_needs():
    policy = BCQPolicy(*make_bcq_modules(Unbounded((8,)), Bounded(-1, 1, (1,)), hidden=[8], vae_hidden=[8]))
    policy.stack = 4
    with pytest.raises(ValueError, match="one state or several") as error:
        policy.act([0.0, 0.0])
    assert str(error.value) == (
        "'observation' has shape (2,), expected [8] or [B, 8]: one state or several. The policy was trained with "
        "stack=4: join the last 4 observations with History(4)."
    )
    assert policy.act(History(policy.stack)([0.0, 0.0])).shape == (1,)
