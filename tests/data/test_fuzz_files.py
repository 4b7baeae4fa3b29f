"""Damaged files of every format: refused by this package, or complete and finite if the damage looks like data."""

from __future__ import annotations

import gzip
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import h5py
import minari
import numpy as np
import pyarrow
import pytest
import torch
from gymnasium.spaces import Box
from hypothesis import assume, given, settings, strategies as st
from minari.data_collector import EpisodeBuffer
from pyarrow import parquet
from tensordict import TensorDict

from torchrl_bcq import load_hdf5, load_memmap, load_minari, load_npz, load_table, load_transitions

DAMAGES = ("cut", "overwrite", "insert", "remove", "zero", "append", "exchange")
SEEDS = st.integers(0, 9)  # of the good files, each of which is written and loaded once
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:minari"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def write_hdf5(file: Path, steps, **options) -> None:
    with h5py.File(file, "w", libver=options.pop("libver", None)) as content:
        for name, values in steps.items():
            content.create_dataset(name, data=values, **options)


def write_groups(file: Path, steps) -> None:
    with h5py.File(file, "w") as content:
        for number in range(steps.episode[-1] + 1):
            for name, values in steps.items():
                content[f"data/demo_{number}/{name}"] = values[steps.episode == number]


def write_minari(folder: Path, steps) -> None:
    flags = {"terminations": steps["terminated"], "truncations": steps["truncated"]}
    buffers = []
    for number in range(steps.episode[-1] + 1):
        rows = steps.episode == number
        fields = {name: values[rows] for name, values in flags.items()}
        fields["observations"] = np.concatenate([steps["observations"][rows], steps["next_observations"][rows][-1:]])
        buffers.append(EpisodeBuffer(actions=steps["actions"][rows], rewards=steps["rewards"][rows], **fields))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(folder.parent))
        minari.create_dataset_from_buffers(
            folder.name,
            buffer=buffers,
            action_space=Box(-2, 2, steps["actions"].shape[1:], np.float64),
            observation_space=Box(-99, 99, steps["observations"].shape[1:], np.float64),
            algorithm_name="none",
            author="none",
            author_email="none",
            code_permalink="none",
            requirements=[],
        )


def read_minari(folder: Path, steps, root=None) -> TensorDict:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(folder.parent))
        return load_minari(folder.name, root=root)


def named_columns(steps) -> dict[str, np.ndarray]:
    named = {"reward": steps["rewards"], "episode": steps.episode, "step": steps.step}
    named |= {name: steps[name].astype(int) for name in ("terminated", "truncated")}
    for field in ("observations", "actions", "next_observations"):
        named |= {f"{field[0]}{i}": column for i, column in enumerate(steps[field].T)}
    return named


def write_csv(file: Path, steps) -> None:
    named = named_columns(steps)
    lines = [",".join(named), *(",".join(repr(v.item()) for v in row) for row in zip(*named.values(), strict=True))]
    content = "\n".join(lines).encode()
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)


def write_parquet(file: Path, steps) -> None:
    parquet.write_table(pyarrow.table(named_columns(steps)), file, write_page_checksum=True)


def read_table(file: Path, steps, root=None) -> TensorDict:
    named = list(named_columns(steps))
    letters = {"observation": "o", "action": "a", "next_observation": "n"}
    several = {field: [n for n in named if n[0] == letter and n[1:].isdigit()] for field, letter in letters.items()}
    single = {name: name for name in ("reward", "terminated", "truncated", "episode", "step")}
    return load_table(file, **several, **single, root=root)


class Kind(NamedTuple):
    """Writes steps to a path and reads them."""

    write: Callable
    read: Callable
    is_checked: bool = False  # checksums cover all data
    has_root: bool = True


def read_arrays(file: Path, steps, root=None) -> TensorDict:
    return (load_npz if file.suffix == ".npz" else load_hdf5)(file, root=root)


KINDS = {
    "plain.hdf5": Kind(write_hdf5, read_arrays),
    "packed.hdf5": Kind(lambda file, steps: write_hdf5(file, steps, compression="gzip", fletcher32=True), read_arrays),
    "latest.hdf5": Kind(lambda file, steps: write_hdf5(file, steps, libver="latest", chunks=True), read_arrays),
    "groups.hdf5": Kind(write_groups, read_arrays),
    "plain.npz": Kind(lambda file, steps: np.savez(file, **steps), read_arrays, is_checked=True),
    "packed.npz": Kind(lambda file, steps: np.savez_compressed(file, **steps), read_arrays, is_checked=True),
    "plain.csv": Kind(write_csv, read_table),
    "packed.csv.gz": Kind(write_csv, read_table, is_checked=True),
    "plain.parquet": Kind(write_parquet, read_table),
    "minari-v0": Kind(write_minari, read_minari),
    "memmap": Kind(
        lambda folder, steps: steps.transitions().memmap(folder),
        lambda folder, steps: load_memmap(folder),
        has_root=False,
    ),
}


class Shelf:
    """Good files, each written and loaded once."""

    def __init__(self, folder: Path, make_steps, same):
        self._folder, self._make_steps, self._same = folder, make_steps, same
        self._steps = {}

    def copy(self, name: str, seed: int, folder: str) -> tuple[Path, list[Path], object]:
        """Path of a copy in a folder, its files, and their steps."""
        kind, source = KINDS[name], self._folder / str(seed) / name
        if (name, seed) not in self._steps:
            source.parent.mkdir(exist_ok=True)
            self._steps[name, seed] = steps = self._make_steps(seed)
            kind.write(source, steps)
            assert self._same(kind.read(source, steps), steps.transitions())
            if kind.has_root:
                assert self._same(kind.read(source, steps, source.parent / "root"), steps.transitions())
        path = Path(folder) / name
        if source.is_dir():
            shutil.copytree(source, path)
        else:
            shutil.copyfile(source, path)
        files = sorted(file for file in [path, *path.rglob("*")] if file.is_file())
        return path, files, self._steps[name, seed]


@pytest.fixture(scope="session")
def shelf(tmp_path_factory, make_steps, same) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("shelf"), make_steps, same)


def try_to_read(ledger, name: str, path: Path, steps) -> TensorDict | None:
    read = KINDS[name].read
    if KINDS[name].has_root:
        return ledger.load(name, lambda root=None: read(path, steps, root))
    return ledger.load(name, lambda: read(path, steps))


@pytest.mark.parametrize("name", KINDS)
def test_good_files_load(ledger, shelf, name):
    for seed in range(5):
        with tempfile.TemporaryDirectory(dir=ledger.folder) as folder:
            shelf.copy(name, seed, folder)


def damaged(content: bytes, damage: str, at: float, noise: bytes) -> bytes:
    start = int(at * len(content))
    end = start + len(noise)
    return {
        "cut": content[:start],
        "overwrite": content[:start] + noise + content[end:],
        "insert": content[:start] + noise + content[start:],
        "remove": content[:start] + content[end:],
        "zero": content[:start] + bytes(len(noise)) + content[end:],
        "append": content + noise,
        "exchange": content[start:] + content[:start],
    }[damage]


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=90)
@given(
    seed=SEEDS,
    damage=st.sampled_from(DAMAGES),
    at=st.floats(0, 1, exclude_max=True),
    noise=st.binary(min_size=1, max_size=24),
    which=st.integers(0, 99),
)
def test_damaged_bytes(ledger, shelf, same, name, seed, damage, at, noise, which):
    with tempfile.TemporaryDirectory(dir=ledger.folder) as folder:
        path, files, steps = shelf.copy(name, seed, folder)
        file = files[which % len(files)]
        content = file.read_bytes()
        broken = damaged(content, damage, at, noise)
        assume(broken != content)
        file.write_bytes(broken)
        result, expected = try_to_read(ledger, name, path, steps), steps.transitions()
        if result is None or same(result, expected):
            return  # the damage was found, or lies between the data
        assert not KINDS[name].is_checked
        check_memmap(result, expected) if name == "memmap" else check_plausible(result, expected)


def check_memmap(result: TensorDict, expected: TensorDict) -> None:
    """No checksum covers the values, and mapping does not read them: shapes and dtypes must be right."""
    assert result.batch_size == expected.batch_size
    for key, value in result.items(True, True):
        assert (value.shape, value.dtype) == (expected[key].shape, expected[key].dtype)


def check_plausible(result: TensorDict, expected: TensorDict) -> None:
    """TorchRL's layout, finite values, and flags that agree with the episodes."""
    assert set(result.keys(True, True)) == set(expected.keys(True, True))
    assert result["next", "observation"].shape == result["observation"].shape
    for key, value in result.items(True, True):
        assert value.dtype == expected[key].dtype
        assert value.ndim == expected[key].ndim
        assert value.isfinite().all()
        assert value.shape[1:] == expected[key].shape[1:] or key not in [("next", "reward"), ("next", "done")]
    after = result["next"]
    assert torch.equal(after["done"], after["terminated"] | after["truncated"])
    assert set(result["episode"].diff().tolist()) <= {0, 1}
    assert result["episode"][0] == 0
    assert len(result) >= 1


def format_of(name: str) -> str:
    """Minari stores HDF5 files with groups."""
    return ".hdf5" if name == "minari-v0" else Path(name).suffix or name


@settings(max_examples=120)
@given(seed=SEEDS, name=st.sampled_from(sorted(KINDS)), other=st.sampled_from(sorted(KINDS)), loud=st.booleans())
def test_wrong_format_behind_a_name(ledger, shelf, seed, name, other, loud):
    """Files under the name of another format, read by that format's reader or by their ending."""
    assume(format_of(name) != format_of(other))
    with tempfile.TemporaryDirectory(dir=ledger.folder) as folder, tempfile.TemporaryDirectory() as elsewhere:
        path, files, steps = shelf.copy(name, seed, folder)
        _, others, _ = shelf.copy(other, seed, elsewhere)
        shutil.copyfile(others[0], files[seed % len(files)])
        if loud and path.is_file():
            ledger.refuse("wrong format", lambda root=None: load_transitions(str(path), root=root))
        else:
            assert try_to_read(ledger, name, path, steps) is None


NO_DATA = {
    "empty": lambda ledger: b"",
    "pickle": lambda ledger: ledger.pickled(),
    "old pickle": lambda ledger: ledger.pickled()[:2] + b"." + ledger.pickled(),
    "packed pickle": lambda ledger: gzip.compress(ledger.pickled()),
    "text": lambda ledger: "nichts als Text \U0001f600\n".encode() * 9,
    "zeros": lambda ledger: bytes(5000),
    "newlines": lambda ledger: b"\r\n" * 50,
    "magic of zip": lambda ledger: b"PK\x03\x04" + bytes(100) + b"PK\x05\x06" + bytes(18),
    "magic of HDF5": lambda ledger: b"\x89HDF\r\n\x1a\n" + bytes(100),
    "magic of Parquet": lambda ledger: b"PAR1" + bytes(100) + b"PAR1",
    "magic of NumPy": lambda ledger: b"\x93NUMPY\x01\x00" + bytes(100),
    "json": lambda ledger: b'{"_type": 1, "shape": []}',
    "packed": lambda ledger: gzip.compress(b""),
}


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=20)
@given(seed=SEEDS, content=st.sampled_from([*NO_DATA, "missing", "folder"]), which=st.integers(0, 99))
def test_no_data_under_a_name(ledger, shelf, name, seed, content, which):
    with tempfile.TemporaryDirectory(dir=ledger.folder) as folder:
        path, files, steps = shelf.copy(name, seed, folder)
        file = files[which % len(files)]
        file.unlink()
        if content == "folder":
            file.mkdir()
        elif content != "missing":
            file.write_bytes(NO_DATA[content](ledger))
        assert try_to_read(ledger, name, path, steps) is None


def test_how_many_were_malformed(ledger, check_count):
    check_count(ledger.counts, [*KINDS, "wrong format"], at_least=1000)
