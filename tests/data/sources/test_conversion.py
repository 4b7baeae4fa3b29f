"""Memory-mapped copies: the same content, made once, complete or absent."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import tqdm.auto
from tensordict import TensorDict
from torchrl.data import Bounded

from torchrl_bcq import from_arrays, load_hdf5
from torchrl_bcq.data.sources import array_files, conversion, layouts, source
from torchrl_bcq.data.sources.conversion import load_memmap, write_memmap
from torchrl_bcq.data.sources.source import Source
from torchrl_bcq.files import UNFINISHED

from ...array_files import same, write_arrays

ROWS = 40
TIME = np.arange(ROWS, dtype=np.float32)
STEPS = {
    "observations": np.stack([TIME, -TIME], 1),
    "actions": np.linspace(-1, 1, ROWS, dtype=np.float32)[:, None],
    "rewards": TIME / 10,
    "terminals": np.arange(ROWS) == 9,
    "timeouts": np.arange(ROWS) == 29,
}
ARRAYS = dict(zip(("observations", "actions", "rewards", "terminated", "truncated"), STEPS.values(), strict=True))


def write(path, **changes):
    return write_arrays(path, {**STEPS, **changes})


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "d.hdf5")


@pytest.fixture
def root(tmp_path):
    return tmp_path / "copies"


@pytest.fixture
def reads(monkeypatch):
    """Counts how often a file is read."""
    count = []
    slices = layouts._slices
    monkeypatch.setattr(layouts, "_slices", lambda *args: count.append(1) or slices(*args))
    return count


def copies(root) -> list[Path]:
    return sorted(path for path in root.iterdir() if not path.name.startswith("."))


def leftovers(root) -> list[str]:
    """All names except locks."""
    return [path.name for path in root.iterdir() if not path.name.endswith(".lock")] if root.exists() else []


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_a_copy_holds_what_is_read_into_memory(file, root, monkeypatch, chunk):
    monkeypatch.setattr(layouts, "CHUNK_BYTES", chunk * 8)
    td = load_hdf5(file, root=root)
    assert td.is_memmap()
    same(td, from_arrays(**ARRAYS))
    same(td, load_hdf5(file))
    same(load_memmap(copies(root)[0]), from_arrays(**ARRAYS))
    assert leftovers(root) == [copies(root)[0].name]


def test_a_copy_has_the_bytes_that_tensordict_would_write(file, root, tmp_path):
    load_hdf5(file, root=root)
    from_arrays(**ARRAYS).memmap(str(tmp_path / "other"))
    found, expected = (
        {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.memmap")}
        for folder in (copies(root)[0], tmp_path / "other")
    )
    assert found == expected
    assert len(found) == 8


def test_a_copy_is_made_once(file, root, reads):
    load_hdf5(file, root=root)
    assert len(reads) == 2  # checked, then written
    content = {path: path.stat().st_mtime_ns for path in root.rglob("*.memmap")}
    os.utime(file, (1, 1))  # another time, the same content
    same(load_hdf5(file, root=str(root)), from_arrays(**ARRAYS))
    moved = file.rename(file.with_name("e.hdf5")).rename(file)  # another inode's name, the same content
    load_hdf5(moved, root=root)
    assert len(reads) == 2
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*.memmap")} == content


def test_other_content_or_settings_are_converted_anew(file, root, reads):
    load_hdf5(file, root=root)
    changed = STEPS["rewards"].copy()
    changed[17] = 99
    before, stamp = file.stat().st_size, file.stat().st_mtime_ns
    write(file, rewards=changed)
    os.utime(file, ns=(stamp, stamp))
    assert file.stat().st_size == before  # size and time do not show the change
    assert load_hdf5(file, root=root)["next", "reward"][17].item() == 99
    assert len(copies(root)) == 2
    for settings in ({"max_episode_steps": 7}, {"names": {"rewards": "rewards"}}):
        count = len(copies(root))
        load_hdf5(file, root=root, **settings)
        load_hdf5(file, root=root, **settings)
        assert len(copies(root)) == count + 1, settings
    assert len(reads) == 2 * 4


@pytest.mark.parametrize("first", [None, Bounded(-1, 2, (1,))])
def test_bounds_do_not_change_a_copy(file, root, reads, first):
    load_hdf5(file, root=root, action_spec=first)
    same(load_hdf5(file, root=root, action_spec=Bounded(-1, 1, (1,))), from_arrays(**ARRAYS))
    assert (len(copies(root)), len(reads)) == (1, 2)


@pytest.mark.parametrize("first", [None, Bounded(-1, 1, (1,))])
def test_the_actions_of_a_copy_must_lie_within_the_bounds(file, root, first):
    load_hdf5(file, root=root, action_spec=first)
    with pytest.raises(ValueError, match=r"^d.hdf5: actions has 20 rows \(first: 0\) outside the action bounds"):
        load_hdf5(file, root=root, action_spec=Bounded(-0.5, 0.5, (1,)))


def test_refused_files_leave_nothing(file, root):
    write(file, rewards=np.where(TIME == 33, np.nan, TIME))
    with pytest.raises(ValueError, match=r"^d.hdf5: rewards has 1 row \(first: 33\) that are not finite in float32"):
        load_hdf5(file, root=root)
    assert leftovers(root) == []


def test_files_that_change_meanwhile_leave_nothing(root):
    """One row more when it is written than when it was checked, and one less."""
    for more in (1, -1):
        lengths = iter([20, 20 + more])

        def chunks(lengths=lengths):
            rows = slice(0, next(lengths))
            yield {name: value[rows] for name, value in ARRAYS.items()}

        with pytest.raises(ValueError) as error:  # noqa: PT011 (the whole message is compared below)
            Source("log", chunks, []).read(root=root)
        assert str(error.value) == (
            f"log: it had 19 transitions in the first pass and {19 + more} in the second; try again when no program "
            "writes to the source."
        )
        assert leftovers(root) == []


def test_errors_while_reading_leave_nothing(root):
    reads = []

    def chunks():
        reads.append(1)
        yield ARRAYS
        if len(reads) == 2:
            raise OSError("the drive went away")
        yield ARRAYS

    with pytest.raises(
        ValueError, match=r"^log: the source cannot be read \(the drive went away\) and may be damaged: copy or"
    ) as error:
        Source("log", chunks, []).read(root=root)
    assert isinstance(error.value.__cause__, OSError)
    assert leftovers(root) == []


def test_interruptions_leave_nothing(root):
    reads = []

    def chunks():
        reads.append(1)
        yield ARRAYS
        if len(reads) == 2:
            raise KeyboardInterrupt
        yield ARRAYS

    with pytest.raises(KeyboardInterrupt):
        Source("log", chunks, []).read(root=root)
    assert leftovers(root) == []


def test_full_disks_are_refused_before_anything_is_written(file, root, monkeypatch):
    """39 rows of 2 + 2 + 1 + 1 float32, an int64 and 3 flags are 39 * 35 = 1365 bytes (one row is dropped twice)."""
    usage = type("Usage", (), {"free": 38 * 35 - 1})
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(
        OSError,
        match=r"^\S*/d-\w{16} cannot be written \(the copy needs 0.0 GB, but only 0.0 GB are free; choose",
    ):
        load_hdf5(file, root=root)
    assert leftovers(root) == []
    usage.free += 1
    assert len(load_hdf5(file, root=root)) == 38


def test_disks_that_become_full_leave_nothing(file, root, monkeypatch):
    """Rewards are written to a device that is always full."""
    monkeypatch.setattr(layouts, "CHUNK_BYTES", 40)

    def full(path, mode):
        return open("/dev/full" if "reward" in str(path) else path, mode)

    monkeypatch.setattr(conversion, "open", full, raising=False)
    with pytest.raises(OSError, match=r"^\S*/d-\w{16} cannot be written \(.*\); no partial copy is left.$"):
        load_hdf5(file, root=root)
    assert leftovers(root) == []
    monkeypatch.undo()
    same(load_hdf5(file, root=root), from_arrays(**ARRAYS))


def test_disks_that_are_full_when_files_are_flushed_leave_nothing(file, root, monkeypatch):
    def fsync(number):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(conversion.os, "fsync", fsync)
    with pytest.raises(OSError, match=r"cannot be written \(No space left on device\); no partial copy is left.$"):
        load_hdf5(file, root=root)
    assert leftovers(root) == []


@contextmanager
def unprivileged():
    """Run as nobody, since root may write anywhere."""
    if os.getuid():
        yield
        return
    os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


def test_read_only_folders():
    """No copy can be written to them; an existing one can be read."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        file = write(folder / "d.hdf5")
        load_hdf5(file, root=folder / "shared")
        (folder / "empty").mkdir()
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        with unprivileged():
            for root in (folder / "empty", folder / "none"):
                with pytest.raises(OSError, match="Permission denied"):
                    load_hdf5(file, root=root)
            same(load_hdf5(file, root=folder / "shared"), from_arrays(**ARRAYS))
        assert leftovers(folder / "empty") == []
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o755)


def test_a_file_where_the_folder_should_be(file, tmp_path):
    with pytest.raises(OSError, match="exists"):
        load_hdf5(file, root=file)


@pytest.mark.parametrize("shared", [True, False])
def test_two_at_once_make_one_copy(file, root, reads, shared):
    """Threads wait for the lock file, as processes do."""
    found, begin = [], threading.Barrier(4)

    def load():
        begin.wait()
        found.append(load_hdf5(file, root=root if shared else root / str(threading.get_ident())))

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reads) == (2 if shared else 8)
    assert len(found) == 4
    for td in found:
        same(td, from_arrays(**ARRAYS))


def test_waits_for_another_process(file, root, reads):
    """Another process holds the lock and finishes a second later: nothing is converted here."""
    made = load_hdf5(file, root=root)
    folder = copies(root)[0]
    same(made, from_arrays(**ARRAYS))
    aside = folder.rename(root / ".elsewhere")
    program = (
        "import sys, time, os; from filelock import FileLock\n"
        "with FileLock(sys.argv[1]):\n"
        "    print('locked', flush=True); time.sleep(1); os.rename(sys.argv[2], sys.argv[3])"
    )
    arguments = [sys.executable, "-c", program, root / f".{folder.name}.lock", aside, folder]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        begin = time.monotonic()
        td = load_hdf5(file, root=root)
        assert time.monotonic() - begin > 0.5
    same(td, from_arrays(**ARRAYS))
    assert len(reads) == 2  # by the first call


def test_what_a_killed_run_left_is_removed(file, root):
    load_hdf5(file, root=root)
    folder = copies(root)[0]
    stale = folder.rename(root / f"{UNFINISHED}0a1b2c3d.{folder.name}")
    (stale / "observation.memmap").write_bytes(b"half")
    (stale / "junk").write_text("junk")
    same(load_hdf5(file, root=root), from_arrays(**ARRAYS))
    assert leftovers(root) == [folder.name]
    assert not (folder / "junk").exists()


def saved(folder) -> Path:
    from_arrays(**ARRAYS).memmap(str(folder))
    return folder


def refusal(folder) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011 (whole messages are compared)
        load_memmap(folder)
    return str(error.value)


def test_unfinished_conversions_are_not_loaded(tmp_path):
    folder = saved(tmp_path / f"{UNFINISHED}0a1b2c3d.d-0123456789abcdef")
    assert refusal(folder) == f"{folder} is an unfinished copy; convert the dataset again."


@pytest.mark.parametrize("key", ["observation", "episode", "next/reward", "next/done"])
@pytest.mark.parametrize("size", [0, 10, None])
def test_cut_off_files_are_refused_before_they_are_mapped(tmp_path, key, size):
    """38 rows: 2 float32, an int64, a float32, a flag."""
    folder = saved(tmp_path / "copy")
    whole = 38 * {"observation": 8, "episode": 8, "next/reward": 4, "next/done": 1}[key]
    path = folder / f"{key}.memmap"
    assert path.stat().st_size == whole
    if size is None:
        path.unlink()
    else:
        os.truncate(path, size)
    shape = [38] if key == "episode" else [38, 2] if key == "observation" else [38, 1]
    expected = f"{path} has {size or 0} bytes, expected {whole} for shape {shape}; delete the copy and convert the "
    expected += "dataset again."
    assert refusal(folder) == expected


def test_cut_off_copies_are_refused_by_readers(file, root):
    load_hdf5(file, root=root)
    path = copies(root)[0] / "action.memmap"
    os.truncate(path, 30)
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the whole message is compared below)
        load_hdf5(file, root=root)
    assert str(error.value) == (
        f"d.hdf5: {path} has 30 bytes, expected 152 for shape [38, 1]; delete the copy and convert the dataset again."
    )


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="^there is no folder .*/none.$"):
        load_memmap(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "copy-1").mkdir()
    assert refusal(tmp_path / "empty") == (
        f"{tmp_path / 'empty'} is not a memory-mapped copy; it holds ['copy-1']. Choose another folder."
    )
    folder = saved(tmp_path / "text")
    (folder / "meta.json").write_text("no JSON")
    assert refusal(folder).startswith(f"{folder} cannot be read (")
    folder = tmp_path / "none yet"
    TensorDict({"observation": torch.zeros(0, 2)}, [0]).memmap(str(folder))
    assert refusal(folder) == f"{folder} holds no rows; delete it and convert the dataset again."


def test_folders_of_tensordict_are_loaded(tmp_path):
    expected = from_arrays(**ARRAYS)
    td = load_memmap(saved(tmp_path / "copy"))
    same(td, expected)
    assert td.is_memmap()
    assert td["next"].is_memmap()
    assert td.is_locked
    assert td["next", "reward"].filename == str(tmp_path / "copy" / "next" / "reward.memmap")


def test_loading_writes_nothing(tmp_path):
    """Otherwise processes that load at the same time would find an incomplete description."""
    folder = saved(tmp_path / "copy")
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in tmp_path.rglob("*")}
    load_memmap(folder)
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in tmp_path.rglob("*")} == before


def test_write_memmap_takes_parts_of_any_size(tmp_path):
    expected = from_arrays(**ARRAYS)
    write_memmap(iter(expected.split([1, 30, 7])), 38, tmp_path / "copy")
    same(load_memmap(tmp_path / "copy"), expected)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_progress_is_shown_on_a_terminal_only(root, monkeypatch, stream):
    def chunks():
        for start in range(0, 40, 20):
            yield {name: value[start : start + 20] for name, value in ARRAYS.items()}

    at_once = {"delay": 0, "mininterval": 0}  # instead of a second
    bar = tqdm.auto.tqdm
    monkeypatch.setattr(tqdm.auto, "tqdm", lambda **settings: bar(**{**settings, **at_once}))
    shown = stream()
    monkeypatch.setattr(sys, "stderr", shown)
    Source("log", chunks, []).read(root=root)
    if stream is Terminal:
        assert "checking log: " in shown.getvalue()
        assert "converting log: " in shown.getvalue()
        assert "/38" in shown.getvalue()  # two rows were dropped; the number is known by then
    else:
        assert shown.getvalue() == ""


def test_progress_needs_no_tqdm(file, root, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    same(load_hdf5(file, root=root), from_arrays(**ARRAYS))


def test_kills_leave_a_complete_copy_or_none():
    """The short form of tests/kill_conversion.py."""
    script = Path(__file__).parents[2] / "kill_conversion.py"
    arguments = [sys.executable, script, "--kills", "3", "--rows", "100000"]
    result = subprocess.run(arguments, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr == ""
    summary = result.stdout.splitlines()[-1]
    assert summary.startswith("3 kills (")
    assert summary.endswith(": 3 reruns byte for byte the same, 0 not")


def test_name_of_a_copy_is_safe(root, reads):
    Source("mujoco/ho pper:medium-v0", lambda: iter([ARRAYS]), []).read(root=root)
    assert copies(root)[0].name.startswith("ho_pper_medium-v0-")
    assert source.re.fullmatch(r"ho_pper_medium-v0-[0-9a-f]{16}", copies(root)[0].name)


def test_sources_that_change_meanwhile_are_refused(file, root, monkeypatch):
    """The file changes between checking and writing, with the same number of rows; its digest differs then."""
    written = conversion.write_memmap

    def change_and_write(*settings):
        write(file, rewards=TIME + 500)
        written(*settings)

    monkeypatch.setattr(source, "write_memmap", change_and_write)
    with pytest.raises(ValueError, match=r"^d.hdf5: it changed during the conversion; try again when no program"):
        load_hdf5(file, root=root)
    assert leftovers(root) == []


def test_copies_are_found_whatever_the_file_is_called(file, root, reads):
    load_hdf5(file, root=root)
    file.rename(file.with_name("renamed.hdf5"))
    same(load_hdf5(file.with_name("renamed.hdf5"), root=root), from_arrays(**ARRAYS))
    assert (len(reads), len(copies(root))) == (2, 1)


def test_bad_rows_are_kept_if_not_strict(file, root):
    rewards = np.where(TIME == 3, np.nan, TIME)
    source_of = array_files.hdf5(write(file, rewards=rewards))
    with pytest.raises(ValueError, match=r"rewards has 1 row \(first: 3\)"):
        source_of.read(root=root)
    for td in (source_of.read(strict=False), source_of.read(strict=False, root=root)):
        assert td["next", "reward"].isnan().sum() == 1
    with pytest.raises(ValueError, match=r"rewards has 1 row \(first: 3\)"):
        source_of.read(root=root)


def test_odd_flags_are_refused_even_if_not_strict(file):
    """As booleans they would look like good ones."""
    odd = array_files.hdf5(write(file, terminals=np.where(TIME == 4, 2.0, 0), rewards=np.full(ROWS, np.nan)))
    with pytest.raises(ValueError, match="^d.hdf5: terminated has 1 row [^\\n]*, such as 2.0; use only 0 "):
        odd.read(strict=False)


def test_root_that_is_a_file(file):
    with pytest.raises(OSError, match=r"d.hdf5 cannot be a folder for copies \(.*\); choose another folder.$"):
        load_hdf5(file, root=file)
