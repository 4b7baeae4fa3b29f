"""``torchrl-bcq evaluate``: numbers, tables, baselines, and refusals."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch

from torchrl_bcq.__main__ import main
from torchrl_bcq.cli import evaluate as module
from torchrl_bcq.cli.evaluate import _compare, _from_dataset, _mean_and_error
from torchrl_bcq.cli.sweep import is_sweep
from torchrl_bcq.data import split_episodes
from torchrl_bcq.evaluation.environments import time_limit
from torchrl_bcq.runs.dataset import open_dataset
from torchrl_bcq.runs.folder import load
from torchrl_bcq.runs.job import train
from torchrl_bcq.runs.settings import compose, load_settings, save_settings

from ..array_files import write_arrays


@pytest.fixture
def make_run(make_settings, tmp_path):
    """A run by the name of its folder."""

    def make(name: str, *overrides: str) -> Path:
        train(make_settings("steps=10", f"out={tmp_path / name}", *overrides))
        return tmp_path / name

    return make


@pytest.fixture
def run(make_run) -> Path:
    return make_run("run")


@pytest.fixture
def evaluate(tmp_path):
    """The numbers that the command writes."""

    def call(run: Path, *arguments: str) -> dict:
        assert main(["evaluate", str(run), "--out", str(tmp_path / "found.json"), *arguments]) == 0
        return json.loads((tmp_path / "found.json").read_text())

    return call


def table(text: str, width: int = 20) -> dict[str, list[str]]:
    """Cells of the rows under the headings, by policy."""
    lines = text.partition("\npolicy  ")[2].partition("\n\n")[0].splitlines()[1:]
    return {line[:width].strip(): line[width:].split() for line in lines}


# in an environment


def test_policies_are_compared_with_the_dataset(run, capsys):
    assert main(["evaluate", str(run), "--episodes", "4"]) == 0
    shown = capsys.readouterr().out
    found = json.loads((run / "evaluation.json").read_text())
    names = ["random", "behaviour model", "BCQ"]
    assert list(found) == ["checkpoint", "step", "env", "episodes", "seed", "behaviour", *names]
    assert (found["step"], found["env"], found["episodes"], found["seed"]) == (10, "Swing-v0", 4, 0)
    assert found["checkpoint"] == str(run / "best" / "checkpoint-000000000010")
    rows = table(shown)
    assert list(rows) == ["recorded behaviour", *names]
    behaviour = json.loads((run / "results.json").read_text())["behaviour"]
    assert found["behaviour"] == behaviour
    assert rows["recorded behaviour"] == [f"{behaviour['mean']:.1f}", f"{behaviour['std']:.1f}", "20.0"]
    for name in names:
        assert rows[name] == [f"{found[name]['return']:.1f}", f"{found[name]['return_std']:.1f}", "5.0"]
    assert [name for name in rows if "value_estimate" in found.get(name, {})] == ["BCQ"]
    estimate, obtained = (f"{found['BCQ'][name]:.4g}" for name in ("value_estimate", "discounted_return"))
    sentence = f"the critic estimates a discounted return of {estimate}; the policy obtained {obtained}"
    within = "in at most 51 steps, without the time limit"  # 0.9 ** 51 is the first power below 0.005
    assert f"{sentence} {within}.\n" in shown
    assert shown.startswith(f"{found['checkpoint']}: 10 gradient steps on ")
    assert shown.endswith(f"The numbers are in {run / 'evaluation.json'}.\n")


def test_returns_are_those_of_episodes(run, evaluate):
    """The mean return of many random episodes, found by another loop."""
    found = evaluate(run, "--episodes", "100", "--seed", "3")["random"]
    env = gymnasium.make("Swing-v0")
    env.action_space.seed(0)
    returns = []
    for episode in range(400):
        env.reset(seed=episode)
        rewards = [env.step(env.action_space.sample()) for _ in range(5)]
        assert rewards[-1][3]
        returns.append(sum(reward for _, reward, *_ in rewards))
    error = np.std(returns) / 10
    assert found["return"] == pytest.approx(np.mean(returns), abs=4 * error)
    assert found["return_std"] == pytest.approx(np.std(returns), rel=0.35)
    assert found["episode_length"] == 5


def test_the_seed_decides_the_numbers(run, evaluate):
    first, again, other = (evaluate(run, "--episodes", "3", "--seed", seed) for seed in "445")
    assert first == again
    for name in ("random", "behaviour model", "BCQ"):
        assert first[name]["return"] != other[name]["return"]


def test_numbers_are_those_that_the_run_has_logged(run, evaluate):
    """With as many episodes from the same states."""
    found = evaluate(run, "--episodes", "2", "--seed", "1000", "--checkpoint", "last")
    logged = json.loads((run / "results.json").read_text())["final"]
    assert (found["BCQ"]["return"], found["BCQ"]["return_std"]) == (logged["mean"], logged["std"])


def test_returns_are_discounted_as_in_the_run(run, make_run, evaluate, capsys):
    found = evaluate(make_run("undiscounted", "loss.gamma=1"), "--episodes", "3")["BCQ"]
    assert found["discounted_return"] == pytest.approx(found["return"], rel=1e-6)
    assert f"the policy obtained {found['discounted_return']:.4g} in at most 5 steps.\n" in capsys.readouterr().out
    found = evaluate(run, "--episodes", "3")["BCQ"]
    assert found["discounted_return"] != pytest.approx(found["return"], rel=1e-3)


def test_the_policy_is_compared_with_the_dataset_and_the_baseline():
    """Student's t with 3 degrees of freedom: 3.182. The variances of the means with the dataset are 1/3 and 64/15."""
    mean, error = _mean_and_error(torch.tensor([5.0, 15.0, 5.0, 15.0]) - 20)
    assert (mean, error) == pytest.approx((-10, (100 / 3) ** 0.5 / 2))
    mean, error, freedom = _from_dataset(torch.tensor([9.0, 11.0, 9.0, 11.0]), {"mean": -20, "std": 8, "episodes": 16})
    assert (mean, error) == pytest.approx((30, 4.6**0.5))
    assert freedom == pytest.approx(4.6**2 / ((1 / 3) ** 2 / 3 + (64 / 15) ** 2 / 15))
    equal = _from_dataset(torch.tensor([1.0, 1.0]), {"mean": 1, "std": 0, "episodes": 3})
    assert equal == (0, 0, 3)
    found = _compare(
        "BCQ", {"the recorded behaviour": (30.0, 2.0, 3), "cloning": (8.0, 2.5, 3), "another": (3.0, 1.0, 3)}
    )
    assert found.splitlines() == [
        "BCQ is better than the recorded behaviour (+30.0 ± 6.4) and cloning (+8.0 ± 8.0). BCQ is not clearly "
        "different from another (+3.0 ± 3.2).",
        "(Differences in mean return with 95% confidence intervals.)",
    ]
    assert _compare("BCQ", {"cloning": (-8.0, 2.0, 3)}).startswith("BCQ is worse than cloning (-8.0 ± 6.4).")
    assert "worse" not in _compare("BCQ", {"cloning": (-8.0, 3.0, 3)})


def test_the_comparison_is_shown_unless_there_is_one_episode(make_run, tmp_path, capsys):
    file = f"dataset={cut_off_after(5, tmp_path / 'd.hdf5')}"
    run, baseline = make_run("run", file), make_run("cloning", file, "algorithm=cloning")
    capsys.readouterr()
    words = ["evaluate", str(run), "--baseline", str(baseline)]
    assert main([*words, "--episodes", "3"]) == 0
    shown = capsys.readouterr().out
    numbers = r"\([+-][\d.]+ ± [\d.]+\)"
    assert re.search(rf"\nBCQ is .* the recorded behaviour {numbers}.* cloning {numbers}\.\n", shown)
    assert main([*words, "--episodes", "1"]) == 0
    assert "BCQ is" not in capsys.readouterr().out
    assert main([*words, "--episodes", "3", "--env-kwargs", "max_episode_steps=3"]) == 0
    shown = capsys.readouterr().out
    assert "have 5 steps on average, but episodes of Swing-v0 (at most 3 steps) have up to 3 steps" in shown
    assert "To evaluate episodes of the same length: --env-kwargs max_episode_steps=5\n" in shown
    assert "the recorded behaviour (" not in shown


def test_deterministic_actions_are_others(run, evaluate):
    sampled, chosen = evaluate(run, "--episodes", "3"), evaluate(run, "--episodes", "3", "--deterministic")
    assert sampled["BCQ"]["return"] != chosen["BCQ"]["return"]


def test_scores_are_shown_if_there_are_references(make_run, capsys, evaluate):
    run = make_run("run", "evaluation.reference_scores=[0,10]")
    capsys.readouterr()
    found = evaluate(run, "--episodes", "2")
    rows = table(capsys.readouterr().out)
    assert len(rows) == 4
    for name, cells in rows.items():
        if name != "recorded behaviour":
            assert found[name]["normalized_score"] == pytest.approx(10 * found[name]["return"])
            assert cells[2] == f"{found[name]['normalized_score']:.1f}"


def test_neither_the_dataset_nor_the_settings_are_needed(evaluate, run, file):
    expected = evaluate(run, "--episodes", "2")
    file.unlink()
    (run / "config.yaml").unlink()
    assert evaluate(run, "--episodes", "2") == expected


def test_a_checkpoint_may_be_named(evaluate, run, monkeypatch):
    one = run / "checkpoints" / "checkpoint-000000000010"
    assert evaluate(one, "--episodes", "2")["checkpoint"] == str(one)
    assert main(["evaluate", str(one), "--episodes", "1"]) == 0
    assert [path.name for path in one.parent.iterdir() if path.suffix] == ["checkpoint-000000000010-evaluation.json"]
    monkeypatch.chdir(one)
    assert main(["evaluate", ".", "--episodes", "1"]) == 0
    assert one.with_name("checkpoint-000000000010-evaluation-2.json").exists()


def test_an_evaluation_that_ends_meanwhile_keeps_its_file(run, monkeypatch):
    inner = module._in_environment

    def slow(*args):
        (run / "evaluation.json").write_text("of the other one")
        return inner(*args)

    monkeypatch.setattr(module, "_in_environment", slow)
    assert main(["evaluate", str(run), "--episodes", "1"]) == 0
    assert (run / "evaluation.json").read_text() == "of the other one"
    assert json.loads((run / "evaluation-2.json").read_text())["step"] > 0


# baselines


def test_the_baseline_of_a_run_is_a_row(make_run, evaluate, capsys):
    run = make_run("run", "baseline=cloning")
    capsys.readouterr()
    found = evaluate(run, "--episodes", "3")
    shown = capsys.readouterr().out
    assert list(table(shown)) == ["recorded behaviour", "random", "behaviour model", "cloning", "BCQ"]
    assert f"\n{run}/baseline/best/checkpoint-000000000010: 10 gradient steps on " in shown
    alone = evaluate(run / "baseline", "--episodes", "3")
    assert found["cloning"] == alone["cloning"]
    assert list(table(capsys.readouterr().out)) == ["recorded behaviour", "random", "cloning"]
    shutil.rmtree(run / "baseline")
    without = evaluate(run, "--episodes", "3")
    assert without == {name: value for name, value in found.items() if name != "cloning"}


def test_any_run_may_be_the_baseline(make_run, evaluate, capsys):
    run = make_run("run", "baseline=cloning")
    cloning, other = make_run("clone", "algorithm=cloning", "seed=4"), make_run("other", "seed=4")
    own = evaluate(cloning, "--episodes", "3")["cloning"]
    found = evaluate(run, "--episodes", "3", "--baseline", str(cloning))
    assert found["cloning"] == own != evaluate(run, "--episodes", "3")["cloning"]
    capsys.readouterr()
    title = f"BCQ, {other}"
    found = evaluate(run, "--episodes", "3", "--baseline", str(other))
    shown = capsys.readouterr().out
    assert list(table(shown, len(title))) == ["recorded behaviour", "random", "behaviour model", title, "BCQ"]
    assert found[title]["return"] == evaluate(other, "--episodes", "3")["BCQ"]["return"] != found["BCQ"]["return"]
    assert list(evaluate(cloning, "--episodes", "3", "--baseline", str(run)))[-3:] == ["random", "BCQ", "cloning"]


@pytest.mark.parametrize("what", ["observations", "actions"])
def test_a_baseline_of_another_task_is_refused(run, make_run, make_file, what, capsys):
    values = np.random.default_rng(0).uniform(-1, 1, (200, 4))
    fields = {"actions": values} if what == "actions" else {"observations": values, "next_observations": values}
    other = make_run("other", f"dataset={make_file('other.hdf5', None, **fields)}")
    capsys.readouterr()
    assert main(["evaluate", str(run), "--baseline", str(other)]) == 1
    assert capsys.readouterr().err == (
        f"torchrl-bcq: {other} has other {what} than {run}; compare runs with the same {what}.\n"
    )
    assert main(["evaluate", str(run), "--baseline", str(run.parent / "none")]) == 1
    assert capsys.readouterr().err.startswith(f"torchrl-bcq: there is no folder {run.parent / 'none'}; ")


# without an environment


def logged(run: Path, *names: str) -> dict[str, float]:
    """The last lines of the log."""
    lines = {name: (run / f"log/scalars/{name}.csv").read_text().splitlines()[-1] for name in names}
    assert {line.partition(",")[0] for line in lines.values()} == {"10"}
    return {name: float(line.partition(",")[2]) for name, line in lines.items()}


HELD_OUT = ["loss_vae", "vae_reconstruction", "vae_kl", "loss_qvalue", "td_error", "pred_value", "target_value"]
HELD_OUT = [f"held_out_{name}" for name in (*HELD_OUT, "loss_actor")]


@pytest.mark.parametrize("held_out", [0.3, 0.0])
def test_without_an_environment_the_dataset_is_measured(make_run, capsys, held_out):
    run = make_run("run", "evaluation.env=null", f"held_out={held_out}", "loss.gamma=0.5", "baseline=cloning")
    capsys.readouterr()
    assert main(["evaluate", str(run)]) == 0
    shown = capsys.readouterr().out
    found = json.loads((run / "evaluation.json").read_text())
    of_both = ["held_out_loss_actor", "action_distance"] if held_out else ["action_distance"]
    own = logged(run, *(HELD_OUT if held_out else of_both), "action_distance", "initial_value")
    assert found["BCQ"] == own
    assert found["cloning"] == logged(run / "baseline", *of_both)
    assert list(found) == ["checkpoint", "step", "behaviour", "BCQ", "cloning"]
    for name, value in own.items():
        other = f"{found['cloning'][name]:.4g}" if name in of_both else "-"
        assert f"\n{name:<28}{value:>12.4g}{other:>12}{'-':>20}\n" in shown
    transitions, _ = open_dataset(load_settings(run))
    rewards = transitions["next", "reward"].double().reshape(10, 20)  # episodes of 20 steps
    if held_out:
        rewards = rewards[~split_episodes(transitions, 0.3, seed=0)[0].reshape(10, 20)[:, 0]]
    discounted = sum(rewards[:, t] * 0.5**t for t in range(20))
    numbers = {"return": rewards.sum(1).mean().item(), "discounted_return": discounted.mean().item()}
    assert found["behaviour"] == pytest.approx(numbers)
    for name, value in numbers.items():
        assert f"\n{name:<28}{'-':>12}{'-':>12}{value:>20.4g}\n" in shown
    explained = [line.partition(":")[0] for line in shown.partition("\n\n")[2].partition("\n\n")[2].splitlines()]
    expected = ["held_out_loss_vae", "held_out_vae_kl", "held_out_loss", "held_out_td_error"] if held_out else []
    expected += ["action_distance", "initial_value", "return", "discounted_return"]
    assert [name for name in explained if " " not in name and name] == expected
    where = "held-out episodes" if held_out else "the dataset"
    assert f"The run has no environment; --env ID names one. Metrics on {where}:\n\n" in shown
    assert f"\n{'':<28}{'BCQ':>12}{'cloning':>12}{'recorded behaviour':>20}\n" in shown
    assert main(["evaluate", str(run), "--env", "Swing-v0", "--episodes", "2"]) == 0
    assert json.loads((run / "evaluation.json").read_text()) == found  # earlier results are kept
    assert list(json.loads((run / "evaluation-2.json").read_text()))[-3:] == ["behaviour model", "cloning", "BCQ"]
    assert main(["evaluate", str(run)]) == 0
    assert json.loads((run / "evaluation-3.json").read_text()) == found
    capsys.readouterr()
    assert main(["evaluate", str(run), "--seed", "7", "--deterministic"]) == 1  # they would change nothing
    message = "--seed, --deterministic needs an environment; name it with --env ID, or leave the option out.\n"
    assert capsys.readouterr().err.endswith(message)


def test_a_baseline_that_learned_from_the_held_out_episodes_is_refused(make_run, capsys):
    held_out = ["evaluation.env=null", "held_out=0.3"]
    run, other = make_run("run", *held_out), make_run("other", *held_out, "seed=1", "algorithm=cloning")
    capsys.readouterr()
    assert main(["evaluate", str(run), "--baseline", str(other)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"torchrl-bcq: {other}/")
    assert f" held out other episodes than {run}/" in error
    assert not (run / "evaluation.json").exists()


# sweeps


def test_the_runs_of_a_sweep_are_listed(make_settings, tmp_path, capsys):
    sweep = tmp_path / "sweep"
    for number, seed in enumerate((0, 1)):
        train(make_settings("steps=20", f"seed={seed}", "checkpoint.keep=3", f"out={sweep / str(number)}"))
    for number, returns in enumerate(([0.0, 5.0, 2.5], [9.0, -1.0, 3.0])):  # before training, and at steps 10 and 20
        lines = [f"{step},{value}" for step, value in zip((0, 10, 20), returns, strict=True)]
        (sweep / str(number) / "log/scalars/return.csv").write_text("\n".join(lines) + "\n")
    capsys.readouterr()
    assert main(["evaluate", str(sweep)]) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[0] == f"{sweep} contains 2 runs:"
    cells = [line.split() for line in shown.splitlines()[2:5]]
    assert cells[0] == ["run", "seed", "steps", "last", "return", "best", "return"]
    assert cells[1:] == [["0", "0", "20", "2.5", "5"], ["1", "1", "20", "3", "3"]]
    assert f"The best return is 5, in {sweep / '0'} after 10 gradient steps.\n" in shown
    assert shown.endswith(f"torchrl-bcq evaluate {sweep / '0'}\n")
    assert not list(sweep.glob("**/evaluation*.json"))


def test_runs_on_several_datasets_are_not_ranked(tmp_path, capsys):
    for name in "ab":
        save_settings(compose([f"dataset={name}.hdf5", "algorithm=bcq", f"out={tmp_path / name}"])[0], tmp_path / name)
        (tmp_path / name / "log/scalars").mkdir(parents=True)
        (tmp_path / name / "log/scalars/return.csv").write_text("1000,1.5\n")
    assert main(["evaluate", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert shown.endswith("The runs have different datasets, so their returns may belong to different tasks.\n")
    assert "The best return" not in shown


def test_runs_of_two_algorithms_differ_only_in_the_settings_that_both_have(tmp_path, capsys):
    sweep, phi = tmp_path / "sweep", "network.phi"
    runs = {"0": ["algorithm=cloning", "threads=1"], "1": [f"{phi}=0.1", "threads=2"], "2": [f"{phi}=0.2"]}
    for name, words in runs.items():
        save_settings(compose(["dataset=a.hdf5", "algorithm=bcq", f"out={sweep / name}", *words])[0], sweep / name)
        (sweep / name / "log/scalars").mkdir(parents=True)
        (sweep / name / "log/scalars/return.csv").write_text(f"1000,{name}.5\n")
    for name in ("2", "3"):
        (sweep / name).mkdir(exist_ok=True)
        (sweep / name / "train.log").touch()
    assert main(["evaluate", str(sweep)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[7] == f"Not in the table, because they stopped before their first step (see train.log): {sweep / '3'}"
    assert shown[2:6] == [
        "run  algorithm  network.phi  steps  last return  best return",
        "0      cloning            -  1,000          0.5          0.5",
        "1          bcq          0.1  1,000          1.5          1.5",
        "2          bcq          0.2  1,000          2.5          2.5",
    ]
    assert main(["evaluate", str(sweep), "--out", "x.json", "--episodes", "5", "--device", "auto"]) == 1
    message = f"torchrl-bcq: {sweep} contains several runs, but --episodes, --out needs a single run; "
    advice = "name one of the runs, or leave the option out to print a table of all runs.\n"
    assert capsys.readouterr().err == message + advice


def test_a_run_that_lost_its_settings_is_not_a_sweep_of_its_baseline(tmp_path):
    (tmp_path / "baseline").mkdir()
    (tmp_path / "baseline/config.yaml").touch()
    assert is_sweep(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    assert not is_sweep(tmp_path)


def test_runs_without_an_environment_are_listed_and_none_is_best(make_settings, tmp_path, capsys):
    for phi in (0, 0.1):
        words = [f"network.phi={phi}", "evaluation.env=null", f"out={tmp_path / 'sweep' / str(phi)}"]
        train(make_settings("steps=10", "held_out=0.3", *words))
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "sweep")]) == 0
    shown = capsys.readouterr().out
    columns = ["last", "held_out_td_error", "last", "initial_value", "last", "action_distance"]
    assert shown.splitlines()[2].split() == ["run", "network.phi", "steps", *columns]
    for line, phi in zip(shown.splitlines()[3:5], (0, 0.1), strict=True):
        last = logged(tmp_path / "sweep" / str(phi), *columns[1::2])
        assert line.split()[3:] == [f"{value:.4g}" for value in last.values()]
    assert "No run was evaluated in an environment. These numbers do not show which policy is best." in shown


# refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--episodes", "0"], "torchrl-bcq: --episodes is 0, expected at least 1.\n"),
        (["--device", "abacus"], "torchrl-bcq: device=abacus cannot be used: "),
        (["--env", "Nonsense-v0"], "torchrl-bcq: environment 'Nonsense-v0' cannot be made: "),
        (
            ["--env", "Goal-v0"],
            "torchrl-bcq: the observation of Goal-v0 has the entries ['place', 'goal']; name those that the run ",
        ),
        (
            ["--env", "CartPole-v1"],
            "torchrl-bcq: CartPole-v1 has observations of shape (4,), but the run has (3,); choose ",
        ),
        (["--out", "folder/none.json", "--episodes", "-1"], "torchrl-bcq: --episodes is -1"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(run, capsys, arguments, message):
    capsys.readouterr()
    assert main(["evaluate", str(run), *arguments]) == 1
    assert capsys.readouterr().err.startswith(message)
    assert not (run / "evaluation.json").exists()


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    assert main(["evaluate", str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err == (
        f"torchrl-bcq: there is no folder {tmp_path / 'none'}; choose the folder of a run of torchrl-bcq train.\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_numbers_are_written_to_the_file_that_is_named(run, tmp_path):
    out = tmp_path / "new" / "numbers.json"
    assert main(["evaluate", str(run), "--episodes", "1", "--out", str(out)]) == 0
    assert [path.name for path in out.parent.iterdir()] == ["numbers.json"]
    assert not (run / "evaluation.json").exists()


def cut_off_after(steps: int, path: Path) -> Path:
    """Episodes that were cut off; those of the environment have up to 7 steps."""
    rows = np.arange(12 * steps)
    columns = {"observations": np.random.default_rng(0).normal(size=(len(rows), 3)), "rewards": -np.ones(len(rows))}
    columns |= {"next_observations": columns["observations"] + 0.1, "actions": np.linspace(-1, 1, len(rows))[:, None]}
    columns |= {"terminals": rows < 0, "timeouts": rows % steps == steps - 1}
    return write_arrays(path, columns, env_id="Swing-v0")


@pytest.mark.parametrize("steps", [3, 7])
def test_returns_of_shorter_episodes_are_not_compared(make_run, tmp_path, capsys, caplog, steps):
    """With the reward -1 in each step, a longer episode has a lower return, whatever the policy does."""
    run = make_run("run", f"dataset={cut_off_after(steps, tmp_path / 'd.hdf5')}")
    limit = time_limit(load(run).task.env)
    assert main(["evaluate", str(run), "--episodes", "4", "--env-kwargs", "max_episode_steps=7"]) == 0
    out = capsys.readouterr().out
    assert table(out)["recorded behaviour"][-1] == f"{steps}.0"
    text = f"the recorded episodes were cut off after {steps} steps (median)"
    assert (text in out) == ("--env-kwargs max_episode_steps=3" in out) == (steps == 3)
    assert ("recorded behaviour (" in out) == (steps == 7)
    assert (text in caplog.text) == (steps < limit)


def test_an_output_that_cannot_be_written_is_reported_before_the_episodes(run, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("torchrl_bcq.cli.evaluate._in_environment", lambda *_: pytest.fail("it ran"))
    assert main(["evaluate", str(run), "--out", str(tmp_path / "file" / "found.json")]) == 1
    assert "found.json cannot be written: " in (error := capsys.readouterr().err)
    assert "; choose another file with --out." in error
