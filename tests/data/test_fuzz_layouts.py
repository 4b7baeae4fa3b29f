"""Undamaged files with wrong fields, groups, members or descriptions."""

from __future__ import annotations

import io
import json
import pickle
import tempfile
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings, strategies as st
from tensordict import NonTensorData, TensorDict

from torchrl_bcq import load_hdf5, load_memmap, load_npz

from ..array_files import write_arrays

SEEDS = st.integers(0, 2**32 - 1)


def npy(values: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.asarray(values))
    return stream.getvalue()


def short(content: bytes) -> bytes:
    return content[:-8]


def header(values: np.ndarray, text: str) -> bytes:
    """An array with a given header."""
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + values.tobytes()


# members of an archive, by name, in place of the good ones
MEMBERS = {
    "objects": lambda name, v: {name: npy(v.astype(object))},
    "empty": lambda name, v: {name: b""},
    "short": lambda name, v: {name: short(npy(v))},
    "fewer rows": lambda name, v: {name: npy(v).replace(f"({len(v)},".encode(), f"({len(v) - 1},".encode(), 1)},
    "negative": lambda name, v: {name: header(v, "{'descr': '<f8', 'fortran_order': True, 'shape': (-1, 2)}")},
    "code": lambda name, v: {name: header(v, "__import__('os').abort()")},
    "dtype": lambda name, v: {name: header(v, f"{{'descr': 'O8', 'fortran_order': False, 'shape': ({len(v)}, 1)}}")},
    "no header": lambda name, v: {name: v.tobytes()},
    "other name": lambda name, v: {f"{name}2.npy": npy(v)},
    "unicode": lambda name, v: {"\u00f6bservations.npy": npy(v)},
    "folder": lambda name, v: {f"../{name}": npy(v)},
    "nothing": lambda name, v: {},
    "ambiguous": lambda name, v: {name: npy(v), "obs.npy": npy(v), "observation.npy": npy(v), "act.npy": npy(v)},
}


@settings(max_examples=150)
@given(
    seed=SEEDS,
    defect=st.sampled_from([*MEMBERS, "pickle"]),
    field=st.sampled_from(["observations", "actions"]),
    method=st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2]),
)
def test_members_of_archives(ledger, make_steps, seed, defect, field, method):
    steps, name = make_steps(seed), f"{field}.npy"
    members = {f"{key}.npy": npy(values) for key, values in steps.items() if key != field}
    members |= {name: ledger.pickled()} if defect == "pickle" else MEMBERS[defect](name, steps[field])
    with tempfile.TemporaryDirectory(dir=ledger.folder) as folder:
        file = Path(folder) / "\u00e4.npz"
        with zipfile.ZipFile(file, "w", method) as archive:
            for key, content in members.items():
                archive.writestr(key, content)
        ledger.refuse("archives", lambda root=None: load_npz(file, root=root))


@settings(max_examples=60)
@given(seed=SEEDS, offset=st.sampled_from([6, 8]), value=st.integers(1, 2**16 - 1))
def test_compression_or_flags_of_an_archive(ledger, make_steps, same, seed, offset, value):
    """The directory of the archive names another method or an encrypted member; some bits have no meaning."""
    steps = make_steps(seed)
    with tempfile.TemporaryDirectory(dir=ledger.folder) as folder:
        file = Path(folder) / "d.npz"
        np.savez(file, **steps)
        content = bytearray(file.read_bytes())
        at = content.index(b"PK\x01\x02") + offset + 2
        changed = int.from_bytes(content[at : at + 2], "little") ^ value
        content[at : at + 2] = changed.to_bytes(2, "little")
        file.write_bytes(content)
        result = ledger.load("archives", lambda root=None: load_npz(file, root=root))
        assert result is None or same(result, steps.transitions())


def in_groups(file, steps) -> None:
    for name, values in steps.items():
        file[f"episode_0/{name}"] = values


def without(file, *names: str) -> None:
    for name in names:
        del file[name]


def replaced(file, name: str, values, **options) -> None:
    del file[name]
    file.create_dataset(name, data=values, **options)


HDF5 = {
    "missing": lambda f, s: without(f, "actions"),
    "no ends": lambda f, s: without(f, "truncated", "next_observations"),
    "ambiguous": lambda f, s: f.__setitem__("states", s["observations"]),
    "group": lambda f, s: (without(f, "observations"), f.create_group("observations/robot")),
    "soft link": lambda f, s: (without(f, "rewards"), f.__setitem__("rewards", h5py.SoftLink("/nowhere"))),
    "external link": lambda f, s: (without(f, "rewards"), f.__setitem__("rewards", h5py.ExternalLink("no.h5", "r"))),
    "link to itself": lambda f, s: (without(f, "rewards"), f.__setitem__("rewards", h5py.SoftLink("/rewards"))),
    "texts": lambda f, s: replaced(f, "rewards", ["\u00f6"] * len(s["rewards"])),
    "ragged": lambda f, s: replaced(f, "rewards", None, shape=s["rewards"].shape, dtype=h5py.vlen_dtype(float)),
    "complex": lambda f, s: replaced(f, "rewards", np.ones(len(s["rewards"]), complex)),
    "empty": lambda f, s: replaced(f, "rewards", h5py.Empty("f8")),
    "scalar": lambda f, s: replaced(f, "rewards", 1.0),
    "never written": lambda f, s: replaced(f, "rewards", None, shape=(len(s["rewards"]),), dtype="f8"),
    "half written": lambda f, s: replaced(
        f, "observations", None, shape=s["observations"].shape, dtype="f4", chunks=(1, s["observations"].shape[1])
    ),
    "huge": lambda f, s: [
        replaced(f, name, None, shape=(10**12, *values.shape[1:]), dtype="f4", chunks=True)
        for name, values in s.items()
    ],
    "zero episodes": lambda f, s: (f.clear(), f.create_group("data")),
    "nothing": lambda f, s: f.clear(),
    "empty episode": lambda f, s: (in_groups(f, s), without(f, *s), f.create_group("episode_1")),
    "episode without steps": lambda f, s: (
        in_groups(f, s),
        without(f, *s),
        [f.create_dataset(f"episode_1/{name}", data=v[:0]) for name, v in s.items()],
    ),
    "episode of another width": lambda f, s: (
        in_groups(f, s),
        without(f, *s),
        in_groups(f.create_group("x"), s),
        f.move("x/episode_0", "episode_1"),
        without(f, "x"),
        replaced(f, "episode_1/actions", np.ones((len(s["actions"]), 7))),
    ),
    "huge episode": lambda f, s: (
        in_groups(f, s),
        without(f, *s),
        replaced(f, "episode_0/observations", None, shape=(2**45, 2), dtype="f8", chunks=True),
    ),
}


@settings(max_examples=150)
@given(seed=SEEDS, defect=st.sampled_from(sorted(HDF5)), latest=st.booleans())
def test_layouts_of_hdf5(ledger, make_steps, seed, defect, latest):
    steps = make_steps(seed)
    with tempfile.TemporaryDirectory(dir=ledger.folder) as folder:
        file = Path(folder) / "d.hdf5"
        with h5py.File(file, "w", libver="latest" if latest else None) as content:
            for name, values in steps.items():
                content[name] = values
            HDF5[defect](content, steps)
        ledger.refuse("HDF5", lambda root=None: load_hdf5(file, root=root))


def as_buffer(file, steps) -> None:
    """A buffer of Tianshou that holds the steps, and three free slots."""
    names = {"observations": "obs", "actions": "act", "rewards": "rew", "next_observations": "obs_next"}
    for name, values in steps.items():
        free = np.zeros((3, *values.shape[1:]), values.dtype)
        file[f"_meta/{names.get(name, name)}"] = np.concatenate([values, free])
    rows = len(steps["rewards"])
    file.attrs.update({"maxsize": rows + 3, "_size": rows, "_insertion_idx": rows, "stack_num": 1})


def as_dump(file, steps) -> None:
    """A dump of d3rlpy 2."""
    file["columns"], file["num_episodes"] = (
        [b"observations", b"actions", b"rewards", b"terminated"],
        steps.episode[-1] + 1,
    )
    for number in range(steps.episode[-1] + 1):
        for name in ("observations", "actions", "rewards"):
            file[f"{name}_{number}"] = steps[name][steps.episode == number]
        file[f"terminated_{number}"] = steps["terminated"][steps.episode == number].any()


def as_padded(file, steps) -> None:
    """Arrays ``[E, T, ...]``."""
    lengths = np.bincount(steps.episode)
    for name, values in steps.items():
        padded = np.zeros((len(lengths), lengths.max(), *values.shape[1:]), values.dtype)
        padded[steps.episode, steps.step] = values
        file[name] = padded
    file["lengths"] = lengths


def as_starts(file, steps) -> None:
    """Flat arrays with the first rows of the episodes."""
    for name in ("observations", "actions", "rewards", "terminated"):
        file[name] = steps[name]
    file["episode_starts"] = steps.step == 0


FORMS = {"buffer": as_buffer, "dump": as_dump, "padded": as_padded, "starts": as_starts}
SIZES = ["maxsize", "_size", "_insertion_idx"]


def first_of(file, name: str) -> str:
    """The path of a field in any layout, such as ``_meta/act`` or ``actions_0``."""
    short = {"observations": "obs", "actions": "act", "rewards": "rew"}
    return next(path for path in (f"_meta/{short.get(name, name)}", f"{name}_0", name) if path in file)


def put(file, name: str, values) -> None:
    replaced(file, first_of(file, name), values)


FORM_DEFECTS = {
    "integers": ([*FORMS], lambda f, s: put(f, "actions", f[first_of(f, "actions")][()].astype(int))),
    "missing": ([*FORMS], lambda f, s: without(f, first_of(f, "rewards"))),
    "one row less": ([*FORMS], lambda f, s: put(f, "rewards", f[first_of(f, "rewards")][:-1])),
    "texts": ([*FORMS], lambda f, s: put(f, "observations", [b"x"] * len(f[first_of(f, "actions")]))),
    "scalar": ([*FORMS], lambda f, s: put(f, "actions", 1.0)),
    "not finite": ([*FORMS], lambda f, s: put(f, "rewards", f[first_of(f, "rewards")][()] * np.nan)),
    "group": ([*FORMS], lambda f, s: (without(f, p := first_of(f, "observations")), f.create_group(f"{p}/robot"))),
    "no flags": ([*FORMS], lambda f, s: put(f, "terminated", f[first_of(f, "terminated")][()] + 2)),
    "no size": (["buffer"], lambda f, s: f.attrs.pop(s.rng.choice(SIZES))),
    "other size": (["buffer"], lambda f, s: f.attrs.__setitem__(s.rng.choice(SIZES), len(s["rewards"]) + 1)),
    "negative size": (["buffer"], lambda f, s: f.attrs.__setitem__(s.rng.choice(SIZES), -1)),
    "text as size": (["buffer"], lambda f, s: f.attrs.__setitem__(s.rng.choice(SIZES), "all")),
    "huge size": (["buffer"], lambda f, s: f.attrs.__setitem__(s.rng.choice(SIZES), 2**62)),
    "rings": (["buffer"], lambda f, s: f.update({"_offset": [0, 1], "_lengths": [1], "last_index": [0, 0]})),
    "rings of texts": (["buffer"], lambda f, s: f.update({"_offset": [b"0"], "_lengths": [1], "last_index": [0]})),
    "no rings": (["buffer"], lambda f, s: f.__setitem__("_offset", [0])),
    "more episodes": (["dump"], lambda f, s: replaced(f, "num_episodes", 99)),
    "fewer episodes": (["dump"], lambda f, s: replaced(f, "num_episodes", s.episode[-1])),
    "text as count": (["dump"], lambda f, s: replaced(f, "num_episodes", "many")),
    "other columns": (["dump"], lambda f, s: replaced(f, "columns", [b"observations", b"rewards", b"\xff"])),
    "columns of numbers": (["dump"], lambda f, s: replaced(f, "columns", [1, 2, 3])),
    "several arrays": (["dump"], lambda f, s: f.move("observations_0", "observations_0_0")),
    "flags as array": (["dump"], lambda f, s: replaced(f, "terminated_0", [False, True])),
    "no lengths": (["padded"], lambda f, s: without(f, "lengths")),
    "lengths of floats": (["padded"], lambda f, s: replaced(f, "lengths", np.bincount(s.episode) * 1.0)),
    "long": (["padded"], lambda f, s: replaced(f, "lengths", np.bincount(s.episode) + 99)),
    "negative": (["padded"], lambda f, s: replaced(f, "lengths", np.bincount(s.episode) - 99)),
    "huge lengths": (["padded"], lambda f, s: replaced(f, "lengths", np.bincount(s.episode) + 2**62)),
    "more lengths": (["padded"], lambda f, s: replaced(f, "lengths", [*np.bincount(s.episode), 1])),
    "one length": (["padded"], lambda f, s: replaced(f, "lengths", 3)),
    "zero lengths": (["padded"], lambda f, s: replaced(f, "lengths", np.bincount(s.episode) * 0)),
    "odd starts": (["starts"], lambda f, s: replaced(f, "episode_starts", np.full(len(s["rewards"]), 3))),
    "starts of texts": (["starts"], lambda f, s: replaced(f, "episode_starts", [b"yes"] * len(s["rewards"]))),
    "short starts": (["starts"], lambda f, s: replaced(f, "episode_starts", (s.step == 0)[1:])),
    "wide starts": (["starts"], lambda f, s: replaced(f, "episode_starts", np.zeros((len(s["rewards"]), 2)))),
    "one start": (["starts"], lambda f, s: replaced(f, "episode_starts", True)),
}


@settings(max_examples=400)
@given(seed=SEEDS, data=st.data(), defect=st.sampled_from(sorted(FORM_DEFECTS)))
def test_defects_of_other_layouts(ledger, make_steps, seed, data, defect):
    steps = make_steps(seed)
    forms, change = FORM_DEFECTS[defect]
    form = data.draw(st.sampled_from(forms))
    assume(len(steps["rewards"]) > 2 or defect not in ("odd starts", "starts of texts"))
    with tempfile.TemporaryDirectory(dir=ledger.folder) as folder:
        file = Path(folder) / "d.hdf5"
        with h5py.File(file, "w") as content:
            FORMS[form](content, steps)
            change(content, steps)
        ledger.refuse("other layouts", lambda root=None: load_hdf5(file, root=root))


@pytest.mark.parametrize("form", FORMS)
def test_good_files_of_other_layouts(tmp_path, make_steps, same, form):
    for seed in range(10):
        steps = make_steps(seed)
        with h5py.File(tmp_path / "d.hdf5", "w") as content:
            FORMS[form](content, steps)
        keep = np.ones(len(steps["rewards"]), bool) if form in ("buffer", "padded") else ~steps["truncated"]
        if not keep.any():
            continue
        found, expected = load_hdf5(tmp_path / "d.hdf5"), steps.transitions()[torch.from_numpy(keep)]
        if form in ("dump", "starts"):  # the next observation of a terminated row is a copy
            ended = expected["next", "terminated"][:, 0]
            expected["next", "observation"][ended] = expected["observation"][ended]
            ends = steps["terminated"] | steps["truncated"]
            last = torch.from_numpy(np.append(~ends[:-1] & ~keep[1:], False)[keep])  # rows before a dropped row
            expected["next", "truncated"][last] = expected["next", "done"][last] = True
        assert same(found, expected)


@pytest.mark.parametrize("load", [load_hdf5, load_npz])
@pytest.mark.parametrize("names", [{"rewards": "reward"}, {"reward": "rewards"}, {"rewards": "\ud800"}, {"": ""}])
def test_names_that_are_not_there(ledger, make_steps, tmp_path, load, names):
    file = write_arrays(tmp_path / ("d.npz" if load is load_npz else "d.hdf5"), make_steps(0))
    ledger.refuse("names", lambda root=None: load(file, names=names, root=root))


def change(*path: str, to):
    """Change an entry of a description."""

    def apply(meta: dict) -> None:
        for key in path[:-1]:
            meta = meta[key]
        meta[path[-1]] = to

    return apply


META = {
    "class": change("_type", to=str(NonTensorData)),
    "tensorclass": change("_type", to="<class 'tensordict._lazy.LazyStackedTensorDict'>"),
    "module": change("_type", to="<class 'os.system'>"),
    "no class": lambda meta: meta.pop("_type"),
    "no shape": lambda meta: meta.pop("shape"),
    "text as shape": change("shape", to="12"),
    "none as shape": change("shape", to=None),
    "negative": change("shape", to=[-1]),
    "of floats": change("shape", to=[1.0]),
    "other rows": lambda meta: meta["shape"].__setitem__(0, meta["shape"][0] + 1),
    "zero rows": lambda meta: meta["shape"].__setitem__(0, 0),
    "no batch": change("shape", to=[]),
    "huge": change("action", "shape", to=[2**40, 2**40]),
    "overflowing": change("action", "shape", to=[2**70]),
    "negative entry": lambda meta: meta["action"].update(shape=[-size for size in meta["action"]["shape"]]),
    "wider entry": lambda meta: meta["action"]["shape"].append(2),
    "dtype": change("action", "dtype", to="torch.float64"),
    "dtype of a function": change("action", "dtype", to="torch.load"),
    "dtype as number": change("action", "dtype", to=3),
    "short dtype": change("action", "dtype", to="float32"),
    "object dtype": change("action", "dtype", to="object"),
    "nested entry": change("action", "is_nested", to=True),
    "directory entry": change("action", to={"type": "TensorDict"}),
    "entry is text": change("action", to="torch.float32"),
    "entry is none": change("action", to=None),
    "up": change("../action", to={"device": "cpu", "shape": [1], "dtype": "torch.float32"}),
    "upper folder": change("..", to={"type": "TensorDict"}),
    "this folder": change(".", to={"type": "TensorDict"}),
    "no name": change("", to={"type": "TensorDict"}),
    "absolute": change("/etc/passwd", to={"device": "cpu", "shape": [1], "dtype": "torch.uint8"}),
    "not there": change("image", to={"device": "cpu", "shape": [1, 3], "dtype": "torch.uint8"}),
    "unicode": change("\U0001f600", to={"type": "NonTensorData"}),
    "other device": change("device", to="meta"),
    "no device": change("device", to="tpu:0"),
}


@settings(max_examples=200)
@given(seed=SEEDS, defect=st.sampled_from(sorted(META)), inner=st.booleans())
def test_descriptions_of_memory_maps(ledger, make_steps, seed, defect, inner):
    with tempfile.TemporaryDirectory(dir=ledger.folder) as folder:
        transitions = make_steps(seed).transitions()
        transitions["next", "action"] = transitions["action"]
        transitions.memmap(folder)
        file = Path(folder) / ("next/meta.json" if inner else "meta.json")
        meta = json.loads(file.read_text())
        META[defect](meta)
        file.write_text(json.dumps(meta))
        ledger.refuse("descriptions", lambda: load_memmap(folder))


@settings(max_examples=40)
@given(
    seed=SEEDS, name=st.sampled_from(["other.pickle", "data.pkl", "action.memmap", "meta.json"]), is_entry=st.booleans()
)
def test_pickles_in_memory_maps(ledger, make_steps, seed, name, is_entry):
    """As an entry of non-tensor data they are refused; beside the entries they are ignored."""
    with tempfile.TemporaryDirectory(dir=ledger.folder) as folder:
        transitions = make_steps(seed).transitions()
        if is_entry:
            transitions.set_non_tensor("note", pathlike := Path("x"))
            assert pickle.loads(pickle.dumps(pathlike)) == pathlike
        transitions.memmap(folder)
        (Path(folder) / ("note" if is_entry else "") / name).write_bytes(ledger.pickled())
        result = ledger.load("pickles", lambda: load_memmap(folder))
        assert (result is None) == (is_entry or name in ("action.memmap", "meta.json"))


def test_memory_maps_of_other_entries(tmp_path):
    """Names with blanks and dots, images, nested observations and several batch dimensions are loaded."""
    entries = {
        "a b.c": torch.ones(2, 3, 4),
        "image": torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
        "\u00f6": torch.ones(2, 3),
    }
    TensorDict({**entries, "next": {"none": torch.ones(2, 3, 0)}}, [2, 3]).memmap(tmp_path)
    loaded = load_memmap(tmp_path)
    assert all(torch.equal(loaded[key], value) for key, value in entries.items())
    assert loaded["next", "none"].shape == (2, 3, 0)
