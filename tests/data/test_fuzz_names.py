"""Malformed names of the entries of a file, and layouts of other packages with odd facts."""

from __future__ import annotations

import h5py
import numpy as np
import pytest
import torch

from torchrl_bcq import load_hdf5, load_npz

from ..array_files import write_arrays
from .test_fuzz_layouts import FORMS, first_of, replaced, without


def with_entries(steps) -> dict:
    """The steps with other entries beside them; ``next_observations`` is left out, so any width fits."""
    rows = len(steps["rewards"])
    fields = {name: values for name, values in steps.items() if name != "next_observations"}
    ones = np.ones((rows, 2))
    others = {"a": ones, "one": np.arange(rows) + 1.0, "img": np.ones((rows, 2, 2)), "txt": np.array([b"x"] * rows)}
    others |= {"short": ones[1:], "long": np.ones((rows + 1, 2)), "scalar": np.float64(1), "nan": ones * np.nan}
    others |= {"cplx": ones * 1j, "huge": ones * 1e300, "none": np.zeros((rows, 0)), "dates": np.zeros(rows, "V8")}
    return fields | others


JOINED = [
    *(["a", "a"], [], [[]], ["a", 1], ["a", ["one"]], [None], ["a", None], {"a": 1}, {"a", "one"}, 1, None, b"a"),
    *(["a", "img"], ["img", "one"], ["a", "txt"], ["a", "short"], ["one", "long"], ["a", "scalar"], ["scalar", "one"]),
    *(["a", "cplx"], ["a", "nan"], ["one", "huge"], ["a", "nope"], [""], ["a", ""], ["a", "../a"], iter(["a"])),
    *(
        np.array(["a", "one"]),
        ["\ud800"],
        ["a"] * 50,
        "*",
        "a,one",
        "[a,one]",
        ["a", b"one"],
        1.5,
        True,
        ["a", "dates"],
    ),
    *(["/a", "a"], ["a/", "a"], ["./a", "a"], ["a", "a.npy"], ["a", "one", "//a"], "none", ["none"], "long", "short"),
]


@pytest.mark.parametrize("name", ["d.hdf5", "d.npz"])
@pytest.mark.parametrize("value", JOINED, ids=lambda value: type(value).__name__)
def test_entries_that_cannot_be_joined(ledger, make_steps, tmp_path, name, value):
    """One spelling of an entry beside another spelling would repeat its features."""
    file, load = tmp_path / name, load_npz if name == "d.npz" else load_hdf5
    for seed in (0, 3):
        write_arrays(file, with_entries(make_steps(seed)))
        ledger.refuse("entries", lambda root=None: load(file, names={"observations": value}, root=root))


@pytest.mark.parametrize("name", ["d.hdf5", "d.npz"])
@pytest.mark.parametrize(
    "names",
    [
        *(["observations"], "observations", 1, True, [("observations", "a")], {"observations"}, {1: "a"}, {None: "a"}),
        *({"": ["a"]}, {"Observations": "a"}, {"obs": "a"}, {"rewards": ["one", "a"]}, {"terminated": ["one", "a"]}),
        *({"lengths": ["one", "a"]}, {"rewards": "a"}, {"lengths": "a"}, {"lengths": "one"}, {"terminated": "one"}),
        *({"actions": ["a", "img"]}, {"next_observations": ["a", "img"]}, {"next_observations": "a", "": "b"}),
        *({"truncated": "truncated", "episode_starts": "one"}, {"episode_terminals": "txt"}, {"actions": "scalar"}),
    ],
    ids=repr,
)
def test_names_that_are_not_names_of_entries(ledger, make_steps, tmp_path, name, names):
    file, load = write_arrays(tmp_path / name, with_entries(make_steps(3))), load_npz if name == "d.npz" else load_hdf5
    ledger.refuse("entry names", lambda root=None: load(file, names=names, root=root))


def test_entries_that_are_joined(make_steps, tmp_path):
    fields = with_entries(make_steps(3))
    for name, load in (("d.hdf5", load_hdf5), ("d.npz", load_npz)):
        td = load(write_arrays(tmp_path / name, fields), names={"observations": ("one", "a", "none")})
        expected = np.concatenate([fields["one"][:, None], fields["a"]], 1)[~fields["truncated"]]
        assert torch.equal(td["observation"], torch.tensor(expected).float())


def change(file, name: str, with_: object) -> None:
    file.attrs[name] = with_


LAYOUTS = {
    "text as stack": ("buffer", lambda f, s: change(f, "stack_num", "four")),
    "stacks": ("buffer", lambda f, s: change(f, "stack_num", [1, 2])),
    "size is not whole": ("buffer", lambda f, s: change(f, "_insertion_idx", len(s["rewards"]) + 1.5)),
    "not a number as size": ("buffer", lambda f, s: change(f, "maxsize", np.nan)),
    "wrapped with free slots": ("buffer", lambda f, s: change(f, "_insertion_idx", 1 + (len(s["rewards"]) == 1))),
    "no group": ("buffer", lambda f, s: (without(f, "_meta"), f.__setitem__("_meta", np.ones(3)))),
    "empty group": ("buffer", lambda f, s: (without(f, "_meta"), f.create_group("_meta"))),
    "no group at all": ("buffer", lambda f, s: without(f, "_meta")),
    "no truncated": ("buffer", lambda f, s: without(f, "_meta/truncated")),
    "dict": ("buffer", lambda f, s: (f.move("_meta/obs", "o"), f.__setitem__("_meta/obs/arm", f["o"][()]))),
    "rings overlap": ("buffer", lambda f, s: f.update({"_offset": [0, 0], "_lengths": [1, 1], "last_index": [0, 0]})),
    "rings backwards": ("buffer", lambda f, s: f.update({"_offset": [2, 0], "_lengths": [1, 1], "last_index": [2, 0]})),
    "long ring": ("buffer", lambda f, s: f.update({"_offset": [0], "_lengths": [10**9], "last_index": [0]})),
    "ring is a number": ("buffer", lambda f, s: f.update({"_offset": 0, "_lengths": 1, "last_index": 0})),
    "rings of floats": ("buffer", lambda f, s: f.update({"_offset": [0.5], "_lengths": [1.5], "last_index": [0.5]})),
    "columns twice": ("dump", lambda f, s: replaced(f, "columns", [*f["columns"][()], b"actions"])),
    "no columns": ("dump", lambda f, s: replaced(f, "columns", np.zeros(0, "S9"))),
    "one column": ("dump", lambda f, s: replaced(f, "columns", b"actions")),
    "column left over": ("dump", lambda f, s: f.__setitem__("returns_0", [1.0])),
    "episode left over": ("dump", lambda f, s: f.__setitem__("actions_77", [[1.0]])),
    "tuple": ("dump", lambda f, s: [f.__setitem__(f"observations_0_{i}", np.ones((1, 2))) for i in (0, 1)]),
    "count of floats": ("dump", lambda f, s: replaced(f, "num_episodes", np.nan)),
    "counts": ("dump", lambda f, s: replaced(f, "num_episodes", [1, 2])),
    "sizes": ("dump", lambda f, s: (without(f, "num_episodes"), f.__setitem__("total_size", -1))),
    "end is a text": ("dump", lambda f, s: replaced(f, "terminated_0", "yes")),
    "end is two": ("dump", lambda f, s: replaced(f, "terminated_0", 2)),
    "actions of two shapes": ("dump", lambda f, s: replaced(f, "actions_0", np.ones((2, 3, 4)))),
    "lengths of texts": ("padded", lambda f, s: replaced(f, "lengths", [b"1"] * len(f["lengths"]))),
    "lengths of booleans": ("padded", lambda f, s: replaced(f, "lengths", np.ones(len(f["lengths"]), bool))),
    "lengths in rows": ("padded", lambda f, s: replaced(f, "lengths", f["lengths"][()][None])),
    "no length": ("padded", lambda f, s: replaced(f, "lengths", np.zeros(0, int))),
    "unsigned": ("padded", lambda f, s: replaced(f, "lengths", np.full(len(f["lengths"]), 2**64 - 1, np.uint64))),
    "rewards are flat": ("padded", lambda f, s: replaced(f, "rewards", s["rewards"][: -1 or None])),
    "lengths left of rows": ("starts", lambda f, s: f.__setitem__("lengths", [len(s["rewards"]) + 1])),
    "wrong sum": ("starts", lambda f, s: (without(f, "episode_starts"), f.__setitem__("lengths", [1, 2, 99]))),
    "sum overflows": ("starts", lambda f, s: (without(f, "episode_starts"), f.__setitem__("lengths", [2**62] * 4))),
    "starts of nothing": ("starts", lambda f, s: replaced(f, "episode_starts", h5py.Empty("?"))),
    "starts not a number": ("starts", lambda f, s: replaced(f, "episode_starts", s["rewards"] * np.nan)),
    "terminals of halves": ("starts", lambda f, s: f.move("episode_starts", "x") or f.__setitem__(
        "episode_terminals", np.full(len(s["rewards"]), 0.5)
    )),
}  # fmt: skip


@pytest.mark.parametrize("defect", LAYOUTS)
def test_odd_facts_of_layouts(ledger, make_steps, tmp_path, defect):
    form, apply = LAYOUTS[defect]
    for seed in (3, 5, 8):
        steps = make_steps(seed)
        with h5py.File(tmp_path / "d.hdf5", "w") as content:
            FORMS[form](content, steps)
            assert first_of(content, "actions") in content
            apply(content, steps)
        if ledger.load("odd layouts", lambda root=None: load_hdf5(tmp_path / "d.hdf5", root=root)) is not None:
            assert defect in ("lengths left of rows", "columns twice"), "episode_starts counts, if both are in the file"


def test_how_many_were_malformed(ledger, check_count):
    check_count(ledger.counts, ["entries", "entry names", "odd layouts"], at_least=300)
