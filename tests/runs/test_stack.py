"""Runs whose states join several observations: data, checkpoints, and what may change on resume."""

from __future__ import annotations

import logging

import h5py
import numpy as np
import pytest
import torch

from torchrl_bcq import History, load_policy, load_transitions, multi_step, stack_observations
from torchrl_bcq.data.sources.environment import Environment
from torchrl_bcq.errors import RunError
from torchrl_bcq.evaluation import evaluate
from torchrl_bcq.evaluation.environments import make_env, make_envs
from torchrl_bcq.runs.assembly import assemble, split
from torchrl_bcq.runs.dataset import open_dataset
from torchrl_bcq.runs.folder import find_checkpoint, load, read_metadata
from torchrl_bcq.runs.job import train


@pytest.fixture
def run(make_settings, tmp_path):
    train(make_settings("stack=3"))
    return tmp_path / "run"


def test_all_parts_of_a_run_get_stacked_rows(make_settings, file):
    settings = make_settings("stack=3", "held_out=0.3", "normalize=true", "n_step=2", "loss.gamma=0.5")
    transitions, task = open_dataset(settings)
    expected = stack_observations(load_transitions(file), 3)
    assert torch.equal(transitions["observation"], expected["observation"])
    assert torch.equal(transitions["next", "observation"], expected["next", "observation"])
    assert (task.shapes, task.observation_spec.shape, task.stack) == ({"observation": [9]}, (9,), 3)
    assert task.env == Environment("Swing-v0", stack=3)
    trainer = assemble(settings, transitions, task)
    rows = trainer._replay.replay_buffer[:][split(settings, transitions)]
    assert rows["observation"].shape == (140, 9)
    assert torch.equal(rows["next", "observation"][0], expected["next", "observation"][1])  # two steps further
    mean = expected["observation"][torch.isin(expected["episode"], rows["episode"])].mean(0)
    buffers = [value for value in trainer.loss_module.state_dict().values() if value.shape[-1:] == (10,)]
    assert any(torch.allclose(value[..., :9].flatten(), mean, atol=1e-6) for value in buffers)


def test_a_checkpoint_holds_the_number(run):
    settings, task, _ = read_metadata(find_checkpoint(run))
    assert (settings.stack, task.stack, task.shapes) == (3, 3, {"observation": [9]})
    policy = load_policy(run)
    assert policy.stack == 3
    with pytest.raises(
        ValueError, match=r"expected \[9\] .* with stack=3: join the last 3 observations with History\(3"
    ):
        policy.act(np.zeros(3))


def test_a_policy_acts_alike_in_and_outside_of_the_environment(run):
    """Under a deterministic policy, a rollout with CatFrames and a loop with History take the same actions."""
    trained, policy = load(run), load_policy(run)
    env, history = make_env(trained.task.env), History(policy.stack)
    env.set_seed(0)
    state = env.reset()
    for _ in range(12):
        action = policy.act(history(state["observation"][..., -3:].numpy()))
        assert np.array_equal(action, policy.act(state["observation"]))
        stepped, state = env.step_and_maybe_reset(state.set("action", torch.from_numpy(action)))
        if stepped["next", "done"]:
            history.reset()


def test_parallel_evaluation_sees_the_states_of_each_episode(run):
    trained, seen = load(run), []

    def policy(states):
        seen.append(states.clone())
        return trained.policy(states)

    envs = make_envs(trained.task.env, 2)
    episodes = evaluate(envs, policy, value=trained.loss.value, seed=3)
    envs.close()
    assert episodes["length"].tolist() == [5, 5]
    states = torch.stack(seen, 1).unflatten(-1, (3, 3))  # [2, T, 3 observations, 3]
    assert torch.equal(states[:, 0, 0], states[:, 0, 2])
    assert torch.equal(states[:, 1:, :2], states[:, :-1, 1:])
    assert not torch.equal(states[0, 0], states[1, 0])


def test_a_resumed_run_keeps_the_number(make_settings, run):
    with pytest.raises(RunError, match=r"cannot be resumed with changed settings: stack was 3 and is now 1\. To"):
        train(make_settings("resume=true", "steps=30"))
    assert train(make_settings("stack=3", "resume=true", "steps=30"))["steps"] == 30
    train(make_settings("stack=3", "steps=30", f"out={run.with_name('whole')}"))
    for one in (run, run.with_name("whole")):
        assert read_metadata(find_checkpoint(one, "last"))[2] == 30
    resumed, whole = (load(one, "last").loss.state_dict() for one in (run, run.with_name("whole")))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_checkpoints_from_before_the_setting_have_one_observation(make_settings, tmp_path):
    train(make_settings())
    metadata = read_metadata(find_checkpoint(tmp_path / "run"))[1]
    assert metadata.stack == 1
    assert metadata.env == Environment("Swing-v0")


def test_networks_of_another_number_are_not_taken(make_settings, run, tmp_path):
    settings = make_settings(f"init_from={run}", f"out={tmp_path / 'new'}", "stack=2")
    with pytest.raises(RunError, match=r"was trained with stack=3, not 2; set stack=3\.$"):
        train(settings)
    settings.stack = 3
    assert train(settings)["steps"] == 20


def test_the_baseline_gets_the_same_states(make_settings, run):
    train(make_settings("stack=3", "resume=true", "baseline=cloning"))
    assert load(run / "baseline").task.stack == 3


@pytest.mark.parametrize("stack", ["0", "-1"])
def test_numbers_below_one_are_refused(make_settings, stack):
    with pytest.raises(RunError, match=f"^stack is {stack}, expected at least 1\\.$"):
        train(make_settings(f"stack={stack}"))


@pytest.mark.parametrize("stack", ["2.5", "two", "null"])
def test_no_whole_numbers_are_refused(make_settings, stack):
    with pytest.raises(RunError, match="^stack (is|cannot be)"):
        make_settings(f"stack={stack}")


def test_an_environment_of_another_shape_is_told_in_single_observations(make_settings, make_file):
    make_file(observations=np.ones((200, 4)), next_observations=np.ones((200, 4)))
    message = r"^Swing-v0 has observations of shape \(3,\), but the dataset has \(4,\);"
    with pytest.raises(RunError, match=message):
        open_dataset(make_settings("stack=3"))


def test_the_number_is_shown():
    assert str(Environment("Maze-v1", {"size": 2}, stack=4)) == "Maze-v1 (size=2, states of 4 observations)"


def test_copies_of_stacked_rows(make_settings, file, tmp_path, caplog):
    """They are made once, beside the copy of the dataset, and are those in memory."""
    root = tmp_path / "copies"
    expected, _ = open_dataset(make_settings("stack=3"))
    with caplog.at_level(logging.INFO):
        stacked, task = open_dataset(make_settings("stack=3", f"root={root}"))
    assert task.stack == 3
    assert stacked.is_memmap()
    torch.testing.assert_close(stacked.to_dict(), expected.to_dict(), rtol=0, atol=0)
    plain, copy = sorted(root.glob("[!.]*"))
    assert copy.name == f"{plain.name}-stack3"
    assert caplog.messages[-2] == f"states of 3 observations: memory-mapped from {copy}"
    before = copy.stat().st_mtime_ns
    open_dataset(make_settings("stack=3", f"root={root}"))
    assert copy.stat().st_mtime_ns == before
    with h5py.File(file, "a") as contents:
        contents["observations"][0] = 9  # another dataset under the same name
    again, _ = open_dataset(make_settings("stack=3", f"root={root}"))
    assert again["observation"][0].tolist() == [9] * 9
    clipped = make_settings("stack=3", f"root={root}", "action_high=1", "action_clip=true")
    assert open_dataset(clipped)[0]["action"].max() == 1
    assert train(make_settings("stack=3", f"root={root}"))["steps"] == 20
    assert train(make_settings("stack=3", "resume=true", "steps=30"))["steps"] == 30  # the contents are the same


@pytest.mark.parametrize("stack", [1, 2])
def test_a_copy_of_several_steps_is_refused_in_words_of_the_settings(make_settings, file, tmp_path, stack):
    multi_step(load_transitions(file), 2, 0.9, folder=tmp_path / "two")
    with pytest.raises(ValueError, match=r"a row spans several steps; name a dataset of single steps\.$"):
        open_dataset(make_settings(f"dataset={tmp_path / 'two'}", "evaluation.env=Swing-v0", f"stack={stack}"))
