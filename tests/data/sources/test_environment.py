"""Descriptions of environments in files are read as plain values; nothing that they name is imported."""

from __future__ import annotations

import json

import numpy as np
import pytest

from torchrl_bcq.data.sources.environment import (
    Environment,
    change_environment,
    recorded_environment,
    recorded_in_hdf5,
    recorded_in_minari,
)
from torchrl_bcq.errors import RunError

MAZE = [[1, "r"], [0, 1.5]]


def spec(**changed) -> str:
    """The JSON of a Gymnasium EnvSpec."""
    plain = {"id": "Maze-v1", "entry_point": "mazes.point:Maze", "kwargs": {}, "max_episode_steps": 30}
    return json.dumps({**plain, "additional_wrappers": [], **changed})


def test_arguments_and_time_limit_are_read():
    attributes = {"env_id": b"mine/Maze-v1", "env_kwargs": json.dumps({"maze": MAZE}), "max_episode_steps": np.int64(7)}
    found = recorded_in_hdf5(attributes)
    assert (found.id, found.kwargs, found.max_episode_steps) == ("mine/Maze-v1", {"maze": MAZE}, 7)
    assert (found.module, found.notes) == (None, ())
    found = recorded_in_minari({"env_spec": spec(kwargs={"maze": MAZE, "render_mode": "human"})})
    assert (found.id, found.kwargs, found.max_episode_steps, found.module) == ("Maze-v1", {"maze": MAZE}, 30, "mazes")
    assert str(found) == "Maze-v1 (maze=[[1, 'r'], [0, 1.5]], at most 30 steps)"


@pytest.mark.parametrize("limit", [None, 0, -1, "many", np.nan, np.inf, np.array([1, 2])])
def test_invalid_time_limits_are_left_out(limit):
    assert recorded_environment("Maze-v1", None, limit).max_episode_steps is None


@pytest.mark.parametrize("env_id", ["", "a b", "os:", ":Maze-v1", "a:b:Maze-v1", b"\xff", 5, None])
def test_invalid_ids_are_left_out(env_id):
    assert recorded_environment(env_id) is None


def test_a_module_is_kept_apart_from_the_id():
    found = recorded_environment("mazes.point:Maze-v1", entry_point="others:Maze")
    assert (found.id, found.module, found.named_code) == ("Maze-v1", "mazes.point", {})


@pytest.mark.parametrize(
    ("kwargs", "left", "note"),
    [
        ({"env_id": "os:Maze", "size": 2}, {"size": 2}, "its arguments ['env_id'] are not used, because a text with a"),
        ({"deep": [{"a": ("b:c",)}]}, {}, "its arguments ['deep'] are not used"),
        ({"deep": {"b:c": 1}}, {}, "its arguments ['deep'] are not used"),
        ("[1, 2]", {}, "its arguments cannot be read"),
        ("{", {}, "its arguments cannot be read"),
    ],
)
def test_arguments_that_can_name_code_are_not_used(kwargs, left, note):
    found = recorded_environment("Maze-v1", kwargs)
    assert found.kwargs == left
    assert len(found.notes) == 1
    assert found.notes[0].startswith(note)


def test_wrappers_are_not_used():
    """As in Minari's mujoco/humanoidstandup/medium-v0, whose wrapper Monitor nobody can make again (Minari#302)."""
    wrapper = {"name": "Monitor", "entry_point": "stable_baselines3.common.monitor:Monitor", "kwargs": None}
    found = recorded_in_minari({"env_spec": spec(additional_wrappers=[wrapper])})
    assert found.notes == ("its wrappers ['Monitor'] are not used, because code that a dataset names is not loaded",)


def test_the_environment_for_evaluation_comes_before_the_recorded_one():
    """As in Minari's D4RL/antmaze datasets, where the two have other mazes (Minari#304)."""
    metadata = {"env_spec": spec(kwargs={"maze": 1}), "eval_env_spec": spec(kwargs={"maze": 2})}
    found = recorded_in_minari(metadata)
    assert found.kwargs == {"maze": 2}
    assert found.notes == ("the dataset was recorded in another environment, Maze-v1 (maze=1, at most 30 steps)",)
    assert recorded_in_minari({**metadata, "eval_env_spec": metadata["env_spec"]}).notes == ()
    assert recorded_in_minari({"eval_env_spec": spec()}).id == "Maze-v1"


@pytest.mark.parametrize("text", [None, 5, "{", "[]", "{}", '{"id": 5}'])
def test_damaged_descriptions_are_left_out(text):
    assert recorded_in_minari({"env_spec": text}) is None


def test_a_user_changes_an_environment():
    known = Environment("Maze-v1", {"maze": 1, "size": 2}, 30)
    assert change_environment(known, None, {"size": 3}) == Environment("Maze-v1", {"maze": 1, "size": 3}, 30)
    assert change_environment(known, None, {}, 40).max_episode_steps == 40
    for limit in (0, -1, 2.5, "long"):
        with pytest.raises(RunError, match=f"max_episode_steps is {limit!r}, expected a whole number of at least 1"):
            change_environment(known, None, {"max_episode_steps": limit})
    assert change_environment(known, None, {"max_episode_steps": 50}) == Environment("Maze-v1", known.kwargs, 50)
    assert change_environment(known, "mazes:Maze-v1", {}) == Environment("mazes:Maze-v1", known.kwargs, 30)
    assert change_environment(known, "Other-v1", {"a": 1}) == Environment("Other-v1", {"a": 1})
    assert change_environment(None, None, {"a": 1}) is None


def test_the_id_and_the_arguments_that_can_name_code():
    assert Environment("Maze-v1", {"size": 2}).named_code == {}
    assert Environment("a:Maze-v1", {"b": ["c:d"], "size": 2}).named_code == {"id": "a:Maze-v1", "b": ["c:d"]}
