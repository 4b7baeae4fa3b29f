"""Discrete actions on the command line: the algorithm is found, trained, resumed, evaluated, plotted and recorded."""

from __future__ import annotations

import csv
import json

import gymnasium
import h5py
import numpy as np
import pytest
import torch
import yaml
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary
from torchrl.envs import GymWrapper, SerialEnv, TransformedEnv, UnaryTransform

from torchrl_bcq import from_rollouts, load_hdf5, load_policy
from torchrl_bcq.__main__ import main
from torchrl_bcq.evaluation.environments import make_env, make_envs
from torchrl_bcq.evaluation.rollouts import evaluate
from torchrl_bcq.runs.folder import load

from ..array_files import write_arrays
from ..runs.folders import assert_same
from ..small_runs import TINY

LENGTH = 6
SMALL = [TINY[0], *TINY[5:], "loss.gamma=0.9"]


class Lights(gymnasium.Env):
    """One of three lights is on. An action lights a light; the reward is 1 if it is the next one in the circle."""

    observation_space = Box(0, 1, (3,), np.float32)
    action_space = Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.lit = int(self.np_random.integers(3))
        return self._observe(), {}

    def step(self, action):
        reward, self.lit = float(action == (self.lit + 1) % 3), int(action)
        return self._observe(), reward, False, False, {}

    def _observe(self):
        return np.eye(3, dtype=np.float32)[self.lit]


class MaskedLights(Lights):
    """The light that is on cannot be chosen."""

    observation_space = Dict(light=Lights.observation_space, action_mask=MultiBinary(3))

    def step(self, action):
        assert action != self.lit
        return super().step(action)

    def _observe(self):
        light = super()._observe()
        return {"light": light, "action_mask": (1 - light).astype(np.int8)}


@pytest.fixture(autouse=True, scope="module")
def _lights():
    for name, kind in {"Lights-v0": Lights, "MaskedLights-v0": MaskedLights}.items():
        gymnasium.register(name, kind, max_episode_steps=LENGTH)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def recorded(tmp_path, capsys):
    """A function that records random actions and returns the file."""

    def make(env_id: str, steps: int = 600):
        assert main(["record", "--env", env_id, "--steps", str(steps), "--out", f"{env_id}.hdf5"]) == 0
        capsys.readouterr()
        return tmp_path / f"{env_id}.hdf5"

    return make


def error_of(capsys, *words: str) -> str:
    assert main(["train", "out=bad", *words]) == 1
    return capsys.readouterr().err


def scalars(run, name):
    with open(run / "log" / "scalars" / f"{name}.csv") as file:
        return [float(row[-1]) for row in csv.reader(file)]


def test_a_run(recorded, tmp_path, capsys):
    """On this task, the best action of each state is known, so every part of the command line can be checked."""
    file, run = recorded("Lights-v0"), tmp_path / "run"
    words = [f"dataset={file}", "network.hidden=[32]", "steps=400", "optim.lr=0.003", "loss.tau=0.05", f"out={run}"]
    words += ["evaluation.interval=200", "checkpoint.interval=200", "loss.gamma=0.9", "baseline=discrete_cloning"]
    assert main(["train", *words, "evaluation.episodes=3"]) == 0
    assert yaml.safe_load((run / "config.yaml").read_text())["algorithm"] == "discrete_bcq"
    assert "number of actions: 3 (environment Lights-v0)" in (run / "train.log").read_text()
    assert scalars(run, "return")[-1] == LENGTH
    assert scalars(run, "allowed_share")[-1] == 1  # three equally likely actions
    policy = load_policy(run)
    assert policy.act(np.eye(3)).tolist() == [1, 2, 0]
    assert policy.act([1.0, 0.0, 0.0]).shape == ()
    capsys.readouterr()
    assert main(["evaluate", str(run), "--episodes", "4"]) == 0
    numbers = json.loads((run / "evaluation.json").read_text())
    assert {"random", "imitation", "cloning", "discrete BCQ"} < numbers.keys()
    assert numbers["discrete BCQ"]["return"] == LENGTH
    assert numbers["random"]["return"] < LENGTH
    assert "discrete BCQ is better than the recorded behaviour" in capsys.readouterr().out
    assert main(["plot", str(run)]) == 0
    assert (run / "learning_curve.png").stat().st_size > 10_000
    assert main(["record", "--policy", str(run), "--epsilon", "0.5", "--steps", "300", "--out", "own.hdf5"]) == 0
    steps = load_hdf5("own.hdf5")
    best = steps["action"] == (steps["observation"].argmax(-1) + 1) % 3
    assert 0.55 < best.float().mean() < 0.77  # 1/2 + 1/6, in 300 steps


def test_a_resumed_run_equals_an_uninterrupted_run(recorded, tmp_path):
    words = [f"dataset={recorded('Lights-v0')}", *SMALL, "held_out=0.2", "n_step=2", "sampler=without_replacement"]
    for run, lengths in (("whole", [20]), ("parts", [10, 20])):
        for steps in lengths:
            assert main(["train", *words, f"steps={steps}", f"out={tmp_path / run}", "resume=true"]) == 0
    assert_same(tmp_path / "whole", tmp_path / "parts")


def test_masks_from_the_environment_to_the_policy(recorded, tmp_path, capsys):
    """The environment raises an error if a masked action is taken, also at random."""
    file, run = recorded("MaskedLights-v0"), tmp_path / "run"
    data = load_hdf5(file)
    assert torch.equal(data["action_mask"], data["observation"] == 0)
    assert torch.equal(data["next", "action_mask"], data["next", "observation"] == 0)
    words = [f"dataset={file}", *SMALL, "loss.unlikely_action_threshold=0", "policy.epsilon=0.5", "steps=10"]
    assert main(["train", *words, f"out={run}"]) == 0
    assert "policy of" not in error_of(capsys, *words, "evaluation.env=Lights-v0")
    assert main(["evaluate", str(run), "--episodes", "3"]) == 0
    assert main(["record", "--policy", str(run), "--epsilon", "1", "--steps", "60", "--out", "own.hdf5"]) == 0
    policy, light = load_policy(run), np.eye(3)[[0, 1, 2]]
    for allowed in range(3):
        mask = np.eye(3, dtype=bool)[[allowed] * 3]
        assert policy.act({"observation": light, "action_mask": mask}).tolist() == [allowed] * 3


def test_an_environment_without_masks_is_refused(recorded, capsys):
    file = recorded("MaskedLights-v0")
    env = ["evaluation.env=Lights-v0", "evaluation.observation=[light]"]
    message = (
        "the dataset has masks of the available actions, but Lights-v0 (observation of light) has no entry action_mas"
    )
    assert message in error_of(capsys, f"dataset={file}", *SMALL, *env)


def test_random_actions_follow_the_mask():
    for envs in (make_envs("MaskedLights-v0", 3), make_env("MaskedLights-v0")):
        steps = evaluate(envs, None) if envs.batch_size else envs.rollout(LENGTH)
        assert len(steps)


def test_settings_of_continuous_algorithms_are_refused_by_name(recorded, capsys, file):
    discrete = f"dataset={recorded('Lights-v0')}"
    for word in ("loss.lmbda=0.5", "network.phi=0.1", "action_low=-1", "policy.num_action_samples=5", "optim.vae.lr=1"):
        assert main(["train", discrete, word, "out=bad"]) == 1
        name = word.partition("=")[0]
        assert (
            f"{name} is a setting of bcq, but this run has algorithm=discrete_bcq, for discrete actions; leave {name} "
            "out."
        ) in capsys.readouterr().err.replace("bcq and cloning", "bcq")
    assert main(["train", f"dataset={file}", "n_actions=3", "out=bad"]) == 1
    assert (
        "n_actions is a setting of discrete_bcq and discrete_cloning, but this run has algorithm=bcq, for continuous "
        "actions; leave n_actions out."
    ) in capsys.readouterr().err


def test_a_missing_dataset_is_reported_before_settings_that_may_be_right(recorded, capsys):
    """Without the dataset it is not known that these are settings of the algorithm, or that the run can be resumed."""
    words = [f"dataset={recorded('Lights-v0')}", "out=run", *SMALL]
    assert main(["train", *words]) == 0
    (_, *words), missing = words, "torchrl-bcq: there is no file none.hdf5 in /"
    capsys.readouterr()
    assert error_of(capsys, "dataset=none.hdf5", *words, "resume=true").startswith(missing)
    for word in ("loss.unlikely_action_threshold=0.5", "n_actions=3", "baseline=discrete_cloning"):
        assert error_of(capsys, "dataset=none.hdf5", word).startswith(missing)


def test_the_algorithm_must_fit_the_actions(recorded, capsys, file):
    discrete = f"dataset={recorded('Lights-v0')}"
    message = (
        "the actions are discrete, but algorithm=cloning needs continuous actions; set algorithm=discrete_bcq or "
        "discrete_cloning, or "
    )
    found = error_of(capsys, discrete, "algorithm=cloning")
    assert f"environment Lights-v0: {message}choose another environment with evaluation.env=ID." in found
    found = error_of(capsys, discrete, "algorithm=cloning", "evaluation.env=null")
    assert f"dataset's spec: {message}set reader.action_type=continuous if the actions are continuous." in found
    for env in ("auto", "null"):
        found = error_of(capsys, f"dataset={file}", "algorithm=discrete_bcq", f"evaluation.env={env}")
        assert (
            "the actions are continuous, but algorithm=discrete_bcq needs discrete actions; set algorithm=bcq" in found
        )
    assert "algorithm=discrete_bcq needs dataset=...: the default dataset has continuous actions." in error_of(
        capsys, "algorithm=discrete_bcq"
    )


def test_the_number_of_actions(recorded, tmp_path, capsys):
    path = recorded("Lights-v0")
    with h5py.File(path, "a") as recording:
        del recording.attrs["n_actions"]  # as other programs write files
    discrete = [f"dataset={path}", *SMALL, "steps=5", "log_interval=5"]
    discrete += ["evaluation.interval=5", "checkpoint.interval=5"]
    assert "Lights-v0 has 3 discrete actions, but the dataset has 4 discrete actions" in error_of(
        capsys, *discrete, "n_actions=4"
    )
    alone = [*discrete, "evaluation.env=null"]
    assert "that are not whole numbers from 0 to 1, such as 2.0" in error_of(capsys, *alone, "n_actions=2")
    assert "n_actions is 1, expected at least 2, or null." in error_of(capsys, *alone, "n_actions=1")
    assert main(["train", *alone, "n_actions=5", f"out={tmp_path / 'five'}"]) == 0
    assert load(tmp_path / "five").task.n_actions == 5
    assert load_policy(tmp_path / "five").act([1.0, 0, 0]) in range(5)
    assert main(["train", *alone, f"out={tmp_path / 'three'}"]) == 0
    log = (tmp_path / "three" / "train.log").read_text()
    assert "the number of actions is that of the largest recorded action, 2, plus 1; if there are more" in log
    found = error_of(capsys, *alone, f"init_from={tmp_path / 'five'}", "n_actions=3")
    assert "and 5 discrete actions, but the dataset has {'observation': [3]} and 3; set another init_from" in found
    assert main(["train", f"resume={tmp_path / 'five'}", "steps=10", "n_actions=6"]) == 1
    assert "was trained with 5 actions, but there are now 6; set n_actions=5." in capsys.readouterr().err


@pytest.mark.parametrize("held_out", [0, 0.3])
def test_metrics_on_the_dataset(recorded, tmp_path, capsys, held_out):
    file, run = recorded("Lights-v0"), tmp_path / "run"
    words = [f"dataset={file}", *SMALL, "evaluation.env=null", f"held_out={held_out}", "baseline=discrete_cloning"]
    assert main(["train", *words, f"out={run}"]) == 0
    assert main(["evaluate", str(run)]) == 0
    numbers = json.loads((run / "evaluation.json").read_text())
    assert 0 <= numbers["discrete BCQ"]["action_agreement"] <= 1
    assert numbers["discrete BCQ"]["action_agreement"] == pytest.approx(scalars(run, "action_agreement")[-1])
    assert "initial_value" in numbers["discrete BCQ"].keys() - numbers["cloning"].keys()
    assert ("held_out_imitation_accuracy" in numbers["cloning"]) == bool(held_out)
    assert "action_agreement: share of the recorded actions that the policy takes too" in capsys.readouterr().out


def test_agreement_is_the_share_of_equal_actions(recorded, tmp_path):
    file, run = recorded("Lights-v0"), tmp_path / "run"
    assert main(["train", f"dataset={file}", *SMALL, f"out={run}"]) == 0
    data, policy = load_hdf5(file), load_policy(run, "last")
    equal = policy(data.select("observation"))["action"] == data["action"]
    assert scalars(run, "action_agreement")[-1] == pytest.approx(equal.float().mean().item())


def test_the_policy_acts_with_the_threshold_of_the_loss(recorded, tmp_path):
    run = tmp_path / "run"
    words = [f"dataset={recorded('Lights-v0')}", *SMALL, f"out={run}", "loss.unlikely_action_threshold=0.7"]
    assert main(["train", *words]) == 0
    assert load_policy(run).unlikely_action_threshold == 0.7
    assert "unlikely_action_threshold" not in yaml.safe_load((run / "config.yaml").read_text())["policy"]


TABLE = ["reader.observation=[x]", "reader.action=[a]", "reader.reward=r", "reader.terminated=end"]
TABLE += ["reader.episode=trip"]


def write_table(tmp_path, actions):
    path = tmp_path / "trips.csv"
    rows = [f"{0.1 * row},{action},{row % 3},{row % 5 == 4:d},{row // 5}" for row, action in enumerate(actions)]
    path.write_text("\n".join(["x,a,r,end,trip", *rows]))
    return f"dataset={path}"


def test_a_table_of_whole_numbers_trains_discrete_bcq_and_a_fraction_trains_bcq(tmp_path, capsys):
    tiny = ["steps=5", "log_interval=5", "evaluation.interval=5", "checkpoint.interval=5", "batch_size=4"]
    for name, actions, algorithm in (("a", [0, 1, 2, 1] * 20, "discrete_bcq"), ("b", [0, 1, 2, 0.5] * 20, "bcq")):
        assert main(["train", write_table(tmp_path, actions), *TABLE, *tiny, f"out={tmp_path / name}"]) == 0
        assert load(tmp_path / name).settings.algorithm == algorithm
    data = write_table(tmp_path, [0, 50, 100, 50] * 20)
    found = error_of(capsys, data, *TABLE, *tiny)
    assert "and only 3 of the numbers 0 to 100 occur" in found
    assert "set reader.action_type=continuous; if they are discrete actions, set reader.action_type=discrete." in found
    continuous = [data, *TABLE, *tiny, "reader.action_type=continuous", "network.hidden=[8]", f"out={tmp_path / 'c'}"]
    assert main(["train", *continuous]) == 0
    assert load(tmp_path / "c").settings.algorithm == "bcq"


def test_describe_shows_how_often_each_action_occurs(tmp_path, capsys):
    source = write_table(tmp_path, [0, 1, 3, 1] * 20).partition("=")[2]
    assert main(["describe", source, *TABLE, "--n-actions", "5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("action "))
    cells = [line.split() for line in lines[at : at + 6]]
    assert cells == [
        ["action", "rows", "share"],
        ["0", "20", "25.0%"],
        ["1", "40", "50.0%"],
        ["2", "0", "0.0%"],
        ["3", "20", "25.0%"],
        ["4", "0", "0.0%"],
    ]
    found = "2 of 5 discrete actions occur in no row: 2, 4; the data does not show what they lead to"
    assert found in " ".join(lines)


@pytest.mark.parametrize("words", [["--n-actions", "3"], ["--env", "CartPole-v1"]])
def test_describe_refuses_discrete_options_for_continuous_actions(tmp_path, capsys, words):
    source = write_table(tmp_path, [0.5, 0.1, 0.3, 0.1] * 20).partition("=")[2]
    assert main(["describe", source, *TABLE, *words]) == 1
    assert "the actions of the dataset are continuous, but those of --env or --n" in capsys.readouterr().err


def test_numbers_of_record_fit_the_kind_of_actions(recorded, tmp_path, capsys, file):
    for words, message in (
        (["--env", "Lights-v0", "--epsilon", "0.5"], "--epsilon needs --policy RUN; without a policy, all actions are"),
        (["--env", "Pendulum-v1", "--noise", "0.5"], "--noise needs --policy RUN; without a policy, all actions are"),
    ):
        assert main(["record", *words, "--out", "own.hdf5"]) == 1
        assert message in capsys.readouterr().err
    run = tmp_path / "run"
    assert main(["train", f"dataset={recorded('Lights-v0')}", *SMALL, f"out={run}"]) == 0
    assert main(["record", "--policy", str(run), "--noise", "0.5", "--out", "own.hdf5"]) == 1
    assert "Lights-v0 has discrete actions, which noise does not change; use epsilon." in capsys.readouterr().err
    assert main(["record", "--policy", str(run), "--epsilon", "2", "--out", "own.hdf5"]) == 1
    assert "epsilon is 2.0, expected a probability between 0 and 1." in capsys.readouterr().err


def test_probabilities_travel_along(tmp_path):
    """They are not used in training, but stay in the data."""
    steps = {"observations": np.arange(40.0).reshape(20, 2), "actions": np.arange(20) % 3, "rewards": np.arange(20.0)}
    steps |= {"terminals": np.arange(20) % 5 == 4, "timeouts": np.zeros(20), "action_probability": np.full(20, 0.25)}
    path = write_arrays(tmp_path / "steps.hdf5", steps)
    with h5py.File(path, "a") as file:
        file.attrs["n_actions"] = 3
    tiny = ["steps=5", "log_interval=5", "evaluation.interval=5", "checkpoint.interval=5", "batch_size=4"]
    assert main(["train", f"dataset={path}", *tiny, f"out={tmp_path / 'run'}", f"root={tmp_path / 'copies'}"]) == 0
    assert load_hdf5(path, root=tmp_path / "copies")["action_probability"].tolist() == [0.25] * 20


@pytest.mark.parametrize("one_hot", [False, True])
def test_a_copy_of_rollouts(tmp_path, capsys, one_hot):
    """Of one-hot actions, also an action that never occurs counts; agreement compares each row with itself."""
    env = make_env("Lights-v0")
    data = from_rollouts(env.rollout(60, break_when_any_done=False))
    index = data["action"].clone() % 2
    data["action"] = torch.nn.functional.one_hot(index, 3) if one_hot else index.unsqueeze(-1)
    data.memmap(tmp_path / "copy")
    words = [f"dataset={tmp_path / 'copy'}", *SMALL, "evaluation.env=null", f"out={tmp_path / 'run'}"]
    assert main(["train", *words]) == 0
    assert f"number of actions: {3 if one_hot else 2} " in (tmp_path / "run" / "train.log").read_text()
    policy = load_policy(tmp_path / "run", "last")
    agreement = (torch.from_numpy(policy.act(data["observation"].numpy())) == index).float().mean().item()
    assert scalars(tmp_path / "run", "action_agreement")[-1] == pytest.approx(agreement)
    assert "2 columns" not in capsys.readouterr().err
    if one_hot:
        assert main(["train", *words[:-1], "n_actions=4", f"out={tmp_path / 'other'}"]) == 1
        assert "actions has 3 columns, but there are 4 discrete actions; store" in capsys.readouterr().err


def test_recorded_files_hold_the_number_of_actions(recorded):
    with h5py.File(recorded("Lights-v0", 12)) as file:
        assert file.attrs["n_actions"] == 3


def test_an_environment_with_masks_that_the_dataset_lacks(recorded, caplog, monkeypatch):
    monkeypatch.setattr(MaskedLights, "step", Lights.step)  # without the check of the action
    monkeypatch.setattr(
        MaskedLights, "_observe", lambda self: {"light": Lights._observe(self), "action_mask": np.ones(3, np.int8)}
    )
    words = [f"dataset={recorded('Lights-v0')}", *SMALL, "steps=10", "out=run", "evaluation.env=MaskedLights-v0"]
    assert main(["train", *words, "evaluation.observation=[light]"]) == 0
    assert "has masks of the available actions, but the dataset has none" in caplog.text


@pytest.mark.parametrize("number", ["-1", "0", "1"])
def test_odd_numbers_of_actions(recorded, capsys, number):
    assert main(["describe", str(recorded("Lights-v0", 12)), "--n-actions", number]) == 1
    assert f"--n-actions is {number}, expected at least 2." in capsys.readouterr().err


def test_the_random_policy_takes_available_actions_of_one_hot_environments():
    """MaskedLights asserts that no masked action is taken."""
    keys = ["action_mask"], ["action_mask"]
    for categorical in (False, True):

        def make(categorical=categorical):
            env = GymWrapper(gymnasium.make("MaskedLights-v0"), categorical_action_encoding=categorical)
            return TransformedEnv(env, UnaryTransform(*keys, fn=lambda mask: mask != 0))

        assert evaluate(SerialEnv(3, make), None)["length"].tolist() == [LENGTH] * 3
