"""Rollouts written by hand, and those of TorchRL's environments and collectors."""

from __future__ import annotations

import logging
import tracemalloc

import pytest
import torch
from tensordict import TensorDict
from torch.utils._python_dispatch import TorchDispatchMode
from torchrl.collectors import Collector
from torchrl.collectors.utils import split_trajectories
from torchrl.data import Bounded
from torchrl.envs import GymEnv, SerialEnv, StepCounter, TransformedEnv

from torchrl_bcq import from_rollouts
from torchrl_bcq.data import checks


def rollout(first: float, length: int, terminated=(), truncated=(), reset: float = 100.0) -> TensorDict:
    """Observations count up from ``first``; after an end they continue at ``first + reset``."""
    value, states, after = first, [], []
    for step in range(length):
        states.append(value)
        after.append(value + 1)
        value = first + reset if step in (*terminated, *truncated) else value + 1
    flags = torch.zeros(3, length, 1, dtype=torch.bool)
    flags[1, list(terminated)] = flags[2, list(truncated)] = True
    flags[0] = flags[1] | flags[2]
    names = ("done", "terminated", "truncated")
    outcome = {"observation": torch.tensor(after)[:, None], "reward": torch.tensor(states)[:, None] / 10}
    outcome |= dict(zip(names, flags.unbind(), strict=True))
    columns = {"observation": torch.tensor(states)[:, None], "action": torch.linspace(-1, 1, length)[:, None]}
    columns |= {name: torch.zeros(length, 1, dtype=torch.bool) for name in names}
    return TensorDict({**columns, "next": outcome}, [length])


def test_padding_of_split_trajectories_is_left_out():
    data = rollout(0.0, 5, terminated=[1], truncated=[3])
    split = split_trajectories(data, done_key="done")
    assert split.shape == (3, 2)
    assert rows(from_rollouts(split), "observation") == data["observation"].squeeze(-1).tolist()


def test_copies_with_which_finished_environments_wait_are_left_out(caplog):
    """The first environment ends after two steps, and its last step is repeated until the second one ends."""
    short, long = rollout(0.0, 2, terminated=[1]), rollout(10.0, 5, terminated=[4])
    waits = torch.cat([short, *[short[-1:]] * 3])
    with caplog.at_level(logging.INFO):
        data = from_rollouts(torch.stack([waits, long]))
    assert rows(data, "observation") == [0, 1, 10, 11, 12, 13, 14]
    assert rows(data, "episode") == [0, 0, 1, 1, 1, 1, 1]
    assert caplog.messages == ["left out 3 copies of final steps."]


def test_environments_that_wait_in_torchrl():
    env = SerialEnv(3, lambda: GymEnv("CartPole-v1"))
    env.set_seed(0)
    torch.manual_seed(0)
    rollout = env.rollout(200, break_when_any_done=False, break_when_all_done=True)
    data = from_rollouts(rollout)
    lengths = rollout["next", "done"].squeeze(-1).long().argmax(1) + 1
    assert len(data) == lengths.sum() < rollout.numel()
    assert data["episode"].bincount().tolist() == lengths.tolist()


def test_equal_steps_before_another_step_are_kept():
    """One environment ends in each step, twice with equal steps; the other one never ends."""
    ends, never = rollout(0.0, 3, terminated=[0, 1, 2]), rollout(10.0, 3)
    ends[1] = ends[0].clone()
    assert len(from_rollouts(torch.stack([ends, never]))) == 6


def test_equal_steps_of_one_step_episodes_are_kept():
    """All environments end in each step, so none waits."""
    ended = {name: torch.ones(2, 4, 1, dtype=torch.bool) for name in ("done", "terminated")}
    one = torch.ones(2, 4, 1)
    outcome = {"observation": one, "reward": one, **ended}
    bandit = TensorDict({"observation": one, "action": one, "next": outcome}, [2, 4])
    assert from_rollouts(bandit).batch_size == (8,)


def rows(td, *key):
    return td[key if len(key) > 1 else key[0]].squeeze(-1).tolist()


def test_one_rollout():
    """Steps 2 (terminated) and 4 (truncated) end episodes; the last step has no flag and is cut off."""
    td = from_rollouts(rollout(1.0, 7, terminated=[2], truncated=[4]))
    assert td.batch_size == (7,)
    assert rows(td, "observation") == [1, 2, 3, 101, 102, 101, 102]
    assert rows(td, "next", "observation") == [2, 3, 4, 102, 103, 102, 103]
    assert rows(td, "next", "terminated") == [step == 2 for step in range(7)]
    assert rows(td, "next", "truncated") == [step in (4, 6) for step in range(7)]
    assert rows(td, "next", "done") == [step in (2, 4, 6) for step in range(7)]
    assert rows(td, "episode") == [0, 0, 0, 1, 1, 2, 2]
    assert td["episode"].dtype == torch.int64
    assert set(td.keys()) == {"observation", "action", "episode", "next"}


def test_the_given_rollouts_do_not_change():
    given = rollout(1.0, 3)
    before = given.clone()
    from_rollouts(given)
    assert set(given.keys(True)) == set(before.keys(True))
    assert (given == before).all()


def test_batch_of_rollouts():
    """[2, 4]: one after the other, each cut off at its last step."""
    td = from_rollouts(torch.stack([rollout(1.0, 4, terminated=[1]), rollout(7.0, 4)]))
    assert rows(td, "observation") == [1, 2, 101, 102, 7, 8, 9, 10]
    assert rows(td, "next", "truncated") == [False, False, False, True, False, False, False, True]
    assert rows(td, "next", "terminated") == [row == 1 for row in range(8)]
    assert rows(td, "episode") == [0, 0, 1, 1, 2, 2, 2, 2]


def same_state(*batch: int) -> TensorDict:
    """Steps in which nothing changes and nothing ends."""
    one, no = torch.ones(*batch, 1), torch.zeros(*batch, 1, dtype=torch.bool)
    outcome = {"observation": one, "reward": one, "done": no, "terminated": no}
    return TensorDict({"observation": one, "action": one, "next": outcome}, batch)


def test_environments_with_equal_observations_are_cut_off():
    """The last observation of one environment is the first one of the next: they are still different episodes."""
    assert rows(from_rollouts(same_state(2, 3)), "episode") == [0] * 3 + [1] * 3
    assert rows(from_rollouts([same_state(2, 3), same_state(2, 2)]), "episode") == [0] * 5 + [1] * 5
    assert rows(from_rollouts([same_state(2), same_state(2, 2)]), "episode") == [0] * 2 + [1] * 2 + [2] * 2
    padded = same_state(2, 3).set("mask", torch.tensor([[True, True, False], [True, True, True]]))
    assert rows(from_rollouts(padded), "episode") == [0] * 2 + [1] * 3
    assert rows(from_rollouts([same_state(2), same_state(3)]), "episode") == [0] * 5  # these continue each other


def test_entries_without_a_last_dimension():
    for length in (1, 4):
        data = rollout(1.0, length)
        for key in ("observation", ("next", "observation")):
            data[key] = data[key][:, 0]
        assert from_rollouts(data)["observation"].tolist() == [1.0, 2.0, 3.0, 4.0][:length]


def test_groups_of_several_rollouts_are_warned_of(caplog):
    one, other = (rollout(first, 3).set("group", torch.zeros(3, dtype=torch.int64)) for first in (1.0, 50.0))
    from_rollouts([one])
    assert not caplog.messages
    from_rollouts([one, other])
    assert caplog.messages[0].startswith("several rollouts have group numbers, and equal numbers become one group.")


def test_rollouts_stay_unchanged():
    for given in (same_state(3).set("mask", torch.tensor([True, True, False])), same_state(2, 3)):
        before = given.clone()
        td = from_rollouts(given)
        td["observation"] += 1
        assert set(given.keys(True)) == set(before.keys(True))
        assert (given == before).all()


def test_rollouts_of_several_batch_shapes():
    td = from_rollouts([rollout(1.0, 2), torch.stack([rollout(7.0, 3), rollout(20.0, 3)])[None]])
    assert rows(td, "observation") == [1, 2, 7, 8, 9, 20, 21, 22]
    assert rows(td, "episode") == [0, 0, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("sizes", [[1] * 9, [2, 3, 4], [8, 1], [9]])
def test_batches_of_a_collector_continue_each_other(sizes):
    whole = torch.stack([rollout(1.0, 9, terminated=[3]), rollout(50.0, 9, truncated=[5])])
    expected = from_rollouts(whole)
    td = from_rollouts(list(whole.split(sizes, dim=1)))
    assert (td == expected).all()
    assert rows(td, "next", "truncated") == [row in (8, 9 + 5, 9 + 8) for row in range(18)]


def test_rollouts_that_do_not_continue_are_cut_off():
    """Two rollouts from resets: nothing was flagged at the end of the first one."""
    td = from_rollouts([rollout(1.0, 3), rollout(8.0, 2)])
    assert rows(td, "next", "truncated") == [False, False, True, False, True]
    assert rows(td, "episode") == [0, 0, 0, 1, 1]


def test_padding_is_left_out():
    """As split_trajectories pads: [2, 4], the first rollout has 2 steps."""
    short = torch.cat([rollout(1.0, 2), rollout(1.0, 2).zero_()])
    padded = torch.stack([short, rollout(7.0, 4)])
    padded["collector", "mask"] = torch.tensor([[True, True, False, False], [True] * 4])
    td = from_rollouts(padded)
    assert rows(td, "observation") == [1, 2, 7, 8, 9, 10]
    assert rows(td, "episode") == [0, 0, 1, 1, 1, 1]
    assert rows(td, "next", "truncated") == [False, True, False, False, False, True]
    assert "collector" not in td.keys()


def test_other_entries_keep_their_names():
    given = rollout(1.0, 3)
    given["pixels"] = given["next", "pixels"] = torch.ones(3, 3, 4, 4, dtype=torch.uint8)
    given["mode"] = torch.tensor([4, 5, 6])
    td = from_rollouts(given)
    assert td["pixels"].dtype == torch.uint8
    assert td["pixels"].shape == (3, 3, 4, 4)
    assert td["mode"].tolist() == [4, 5, 6]


def nested(first: float, length: int, **ends) -> TensorDict:
    flat = rollout(first, length, **ends)
    for part in (flat, flat["next"]):
        value = part.pop("observation")
        part["robot"] = TensorDict({"joints": value, "camera": value[:, :, None].repeat(1, 2, 2).byte()}, [length])
    return flat


def test_nested_observations():
    """The episode is cut off where any of them does not continue."""
    td = from_rollouts([nested(1.0, 3, terminated=[0]), nested(8.0, 2)])
    assert rows(td, "robot", "joints") == [1, 101, 102, 8, 9]
    assert td["robot", "camera"].shape == (5, 2, 2)
    assert rows(td, "episode") == [0, 1, 1, 2, 2]
    apart = nested(1.0, 4)
    apart["robot", "camera"][2:] += 1
    apart["next", "robot", "camera"][2:] += 1
    assert rows(from_rollouts(apart), "episode") == [0, 0, 1, 1]


def test_images_under_the_name_of_observations():
    given = rollout(1.0, 4, terminated=[1])
    for part in (given, given["next"]):
        part["observation"] = part["observation"][:, :, None, None].repeat(1, 3, 2, 2).byte()
    td = from_rollouts(given)
    assert td["observation"].shape == (4, 3, 2, 2)
    assert td["observation"].dtype == torch.uint8
    assert rows(td, "episode") == [0, 0, 1, 1]


def test_float64_becomes_float32():
    given = rollout(1 / 3, 3)
    given["observation"] = given["observation"].double() + 1e-12
    given["next", "reward"] = given["next", "reward"].double()
    td = from_rollouts(given)
    assert {value.dtype for value in td.values(True, True)} == {torch.float32, torch.bool, torch.int64}


def test_flags_of_environments_without_truncated():
    given = rollout(1.0, 5, terminated=[1])
    del given["next", "truncated"]
    td = from_rollouts(given)
    assert rows(td, "next", "truncated") == [False, False, False, False, True]


@pytest.mark.parametrize("name", ["done", "terminated", "truncated"])
def test_an_episode_ends_where_any_flag_is_set(name):
    """Observations continue after the flag, so only the flag ends the episode."""
    given = rollout(1.0, 5)
    given["next", name][1] = True
    td = from_rollouts(given)
    assert rows(td, "episode") == [0, 0, 1, 1, 1]
    assert rows(td, "next", "done") == [False, True, False, False, True]
    assert rows(td, "next", "terminated") == [False, name == "terminated", False, False, False]
    assert rows(td, "next", "truncated") == [False, name == "truncated", False, False, True]


def warning(given, caplog) -> str:
    caplog.clear()
    from_rollouts(given)
    return "\n".join(record.getMessage() for record in caplog.records if record.levelname == "WARNING")


def test_rows_that_are_all_cut_off_are_reported(caplog):
    """Next observations that were computed again, with errors of 1e-4. Row 2 is terminated, row 6 is the last."""
    given = rollout(1.0, 7, terminated=[2])
    given["next", "observation"] += 1e-4
    assert warning(given, caplog) == (
        "5 of 7 rows end an episode, because their next observation is not exactly the observation of the next row. If "
        "these rows belong to one episode, sort them by time, and correct or remove the next observations."
    )


def test_half_of_the_rows_may_be_cut_off(caplog):
    """Of 2 rows each, every second row is cut off, and the last one is not counted."""
    pairs = [rollout(10.0 * i, 2) for i in range(1, 6)]
    assert warning(pairs, caplog) == ""
    assert warning([*pairs, rollout(90.0, 1), rollout(95.0, 1)], caplog) == ""  # 6 of 12
    singles = [rollout(float(first), 1) for first in (90, 92, 94, 96)]
    assert warning([*pairs, *singles], caplog).startswith("8 of 14 rows end an episode")


class Joined(TorchDispatchMode):
    """Adds up the bytes that are copied to join tensors."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.cat.default:
            self.size += out.numel() * out.element_size()
        return out


@pytest.mark.parametrize("pieces", [1, 4])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_rollouts_are_copied_once(pieces, batch):
    whole = rollout(1.0, 8).expand(*batch, 8).contiguous()
    given = list(whole.split(8 // pieces, dim=-1)) if pieces > 1 else whole
    with Joined() as joined:
        td = from_rollouts(given)
    entries = whole.exclude("done", "terminated", "truncated").values(True, True)
    kept = whole.numel()  # one byte for each step says whether it is padding
    assert joined.size == kept + sum(entry.numel() * entry.element_size() for entry in entries)
    td["observation"].zero_()
    assert whole["observation"].all()


def test_checks_copy_some_rows_at_a_time(monkeypatch):
    """Each field is 400 kB; without chunks, checks hold a copy of three of them at once."""
    given = rollout(1.0, 100_000)
    monkeypatch.setattr(checks, "CHUNK_ROWS", 1000)
    tracemalloc.start()
    from_rollouts(given)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 400_000


@pytest.mark.parametrize("chunk", [1, 3, 5])
def test_checks_count_over_chunks(monkeypatch, chunk):
    monkeypatch.setattr(checks, "CHUNK_ROWS", chunk)
    given = rollout(1.0, 5)
    given["action"][[2, 4]] = torch.nan
    assert refusal(given) == "actions has 2 rows (first: 2) that are not finite in float32; drop or repair them."


def refusal(given, **settings) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011 (whole messages are compared)
        from_rollouts(given, **settings)
    return str(error.value)


def test_empty_rollouts_are_refused():
    for given in ([], rollout(1.0, 3)[:0], [rollout(1.0, 3)[:0]]):
        assert refusal(given) == "rollouts is empty; pass at least one step."
    found = from_rollouts([rollout(1.0, 2), rollout(1.0, 3)[:0], rollout(3.0, 2)])
    assert rows(found, "episode") == [0, 0, 0, 0]
    padded = rollout(1.0, 2)
    padded["collector", "mask"] = torch.zeros(2, dtype=torch.bool)
    assert refusal(padded) == "rollouts is empty; pass at least one step."


def test_single_steps_and_other_things_are_refused():
    expected = "expected TensorDicts of batch size [T] or [*B, T]."
    assert refusal(rollout(1.0, 3)[0]) == f"rollouts holds a TensorDict; {expected}"
    assert refusal([rollout(1.0, 3), {"observation": 1}]) == f"rollouts holds a dict; {expected}"


def test_missing_keys_are_named():
    given = rollout(1.0, 3).exclude(("next", "reward"), ("next", "terminated"), "done", "terminated", "truncated")
    held = ["('next', 'done')", "('next', 'observation')", "('next', 'truncated')", "action", "observation"]
    expected = f"the rollouts lack ['reward', 'terminated'] under 'next'; they hold {held}. Add or rename the entries."
    assert refusal(given) == expected


@pytest.mark.parametrize("make", [rollout, nested])
@pytest.mark.parametrize("key", ["action", ("next", "reward")])
def test_rows_that_are_not_finite_are_refused(make, key):
    given = make(1.0, 5)
    given[key][[1, 3]] = torch.nan
    name = "actions" if key == "action" else "rewards"
    assert refusal(given) == f"{name} has 2 rows (first: 1) that are not finite in float32; drop or repair them."


def test_observations_that_are_not_finite_are_refused():
    given = rollout(1.0, 5)
    given["observation"][2] = torch.inf
    assert refusal(given) == "observations has 1 row (first: 2) that are not finite in float32; drop or repair them."
    for part, where in (((), ""), (("next",), " under 'next'")):
        given = nested(1.0, 5)
        given[(*part, "robot", "joints")][2:4] = torch.inf
        rest = "has 2 rows (first: 2) that are not finite; drop or repair them."
        assert refusal(given) == f"('robot', 'joints'){where} {rest}"


@pytest.mark.parametrize("make", [rollout, nested])
def test_actions_out_of_bounds_are_refused(make):
    assert refusal(make(1.0, 5), action_spec=Bounded(-0.75, 2, (1,))) == (
        "actions has 1 row (first: 0) outside the action bounds: the actions span [-1.0] to [1.0], the bounds are "
        "[-0.75] to [2.0]; clip or rescale the actions."
    )


def test_rollout_of_an_environment():
    """Pendulum is never terminated; a limit of 7 steps cuts 20 into 7, 7 and 6."""
    env = TransformedEnv(GymEnv("Pendulum-v1"), StepCounter(7))
    td = from_rollouts(env.rollout(20, break_when_any_done=False), action_spec=env.action_spec)
    assert td["episode"].bincount().tolist() == [7, 7, 6]
    assert td["next", "truncated"].flatten().nonzero().flatten().tolist() == [6, 13, 19]
    inside = td["episode"][:-1] == td["episode"][1:]
    assert torch.equal(td["next", "observation"][:-1][inside], td["observation"][1:][inside])


def test_batches_of_an_environment_collector():
    """Ends are those of the whole run, however it was cut into batches of 5."""
    env = TransformedEnv(GymEnv("Pendulum-v1"), StepCounter(7))
    collector = Collector(env, None, frames_per_batch=5, total_frames=25)
    batches = [batch.clone() for batch in collector]
    collector.shutdown()
    td = from_rollouts(batches)
    assert td["episode"].bincount().tolist() == [7, 7, 7, 4]
    assert "collector" not in td.keys()


def test_actions_under_another_name():
    given = rollout(1.0, 3).rename_key_("action", "torque")
    assert rows(from_rollouts(given), "torque") == [-1, 0, 1]


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_actions_of_discrete_environments_stay_as_they_are(dtype):
    """TorchRL's CartPole has actions of one bit for each choice, in int64."""
    choices = torch.nn.functional.one_hot(torch.tensor([0, 1, 1]), 2).to(dtype)
    steps = rollout(1.0, 3, terminated=[2])
    for actions in (choices, choices.long().argmax(-1)):
        found = from_rollouts(steps.clone().set("action", actions))["action"]
        assert torch.equal(found, actions)
        assert found.dtype == actions.dtype
    with pytest.raises(
        ValueError, match=r"^actions has 1 row \(first: 1\) that are not one-hot vectors with a single 1"
    ):
        from_rollouts(steps.clone().set("action", choices.long() + torch.tensor([[0, 0], [1, 0], [0, 0]])))
