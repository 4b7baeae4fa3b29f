"""``torchrl-bcq rank`` on runs, on all checkpoints of a run, and beside a policy whose value is known."""

from __future__ import annotations

import json
import math
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import h5py
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torchrl.data import Categorical

from torchrl_bcq.__main__ import main
from torchrl_bcq.cli.rank import _Results
from torchrl_bcq.errors import RunError
from torchrl_bcq.evaluation import Estimate, OffPolicyEvaluation
from torchrl_bcq.runs.candidates import check_comparable, find_candidates, import_policy

from ..array_files import write_arrays
from ..small_runs import TINY
from .test_discrete import LENGTH, Lights

ROWS = 40 * LENGTH
SMALL = [TINY[0], *TINY[5:], "loss.gamma=0.9"]
QUICK = ["--steps", "3", "--episodes", "2"]
MODULE = """
import torch
from tensordict.nn import TensorDictModule
best = TensorDictModule(lambda x: (x.argmax(-1) + 1) % 3, ["observation"], ["action"])
number = 3
Kind = TensorDictModule
wrong = TensorDictModule(lambda x: x, ["observation"], ["action"])
learned = TensorDictModule(torch.nn.Linear(3, 3), ["observation"], ["action"])
from torch.distributions import Categorical
from torchrl.modules import ProbabilisticActor
even = TensorDictModule(lambda x: torch.zeros(len(x), 3), ["observation"], ["logits"])
even = ProbabilisticActor(even, in_keys=["logits"], distribution_class=Categorical)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A current folder with recorded episodes of random actions, and a policy that always gets the reward 1."""
    gymnasium.register("Lights-v2", Lights, max_episode_steps=LENGTH)
    rng = np.random.default_rng(0)
    lit = rng.integers(3, size=ROWS + 1)
    start, action = lit[:-1], lit[1:]
    last = np.arange(1, ROWS + 1) % LENGTH == 0
    write_arrays(
        tmp_path / "lights.hdf5",
        {
            "observations": np.eye(3)[start],
            "next_observations": np.eye(3)[action],
            "actions": action,
            "rewards": (action == (start + 1) % 3) * 1.0,
            "terminals": np.zeros(ROWS, bool),
            "timeouts": last,
            "action_probabilities": np.full(ROWS, 1 / 3),
        },
        env_id="Lights-v2",
        n_actions=3,
    )
    (tmp_path / "mine_lights.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    del gymnasium.registry["Lights-v2"]
    sys.modules.pop("mine_lights", None)


def train(*words: str) -> None:
    assert main(["train", "dataset=lights.hdf5", *SMALL, *words]) == 0


def table(out: str) -> dict[str, list[str]]:
    """Return the cells of the printed table by the first cell."""
    lines = out[out.index("\npolicy") :].split("\n\n")[0].strip().splitlines()
    return {line.split("  ")[0]: line.split() for line in lines}


def test_a_good_policy_is_found(folder, capsys):
    """The best policy gets 1 in each step, which is worth 1 / (1 - 0.9) = 10; random actions get a third of it."""
    train("out=sweep/a", "steps=5")
    words = ["--policy", "mine_lights:best", "--steps", "800", "--held-out", "0.5", "--episodes", "2", "--seed", "3"]
    assert main(["rank", "sweep", *words]) == 0
    out = capsys.readouterr().out
    rows = table(out)
    assert list(rows) == ["policy", "mine_lights:best", "sweep/a", "recorded behaviour"]
    assert float(rows["mine_lights:best"][1]) == pytest.approx(10, abs=0.5)
    assert float(rows["recorded behaviour"][2]) == pytest.approx(10 / 3, abs=0.6)
    assert "mine_lights:best: estimated better: difference +" in out
    assert float(rows["mine_lights:best"][5]) == pytest.approx(20 / 3, abs=0.6)
    saved = json.loads((folder / "sweep" / "ranking.json").read_text())
    true = {one["name"]: one["true"] for one in saved["estimates"] if "true" in one}
    steps = math.ceil(math.log(0.005) / math.log(0.9))
    assert true["mine_lights:best"] == [pytest.approx((1 - 0.9**steps) / 0.1), 0]
    assert "The true value of the first policy in the table is 0 below the highest true value." in out
    assert "do not cover the bias of the estimate" in out
    assert (folder / "sweep" / "ranking.png").read_bytes().startswith(b"\x89PNG")


def test_the_true_value_of_a_random_policy_is_that_of_its_random_actions(folder, capsys):
    """Random actions get a third of the rewards; the most likely action of equal ones would always be the first."""
    train("out=run", "steps=5")
    assert main(["rank", "run", "--policy", "mine_lights:even", "--steps", "3", "--episodes", "30"]) == 0
    saved = json.loads((folder / "run" / "ranking.json").read_text())["estimates"]
    (true,) = (one["true"][0] for one in saved if one["name"] == "mine_lights:even")
    assert true == pytest.approx(10 / 3, abs=0.6)


def test_estimates_of_a_corrected_dataset_are_computed_again(folder, capsys):
    """The time limits were stored as terminal states; the sums of rewards and the ends of episodes stay the same."""
    train("out=run", "steps=5")
    for corrected in (False, True):
        with h5py.File("lights.hdf5", "a") as file:
            for name, value in (("terminals", not corrected), ("timeouts", corrected)):
                file[name][:] = value & (np.arange(1, ROWS + 1) % LENGTH == 0)
        assert main(["rank", "run", *QUICK]) == 0
    saved = json.loads((folder / "run" / "ranking.json").read_text())["estimates"]
    assert len(saved) == 4  # twice the run and the recorded behaviour
    assert saved[0]["value"] != saved[2]["value"]


def test_a_dataset_that_has_grown_has_other_held_out_episodes(folder, capsys):
    train("out=run", "steps=5", "held_out=0.2")
    with h5py.File("lights.hdf5", "a") as file:
        fields = {name: file[name][:] for name in file}
        for name, values in fields.items():
            del file[name]
            file[name] = np.concatenate([values, values])
    assert main(["rank", "run", *QUICK]) == 1
    assert "the dataset has changed since the run began: it had 40 episodes" in capsys.readouterr().err
    assert main(["rank", "run", *QUICK, "--held-out", "0.5"]) == 0


def test_nothing_is_estimated_twice(folder, capsys, monkeypatch):
    train("-m", "out=sweep", "seed=0,1")
    estimate, calls = OffPolicyEvaluation.estimate, []

    def stopped(self, policy):
        calls.append(policy)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return estimate(self, policy)

    monkeypatch.setattr(OffPolicyEvaluation, "estimate", stopped)
    words = ["rank", "sweep", "--checkpoint", "last", *QUICK]
    assert main(words) == 130
    assert main(words) == 0
    assert len(calls) == 3
    first = capsys.readouterr().out
    assert main(words) == 0
    assert len(calls) == 3
    assert table(capsys.readouterr().out) == table(first)
    assert main([*words, "--seed", "1"]) == 0  # other settings
    assert len(calls) == 5
    train("resume=sweep/1", "steps=30")
    assert main([*words, "--seed", "1"]) == 0  # another checkpoint of one run
    assert len(calls) == 6
    assert main(words) == 0  # the estimates with the first settings are still in the file
    assert len(calls) == 7


def test_a_policy_with_new_weights_is_estimated_again(folder, monkeypatch):
    """The weights may come from another file than the module."""
    facts = [import_policy("mine_lights:learned", "cpu").facts for _ in range(2)]
    assert facts[0] == facts[1]
    with torch.no_grad():
        next(sys.modules["mine_lights"].learned.parameters()).add_(1)
    assert import_policy("mine_lights:learned", "cpu").facts != facts[0]


def test_runs_that_read_other_columns_are_refused(tmp_path, monkeypatch, capsys):
    """Both read two columns, so only the settings of the readers differ."""
    monkeypatch.chdir(tmp_path)
    rows = np.random.default_rng(0).normal(size=(40, 3)).round(3)
    lines = [f"{x},{v},{w},{i % 2},0.5,0,{i // 10}" for i, (x, v, w) in enumerate(rows)]
    Path("trips.csv").write_text("\n".join(["x,v,w,a,r,end,trip", *lines]) + "\n")
    for name, columns in (("one", "[x,v]"), ("two", "[x,w]")):
        names = f"observation: {columns}, action: [a], reward: r, terminated: end, episode: trip"
        reader = f"reader={{{names}, action_type: discrete}}"
        small = [word for word in SMALL if not word.startswith("evaluation")]
        assert main(["train", "dataset=trips.csv", reader, *small, "evaluation.env=null", f"out={name}"]) == 0
    capsys.readouterr()
    assert main(["rank", "one", "two"]) == 1
    assert "two reads other columns or entries than one; compare runs with the same" in capsys.readouterr().err
    assert main(["evaluate", "one", "--baseline", "two"]) == 1
    assert "two reads other columns or entries than one; compare runs with the same" in capsys.readouterr().err


def test_entries_in_another_order_are_refused():
    """The names of one file must be equal; those of other files may differ, but not in their order alone."""
    task = SimpleNamespace(observation=None, stack=1, shapes={}, action_spec=None, has_mask=False)

    def check(dataset, *names):
        readers = [{"names": {"observations": each}} for each in (["x", "v"], [*names])]
        runs = [OmegaConf.create({"dataset": d, "reader": r}) for d, r in zip(("a", dataset), readers, strict=True)]
        check_comparable((runs[0], task), "one", (runs[1], task), "two")

    check("a", "x", "v")
    check("b", "place", "speed")
    for dataset, *names in (("a", "v", "x"), ("b", "v", "x"), ("a", "x", "w")):
        with pytest.raises(RunError, match="one reads other columns or entries than two"):
            check(dataset, *names)


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("observations", {"shapes": {"observation": [4]}}),
        ("actions", {"action_spec": Categorical(4)}),
        ("masks of the available actions", {"has_mask": True}),
    ],
)
def test_runs_that_differ_are_refused_with_the_difference(what, change):
    facts = {"shapes": {"observation": [3]}, "action_spec": Categorical(3), "has_mask": False}
    tasks = [SimpleNamespace(observation=None, stack=1, **{**facts, **changed}) for changed in ({}, change)]
    settings = OmegaConf.create({"dataset": "a", "reader": {}})
    check_comparable((settings, tasks[0]), "one", (settings, tasks[0]), "two")
    with pytest.raises(RunError, match=f"^one has other {what} than two; compare runs with the same {what}.$"):
        check_comparable((settings, tasks[0]), "one", (settings, tasks[1]), "two")


def test_a_machine_without_the_environment_can_rank(folder, capsys):
    train("out=run", "evaluation.env=Lights-v2")
    spec = gymnasium.registry.pop("Lights-v2")
    assert main(["rank", "run", "--steps", "3", "--episodes", "0"]) == 0
    gymnasium.registry["Lights-v2"] = spec
    assert "run: cannot tell" in capsys.readouterr().out


def test_rewards_that_are_too_large_are_blamed(folder, capsys):
    train("out=run", "steps=5")
    with h5py.File("lights.hdf5", "r+") as file:
        file["rewards"][:] = 1e30
    assert main(["rank", "run", *QUICK]) == 1
    assert "the value of the recorded behaviour cannot be estimated, because a loss" in capsys.readouterr().err


def test_all_checkpoints_of_a_run(folder, capsys):
    train("out=run", "checkpoint.monitor=null")
    assert main(["rank", "run", "--checkpoint", "all", *QUICK]) == 0
    rows = table(capsys.readouterr().out)
    assert {*rows} == {"policy", "run, step 10", "run, step 20", "recorded behaviour"}
    assert main(["rank", "run/checkpoints/checkpoint-000000000010", "--out", "here", *QUICK]) == 0
    assert (folder / "here" / "ranking.json").is_file()


def test_without_an_environment(folder, capsys):
    train("out=run", "evaluation.env=null", "held_out=0.25")
    assert main(["rank", "run", "--steps", "3"]) == 0
    out = capsys.readouterr().out
    assert "1 policy, 25% of the episodes are held out" in out
    assert "may have learned" not in out
    assert "true" not in out.partition("\n\n")[0]
    assert "rank correlation" not in out
    saved = json.loads((folder / "run" / "ranking.json").read_text())["estimates"][0]["settings"]
    assert (saved["held_out"], saved["gamma"], saved["env"], saved["episodes"]) == (0.25, 0.9, None, 0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere is not a run: there is no such folder"),
        (["run", "--steps", "0"], "--steps is 0, expected at least 1"),
        (["run", "--held-out", "1"], "--held-out is 1.0, expected a number between 0 and 1"),
        (["run", "--gamma", "2"], "--gamma is 2.0, expected a number from 0 to 1"),
        (["run", "--policy", "mine_lights"], "--policy is 'mine_lights', expected MODULE:OBJECT"),
        (["run", "--policy", "mine_lights:other"], "other of mine_lights does not exist"),
        (["run", "--policy", "mine_lights:number"], "number of mine_lights is a int"),
        (["run", "--policy", "nomodule:best"], "the module nomodule cannot be imported: ModuleNotFoundError"),
        (["run", "--policy", "mine_lights:Kind"], "Kind of mine_lights is a type, expected a TensorDict policy"),
        (["run", "--policy", "mine_lights:wrong"], "--policy mine_lights:wrong cannot act on this dataset: ValueError"),
        (["run", "--env", "Pendulum-v1"], "--env ID"),
    ],
)
def test_bad_input_is_refused(folder, capsys, words, message):
    train("out=run")
    assert main(["rank", *QUICK, *words]) == 1
    error = capsys.readouterr().err
    assert message in error
    names = ["recorded behaviour", "run"] if "wrong" in str(words) else []
    file = folder / "run" / "ranking.json"
    assert [one["name"] for one in (json.loads(file.read_text())["estimates"] if names else [])] == names
    assert file.exists() == bool(names)


def test_estimates_of_another_rank_are_kept(tmp_path):
    """Both have read the file before the other one wrote to it."""
    file, estimate = tmp_path / "ranking.json", asdict(Estimate(1.0, (0.0, 2.0), (1.0,), (0.0, 9.0), 0.0))
    first, second = (_Results(file, {"seed": seed}) for seed in (0, 1))
    for results in (first, second, first):
        results.get("run", {}, lambda: estimate)
    assert [line["settings"]["seed"] for line in json.loads(file.read_text())["estimates"]] == [0, 1]


def test_a_damaged_file_is_not_replaced(folder, capsys):
    train("out=run")
    (folder / "run" / "ranking.json").write_text("{")
    assert main(["rank", "run", *QUICK]) == 1
    assert "ranking.json cannot be read as results of torchrl-bcq rank" in capsys.readouterr().err
    assert (folder / "run" / "ranking.json").read_text() == "{"


def test_a_dataset_that_has_moved_is_named_again(folder, capsys):
    """rank estimates nothing again, and knows that the run may have learned from the held-out episodes."""
    train("out=run", "evaluation.env=null", "steps=10")
    assert main(["rank", "run", *QUICK]) == 0
    estimates = (folder / "run" / "ranking.json").read_bytes()
    (folder / "lights.hdf5").rename(folder / "moved.hdf5")
    shutil.copy("moved.hdf5", "copy.hdf5")
    capsys.readouterr()
    for command in (["rank", "run", *QUICK], ["evaluate", "run"], ["export", "run", "policy.onnx"]):
        assert main(command) == 1
        found = capsys.readouterr().err
        assert "there is no file lights.hdf5 in /" in found
        assert "was trained on lights.hdf5; if this dataset has moved, name its new place with --dataset." in found
        assert main([*command, "--dataset", "moved.hdf5"]) == 0
        shown = capsys.readouterr().out
        assert ("These policies may have learned from the episodes" in shown) == (command[0] == "rank")
    assert (folder / "run" / "ranking.json").read_bytes() == estimates
    with h5py.File("moved.hdf5", "r+") as file:
        fields = {name: file[name][:] for name in file}
        for name, values in fields.items():
            del file[name]
            file[name] = values[:-LENGTH]
    assert main(["rank", "run", *QUICK, "--dataset", "moved.hdf5"]) == 1
    assert "so moved.hdf5 is not the dataset of " in capsys.readouterr().err
    with h5py.File("moved.hdf5", "r+") as file:
        for name in [name for name in file if "observations" in name]:
            values = file[name][:, :2]
            del file[name]
            file[name] = values
    assert main(["rank", "run", *QUICK, "--dataset", "moved.hdf5"]) == 1
    assert "moved.hdf5 has other observations or actions than the dataset of " in capsys.readouterr().err
    assert main(["export", "run", "policy.onnx", "--random-states", "--dataset", "moved.hdf5"]) == 1
    assert "--random-states does not read a dataset; leave out --random-states or --dataset." in capsys.readouterr().err
    assert main(["evaluate", "run", "--env", "Lights-v2", "--dataset", "moved.hdf5"]) == 1
    assert "--dataset has an effect only without an environment; leave it out." in capsys.readouterr().err
    assert main(["train", "resume=run", "steps=20"]) == 1
    assert "If the dataset has moved, name its new place with dataset=PATH." in capsys.readouterr().err
    assert main(["train", "resume=run", "steps=20", "dataset=copy.hdf5"]) == 0


def test_a_checkpoint_that_its_run_has_replaced_is_reported(folder):
    train("out=run", "steps=10")
    (found,) = find_candidates([folder / "run"], "last", "cpu")
    shutil.rmtree(folder / "run" / "checkpoints")
    with pytest.raises(RunError, match=r"no longer exists; .*\. Repeat the command"):
        found.load()


def test_options_of_true_values_are_refused_without_episodes(folder, capsys):
    train("out=run", "steps=10")
    assert main(["rank", "run", "--episodes", "0", "--env", "Lights-v2", "--observation", "light"]) == 1
    assert "--episodes 0 measures no true values; leave out --env and --observation, or" in capsys.readouterr().err


def test_runs_of_other_tasks_are_refused(folder, make_file, capsys):
    train("out=run")
    make_file()
    assert main(["train", "dataset=swings.hdf5", *TINY, "out=other"]) == 0
    assert main(["rank", "run", "other", *QUICK]) == 1
    assert "other has other actions than run; compare runs with the same actions." in capsys.readouterr().err
    assert main(["rank", "other", "--estimator", "doubly_robust", *QUICK]) == 1
    assert "--estimator doubly_robust needs discrete actions" in capsys.readouterr().err


def test_runs_with_another_stack_are_refused(folder, capsys):
    train("out=run")
    train("out=other", "stack=2")
    assert main(["rank", "run", "other", *QUICK]) == 1
    assert "other was trained with stack=2, but run with stack=1" in capsys.readouterr().err


def test_a_run_of_a_sweep_without_a_checkpoint_is_left_out(folder, caplog):
    train("-m", "out=sweep", "seed=0,1")
    shutil.rmtree(folder / "sweep" / "1" / "checkpoints")
    shutil.rmtree(folder / "sweep" / "1" / "best")
    assert main(["rank", "sweep", *QUICK]) == 0
    assert "sweep/1 contains no checkpoint, so it is left out" in caplog.text
    shutil.rmtree(folder / "sweep" / "0" / "checkpoints")
    shutil.rmtree(folder / "sweep" / "0" / "best")
    assert main(["rank", "sweep", *QUICK]) == 1


def test_runs_that_learned_from_the_held_out_episodes_are_named(folder, capsys):
    train("-m", "out=sweep", "seed=0,1", "held_out=0.25", "evaluation.env=null")
    train("out=run", "evaluation.env=null")
    shutil.copy("lights.hdf5", "other.hdf5")
    train("out=other", "evaluation.env=null", "dataset=other.hdf5")
    train("out=second", "evaluation.env=null", "held_out=0.2", "init_from=run")
    capsys.readouterr()
    for options, learned in (
        (["sweep", "run", "other"], "sweep/1, run"),
        (["sweep", "--held-out", "0.5"], "sweep/0, sweep/1"),
        (["second", "--policy", "mine_lights:best"], "second"),
    ):
        assert main(["rank", *options, *QUICK]) == 0
        out = capsys.readouterr().out
        assert f"held out now, so their estimates may be\ntoo high: {learned}.\n" in out
    assert "train with held_out=0.2 and equal seeds" in out


def test_runs_of_other_data_are_told(folder, caplog, capsys):
    train("out=run")
    train("out=other", "reward.scale=10")
    assert main(["rank", "run", "other", *QUICK]) == 0
    (warning,) = [record.getMessage() for record in caplog.records if "all policies are evaluated" in record.msg]
    assert "other was trained with reward=" in warning
    assert warning.endswith("all policies are evaluated on the data of run.")
    assert "2 policies, 20% of the episodes are held out" in capsys.readouterr().out


def test_other_data_gives_other_estimates(folder, capsys):
    train("out=run", "reward.scale=10")
    assert main(["rank", "run", *QUICK]) == 0
    out = capsys.readouterr().out
    assert "1 policy, 20% of the episodes are held out" in out
    assert "All values are of the rewards that run was trained with" in out
    assert ": (reward + 0) * 10." in out
    with h5py.File("lights.hdf5", "r+") as file:
        file["rewards"][:] = 1 - file["rewards"][:]
    assert main(["rank", "run", *QUICK]) == 0
    assert len(json.loads((folder / "run" / "ranking.json").read_text())["estimates"]) == 4


def test_the_seed_changes_the_critics_but_not_the_held_out_episodes_of_the_run(folder, capsys):
    train("out=run", "held_out=0.25", "evaluation.env=null")
    for seed in ("0", "7"):
        assert main(["rank", "run", "--steps", "3", "--seed", seed]) == 0
    lines = json.loads((folder / "run" / "ranking.json").read_text())["estimates"]
    assert [line["settings"]["split_seed"] for line in lines] == [0] * 4
    assert len({line["value"] for line in lines}) == 4
