"""Malformed names of files, columns and environments."""

from __future__ import annotations

import csv
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from torchrl_bcq import load_table, load_transitions
from torchrl_bcq.data.registry import find_source
from torchrl_bcq.data.sources.environment import recorded_in_minari

from ..array_files import write_arrays


def folder_of(steps, folder: Path) -> Path:
    write_arrays(folder / "one.hdf5", steps)
    write_arrays(folder / "two.npz", steps)
    write_arrays(folder / "wide.hdf5", {**steps, "actions": np.repeat(steps["actions"], 3, 1)})
    write_arrays(
        folder / "many.hdf5", {**steps, **{n: np.repeat(steps[n], 2, 1) for n in ("observations", "next_observations")}}
    )
    write_arrays(folder / "bad.hdf5", {**steps, "rewards": steps["rewards"] * np.nan})
    write_arrays(folder / "rows.hdf5", {name: values[:0] for name, values in steps.items()})
    (folder / "broken.hdf5").write_bytes((folder / "one.hdf5").read_bytes()[:700])
    (folder / "empty.hdf5").touch()
    (folder / "trips.csv").write_text("x,u\n1,2\n")
    (folder / "note.txt").write_text("no data")
    (folder / "link.hdf5").symlink_to("one.hdf5")
    (folder / "gone.hdf5").symlink_to("nowhere.hdf5")
    (folder / "round.hdf5").symlink_to("round.hdf5")
    os.link(folder / "one.hdf5", folder / "same.hdf5")
    for name in ("nothing", "hidden/.x", "mixed", "dir.hdf5"):
        (folder / name).mkdir(parents=True)
    write_arrays(folder / "hidden" / ".one.hdf5", steps)
    write_arrays(folder / "mixed" / "one.hdf5", steps)
    write_arrays(folder / "mixed" / "two.npz", steps)
    return folder


def many(*names: object):
    return lambda folder: [
        name if not isinstance(name, str) else f"{folder}/{name}" if name else name for name in names
    ]


SOURCES = {
    **{f"one and {name}": many("one.hdf5", f"{name}.hdf5") for name in (
        "wide", "many", "bad", "rows", "broken", "empty", "link", "gone", "round", "dir", "one", "absent", "./one", "*",
    )},
    **{name: many(name) for name in ("nothing", "hidden", "mixed", "dir.hdf5", "note.txt", "*.nope", "*", "[")},
    "with nothing": many("one.hdf5", ""),
    "blank": many("one.hdf5", None),
    "number": many("one.hdf5", 3),
    "bytes": many("one.hdf5", b"two.npz"),
    "nested": many("one.hdf5", ["two.npz"]),
    "none": many(),
    "empty": lambda f: "",
    "blanks": lambda f: "  ",
    "dictionary": lambda f: {str(f): 1},
    "set": lambda f: {f"{f}/one.hdf5"},
    "null": lambda f: None,
    "iterator": lambda f: iter([f"{f}/one.hdf5"]),
    "no user": lambda f: "~nobody-of-this-name/d.hdf5",
    "colon": lambda f: ":",
    "prefix": lambda f: f"npz:{f}/one.hdf5",
    "two prefixes": lambda f: f"hdf5:hdf5:{f}/one.hdf5",
    "only": lambda f: "hdf5:",
    "no copy": lambda f: f"memmap:{f}/one.hdf5",
    "copy of no user": lambda f: "memmap:~nobody-of-this-name",
    "zero": lambda f: "a\0b",
    "csv": many("one.hdf5", "trips.csv"),
    "surrogate": lambda f: "\ud800.hdf5",
    "copy": many("one.hdf5", "nothing"),
    "unknown": lambda f: "hdf6:x",
    "capitals": lambda f: f"HDF5:{f}/one.hdf5",
    "d4rl": lambda f: ["d4rl:hopper", f"{f}/one.hdf5"],
}  # fmt: skip


@pytest.mark.parametrize("case", SOURCES)
def test_names_of_sources(ledger, make_steps, tmp_path, case):
    name = SOURCES[case](folder_of(make_steps(3), tmp_path))
    ledger.refuse("several sources", lambda: load_transitions(name))
    if not hasattr(name, "__next__"):
        ledger.refuse("several sources", lambda root=None: load_transitions(name, root=root))
        ledger.refuse("several sources", lambda: find_source(name, max_episode_steps=0))


DEEP = "[" * 10_000
JSON = [
    "",
    "[",
    "1",
    "null",
    "{}",
    "[1]",
    "[[]]",
    '"a"',
    "[null]",
    b"\xff",
    5,
    np.ones(3),
    "[]",
    '["a", 1]',
    DEEP,
    "NaN",
]
KWARGS = [
    *JSON,
    '{"a": "os:system"}',
    '{"a": {"b:c": 1}}',
    '{"a": ["x", [":"]]}',
    '{"": 1}',
    '{"a": NaN}',
    '{"a": 1e999}',
]
IDS = [
    "",
    5,
    np.ones(2),
    b"\xff",
    "a:b:c",
    "Pendulum-v1\n",
    "Pendulum v1",
    "${x}",
    "???",
    "a;b",
    "\0",
    "a:",
    ":a",
    "ä:ö!",
]
LIMITS = [0, -1, np.nan, np.inf, -np.inf, "x", np.ones(2), b"ten", "1e3", 10**18]


def test_environments_that_files_name(ledger, make_steps, tmp_path):
    """A malformed fact is left out and noted; nothing else of the file is lost."""
    cases = [{"observation_entries": value} for value in JSON] + [{"env_kwargs": value} for value in KWARGS]
    cases += [{"env_id": value} for value in IDS] + [{"max_episode_steps": value} for value in LIMITS]
    for case in cases:
        ledger.counts["environments"] += 1
        facts = {"env_id": "Pendulum-v1", "ref_min_score": 1.0, "ref_max_score": 2.0, **case}
        try:
            file = write_arrays(tmp_path / "d.hdf5", make_steps(0), **facts)
        except (ValueError, OSError):  # HDF5 takes no zeros in texts, and no long ones
            continue
        source = find_source(str(file))
        assert source.reference_scores == (1, 2), case
        if "env_id" in case:
            assert source.env is None, case
            continue
        env = source.env
        assert env.id == "Pendulum-v1"
        assert not env.named_code
        assert env.observation is None
        assert env.max_episode_steps in (None, 10**18)
        assert env.notes or "max_episode_steps" in case or not case.get("env_kwargs", 1) or set(env.kwargs) <= {"", "a"}
        assert "observation_entries" not in case or env.notes == ("the entries of its observation cannot be read",)


@settings(max_examples=60)
@given(
    fact=st.sampled_from(["id", "kwargs", "max_episode_steps", "additional_wrappers", "entry_point"]), data=st.data()
)
def test_environments_that_minari_names(ledger, fact, data):
    values = st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(), lambda v: st.lists(v) | st.dictionaries(st.text(), v)
    )
    ledger.counts["environments"] += 1
    text = json.dumps({"id": "A-v0", fact: data.draw(values)})
    env = recorded_in_minari(
        {"env_spec": text, "eval_env_spec": data.draw(st.sampled_from([None, "", "[", text[:-1], DEEP]))}
    )
    assert env is None or (not env.named_code and str(env) and (env.max_episode_steps or 1) >= 1)


@settings(max_examples=80)
@given(seed=st.integers(0, 99), names=st.lists(st.text(min_size=1, max_size=9), min_size=5, max_size=5), data=st.data())
def test_odd_names_of_columns(ledger, make_steps, seed, names, data):
    """Unique names of any characters are read; an asked name that is no text, or repeated, is refused."""
    steps = make_steps(seed)
    columns = [
        steps["observations"][:, 0],
        steps["actions"][:, 0],
        steps["rewards"],
        steps["terminated"] * 1,
        steps.episode,
    ]
    with tempfile.TemporaryDirectory(dir=ledger.folder) as folder:
        file = Path(folder) / "d.csv"
        with open(file, "w", encoding="utf-8", errors="surrogatepass", newline="") as content:
            csv.writer(content).writerows([names, *(map(repr, map(float, row)) for row in zip(*columns, strict=True))])
        asked = dict(zip(("observation", "action", "reward", "terminated", "episode"), names, strict=True))
        td = ledger.load("columns", lambda root=None: load_table(file, **asked, root=root))
        if td is not None:
            assert len({*names}) == 5
            assert torch.equal(td["observation"][:, 0], torch.tensor(columns[0]).float()[: len(td)]) or len(td) < len(
                columns[0]
            )
        odd = data.draw(st.sampled_from([1, 1.5, [1], [["a"]], [None], {"a": 1}, {1}, b"x", [b"x"], True]))
        field = data.draw(st.sampled_from(sorted(asked)))
        if not (isinstance(odd, dict) and "a" in names):
            ledger.refuse("columns", lambda: load_table(file, **{**asked, field: odd}))


@pytest.mark.parametrize("setting", ["delimiter", "decimal_point"])
@pytest.mark.parametrize(
    "sign", ["", ";", "ab", "\\t", "\t", "é", "\n", "\r", '"', None, 1, [","], "\0", "\ud800", ";;", " ", "5", "-"]
)
def test_wrong_separators(ledger, tmp_path, setting, sign):
    rows = ["x,u,r,end,trip", *(f"{i}.5,0.{i}5,{i}.25,0,{i // 3}" for i in range(6))]
    (tmp_path / "d.csv").write_text("\n".join(rows))
    columns = {"observation": ["x"], "action": ["u"], "reward": "r", "terminated": "end", "episode": "trip"}
    assert len(load_table(tmp_path / "d.csv", **columns)) == 4
    ledger.refuse(
        "separators", lambda root=None: load_table(tmp_path / "d.csv", **columns, **{setting: sign}, root=root)
    )


def test_how_many_were_malformed(ledger, check_count):
    check_count(ledger.counts, ["several sources", "environments", "columns", "separators"], at_least=450)
