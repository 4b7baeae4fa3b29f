"""What the policy of a run is worth: the numbers, the table, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import gymnasium
import numpy as np
import pytest

from torchrl_bcq.__main__ import main
from torchrl_bcq.cli.train import train


@pytest.fixture
def run(make_config, tmp_path) -> Path:
    train(make_config("steps=10"))
    return tmp_path / "run"


@pytest.fixture
def evaluate(run, tmp_path):
    """The numbers that the command leaves."""

    def call(*arguments: str, folder: Path = run) -> dict:
        assert main(["evaluate", str(folder), "--out", str(tmp_path / "found.json"), *arguments]) == 0
        return json.loads((tmp_path / "found.json").read_text())

    return call


def table(text: str) -> dict[str, list[str]]:
    """Cells of the rows that are under the line of headings, by policy."""
    lines = text.partition("policy  ")[2].splitlines()[1:5]
    return {line[:20].strip(): line[20:].split() for line in lines}


# in an environment


def test_policies_are_compared_with_the_dataset(run, capsys):
    assert main(["evaluate", str(run), "--episodes", "4"]) == 0
    shown = capsys.readouterr().out
    found = json.loads((run / "evaluation.json").read_text())
    assert list(found) == [
        "checkpoint",
        "step",
        "env",
        "episodes",
        "seed",
        "behaviour",
        "random",
        "behaviour cloning",
        "BCQ",
    ]
    assert (found["step"], found["env"], found["episodes"], found["seed"]) == (10, "Swing-v0", 4, 0)
    assert found["checkpoint"] == str(run / "best" / "checkpoint-000000000010")
    rows = table(shown)
    assert list(rows) == ["the dataset", "random", "behaviour cloning", "BCQ"]
    behaviour = json.loads((run / "results.json").read_text())["behaviour"]
    assert found["behaviour"] == behaviour
    assert rows["the dataset"] == [f"{behaviour['mean']:.1f}", f"{behaviour['std']:.1f}", "-", "-"]
    for name in ("random", "behaviour cloning", "BCQ"):
        assert rows[name] == [f"{found[name]['return']:.1f}", f"{found[name]['return_std']:.1f}", "-", "5.0"]
    assert [name for name in rows if "value_estimate" in found.get(name, {})] == ["BCQ"]
    estimate, obtained = (f"{found['BCQ'][name]:.4g}" for name in ("value_estimate", "discounted_return"))
    assert f"the first critic estimates {estimate}; the discounted return from there was {obtained}." in shown
    assert shown.startswith(f"{found['checkpoint']}: 10 gradient steps on ")
    assert shown.endswith(f"The numbers are in {run / 'evaluation.json'}.\n")


def test_returns_are_those_of_episodes(evaluate):
    """The mean return of many random episodes, found by another loop."""
    found = evaluate("--episodes", "100", "--seed", "3")["random"]
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


def test_the_seed_decides_the_numbers(evaluate):
    first, again, other = (evaluate("--episodes", "3", "--seed", seed) for seed in "445")
    assert first == again
    for name in ("random", "behaviour cloning", "BCQ"):
        assert first[name]["return"] != other[name]["return"]


def test_they_are_what_the_run_has_logged(evaluate, run):
    """With as many episodes from the same states."""
    found = evaluate("--episodes", "2", "--seed", "1000", "--checkpoint", "last")
    logged = json.loads((run / "results.json").read_text())["final"]
    assert (found["BCQ"]["return"], found["BCQ"]["return_std"]) == (logged["mean"], logged["std"])


def test_deterministic_actions_are_others(evaluate):
    sampled, chosen = evaluate("--episodes", "3"), evaluate("--episodes", "3", "--deterministic")
    assert sampled["BCQ"]["return"] != chosen["BCQ"]["return"]


def test_scores_are_shown_where_there_are_references(make_config, tmp_path, capsys, evaluate):
    other = tmp_path / "other"
    train(make_config("steps=10", "evaluation.reference_scores=[0,10]", f"out={other}"))
    capsys.readouterr()
    found = evaluate("--episodes", "2", folder=other)
    for name, cells in table(capsys.readouterr().out).items():
        if name != "the dataset":
            assert found[name]["normalized_score"] == pytest.approx(10 * found[name]["return"])
            assert cells[2] == f"{found[name]['normalized_score']:.1f}"


def test_neither_the_dataset_nor_the_settings_are_needed(evaluate, run, file):
    expected = evaluate("--episodes", "2")
    file.unlink()
    (run / "config.yaml").unlink()
    assert evaluate("--episodes", "2") == expected


def test_a_checkpoint_may_be_named(evaluate, run):
    one = run / "checkpoints" / "checkpoint-000000000010"
    assert evaluate("--episodes", "2", folder=one)["checkpoint"] == str(one)


# without one


@pytest.mark.parametrize("held_out", [0.3, 0.0])
def test_without_an_environment_the_dataset_is_measured(make_config, tmp_path, capsys, held_out):
    run = tmp_path / "run"
    train(make_config("evaluation.env=null", f"held_out={held_out}"))
    capsys.readouterr()
    assert main(["evaluate", str(run)]) == 0
    shown = capsys.readouterr().out
    found = json.loads((run / "evaluation.json").read_text())
    logged = {}
    names = ["action_distance", "initial_value", *(["held_out_td_error", "held_out_vae_loss"] if held_out else [])]
    for name in names:
        last = (run / f"log/scalars/{name}.csv").read_text().splitlines()[-1]
        assert last.startswith("20,")
        logged[name] = float(last.removeprefix("20,"))
        assert f"{name:<24}{logged[name]:>12.4g}\n" in shown
    assert {name: found[name] for name in logged} == logged
    assert set(found) == {"checkpoint", "step", *names}
    assert f"no environment; on {'held-out episodes' if held_out else 'the dataset'}:" in shown
    assert main(["evaluate", str(run), "--env", "Swing-v0", "--episodes", "2"]) == 0
    assert json.loads((run / "evaluation.json").read_text())["env"] == "Swing-v0"


# what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--episodes", "0"], "torchrl-bcq: --episodes is 0, expected at least 1.\n"),
        (["--device", "abacus"], "torchrl-bcq: device=abacus cannot be used: "),
        (["--env", "Nonsense-v0"], "torchrl-bcq: environment 'Nonsense-v0' cannot be made: "),
        (
            ["--env", "Goal-v0"],
            "torchrl-bcq: Goal-v0 has observations of shape {'goal': (3,), 'place': (3,)}, the run ",
        ),
        (["--env", "CartPole-v1"], "torchrl-bcq: CartPole-v1 has observations of shape (4,), the run of (3,); choose "),
        (["--out", "folder/none.json", "--episodes", "-1"], "torchrl-bcq: --episodes is -1"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(run, capsys, arguments, message):
    capsys.readouterr()
    assert main(["evaluate", str(run), *arguments]) == 1
    assert capsys.readouterr().err.startswith(message)
    assert not (run / "evaluation.json").exists()


def test_what_is_no_run_is_refused(tmp_path, capsys):
    assert main(["evaluate", str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err == (
        f"torchrl-bcq: {tmp_path / 'none'} holds no checkpoint; name the folder of a run of torchrl-bcq train, or a "
        "checkpoint.\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_numbers_go_where_they_are_asked_to(run, tmp_path):
    out = tmp_path / "new" / "numbers.json"
    assert main(["evaluate", str(run), "--episodes", "1", "--out", str(out)]) == 0
    assert [path.name for path in out.parent.iterdir()] == ["numbers.json"]
    assert not (run / "evaluation.json").exists()
