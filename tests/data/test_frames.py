"""States of several observations, compared with states by hand and with TorchRL's environments."""

from __future__ import annotations

import logging

import gymnasium
import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.envs import CatFrames, DoubleToFloat, GymWrapper, SerialEnv, TransformedEnv

from torchrl_bcq import DatasetError, from_rollouts, load_memmap, make_replay_buffer, multi_step, stack_observations
from torchrl_bcq.data import frames


class Walk(gymnasium.Env):
    """Random numbers; episodes end at random, or after 6 steps."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.normal(size=2), {}

    def step(self, action):
        return self.np_random.normal(size=2), 1.0, bool(self.np_random.uniform() < 0.2), False, {}


def make_walk():
    return TransformedEnv(GymWrapper(gymnasium.wrappers.TimeLimit(Walk(), 6)), DoubleToFloat())


def cat_frames(number: int) -> CatFrames:
    return CatFrames(number, dim=-1, in_keys=["observation"], out_keys=["stacked"])


def numbered(*episodes: int, flagged: bool = True) -> TensorDict:
    """Episodes of these lengths: observations 0, 1, 2 ...; the next observation of a last row is 0.5 more."""
    rows = sum(episodes)
    episode = torch.arange(len(episodes)).repeat_interleave(torch.tensor(episodes))
    last = torch.ones(rows, dtype=torch.bool)
    last[:-1] = episode[1:] != episode[:-1]
    now = torch.arange(float(rows))[:, None]
    following = torch.where(last[:, None], now + 0.5, now + 1)
    outcome = {"observation": following, "reward": now.clone(), "done": last[:, None] & flagged}
    return TensorDict({"observation": now, "action": -now, "episode": episode, "next": outcome}, [rows])


def test_three_frames_by_hand():
    """Episodes of 4, 1 and 2 rows: shorter ones than a state too. The next state of a last row is of its episode."""
    source = numbered(4, 1, 2)
    stacked = stack_observations(source, 3)
    assert stacked["observation"].tolist() == [
        *([0, 0, 0], [0, 0, 1], [0, 1, 2], [1, 2, 3]),
        [4, 4, 4],
        *([5, 5, 5], [5, 5, 6]),
    ]
    assert stacked["next", "observation"].tolist() == [
        *([0, 0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 3.5]),
        [4, 4, 4.5],
        *([5, 5, 6], [5, 6, 6.5]),
    ]
    for key in ("action", "episode", ("next", "reward"), ("next", "done")):
        assert stacked[key].data_ptr() == source[key].data_ptr()
    torch.testing.assert_close(source.to_dict(), numbered(4, 1, 2).to_dict(), rtol=0, atol=0)


def test_one_frame_changes_nothing(caplog):
    torch.testing.assert_close(stack_observations(numbered(4, 2), 1).to_dict(), numbered(4, 2).to_dict())
    assert not caplog.messages


def test_vectors_are_joined_oldest_first():
    source = numbered(3)
    for part in (source, source["next"]):
        part["observation"] = part["observation"] * torch.tensor([1.0, 10.0])
    assert stack_observations(source, 2)["observation"].tolist() == [[0, 0, 0, 0], [0, 0, 1, 10], [1, 10, 2, 20]]


@pytest.mark.parametrize("flagged", [True, False])
def test_episodes_end_by_their_numbers_or_by_done(flagged):
    source = numbered(2, 2, flagged=flagged)
    source = source.exclude("episode") if flagged else source
    assert stack_observations(source, 2)["observation"].tolist() == [[0, 0], [0, 1], [2, 2], [2, 3]]


@pytest.mark.parametrize("number", [1, 2, 4, 9])
@pytest.mark.parametrize("envs", [1, 3])
def test_equal_to_cat_frames_bit_for_bit(number, envs):
    """Environments that end at different times are reset one by one, after terminations and after time limits."""
    torch.manual_seed(number)
    base = make_walk() if envs == 1 else SerialEnv(envs, make_walk)
    env = TransformedEnv(base, cat_frames(number), auto_unwrap=True)
    env.set_seed(number)
    rollouts = [env.rollout(60, break_when_any_done=False) for _ in range(2)]
    rows = from_rollouts(torch.cat([rollout.reshape(-1) for rollout in rollouts]))
    env.close()
    assert rows["next", "terminated"].sum() > 10
    assert (rows["next", "truncated"] & ~rows["next", "terminated"]).sum() > 2 * envs
    stacked = stack_observations(rows, number)
    assert torch.equal(stacked["observation"], rows["stacked"])
    assert torch.equal(stacked["next", "observation"], rows["next", "stacked"])


def test_equal_to_the_wrapper_of_gymnasium():
    """Gymnasium#829: its FrameStackObservation padded with zeros; padding_type="reset" repeats the first one."""
    env = gymnasium.wrappers.FrameStackObservation(gymnasium.wrappers.TimeLimit(Walk(), 6), 3, padding_type="reset")
    states, source = [env.reset(seed=3)[0]], []
    while len(source) < 30:
        state, _, terminated, truncated, _ = env.step(np.zeros(1))
        source.append((states[-1], state, terminated or truncated))
        states.append(env.reset()[0] if terminated or truncated else state)
    now, after, done = (torch.tensor(np.array(values)) for values in zip(*source, strict=True))
    outcome = {"observation": after[:, -1], "done": done[:, None]}
    stacked = stack_observations(TensorDict({"observation": now[:, -1], "next": outcome}, [30]), 3)
    assert torch.equal(stacked["observation"], now.flatten(1))
    assert torch.equal(stacked["next", "observation"], after.flatten(1))  # stable-baselines3#1883: also where done


def test_result_on_disk_is_the_one_in_memory(tmp_path, monkeypatch):
    expected = stack_observations(numbered(5, 3, 1), 4).to_dict()
    monkeypatch.setattr(frames, "_CHUNK", 2)  # smaller than a state
    source = numbered(5, 3, 1).memmap(tmp_path / "source")
    written = stack_observations(source, 4, folder=tmp_path / "stacked")
    assert written.is_memmap()
    torch.testing.assert_close(written.to_dict(), expected, rtol=0, atol=0)
    assert make_replay_buffer(load_memmap(tmp_path / "stacked"), batch_size=5).sample()["observation"].shape == (5, 4)
    with pytest.raises(FileExistsError, match="stacked already exists; choose a new folder, or load this folder"):
        stack_observations(source, 4, folder=tmp_path / "stacked")


def test_stack_first_and_then_n_steps():
    """Three steps from row 0: the state after them joins the observations 2 and 3."""
    rows = multi_step(stack_observations(numbered(4), 2), 3, gamma=1.0)
    assert rows["observation"].tolist() == [[0, 0], [0, 1], [1, 2], [2, 3]]
    assert rows["next", "observation"].tolist() == [[2, 3], [3, 3.5], [3, 3.5], [3, 3.5]]
    with pytest.raises(DatasetError, match=r"a row spans several steps; pass transitions of single steps\.$"):
        stack_observations(multi_step(numbered(4), 3, gamma=1.0), 2)


@pytest.mark.parametrize("chunk", [2, 100])
def test_missing_rows_are_told(caplog, monkeypatch, chunk):
    """Without rows 2 and 5, the states after them hold earlier rows; the next states are right."""
    monkeypatch.setattr(frames, "_CHUNK", chunk)
    stacked = stack_observations(numbered(4, 4)[torch.tensor([0, 1, 3, 4, 6, 7])], 2)
    assert stacked["observation"].tolist() == [[0, 0], [0, 1], [1, 3], [4, 4], [4, 6], [6, 7]]
    assert stacked["next", "observation"].tolist() == [[0, 1], [1, 2], [3, 3.5], [4, 5], [6, 7], [7, 7.5]]
    assert caplog.messages == [
        "in 2 of 6 rows (first: 1), the next observation is not the observation of the next row of the episode. The "
        "states join the rows as they are stored. If rows are missing, the states after them hold earlier "
        "observations; if rows are shuffled, the states are wrong, so sort the rows by episode and time."
    ]


def test_the_first_missing_row_is_counted_from_the_start(caplog, monkeypatch):
    """Row 6 is missing: rows 4 and 5 are in the third part of two rows, and row 5 precedes the gap."""
    monkeypatch.setattr(frames, "_CHUNK", 2)
    stack_observations(numbered(8)[torch.tensor([0, 1, 2, 3, 4, 5, 7])], 2)
    assert caplog.messages[0].startswith("in 1 of 7 rows (first: 5), the next observation is not")


def test_stacking_twice_is_told(caplog):
    """As pytorch/rl#4229 warns: in the environment, and again in the data."""
    once = stack_observations(numbered(5, 3), 3)
    assert not caplog.messages
    stack_observations(once, 3)
    assert caplog.messages == [
        "the observations seem to be stacked already: each holds the last numbers of the row before, moved by 1 "
        "places. If so, do not stack them again."
    ]
    caplog.clear()
    still = numbered(5)
    for part in (still, still["next"]):
        part["observation"] = torch.zeros(5, 3)
    stack_observations(still, 3)  # zeros are no sign of it
    assert not caplog.messages


def test_large_data_need_no_loop_over_rows():
    rows = 200_000
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging.Logger, "warning", lambda *args: None)
        stacked = stack_observations(numbered(*[100] * (rows // 100)), 4)
    assert stacked["observation"][-1].tolist() == [rows - 4, rows - 3, rows - 2, rows - 1]


@pytest.mark.parametrize(
    ("change", "number", "message"),
    [
        (lambda td: td, 0, "num_frames is 0, expected a whole number of at least 1"),
        (lambda td: td, -1, "num_frames is -1, expected a whole number"),
        (lambda td: td, 2.5, "num_frames is 2.5, expected a whole number"),
        (lambda td: td, "2", "num_frames is '2', expected a whole number"),
        (lambda td: td.exclude("observation"), 2, r"lack \['observation'\]; they hold .*'action'"),
        (lambda td: td.exclude(("next", "observation")), 2, r"lack \[\('next', 'observation'\)\]"),
        (
            lambda td: td.set("observation", torch.zeros(6, 3, 8, 8)).set(("next", "observation"), td["observation"]),
            2,
            r"observation has shape \(6, 3, 8, 8\) and .* expected the same shape \[N, D\] twice: only vectors can be",
        ),
        (
            lambda td: td.set("observation", torch.zeros(6, 2)),
            2,
            r"shape \(6, 2\) and \('next', 'observation'\) \(6, 1",
        ),
        (lambda td: td[torch.tensor([0, 3, 1, 4, 2, 5])], 2, "episode 0 appears again at row 2, after rows of another"),
        (lambda td: td.exclude("episode", ("next", "done")), 2, r"lack \('next', 'done'\)"),
        (lambda td: td.view(2, 3), 2, r"transitions have batch size \(2, 3\), expected \[N\]"),
        (lambda td: td[:0], 2, r"transitions have batch size \(0,\)"),
    ],
)
def test_refusals(change, number, message):
    with pytest.raises(ValueError, match=message):
        stack_observations(change(numbered(3, 3)), number)
