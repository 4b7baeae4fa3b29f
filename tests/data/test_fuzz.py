"""Malformed steps, in memory and in files: each is refused by this package and leaves nothing on disk."""

from __future__ import annotations

import tempfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as nst
from torchrl.data import Bounded, Categorical

from torchrl_bcq import from_arrays, from_rollouts, load_hdf5, load_npz

SEEDS = st.integers(0, 2**32 - 1)
NUMBERS = ("observations", "actions", "rewards", "next_observations")
FLAGS = ("terminated", "truncated")


def write_hdf5(file: Path, fields: dict) -> None:
    with h5py.File(file, "w") as content:
        for name, values in fields.items():
            content[name] = np.asarray(values)


def write_npz(file: Path, fields: dict) -> None:
    np.savez(file, **fields)


def write_compressed(file: Path, fields: dict) -> None:
    np.savez_compressed(file, **fields)


STORES = {"d.hdf5": (write_hdf5, load_hdf5), "d.npz": (write_npz, load_npz), "c.npz": (write_compressed, load_npz)}


def put(values: np.ndarray, rng: np.random.Generator, *candidates: float) -> np.ndarray:
    """Write candidates to one or more places."""
    values = values.astype(float)
    values.flat[rng.integers(0, values.size, 1 + values.size // 8)] = rng.choice(candidates)
    return values


def of_kind(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An array with a dtype that is not real."""
    dtypes = ("c8", "c16", "U5", "S9", "m8[s]", "O", [("x", "f4"), ("y", "i8")], "V8")
    return np.zeros(values.shape, rng.choice(np.array(dtypes, dtype=object)))


def of_shape(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    rows = len(values)
    shapes = [(rows, 2, 2), (0,), (0, 3), (), (1, 1, 1), (rows + 1, *values.shape[1:]), (rows, 0), (2 * rows,)]
    return np.ones(shapes[rng.integers(len(shapes))])


DEFECTS = {
    "not finite": (NUMBERS, lambda v, rng: put(v, rng, np.nan, np.inf, -np.inf, 1e39, -1e300)),
    "no flag": (FLAGS, lambda v, rng: put(v, rng, 2, -1, 0.5, np.nan, np.inf, 1e-30)),
    "kind": ((*NUMBERS, *FLAGS), of_kind),
    "shape": ((*NUMBERS, *FLAGS), of_shape),
    "length": ((*NUMBERS, *FLAGS), lambda v, rng: np.concatenate([v] * 3)[: len(v) + rng.integers(1, len(v) + 1)]),
    "negative choices": (("actions",), lambda v, rng: -np.ones(v.shape, rng.choice(["i1", ">i4", "i8"]))),
    "zero": (NUMBERS[:3], lambda v, rng: v * rng.choice([0.0, -0.0, 1e-60])),
    "turned": (NUMBERS[:2], lambda v, rng: np.stack([v, v, v], axis=rng.integers(3))),
    "width": (("next_observations",), lambda v, rng: np.concatenate([v, v[:, :1]], 1)),
}


@settings(max_examples=400)
@given(seed=SEEDS, defect=st.sampled_from(sorted(DEFECTS)), store=st.sampled_from([*STORES, "memory"]))
def test_defects_of_a_field(ledger, make_steps, seed, defect, store):
    steps = make_steps(seed)
    names, broken = DEFECTS[defect]
    name = str(steps.rng.choice(names))
    with np.errstate(all="ignore"):
        fields = {**steps, name: broken(steps[name], steps.rng)}
    if store == "memory":
        return ledger.refuse("arrays", lambda: from_arrays(**fields))
    if store == "d.hdf5" and fields[name].dtype.kind in "UmO":
        fields[name] = fields[name].astype("S9")  # HDF5 takes no other
    write, load = STORES[store]
    with tempfile.TemporaryDirectory(dir=ledger.folder) as folder:
        write(Path(folder) / store, fields)
        ledger.refuse(f"arrays in {store}", lambda root=None: load(Path(folder) / store, root=root))


@pytest.mark.parametrize("store", STORES)
def test_good_steps_load_from_each_store(tmp_path, make_steps, same, store):
    write, load = STORES[store]
    for seed in range(10):
        write(tmp_path / store, steps := make_steps(seed))
        assert same(load(tmp_path / store), steps.transitions())
        assert same(load(tmp_path / store, root=tmp_path), steps.transitions())


@settings(max_examples=300)
@given(seed=SEEDS, name=st.sampled_from((*NUMBERS, *FLAGS)), data=st.data())
def test_any_array_in_place_of_a_field(ledger, make_steps, seed, name, data):
    """Arrays that are valid by chance are accepted, all others refused."""
    steps = make_steps(seed)
    rows, width = len(steps["actions"]), steps[name].shape[-1]
    shapes = nst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5)
    shape = data.draw(st.sampled_from([(rows,), (rows, 1), (rows, width), (1, rows), (0, width), (rows, 0)]) | shapes)
    dtype = data.draw(nst.array_dtypes() | nst.scalar_dtypes() | nst.datetime64_dtypes())
    values = np.frombuffer(steps.rng.bytes(int(np.prod(shape)) * dtype.itemsize), dtype).reshape(shape)
    if is_field(name, values, steps[name].shape):
        from_arrays(**{**steps, name: values})
    else:
        ledger.refuse("any array", lambda: from_arrays(**{**steps, name: values}))


def are_choices(values: np.ndarray, rows: int) -> bool:
    """Whether integers are indices of discrete actions, or one-hot vectors; if all are 0, nothing was recorded."""
    if not values.size or values.ndim not in (1, 2) or len(values) != rows:
        return False
    wide = values.astype(float).reshape(rows, -1)
    if wide.shape[1] > 1:
        return bool(np.isin(wide, (0, 1)).all() and (wide.sum(1) == 1).all())
    return bool((wide >= 0).all() and (wide < 2**20).all() and wide.any())


def is_field(name: str, values: np.ndarray, shape: tuple[int, ...]) -> bool:
    """Whether an array is valid as a field of this shape."""
    if name in ("actions", "observations"):
        if name == "actions" and values.dtype.kind in "biu":
            return are_choices(values, shape[0])
        fits = values.ndim == 2 and values.shape[0] == shape[0] and values.size > 0
        fits = fits and (name == "actions" or values.shape == shape)
    else:
        fits = values.shape == shape or (name != "next_observations" and values.shape == (*shape, 1))
    if name in FLAGS:
        return fits and values.dtype.kind in "bfiu" and bool(np.isin(values, (0, 1)).all())
    if not fits or values.dtype.kind not in ("f" if name == "actions" else "fiu"):
        return False
    with np.errstate(all="ignore"):
        single = values.astype(np.float32)
    return bool(np.isfinite(single).all() and single.any())


def test_unusual_arrays_that_are_good(make_steps, same):
    """Other precisions and byte orders, strides, lists and tensors with gradients hold the same numbers."""
    steps = make_steps(1)
    rounded = {name: values.astype(np.float16) if name in NUMBERS else values for name, values in steps.items()}
    expected = from_arrays(**rounded)
    for dtype in ("f8", ">f4", "<f4", "g"):
        assert same(from_arrays(**{**rounded, "actions": rounded["actions"].astype(dtype)}), expected)
    for change in (
        np.asfortranarray,
        np.ndarray.tolist,
        lambda v: np.repeat(v, 2, 0)[::2],
        lambda v: v[::-1].copy()[::-1],
    ):
        assert same(from_arrays(**{name: change(values) for name, values in rounded.items()}), expected)
    actions = torch.tensor(rounded["actions"], requires_grad=True)
    assert same(from_arrays(**{**rounded, "actions": actions, "terminated": rounded["terminated"][:, None]}), expected)


def ragged(values: np.ndarray) -> list:
    return [row[: 1 + i % 2] for i, row in enumerate(np.repeat(values, 2, 1).tolist())] + [[]]


class Broken:
    """Neither an array nor a sequence."""

    def __array__(self, *args, **kwargs):
        raise RuntimeError("no")


NO_ARRAYS = {
    "none": lambda v: None,
    "ragged": ragged,
    "text": lambda v: "observations.npy",
    "dict": lambda v: {0: v},
    "set": lambda v: set(v.flat),
    "iterator": lambda v: iter(v),
    "class": lambda v: Broken(),
    "mixed": lambda v: [*v.tolist(), None],
    "words": lambda v: [["ä", "\U0001f600"]] * len(v),
    "huge": lambda v: [[10**400] * v.shape[1]] * len(v),
    "dates": lambda v: np.full(v.shape, np.datetime64("2020-01-01")),
    "complex": lambda v: torch.tensor(v + 1j).conj(),
    "sparse": lambda v: torch.tensor(v).to_sparse(),
    "meta": lambda v: torch.empty(v.shape, device="meta"),
    "bfloat16": lambda v: torch.tensor(v, dtype=torch.bfloat16).unsqueeze(0),
    "tensors": lambda v: [torch.full((v.shape[1],), float("nan"), requires_grad=True)] * len(v),
    "masked": lambda v: np.ma.masked_array(v, mask=np.arange(v.size).reshape(v.shape) == 0),
    "nested": lambda v: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@settings(max_examples=150)
@given(seed=SEEDS, kind=st.sampled_from(sorted(NO_ARRAYS)), name=st.sampled_from(NUMBERS[:2]))
def test_no_arrays(ledger, make_steps, seed, kind, name):
    steps = make_steps(seed)
    ledger.refuse("no arrays", lambda: from_arrays(**{**steps, name: NO_ARRAYS[kind](steps[name])}))


@settings(max_examples=60)
@given(seed=SEEDS, kind=st.sampled_from(["missing", "outside", "spec", "narrow", "zero episodes"]))
def test_what_does_not_fit_together(ledger, make_steps, seed, kind):
    steps = make_steps(seed)
    changes = {
        "missing": {"truncated": None, "next_observations": None},
        "outside": {"action_spec": Bounded(-1, 0.05, steps["actions"].shape[1:])},
        "spec": {"action_spec": Categorical(3)},
        "narrow": {"action_spec": Bounded(-1, 1, (steps["actions"].shape[1] + 1,))},
        "zero episodes": {name: values[:0] for name, values in steps.items()},
    }
    ledger.refuse("together", lambda: from_arrays(**{**steps, **changes[kind]}))


ROLLOUT_DEFECTS = {
    "no reward": lambda td: td.exclude(("next", "reward")),
    "no done": lambda td: td.exclude(("next", "done")),
    "no terminated": lambda td: td.exclude(("next", "terminated")),
    "no next": lambda td: td.exclude("next"),
    "no next observation": lambda td: td.exclude(("next", "observation")),
    "not finite": lambda td: td.set("action", td["action"] * float("nan")),
    "negative choices": lambda td: td.set("action", -torch.ones_like(td["action"]).long()),
    "flags": lambda td: td.set(("next", "terminated"), td["next", "terminated"] + 2),
    "wide reward": lambda td: td.set(("next", "reward"), td["observation"].repeat(1, 2)),
    "flat reward": lambda td: td.set(("next", "reward"), td["observation"][:, :1, None].repeat(1, 2, 2)),
    "wide done": lambda td: td.set(("next", "done"), td["next", "done"].repeat(1, 2)),
    "done is a number": lambda td: td.set(("next", "done"), td["next", "reward"] + 0.5),
    "truncated is wide": lambda td: td.set(("next", "truncated"), td["next", "done"].repeat(1, 3)),
    "zero steps": lambda td: td[:0],
    "no batch": lambda td: td[0],
    "none": lambda td: [],
    "not alike": lambda td: [td, td.exclude("observation")],
    "of other widths": lambda td: [td, td.clone().set("action", td["action"].repeat(1, 2))],
    "of other ranks": lambda td: [td, td.unsqueeze(0)[:, :1].exclude("action")],
    "mask": lambda td: td.set(("collector", "mask"), td["next", "done"] & False),
    "wide mask": lambda td: td.set(("collector", "mask"), torch.ones(len(td), 2, dtype=torch.bool)),
    "words": lambda td: [td, "td"],
    "dicts": lambda td: [td.to_dict()],
}


@settings(max_examples=100)
@given(seed=SEEDS, defect=st.sampled_from(sorted(ROLLOUT_DEFECTS)))
def test_defects_of_rollouts(ledger, make_steps, seed, defect):
    rollout = make_steps(seed).transitions().exclude("episode")
    assert len(from_rollouts(rollout.clone())) == len(rollout)
    ledger.refuse("rollouts", lambda: from_rollouts(ROLLOUT_DEFECTS[defect](rollout.clone())))
