"""Transitions over several steps, compared with sums by hand and row by row."""

from __future__ import annotations

import pytest
import torch
from tensordict import NonTensorStack, TensorDict
from torchrl.data import MultiStep
from torchrl.envs import GymEnv

from torchrl_bcq import (
    BCQLoss,
    DatasetError,
    from_rollouts,
    load_memmap,
    make_replay_buffer,
    multi_step,
    return_weights,
)
from torchrl_bcq.data import n_step
from torchrl_bcq.data.episodes import episode_returns

T, F = True, False


def recorded() -> TensorDict:
    """A terminated episode of 4 rows, a timed-out one of 2, one of 2 that ends without a flag, a terminated row."""
    terminated = torch.tensor([F, F, F, T, F, F, F, F, T])[:, None]
    truncated = torch.tensor([F, F, F, F, F, T, F, F, F])[:, None]
    outcome = {
        "observation": torch.arange(100.0, 109.0)[:, None],
        "reward": 2.0 ** torch.arange(9)[:, None],
        "done": terminated | truncated,
        "terminated": terminated,
        "truncated": truncated,
    }
    columns = {
        "observation": torch.arange(9.0)[:, None],
        "action": -torch.arange(9.0)[:, None],
        "episode": torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 3]),
        "next": outcome,
    }
    return TensorDict(columns, batch_size=[9])


def column(spanning: TensorDict, key) -> list:
    return spanning[key].squeeze(1).tolist()


@pytest.mark.parametrize("mapped", [False, True])
def test_three_steps_by_hand(tmp_path, mapped):
    """gamma 0.5 and rewards 1, 2, 4, 8 | 16, 32 | 64, 128 | 256: each further step adds as much as the first."""
    source = recorded().memmap(tmp_path) if mapped else recorded()
    spanning = multi_step(source, num_steps=3, gamma=0.5)
    assert column(spanning, ("next", "reward")) == [3, 6, 8, 8, 32, 32, 128, 128, 256]
    assert column(spanning, "steps_to_next_obs") == [3, 3, 2, 1, 2, 1, 2, 1, 1]
    assert column(spanning, ("next", "observation")) == [102, 103, 103, 103, 105, 105, 107, 107, 108]
    assert column(spanning, ("next", "terminated")) == [F, T, T, T, F, F, F, F, T]
    assert column(spanning, ("next", "truncated")) == [F, F, F, F, T, T, F, F, F]
    assert column(spanning, ("next", "done")) == [F, T, T, T, T, T, F, F, T]
    for key in ("observation", "action", "episode"):
        assert spanning[key].data_ptr() == source[key].data_ptr()
    assert {key: entry.dtype for key, entry in spanning.items(True, True)} == {
        **{key: entry.dtype for key, entry in recorded().items(True, True)},
        "steps_to_next_obs": torch.int64,
    }
    torch.testing.assert_close(source.to_dict(), recorded().to_dict(), rtol=0, atol=0)


def test_result_on_disk_is_the_one_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(n_step, "_CHUNK", 4)  # smaller than a span
    source = recorded().memmap(tmp_path / "source")
    written = multi_step(source, num_steps=3, gamma=0.5, folder=tmp_path / "spanning")
    assert written.is_memmap()
    torch.testing.assert_close(written.to_dict(), multi_step(recorded(), 3, 0.5).to_dict(), rtol=0, atol=0)
    assert make_replay_buffer(written, batch_size=5, seed=0).sample()["steps_to_next_obs"].shape == (5, 1)
    with pytest.raises(FileExistsError, match="spanning already exists; choose a new folder, or load this folder"):
        multi_step(source, num_steps=2, gamma=0.5, folder=tmp_path / "spanning")


def test_folder_is_made_where_it_was_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    multi_step(recorded(), num_steps=3, gamma=0.5, folder="~/new/deep/spanning")
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert column(load_memmap(tmp_path / "new" / "deep" / "spanning"), "steps_to_next_obs") == [
        3,
        3,
        2,
        1,
        2,
        1,
        2,
        1,
        1,
    ]
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"spanning cannot be written \(.*file.*\); no partial copy is left\."):
        multi_step(recorded(), num_steps=3, gamma=0.5, folder=tmp_path / "file" / "spanning")


def test_parts_are_written_from_the_cpu(tmp_path):
    written = multi_step(recorded(), num_steps=3, gamma=0.5, folder=tmp_path / "spanning")
    assert written.device == torch.device("cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_transitions_on_a_gpu_are_written(tmp_path):
    written = multi_step(recorded().to("cuda"), num_steps=3, gamma=0.5, folder=tmp_path / "spanning")
    torch.testing.assert_close(written.to_dict(), multi_step(recorded(), 3, 0.5).to_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(("key", "written"), [("info", True), (("next", "info"), True), (("next", "info"), False)])
def test_entries_that_are_no_tensors_are_refused(tmp_path, key, written):
    source = recorded().set(key, NonTensorStack(*"abcdefghi"))
    folder = tmp_path / "new" / "spanning" if written else None
    with pytest.raises(DatasetError) as error:
        multi_step(source, num_steps=3, gamma=0.5, folder=folder)
    assert str(error.value) == f"{[str(key)]} hold no tensors; exclude them, or convert them to tensors."
    assert not list(tmp_path.iterdir())


def test_notes_of_the_first_row_stay_with_it_in_memory():
    source = recorded().set("info", NonTensorStack(*"abcdefghi"))
    assert list(multi_step(source, num_steps=3, gamma=0.5)["info"]) == list("abcdefghi")


def test_one_step_changes_nothing():
    spanning = multi_step(recorded(), num_steps=1, gamma=0.9)
    assert (spanning.pop("steps_to_next_obs") == 1).all()
    torch.testing.assert_close(spanning.to_dict(), recorded().to_dict(), rtol=0, atol=0)


def row_by_row(source: TensorDict, num_steps: int, gamma: float) -> list[tuple[float, int, int]]:
    """Discounted reward, number of steps and last row, walked from each row."""
    episode, done, reward = (
        source[key].flatten().tolist() for key in ("episode", ("next", "done"), ("next", "reward"))
    )
    walks = []
    for row in range(len(source)):
        total, steps = 0.0, 0
        while steps < num_steps:
            total += gamma**steps * reward[row + steps]
            steps += 1
            last = row + steps - 1
            if done[last] or last + 1 == len(source) or episode[last + 1] != episode[last]:
                break
        walks.append((total, steps, last))
    return walks


@pytest.mark.parametrize("num_steps", [1, 2, 5, 400])
@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_agrees_with_a_walk_from_each_row(num_steps, gamma):
    draw = torch.Generator().manual_seed(num_steps)
    rows = 300
    done = torch.rand(rows, generator=draw) < 0.05
    starts = (torch.rand(rows, generator=draw) < 0.1) | done.roll(1)  # most episodes end without done
    episode = starts.long().cumsum(0)
    following = {
        "reward": torch.randn(rows, 1, generator=draw, dtype=torch.float64),
        "done": done[:, None],
        "world": {"pixels": torch.randint(0, 256, (rows, 3, 2, 2), generator=draw, dtype=torch.uint8)},
    }
    source = TensorDict({"episode": episode, "next": following}, batch_size=[rows])
    spanning = multi_step(source, num_steps, gamma)
    totals, steps, last = zip(*row_by_row(source, num_steps, gamma), strict=True)
    expected = torch.tensor(totals, dtype=torch.float64)[:, None]
    torch.testing.assert_close(spanning["next", "reward"], expected, rtol=1e-12, atol=1e-12)
    assert column(spanning, "steps_to_next_obs") == list(steps)
    assert torch.equal(spanning["next", "world", "pixels"], source["next", "world", "pixels"][list(last)])
    assert torch.equal(spanning["next", "done"], source["next", "done"][list(last)])


def test_agrees_with_torchrl_where_every_end_is_flagged():
    """Except for the flags: TorchRL keeps those of the first row of the span."""
    source = recorded()
    source["next", "done"][7] = True
    ours, theirs = multi_step(source, 3, 0.9), MultiStep(gamma=0.9, n_steps=3)(source.clone())
    torch.testing.assert_close(ours["next", "reward"], theirs["next", "reward"])
    assert torch.equal(ours["next", "observation"], theirs["next", "observation"])
    assert torch.equal(ours["steps_to_next_obs"].squeeze(1), theirs["steps_to_next_obs"])


def test_sums_in_float64():
    """1e8 + 1 - 1e8 is 0 in float32."""
    reward = torch.tensor([1e8, 1.0, -1e8])[:, None]
    source = TensorDict({"next": {"reward": reward, "done": torch.zeros(3, 1, dtype=torch.bool)}}, [3])
    spanning = multi_step(source, 3, 1.0)
    assert spanning["next", "reward"][0].item() == 1.0
    assert spanning["next", "reward"].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_rewards_that_are_no_floats_become_floats(dtype):
    """1 + 1/2 + 1/4, twice, as the episode is 4 rows long; then 1 + 1/2, and 1."""
    flags = torch.zeros(4, 1, dtype=torch.bool)
    source = TensorDict({"next": {"reward": torch.ones(4, 1, dtype=dtype), "done": flags}}, [4])
    reward = multi_step(source, 3, 0.5)["next", "reward"]
    assert reward.squeeze(1).tolist() == [1.75, 1.75, 1.5, 1.0]
    assert reward.dtype == torch.float32


def test_large_integers_are_added_exactly():
    """2^24 + 1 is no float32, and the difference of the two is 1."""
    reward = torch.tensor([2**24 + 1, -(2**24)])[:, None]
    source = TensorDict({"next": {"reward": reward, "done": torch.zeros(2, 1, dtype=torch.bool)}}, [2])
    assert multi_step(source, 2, 1.0)["next", "reward"][0].item() == 1.0


def test_rollouts_of_torchrl_need_no_episode():
    torch.manual_seed(0)
    env = GymEnv("Pendulum-v1")
    source = torch.cat([env.rollout(5), env.rollout(4)])
    source["next", "done"][4] = source["next", "truncated"][4] = True
    spanning = multi_step(source, 3, 0.99)
    assert column(spanning, "steps_to_next_obs") == [3, 3, 3, 2, 1, 3, 3, 2, 1]
    assert torch.equal(spanning["next", "observation"][2], source["next", "observation"][4])


def test_the_loss_bootstraps_from_the_end_of_each_span(modules, make_batch):
    """Target: the summed reward, and gamma^h of the next value unless the span terminated."""
    gamma, source = 0.9, make_batch(12)
    source["episode"] = torch.arange(12) // 6
    for row, flag in ((5, "terminated"), (11, "truncated")):
        source["next", "done"][row] = True
        source.setdefault(("next", flag), torch.zeros(12, 1, dtype=torch.bool))[row] = True
    loss = BCQLoss(*modules, delay_actor=False, delay_qvalue=False)
    batch, latent = make_replay_buffer(multi_step(source, 4, gamma))[:].clone(), torch.randn(12, 10, 4)

    free = source.select("observation", "action", "next").clone()  # single rows: no reward, no end, no discount
    free["next"].update({"reward": torch.zeros(12, 1), "terminated": torch.zeros(12, 1, dtype=torch.bool)})
    last = [3, 4, 5, 5, 5, 5, 9, 10, 11, 11, 11, 11]
    loss.make_value_estimator(gamma=1.0)
    value = loss.qvalue_loss(free[last], latent)[1]["target_value"]

    reward = source["next", "reward"].squeeze(1)
    steps = [end - row + 1 for row, end in enumerate(last)]
    expected = [
        sum(gamma**k * reward[row + k] for k in range(ahead)) + (0 if end == 5 else gamma**ahead * value[row])
        for row, (ahead, end) in enumerate(zip(steps, last, strict=True))
    ]
    loss.make_value_estimator(gamma=gamma)
    torch.testing.assert_close(loss.qvalue_loss(batch, latent)[1]["target_value"], torch.stack(expected))


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (lambda td: td, {"num_steps": 0}, "num_steps is 0, expected at least 1; gamma is 0.9"),
        (lambda td: td, {"gamma": 1.1}, "gamma is 1.1, expected between 0 and 1"),
        (lambda td: multi_step(td, 2, 0.9), {}, "have steps_to_next_obs, so a row spans several steps"),
        (lambda td: td.exclude(("next", "reward")), {}, r"lack \('next', 'reward'\); they hold .*'action'"),
        (lambda td: td.exclude(("next", "done")), {}, r"lack \('next', 'done'\)"),
        (lambda td: td.exclude("episode", ("next", "done")), {}, r"lack \('next', 'done'\).*set transitions\['epi"),
        (lambda td: td.set(("next", "reward"), torch.zeros(9)), {}, r"has shape \(9,\), expected \(9, 1\)"),
        (
            lambda td: td.set(("next", "done"), td["next", "done"].float()),
            {},
            r"\('next', 'done'\) has dtype torch.float32, expected torch.bool; cast it with .bool\(\)",
        ),
        (lambda td: td.view(3, 3), {}, r"transitions have batch size \(3, 3\), expected \[N\]"),
    ],
)
def test_refusals(change, settings, message):
    with pytest.raises(ValueError, match=message):
        multi_step(change(recorded()), **{"num_steps": 2, "gamma": 0.9, **settings})


@pytest.mark.parametrize("call", [episode_returns, return_weights, from_rollouts])
def test_rows_of_several_steps_have_no_returns(call):
    """The reward of each step would be counted several times. Rows of one step are as before."""
    source = recorded()
    with pytest.raises(DatasetError, match="a row spans several steps; pass transitions of single steps"):
        call(multi_step(source, 3, 0.9))
    if call is not from_rollouts:
        assert torch.equal(call(multi_step(source, 1, 0.9)), call(source))
