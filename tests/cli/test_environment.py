"""The environment of a run or a dataset in train, evaluate and record, as a user types it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gymnasium
import h5py
import minari
import numpy as np
import pytest
from minari.data_collector import EpisodeBuffer

from torchrl_bcq import load_policy
from torchrl_bcq.__main__ import main
from torchrl_bcq.data.registry import find_source
from torchrl_bcq.runs.folder import load

MODULE = """
import gymnasium
from tests.small_runs import Swing

class Sloped(Swing):
    def __init__(self, slope):
        self.slope = slope

    def step(self, action):
        return self.state.copy(), float(self.slope), False, False, {}

gymnasium.register("Sloped-v0", "slopes:Sloped", max_episode_steps=5)
gymnasium.register("Endless-v0", "slopes:Sloped", kwargs={"slope": 1})
"""
SLOPED = ["evaluation.env=slopes:Sloped-v0", "evaluation.env_kwargs.slope=3", "evaluation.max_episode_steps=4"]


@pytest.fixture(autouse=True)
def _module(tmp_path, monkeypatch):
    """A module in the current folder, which is not yet on the path of imports."""
    (tmp_path / "slopes.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "store"))
    yield
    forget()


def forget() -> None:
    """Undo the import, as in the process of the next command."""
    sys.modules.pop("slopes", None)
    for name in ("Sloped-v0", "Endless-v0"):
        gymnasium.registry.pop(name, None)


def numbers(run: Path, *words: str) -> dict:
    forget()
    assert main(["evaluate", str(run), "--episodes", "2", "--out", "found.json", *words]) == 0
    return json.loads(Path("found.json").read_text())


def test_a_run_is_evaluated_in_its_environment(words, run, capsys):
    assert main(["train", *words(*SLOPED, "baseline=cloning")]) == 0
    assert "evaluated in slopes:Sloped-v0 (slope=3, at most 4 steps)" in capsys.readouterr().err
    assert json.loads((run / "results.json").read_text())["final"]["mean"] == 12
    found = numbers(run)
    assert found["env"] == "slopes:Sloped-v0 (slope=3, at most 4 steps)"
    assert [found[name]["return"] for name in ("random", "cloning", "BCQ")] == [12, 12, 12]
    assert numbers(run, "--env-kwargs", "slope=-1")["BCQ"]["return"] == -4
    assert numbers(run, "--env-kwargs", "slope=-1", "max_episode_steps=2")["BCQ"]["return"] == -2
    forget()
    assert main(["train", f"resume={run}", "steps=30"]) == 0
    assert json.loads((run / "results.json").read_text())["final"]["mean"] == 12
    forget()
    assert load_policy(run).act(np.zeros(3)).shape == (1,)
    assert "slopes" not in sys.modules


def test_a_module_that_only_a_checkpoint_names_is_not_imported(words, run, capsys):
    assert main(["train", *words(*SLOPED)]) == 0
    (run / "config.yaml").rename(run / "other.yaml")
    forget()
    capsys.readouterr()
    assert main(["evaluate", str(run)]) == 1
    assert capsys.readouterr().err.endswith(
        " names the environment slopes:Sloped-v0 (slope=3, at most 4 steps). A module that only a checkpoint names is "
        "not imported; to allow the import, add --env slopes:Sloped-v0.\n"
    )
    assert main(["rank", str(next((run / "checkpoints").glob("*20")))]) == 1
    assert capsys.readouterr().err.endswith("to allow the import, add --env slopes:Sloped-v0.\n")
    assert main(["export", str(run), "policy.onnx"]) == 0  # needs no environment
    assert "slopes" not in sys.modules
    assert numbers(run, "--env", "slopes:Sloped-v0")["BCQ"]["return"] == 12  # the arguments of the run remain


def test_returns_of_another_environment_are_not_compared_with_the_data(words, run, capsys):
    assert main(["train", *words(*SLOPED, "evaluation.max_episode_steps=20")]) == 0
    capsys.readouterr()
    numbers(run)
    assert "than the recorded behaviour (" in capsys.readouterr().out
    found = numbers(run, "--env-kwargs", "slope=5")
    out = capsys.readouterr().out
    assert "the run's environment is slopes:Sloped-v0 (slope=3, at most 20 steps), so these returns are not" in out
    assert "recorded behaviour" not in out
    assert "normalized_score" not in found["BCQ"]


@pytest.mark.parametrize("command", ["train", "evaluate", "record"])
def test_missing_and_discrete_arguments_take_one_line(words, run, command, capsys):
    assert command == "train" or main(["train", *words(*SLOPED)]) == 0
    forget()
    capsys.readouterr()
    chosen = {
        "train": ["train", *words(SLOPED[0])],
        "evaluate": ["evaluate", str(run), "--env", "slopes:Endless-v0", "--env-kwargs", "height=1"],
        "record": ["record", "--env", "slopes:Sloped-v0"],
    }
    assert main(chosen[command]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "cannot be made" in line]
    assert "'height'" in line if command == "evaluate" else "missing 1 required positional argument: 'slope'" in line
    assert ("evaluation.env_kwargs.NAME=VALUE" if command == "train" else "--env-kwargs NAME=VALUE") in line


def test_episodes_end_where_an_environment_has_no_end(words, run, capsys, monkeypatch):
    monkeypatch.setattr("torchrl_bcq.evaluation.environments._DEFAULT_LIMIT", 60)
    assert main(["train", *words("evaluation.env=slopes:Endless-v0", "evaluation.episodes=1", "steps=10")]) == 0
    assert "slopes:Endless-v0 has no time limit, so evaluation ends its episodes after 60 steps; set another" in (
        capsys.readouterr().err
    )
    assert json.loads((run / "results.json").read_text())["final"]["mean"] == 60
    assert numbers(run, "--env-kwargs", "max_episode_steps=6")["BCQ"]["return"] == 6


@pytest.mark.filterwarnings("ignore::UserWarning:minari")
@pytest.mark.parametrize("out", ["a.hdf5", "minari:mine/a-v0"])
def test_recorded_datasets_hold_the_arguments(words, run, out, capsys, monkeypatch):
    where = ["--env", "slopes:Sloped-v0", "--env-kwargs", "slope=3", "max_episode_steps=4"]
    assert main(["record", *where, "--steps", "8", "--out", out]) == 0
    assert capsys.readouterr().out == (
        f"{out}: 8 steps of slopes:Sloped-v0 (slope=3, at most 4 steps) in 2 episodes, mean return 12.0\n"
    )
    forget()
    env = find_source(out).env
    assert (str(env), env.module) == ("Sloped-v0 (slope=3, at most 4 steps)", "slopes")
    assert main(["train", *words(f"dataset={out}", SLOPED[0])]) == 0
    assert str(load(run).task.env) == "slopes:Sloped-v0 (slope=3, at most 4 steps)"
    forget()
    assert main(["record", "--policy", str(run), "--steps", "8", "--out", "b.hdf5"]) == 0
    with h5py.File("b.hdf5") as file:
        assert dict(file.attrs) == {"env_id": "slopes:Sloped-v0", "env_kwargs": '{"slope": 3}', "max_episode_steps": 4}


@pytest.mark.filterwarnings("ignore::UserWarning:minari")
def test_a_minari_dataset_is_evaluated_in_its_own_environment(words, run, capsys):
    """A pendulum with little gravity, whose episodes have 7 steps and not 200."""
    env = gymnasium.make("Pendulum-v1", g=0.1, max_episode_steps=7)
    flags = np.zeros((2, 40), dtype=bool)
    flags[1, -1] = True
    rng = np.random.default_rng(0)
    states, actions = rng.uniform(-1, 1, (41, 3)), rng.uniform(-2, 2, (40, 1))
    parts = [states.astype(np.float32), actions.astype(np.float32), np.ones(40), *flags]
    names = ["observations", "actions", "rewards", "terminations", "truncations"]
    buffer = [EpisodeBuffer(**dict(zip(names, parts, strict=True)))]
    about = dict.fromkeys(["algorithm_name", "author", "author_email", "code_permalink"], "none")
    minari.create_dataset_from_buffers("trial/kwargs-v0", buffer=buffer, env=env, eval_env=env, **about)
    assert main(["train", *words("dataset=minari:trial/kwargs-v0")]) == 0
    assert "evaluated in Pendulum-v1 (g=0.1, at most 7 steps)" in capsys.readouterr().err
    found = numbers(run)
    assert (found["env"], found["BCQ"]["episode_length"]) == ("Pendulum-v1 (g=0.1, at most 7 steps)", 7)
    assert numbers(run, "--env-kwargs", "g=10")["env"] == "Pendulum-v1 (g=10, at most 7 steps)"


@pytest.mark.parametrize("word", ["slope", "=3"])
def test_odd_arguments_are_refused(word, capsys):
    assert main(["record", "--env", "Swing-v0", "--env-kwargs", word]) == 1
    assert capsys.readouterr().err == (
        f"torchrl-bcq: --env-kwargs has ['{word}'], expected NAME=VALUE, such as g=9.8.\n"
    )
