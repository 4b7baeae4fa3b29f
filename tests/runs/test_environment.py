"""A run is evaluated in the environment that the dataset names or the user chose; else a message says what to do."""

from __future__ import annotations

import logging
import sys

import gymnasium
import numpy as np
import pytest

from torchrl_bcq.data.sources.environment import recorded_environment
from torchrl_bcq.errors import RunError
from torchrl_bcq.evaluation.environments import make_env
from torchrl_bcq.runs.dataset import open_dataset
from torchrl_bcq.runs.environment import choose_environment

from ..small_runs import Swing


class Bounded(Swing):
    """Has a required argument, and discrete actions unless the user wants others."""

    def __init__(self, reach, continuous=True):
        self.action_space = gymnasium.spaces.Box(-reach, reach, (1,)) if continuous else gymnasium.spaces.Discrete(2)


@pytest.fixture(autouse=True)
def _registered():
    gymnasium.register("Bounded-v0", Bounded, max_episode_steps=5)
    gymnasium.register("Endless-v0", Swing)
    yield
    for name in ("Bounded-v0", "Endless-v0"):
        del gymnasium.registry[name]


@pytest.fixture
def choose(make_settings, caplog):
    """The chosen environment and its bounds, and the warnings."""

    def call(recorded, *overrides):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            env, made = choose_environment(make_settings(*overrides).evaluation, recorded)
        return env and str(env), made and made.action_spec.space.high.item(), caplog.messages

    return call


def test_arguments_and_time_limit_of_the_dataset_remain_unless_the_user_changes_them(choose):
    recorded = recorded_environment("Bounded-v0", {"reach": 3}, 4)
    assert choose(recorded) == ("Bounded-v0 (reach=3, at most 4 steps)", 3, [])
    assert choose(recorded, "evaluation.env_kwargs.reach=2")[:2] == ("Bounded-v0 (reach=2, at most 4 steps)", 2)
    assert choose(recorded, "evaluation.max_episode_steps=9")[0] == "Bounded-v0 (reach=3, at most 9 steps)"
    assert choose(recorded, "evaluation.env=Bounded-v0")[0] == "Bounded-v0 (reach=3, at most 4 steps)"
    assert choose(recorded, "evaluation.env=Swing-v0")[0] == "Swing-v0"
    assert choose(recorded, "evaluation.env=null", "evaluation.env_kwargs.reach=2") == (None, None, [])
    assert choose(recorded_environment("Swing-v0", {}, 5))[0] == "Swing-v0"  # the registered limit is not repeated
    with pytest.raises(RunError, match=r"^evaluation\.env_kwargs is set, but the dataset names no environment; set ev"):
        choose(None, "evaluation.env_kwargs.reach=2")
    with pytest.raises(RunError, match=r"^evaluation\.max_episode_steps is set, but the dataset names no environment;"):
        choose(None, "evaluation.max_episode_steps=9")


def test_an_environment_without_a_time_limit_gets_one(choose):
    env, _, messages = choose(None, "evaluation.env=Endless-v0")
    assert env == "Endless-v0 (at most 1000 steps)"
    assert messages == [
        "Endless-v0 has no time limit, so evaluation ends its episodes after 1000 steps; set another number with "
        "evaluation.max_episode_steps."
    ]
    env = choose(None, "evaluation.env=Endless-v0", "evaluation.max_episode_steps=6")
    assert env == ("Endless-v0 (at most 6 steps)", 2, [])


def test_a_module_that_the_dataset_names_is_not_imported(choose, tmp_path, monkeypatch):
    """The message says how the user can import it (as for Minari#271, where gymnasium_robotics is not imported)."""
    (tmp_path / "abroad.py").write_text("import gymnasium\ngymnasium.register('Far-v0', 'tests.small_runs:Swing')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for recorded in (recorded_environment("abroad:Far-v0"), recorded_environment("Far-v0", entry_point="abroad.a:Far")):
        env, _, messages = choose(recorded)
        assert env is None
        assert "abroad" not in sys.modules
        assert messages == [
            "the dataset names the environment Far-v0, which cannot be made (Environment `Far` doesn't exist.); no "
            "policy is evaluated in it; to import the module abroad, which the dataset names, set "
            "evaluation.env=abroad:Far-v0."
        ]
    try:
        assert choose(recorded, "evaluation.env=abroad:Far-v0", "evaluation.max_episode_steps=3")[0] == (
            "abroad:Far-v0 (at most 3 steps)"
        )
        assert sys.path[-1] == str(tmp_path)  # last, so that no file there replaces a package
    finally:
        gymnasium.registry.pop("Far-v0", None)
        sys.modules.pop("abroad", None)


def test_another_package_with_the_same_id_is_not_taken_for_it(choose):
    env, _, (message,) = choose(recorded_environment("Pendulum-v1", entry_point="antigravity:Pendulum"))
    assert env is None
    assert "(Pendulum-v1 is registered by gymnasium, but the dataset was recorded with antigravity)" in message
    assert "antigravity" not in sys.modules
    recorded = recorded_environment("Pendulum-v1", entry_point="gymnasium.envs.old:Pendulum")
    assert choose(recorded) == ("Pendulum-v1", 2, [])


def test_differences_to_the_recorded_environment_are_told(choose):
    env, _, messages = choose(recorded_environment("Swing-v0", wrappers=[{"name": "Monitor"}]))
    assert env == "Swing-v0"
    assert messages == [
        "the dataset names the environment Swing-v0, but its wrappers ['Monitor'] are not used, because code that a "
        "dataset names is not loaded; to use another environment, set evaluation.env=MODULE:ID or "
        "evaluation.env_kwargs.NAME=VALUE."
    ]


def test_missing_arguments_are_told_in_one_line(choose):
    _, _, (message,) = choose(recorded_environment("Bounded-v0"))
    assert "missing 1 required positional argument: 'reach'" in message
    with pytest.raises(RunError) as error:
        choose(None, "evaluation.env=Bounded-v0")
    assert "\n" not in str(error.value)
    assert "missing 1 required positional argument: 'reach'" in str(error.value)
    assert "set its arguments with evaluation.env_kwargs.NAME=VALUE" in str(error.value)
    with pytest.raises(RunError, match="unexpected keyword argument 'rech'"):
        choose(recorded_environment("Bounded-v0"), "evaluation.env_kwargs.rech=3")


def test_an_environment_that_does_not_fit_is_blamed_and_not_the_dataset(make_settings, make_file):
    bounded = ["evaluation.env=Bounded-v0", "evaluation.env_kwargs.reach=1"]
    with pytest.raises(RunError) as error:
        open_dataset(make_settings(*bounded, "evaluation.env_kwargs.continuous=false"))
    assert str(error.value).startswith(
        "environment Bounded-v0 (reach=1, continuous=False): the actions are discrete, but algorithm=bcq needs "
        "continuous actions; set algorithm=discrete_bcq or discrete_cloning, or choose another environment with "
    )
    with pytest.raises(
        ValueError, match=r"outside the action bounds: .* come from: environment Bounded-v0 \(reach=1\)\."
    ):
        open_dataset(make_settings(*bounded))
    make_file(actions=np.zeros((200, 2)))
    with pytest.raises(ValueError, match=r"have shape \(1,\); .* These bounds come from: environment Swing-v0\."):
        open_dataset(make_settings("evaluation.env=Swing-v0"))


def test_arguments_reach_the_task_and_its_environment(make_settings):
    overrides = ["evaluation.env=Bounded-v0", "evaluation.env_kwargs.reach=2.5", "evaluation.max_episode_steps=3"]
    task = open_dataset(make_settings(*overrides))[1]
    assert (task.env_id, task.env_kwargs, task.max_episode_steps) == ("Bounded-v0", {"reach": 2.5}, 3)
    assert (task.action_low, task.action_high) == ([-2.5], [2.5])
    assert make_env(task.env).rollout(9).shape == (3,)
