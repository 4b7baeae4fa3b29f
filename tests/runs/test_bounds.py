"""The bounds of a run's actions: from settings, environment, dataset's spec or data; what is outside is clipped."""

from __future__ import annotations

import logging

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from torchrl.data import Bounded, Unbounded

from torchrl_bcq import load_policy
from torchrl_bcq.__main__ import main
from torchrl_bcq.data import DatasetError
from torchrl_bcq.errors import RunError
from torchrl_bcq.evaluation.recording import record
from torchrl_bcq.runs.bounds import choose_bounds
from torchrl_bcq.runs.dataset import open_dataset
from torchrl_bcq.runs.folder import load
from torchrl_bcq.runs.job import train

from ..small_runs import LENGTH, Swing

FLOAT32 = 0.09999999403953552  # largest float32 number that is not above 0.1; the nearest one is 0.10000000149
NONE = {"action_low": None, "action_high": None}


class Precise(Swing):
    """Takes only actions that its float64 space contains."""

    action_space = Box(-0.1, 0.1, (1,), np.float64)

    def step(self, action):
        assert self.action_space.contains(action), action
        return super().step(action)


class HalfOpen(Swing):
    action_space = Box(-2, np.inf, (1,), np.float32)


class Ball(Swing):
    action_space = Box(-np.inf, np.inf, (1,), np.float32)


@pytest.fixture(autouse=True, scope="module")
def _more_environments():
    for name, kind in {"Precise-v0": Precise, "HalfOpen-v0": HalfOpen, "Ball-v0": Ball}.items():
        gymnasium.register(name, kind, max_episode_steps=LENGTH)


@pytest.fixture
def box_of(make_settings, make_file):
    """The bounds that a run of a file chooses."""

    def find(*overrides, env_id=None, **fields):
        make_file(env_id=env_id, **fields)
        _, task = open_dataset(make_settings(*overrides))
        return task.action_low, task.action_high

    return find


def actions(*columns) -> np.ndarray:
    return np.stack([np.resize(column, 200) for column in columns], 1).astype(np.float32)


# where the bounds come from


def test_the_first_source_that_has_a_bound_gives_it():
    specs = {"a": Bounded(torch.tensor([-1.0, -torch.inf]), torch.tensor([torch.inf, 1.0]), (2,)), "b": Unbounded((2,))}
    specs |= {"none": None, "c": Bounded(-5, 5, (2,))}
    box = choose_bounds(NONE, specs)
    assert (box.low.tolist(), box.high.tolist()) == ([-1, -5], [5, 1])
    assert box.origins == (["a", "c"], ["c", "a"])
    box = choose_bounds({"action_low": -0.1, "action_high": [None, 0.3]}, specs)
    assert (box.low.tolist(), box.high.tolist(), box.low.dtype) == ([-0.1, -0.1], [5, 0.3], torch.float64)
    assert box.origins == (["setting", "setting"], ["c", "setting"])
    assert choose_bounds({"action_low": -1, "action_high": 1}, {"a": None}) is None  # how many dimensions?


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("abc", "action_low is 'abc', expected a number, or a list with one number for each action dimension"),
        (float("nan"), "action_low is nan, expected a number"),
        ([-1, float("-inf")], r"action_low is \[-1, -inf\], expected a number"),
        (True, "action_low is True, expected a number"),
        ([], r"action_low is \[\], expected a number"),
        ([-1], r"the number of action dimensions differs: {'action_low': 1, 'a': 2}; give one number for each"),
    ],
)
def test_settings_that_are_no_bounds_are_refused(given, message):
    settings = {"action_low": given, "action_high": None}
    with pytest.raises(RunError, match=f"^{message}"):
        choose_bounds(settings, {"a": Unbounded((2,))}, ("action_low", "action_high"))


def told(caplog) -> list[str]:
    """Messages without that on the random next observations of the file."""
    return [message for message in caplog.messages if not message.startswith("inside of episodes")]


def test_the_bounds_of_a_run_and_their_origin_are_logged(box_of, caplog):
    caplog.set_level(logging.INFO)
    assert box_of(env_id="Swing-v0") == ([-2], [2])
    assert told(caplog) == ["action bounds: [-2] to [2] (environment Swing-v0)"]
    caplog.clear()
    box_of(env_id="Swing-v0", actions=actions([-1, 0.25]))
    assert [message.partition(".")[0] for message in told(caplog)[1:]] == [
        "all recorded actions lie between -1 and 1, but the bounds are wider"
    ]
    caplog.clear()
    columns = actions([-0.5, 0.25], [0.0, 3.0])
    assert box_of("action_low=[-1,null]", "action_high=4", actions=columns) == ([-1, 0], [4, 4])
    assert told(caplog) == [
        "action bounds: low [-1, 0] (setting, range of the data), high [4, 4] (setting, setting)",
        "the bounds of the action dimensions [1] come from the range of the data, because the settings, the "
        "environment and the dataset have none; if actions beyond this range are possible, set action_low and "
        "action_high.",
    ]


@pytest.mark.parametrize(("env_id", "low"), [("HalfOpen-v0", -2.0), ("Ball-v0", -0.5)])
def test_infinite_bounds_are_replaced_by_the_range_of_the_data(box_of, caplog, env_id, low):
    """t09: the finite part of a half-open box is kept."""
    assert box_of(env_id=env_id, actions=actions([-0.5, 0.25])) == ([low], [0.25])
    assert "the bounds of the action dimensions [0] come from the range of the data" in caplog.text
    assert box_of("action_high=7", env_id=env_id, actions=actions([-0.5, 0.25])) == ([low], [7])


def test_an_action_that_never_moves_needs_bounds_from_the_settings(box_of):
    """t23, w03"""
    columns = actions([-0.5, 0.25], [0.0])
    with pytest.raises(RunError) as error:
        box_of(actions=columns)
    assert str(error.value) == (
        "the bounds of action dimension 1 are low 0 (range of the data) and high 0 (range of the data), but the lower "
        "bound must be below the upper bound; set action_low and action_high."
    )
    assert box_of("action_low=[null,-1]", "action_high=[null,1]", actions=columns) == ([-0.5, -1], [0.25, 1])


# actions beyond the bounds


@pytest.mark.parametrize("overrides", [["action_low=-1", "action_high=1"], ["action_low=[-1]", "action_high=[1]"]])
@pytest.mark.parametrize("root", [True, False])
def test_actions_beyond_the_bounds_are_refused_or_clipped(make_settings, make_file, tmp_path, caplog, overrides, root):
    make_file(env_id=None, actions=actions([-1.5, -1, 0.5, 1, 1.25]))
    overrides = [*overrides, f"root={tmp_path / 'copies'}"] if root else overrides
    with pytest.raises(DatasetError) as error:
        open_dataset(make_settings(*overrides))
    assert "actions has 80 rows (first: 0) outside the action bounds" in str(error.value)
    remedy = "set action_clip=true, or action_low and action_high, in torchrl-bcq train."
    assert str(error.value).endswith(f"the bounds are [-1.0] to [1.0]; {remedy} These bounds come from: setting.")
    caplog.clear()
    transitions, task = open_dataset(make_settings(*overrides, "action_clip=true"))
    assert transitions["action"][:5, 0].tolist() == [-1, -1, 0.5, 1, 1]
    assert (task.action_low, task.action_high) == ([-1], [1])
    assert told(caplog) == ["action_clip: clipped the actions of 80 of 200 transitions (first: 0)"]


def test_a_clipped_run_trains_on_a_copy_and_on_disk(make_settings, make_file, tmp_path):
    """Actions 0, 0.5 and 3 in an environment of -2 to 2: 3 becomes 2."""
    make_file(actions=actions([0, 0.5, 3]))
    train(make_settings("action_clip=true", f"root={tmp_path / 'copies'}"))
    assert load(tmp_path / "run", "last").task.action_high == [2]


def test_describe_and_convert_take_bounds(make_file, tmp_path, capsys):
    file = make_file(env_id=None, actions=actions([-1.5, 0.5], [0.0, 3.0]))
    bounds = ["--action-low", "-1", "0", "--action-high", "1", "4"]
    assert main(["describe", str(file), *bounds, "--out", str(tmp_path / "a.png")]) == 0
    out = capsys.readouterr().out
    assert "actions has 100 rows (first: 0) outside the action bounds, such as -1.5 in column 0" in out
    assert main(["convert", str(file), str(tmp_path / "copies"), *bounds]) == 1
    assert "actions has 100 rows (first: 0) outside the action bounds" in capsys.readouterr().err
    assert main(["convert", str(file), str(tmp_path / "copies"), *bounds[:1], "-2", *bounds[2:]]) == 0
    assert main(["convert", str(file), str(tmp_path / "copies"), *bounds[:3], "--action-high", "1", "0"]) == 1
    message = "high 0 (setting), but the lower bound must be below the upper bound; set --action-low and --action-high."
    assert message in capsys.readouterr().err


# resume


def test_a_resumed_run_keeps_its_bounds(make_settings, make_file):
    make_file(env_id="Swing-v0", actions=actions([-0.5, 0.25]))
    train(make_settings("action_low=-1"))
    more = ["steps=30", "resume=true", "evaluation.env=null"]
    with pytest.raises(RunError) as error:
        train(make_settings(*more, "action_low=-1"))
    assert str(error.value).endswith(
        "was trained with actions from [-1.0] to [2.0], but the bounds are now [-1.0] to [0.25]; "
        "set 'action_low=[-1.0]' 'action_high=[2.0]'."
    )
    assert train(make_settings(*more, "action_low=[-1.0]", "action_high=[2.0]"))["steps"] == 30


# bounds that float32 cannot represent


def test_no_action_leaves_a_float64_box(make_settings, make_file, tmp_path):
    """u12: actions recorded at the bounds are accepted; the policy's actions stay inside, in float64 too."""
    make_file(env_id="Precise-v0", actions=actions([-0.1, 0.1]))
    results = train(make_settings("steps=60", "optim.lr=0.1", "network.phi=2", "policy.num_action_samples=2"))
    assert results["final"]["step"] == 60  # the environment accepted all actions
    task = load(tmp_path / "run").task
    assert (task.action_low, task.action_high) == ([-0.1], [0.1])
    assert task.action_spec.space.high.tolist() == [FLOAT32]
    policy = load_policy(tmp_path / "run")
    acted = policy.act(np.random.default_rng(0).uniform(-9, 9, (50, 3)))
    assert np.abs(acted.astype(np.float64)).max() == FLOAT32
    saturated = record("Precise-v0", policy, 10, noise=5.0)
    assert saturated["action"].double().abs().max() == FLOAT32
    assert record("Precise-v0", None, 10)["action"].double().abs().max() <= FLOAT32
