"""Atomic writes of files and folders."""

from __future__ import annotations

import subprocess
import sys

import pytest

from torchrl_bcq.files import UNFINISHED, home, write_whole


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_replaces_the_old_one_at_the_end(tmp_path):
    path = tmp_path / "new" / "folder" / "results.json"
    for content in ("old", "new"):
        with write_whole(path) as aside:
            aside.write_text(content)
            assert not path.exists() or path.read_text() == "old"
        assert path.read_text() == content
    assert names(path.parent) == ["results.json"]


def test_a_folder_is_there_at_the_end(tmp_path):
    path = tmp_path / "copy"
    with write_whole(path) as aside:
        (aside / "next").mkdir(parents=True)
        (aside / "next" / "reward").write_text("1")
        assert not path.exists()
    assert (path / "next" / "reward").read_text() == "1"
    assert names(tmp_path) == ["copy"]
    with pytest.raises(OSError, match="not empty"), write_whole(path) as aside:
        aside.mkdir()
    assert (path / "next" / "reward").read_text() == "1"
    assert names(tmp_path) == ["copy"]


def test_the_ending_and_the_folder_are_those_of_the_path(tmp_path):
    """Writers of pictures, videos and arrays choose the format by the ending; a rename needs the same file system."""
    path = tmp_path / "curves.tar.png"
    with write_whole(path) as aside:
        assert aside != path
        assert aside.parent == tmp_path
        assert aside.name.startswith(UNFINISHED)
        assert aside.name.endswith(".curves.tar.png")
        aside.touch()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("is_folder", [False, True])
def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path, error, is_folder):
    path = tmp_path / "state.pt"
    path.write_text("old")

    def write_half():
        with write_whole(path) as aside:
            half = aside / "half" if is_folder else aside
            half.parent.mkdir(exist_ok=True)
            half.write_text("ha")
            raise error

    with pytest.raises(error):
        write_half()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["state.pt"]


def test_a_block_that_writes_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), write_whole(tmp_path / "absent"):
        pass
    assert names(tmp_path) == []


def test_a_killed_process_leaves_the_old_file(tmp_path):
    path = tmp_path / "state.pt"
    path.write_text("old")
    program = (
        "import os, signal, sys; from pathlib import Path; from torchrl_bcq.files import write_whole\n"
        "with write_whole(Path(sys.argv[1])) as aside:\n"
        "    aside.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", program, path]).returncode == -9
    assert path.read_text() == "old"
    (left,) = set(names(tmp_path)) - {"state.pt"}
    assert left.startswith(UNFINISHED)


def test_two_at_once_do_not_meet(tmp_path):
    path = tmp_path / "state.pt"
    with write_whole(path) as one, write_whole(path) as other:
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one"
    assert names(tmp_path) == ["state.pt"]


def test_a_path_whose_name_starts_with_a_tilde_stays_that_path(tmp_path, monkeypatch):
    (tmp_path / "~nobody-at-all").touch()
    monkeypatch.chdir(tmp_path)
    path = home("~nobody-at-all")
    monkeypatch.chdir(tmp_path.parent)
    assert home(path) == tmp_path / "~nobody-at-all"
