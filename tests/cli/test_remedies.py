"""What a message advises, in the words of the command line, and that the advice works."""

from __future__ import annotations

import re

import h5py
import numpy as np
import pytest

from torchrl_bcq.__main__ import main
from torchrl_bcq.cli.dataset import reader_words
from torchrl_bcq.data import DatasetError, load_hdf5, load_memmap
from torchrl_bcq.runs.dataset import open_dataset
from torchrl_bcq.runs.settings import load_settings


@pytest.fixture
def shown(capsys):
    """The error of a command that fails, or its output."""

    def call(*words: str, rc: int = 1) -> str:
        capsys.readouterr()
        assert main(list(words)) == rc
        out, err = capsys.readouterr()
        return err if rc else out

    return call


def rename(file, **names: str | None):
    with h5py.File(file, "a") as content:
        for old, new in names.items():
            content.move(old, new) if new else content.pop(old)
    return file


COMMANDS = ["train", "describe", "convert"]


@pytest.fixture
def start(words, tmp_path):
    """The words that start a command on a dataset."""
    return lambda command, file: {
        "train": ["train", *words("steps=10", f"dataset={file}")],
        "describe": ["describe", str(file), "--out", str(tmp_path / "d.png")],
        "convert": ["convert", str(file), str(tmp_path / "copies")],
    }[command]


@pytest.mark.parametrize("command", COMMANDS)
def test_an_entry_is_named_by_the_setting_that_the_message_shows(command, start, shown, file):
    rename(file, rewards="gain")
    message = shown(*start(command, file))
    assert "Name the entries with reader.names.rewards=ENTRY." in message
    assert "names={" not in message
    shown(*start(command, file), "reader.names.rewards=gain", rc=0)
    with pytest.raises(DatasetError, match=r"with names=\{'rewards': \.\.\.\}\."):
        load_hdf5(file)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_time_limit_is_set_as_the_message_shows(command, start, shown, file):
    rename(file, timeouts=None, next_observations=None)
    message = shown(*start(command, file))
    assert "Set reader.max_episode_steps=N to the time limit, or add timeouts" in message
    assert "from_arrays" not in message
    shown(*start(command, file), "reader.max_episode_steps=20", rc=0)
    with pytest.raises(DatasetError, match="Pass max_episode_steps=, add timeouts, or use from_arrays"):
        load_hdf5(file)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_table_is_read_with_the_settings_of_its_reader(command, start, shown, tmp_path):
    rows = np.random.default_rng(0).uniform(-1, 1, (60, 2)).round(3)
    lines = ["trip;x (m);力;gain;end"]
    lines += [f"{i // 20};{x};{force};1,5;0".replace(".", ",") for i, (x, force) in enumerate(rows)]
    table = tmp_path / "trips (1).csv"
    table.write_text("\n".join(lines), encoding="utf-8")
    columns = ["reader={observation: [x (m)], action: [力], reward: gain, terminated: end, episode: trip}"]
    assert "which also needs the names of columns: reader.observation=COLUMN" in shown(*start(command, table))
    message = shown(*start(command, table), *columns, "reader.delimiter=;")
    assert "set reader.delimiter=';' or reader.decimal_point=','." in message
    shown(*start(command, table), *columns, "reader.delimiter=;", "reader.decimal_point=','", rc=0)
    message = shown(*start(command, table), *columns, "reader.delimeter=;")
    assert message.rstrip().endswith(
        f"there is no setting reader.delimeter for {table}; did you mean reader.delimiter?"
    )


def test_settings_of_the_reader_stand_anywhere(shown, file, tmp_path):
    rename(file, rewards="gain", actions="u")
    words = ["reader.names.actions=u", "--", str(file), str(tmp_path / "c"), "reader.names.rewards=gain"]
    found = shown("convert", *words, rc=0)
    copy = next((tmp_path / "c").glob("[!.]*"))
    words = f"dataset={file} root={tmp_path / 'c'}"
    assert f"torchrl-bcq train uses this copy with {words}, the same settings of the reader and the same " in found
    assert f"In Python, load_memmap('{copy}') reads it.\n" in found
    assert "reader.NAME=VALUE" in capture_help("describe")


def test_only_settings_of_the_reader_are_taken_from_the_words(shown, file, tmp_path):
    named = file.rename(tmp_path / "reader_v=2.hdf5").name
    assert reader_words(["convert", named, "++reader.a=1", "reader={b: 2}", "c"]) == ["++reader.a=1", "reader={b: 2}"]
    message = shown("convert", str(tmp_path / named), "readers.max_episode_steps=20", str(tmp_path / "copies"))
    assert message.startswith("torchrl-bcq: readers.max_episode_steps=20 cannot be joined with other datasets: ")


def capture_help(command: str) -> str:
    from torchrl_bcq.__main__ import _parser

    (commands,) = (action.choices for action in _parser()._actions if action.dest == "==SUPPRESS==" or action.choices)
    return commands[command].format_help()


def test_other_data_start_a_new_run_with_the_networks_as_the_message_says(words, shown, run, make_file, tmp_path):
    assert main(["train", *words("steps=10")]) == 0
    new = make_file("new.hdf5", seed=1)
    message = shown("train", f"resume={run}", f"dataset={new}", "steps=20")
    assert "start a new run with the networks of this run: init_from=RUN out=FOLDER." in message
    assert "Checkpoint(" not in message
    message = shown("train", f"resume={run}", "optim.lr=1e-4")
    assert f"in another folder with out=FOLDER; add init_from={run} to start with its networks." in message
    other = [f"init_from={run}", f"out={tmp_path / 'new'}", "optim.lr=1e-4", f"dataset={new}"]
    assert main(["train", *words(*other, "steps=10")]) == 0
    assert load_settings(tmp_path / "new").init_from == str(run)
    assert f"the networks start with the weights of {run}/best/" in (tmp_path / "new" / "train.log").read_text()


def test_files_with_any_name_are_trained_on(words, tmp_path, make_file, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(["hopper (1).hdf5", "a,b.hdf5", "lr=0.1.hdf5", "数据.hdf5", "it's [1].hdf5"]):
        make_file(name)
        assert main(["train", *words(f"dataset={name}", f"out=läufe (x), y=/{number}", "steps=10")]) == 0
        assert main(["train", f"resume=läufe (x), y=/{number}", "steps=20"]) == 0
        assert open_dataset(load_settings(tmp_path / f"läufe (x), y=/{number}"))[0].batch_size == (200,)


def test_a_table_is_read_with_settings(shown, tmp_path):
    lines = ["t;place;force;r;end", *(f"{i // 4};{i},5;0,{i}5;1;{int(i % 4 == 3)}" for i in range(8))]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    columns = "reader={observation: [place], action: [force], reward: r, terminated: end, episode: t}"
    words = [columns, "reader.delimiter=;", "reader.decimal_point=','"]
    shown("convert", str(tmp_path / "a.csv"), str(tmp_path / "copies"), *words, rc=0)
    (copy,) = (tmp_path / "copies").glob("a-*")
    assert load_memmap(copy)["observation"].squeeze(1).tolist() == [i + 0.5 for i in range(8)]


def test_an_output_that_cannot_be_written(words, run, file, tmp_path, shown):
    (tmp_path / "note").write_text("")
    within = tmp_path / "note" / "new"
    shown("train", *words(), rc=0)
    for command, remedy in [
        (["describe", str(file), "--out", f"{within}.png"], "choose another file with --out."),
        (["plot", str(run), "--out", str(within)], "choose another folder with --out."),
        (["export", str(run), f"{within}.onnx"], "choose another FILE."),
    ]:
        message = shown(*command)
        assert message.startswith(f"torchrl-bcq: {within}")
        assert re.search(f" cannot be written: .*; {re.escape(remedy)}\n$", message)
