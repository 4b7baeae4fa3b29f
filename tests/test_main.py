"""The command line, as a user types it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

import torchrl_bcq
from torchrl_bcq import load_hdf5, load_memmap
from torchrl_bcq.__main__ import main

ROWS = 1200


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Six episodes of 200 steps of something like Pendulum, in D4RL's layout."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    with h5py.File("swings.hdf5", "w") as file:
        file["observations"] = np.cumsum(rng.normal(size=(ROWS, 3)), 0)
        file["actions"] = rng.uniform(-2, 2, (ROWS, 1))
        file["rewards"] = rng.uniform(-1, 0, ROWS)
        file["terminals"] = np.zeros(ROWS, dtype=bool)
        file["timeouts"] = np.arange(ROWS) % 200 == 199
    return tmp_path / "swings.hdf5"


def test_describe_prints_and_draws(file, capsys):
    assert main(["describe", "swings.hdf5", "--env", "Pendulum-v1"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("1,194 transitions in 6 episodes")
    assert "-2 to 2" in out
    assert out.endswith("The pictures are in swings.hdf5.png.\n")
    assert (file.parent / "swings.hdf5.png").read_bytes().startswith(b"\x89PNG")


def test_describe_shows_the_defects_that_readers_refuse(file, capsys):
    with h5py.File(file, "r+") as broken:
        broken["rewards"][7:9] = np.nan
        broken["actions"][3] = 5
    assert main(["describe", "swings.hdf5", "--env", "Pendulum-v1", "--out", "other.png"]) == 0
    out = capsys.readouterr().out
    assert "rewards has 2 rows (first: 7) that are not finite" in out
    assert "actions has 1 row (first: 3) outside the action bounds" in out
    assert main(["convert", "swings.hdf5", "copies", "--env", "Pendulum-v1"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("torchrl-bcq: swings.hdf5: 2 defects:\n- rewards has 2 rows (first: 7)")
    assert [path.name for path in (file.parent / "copies").iterdir() if path.suffix != ".lock"] == []


def test_whole_actions_of_a_csv_may_be_doses(file, capsys):
    """The message names the setting of both commands."""
    rng = np.random.default_rng(0)
    rows = [
        f"{rng.normal()},{50 * rng.integers(3)},{rng.normal()},{int(row % 10 == 9)},{row // 10}" for row in range(200)
    ]
    (file.parent / "doses.csv").write_text("\n".join(["state,dose,reward,died,stay", *rows]))
    reader = "reader={observation: [state], action: [dose], reward: reward, terminated: died, episode: stay}"
    assert main(["describe", "doses.csv", reader]) == 0
    assert "actions has only whole numbers in all 200 rows (first: 0), from 0 to 100" in capsys.readouterr().out
    assert main(["convert", "doses.csv", "copies", reader]) == 1
    refusal = capsys.readouterr().err
    assert refusal == (
        "torchrl-bcq: doses.csv: actions has only whole numbers in all 200 rows, in column dose, and only 3 of the "
        "numbers 0 to 100 occur. If the actions are continuous, such as doses in whole units, set "
        "reader.action_type=continuous; if they are discrete actions, set reader.action_type=discrete.\n"
    )
    assert main(["convert", "doses.csv", "copies", reader, "reader.action_type=continuous"]) == 0
    assert main(["train", "dataset=doses.csv", reader, "evaluation.env=null", "out=run"]) == 1
    assert "set reader.action_type=continuous" in capsys.readouterr().err


def test_convert_prints_how_to_open_the_copy(file, capsys):
    for _ in range(2):
        assert main(["convert", "swings.hdf5", "copies"]) == 0
        out = capsys.readouterr().out
        assert out.startswith("1,194 transitions, 0.1 MB, in ")
    copy = eval(out.partition("In Python, ")[2].partition(" reads")[0], {"load_memmap": load_memmap})
    assert (copy == load_hdf5(file)).all()
    assert copy.is_memmap()


def test_tables_take_their_columns_from_the_command_line(file, capsys):
    rows = "\n".join(f"{i // 100},{i * 0.37 % 2},{i * 0.11 % 1 - 0.5},{i % 7},0" for i in range(1000))
    (file.parent / "trips.csv").write_text(f"trip,x,force,r,crashed\n{rows}\n")
    columns = "reader={observation: [x], action: [force], reward: r, terminated: crashed}"
    assert main(["describe", "trips.csv", columns, "reader.episode=trip"]) == 0
    assert capsys.readouterr().out.startswith("990 transitions in 10 episodes")
    assert main(["describe", "trips.csv"]) == 1
    assert capsys.readouterr().err == (
        "torchrl-bcq: trips.csv is a csv source, which also needs the names of columns: reader.observation=COLUMN "
        "reader.action=COLUMN reader.reward=COLUMN reader.terminated=COLUMN, and one of reader.episode=COLUMN "
        "reader.truncated=COLUMN reader.next_observation=COLUMN reader.max_episode_steps=N.\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["describe", "none.hdf5"], "torchrl-bcq: there is no file none.hdf5 in /"),
        (
            ["describe", "swings.hdf5", "reader.names.actions=torque"],
            "swings.hdf5: names refers to the entries ['torque'], but the file holds only",
        ),
        (["describe", "trips.csv", "reader=a,b"], "has 2 values; write a dictionary, as in 'reader={NAME: VALUE}'.\n"),
        (["describe", "trips.csv", "reader.reward=a,b"], "has 2 values; write a list as reader.reward=[a,b], "),
        (["describe", "swings.hdf5", "--env", "Nonsense-v1"], "environment 'Nonsense-v1' cannot be made: "),
        (["convert", "swings.hdf5", "swings.hdf5"], "torchrl-bcq: "),
    ],
)
def test_refusals_are_one_message(file, capsys, arguments, message):
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("torchrl-bcq: ")
    assert message in error


def test_it_is_a_command():
    shown = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "torchrl_bcq", "--help"], capture_output=True, text=True, check=True
    ).stdout
    listed = re.findall(r"^    (\w+)  ", shown, re.MULTILINE)
    assert listed == ["train", "evaluate", "rank", "plot", "export", "record", "describe", "convert"]
    assert "torchrl-bcq train dataset=hopper.hdf5 out=runs/hopper" in shown


@pytest.mark.parametrize("command", ["evaluate", "rank", "plot", "record", "describe", "convert"])
def test_each_command_explains_its_arguments(capsys, command):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: torchrl-bcq {command} ")
    assert f"examples:\n  torchrl-bcq {command}" in shown or f"\n  torchrl-bcq {command} " in shown


@pytest.mark.parametrize("arguments", [[], ["trian"], ["describe"], ["evaluate", "run", "--epsiodes", "3"]])
def test_an_unknown_command_is_refused_with_usage(capsys, arguments):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "usage: torchrl-bcq" in capsys.readouterr().err


def test_train_parses_its_own_arguments(monkeypatch):
    handed = []
    monkeypatch.setattr("torchrl_bcq.cli.train.main", lambda arguments: handed.append(arguments) or 7)
    assert main(["train", "-m", "seed=0,1"]) == 7
    monkeypatch.setattr(sys, "argv", ["torchrl-bcq", "train", "--help"])
    assert main() == 7
    assert handed == [["-m", "seed=0,1"], ["--help"]]


def test_starting_imports_no_package_that_one_command_alone_needs():
    """So that each command starts at once."""
    code = (
        "import sys; from torchrl_bcq.__main__ import _parser; _parser(); "
        "print([name for name in ('hydra', 'matplotlib', 'scipy.stats', 'h5py', 'minari') if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_groups_are_named_on_the_command_line(file, capsys):
    """Ten episodes of nine steps of three users; the last step of each episode is dropped."""
    rows = [f"{i * 0.7 % 2},{i % 3 / 4},1,{i // 9},{i // 9 % 3}" for i in range(90)]
    columns = "reader={observation: [x], action: [u], reward: r, terminated: end, episode: trip}"
    (file.parent / "trips.csv").write_text("\n".join(["x,u,r,trip,user,end", *(f"{row},0" for row in rows)]))
    assert main(["describe", "trips.csv", columns, "reader.group=user"]) == 0
    assert capsys.readouterr().out.startswith("80 transitions in 10 episodes of 3 groups")
    assert main(["convert", "trips.csv", "copies", columns, "reader.group=user"]) == 0
    (copy,) = [path for path in (file.parent / "copies").iterdir() if path.is_dir()]
    assert load_memmap(copy)["group"].tolist() == [trip % 3 for trip in range(10) for _ in range(8)]
    capsys.readouterr()
    assert main(["convert", "trips.csv", "copies", columns, "reader.group=x"]) == 1
    assert "column 'x' names the group, so it cannot also hold another field" in capsys.readouterr().err
    assert main(["convert", "trips.csv", "copies", columns, "reader.group=usr"]) == 1
    assert "the table lacks the columns ['usr']; the table has" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "torchrl-bcq: interrupted before the end; no incomplete file is left\n"),
        (
            ImportError("No module named 'h5py'"),
            1,
            "torchrl-bcq: No module named 'h5py'; install what is missing: pip install 'torchrl-bcq[train]'\n",
        ),
    ],
)
def test_interrupts_and_missing_packages_are_reported_in_a_line(file, capsys, monkeypatch, raised, code, message):
    def stop(*args, **kwargs):
        raise raised

    monkeypatch.setattr("torchrl_bcq.cli.dataset.load_transitions", stop)
    assert main(["convert", "swings.hdf5", "copies"]) == code
    assert capsys.readouterr().err == message


def test_copies_are_not_copied_again(file, capsys):
    assert main(["convert", "swings.hdf5", "copies"]) == 0
    copy = capsys.readouterr().out.partition("load_memmap('")[2].partition("'")[0]
    assert main(["convert", copy, "elsewhere"]) == 1
    error = capsys.readouterr().err
    assert (
        error == f"torchrl-bcq: {copy} is already a memory-mapped copy; use it as it is, without a folder for copies.\n"
    )


def test_it_says_its_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"torchrl-bcq {torchrl_bcq.__version__}\n"


def test_several_files_are_described_and_converted_as_one(file, capsys):
    (file.parent / "other.hdf5").write_bytes(file.read_bytes())
    with h5py.File("other.hdf5", "r+") as other:
        other["rewards"][0] = -0.5
    assert main(["describe", "swings.hdf5", "other.hdf5", "--env", "Pendulum-v1"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("2,388 transitions in 12 episodes")
    assert out.endswith("The pictures are in swings.hdf5.png.\n")
    assert main(["describe", "*.hdf5", "--root", "copies"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("2,388 transitions in 12 episodes")
    assert out.endswith("The pictures are in _.hdf5.png.\n")
    assert main(["convert", "swings.hdf5", "other.hdf5", "copies"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"2,388 transitions, 0.1 MB, in {Path('copies').resolve()}")
    assert main(["convert", "*.npz", "copies"]) == 1
    assert capsys.readouterr().err == "torchrl-bcq: no file matches *.npz.\n"


def test_columns_of_a_table_are_called_by_their_names(file, capsys):
    rows = "\n".join(f"{i // 100},{i * 0.37 % 2},5,{i * 0.11 % 1 - 0.5},0.25,{i % 7},0" for i in range(1000))
    (file.parent / "trips.csv").write_text(f"trip,x,mass,force,brake,r,crashed\n{rows}\n")
    words = [
        "reader.observation=[x, mass]",
        "reader.action=[force,brake]",
        "reader.reward=r",
        "reader.terminated=crashed",
    ]
    assert main(["describe", "trips.csv", *words, "reader.episode=trip"]) == 0
    shown = capsys.readouterr().out
    assert "actions is constant in column brake, in all " in shown
    assert "observations is constant in column mass, in all " in shown
    assert [line.split()[1] for line in shown.splitlines() if line.startswith(("observations ", "actions "))] == [
        *("x", "mass", "force", "brake")
    ]
