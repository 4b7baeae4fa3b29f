"""Several files or Minari ids as one dataset: a list, a pattern, a folder."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import gymnasium
import minari
import numpy as np
import pyarrow
import pytest
import torch
from minari.data_collector import EpisodeBuffer
from pyarrow import parquet
from torchrl.data.datasets import load_dataset

from torchrl_bcq import (
    DatasetError,
    from_rollouts,
    load_hdf5,
    load_memmap,
    load_minari,
    load_npz,
    load_table,
    load_transitions,
    multi_step,
)
from torchrl_bcq.data.registry import find_source
from torchrl_bcq.errors import RunError

from ...array_files import write_arrays

T, F = True, False
TABLE = {"observation": ["x"], "action": ["a"], "reward": "r", "terminated": "end", "episode": "trip"}


def fields(first: float, rewards: list[float], *, ends: bool = False, after: bool = False, width: int = 1) -> dict:
    """One episode with observations first, first + 1, ...; terminated in its last row or cut off."""
    rows = np.arange(len(rewards))
    observations = np.repeat(first + rows[:, None], width, 1).astype(np.float32)
    columns = {
        "observations": observations,
        "actions": np.full((len(rows), 1), 0.5, dtype=np.float32),
        "rewards": np.array(rewards, dtype=np.float32),
        "terminals": (rows == rows[-1]) & ends,
        "timeouts": rows < 0,
    }
    return columns | ({"next_observations": observations + 1} if after else {})


def write(path: str | Path, columns: dict, **attributes: object) -> str:
    return str(write_arrays(path, columns, **attributes))


def write_table(path: str | Path, first: float, trips: list[str]) -> str:
    rows = np.arange(len(trips), dtype=float)
    columns = {"trip": trips, "x": first + rows, "a": rows * 0 + 0.5, "r": rows + 1, "end": rows < 0}
    parquet.write_table(pyarrow.table(columns), path)
    return str(path)


def flat(td, *key):
    return td[key if len(key) > 1 else key[0]].flatten().tolist()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """``a.hdf5`` is cut off after 4 rows, and ``b.hdf5`` is terminated after 3."""
    monkeypatch.chdir(tmp_path)
    write("a.hdf5", fields(1, [1, 2, 4, 8]))
    write("b.hdf5", fields(11, [16, 32, 64], ends=True))
    return tmp_path


@pytest.mark.parametrize("root", [None, "copies"])
@pytest.mark.parametrize(
    "names",
    [["a.hdf5", "b.hdf5"], "*.hdf5", "hdf5:?.hdf5", ".", ["a.hdf5", "b*"], [Path("a.hdf5"), "hdf5:b.hdf5"]],
    ids=str,
)
def test_no_row_reaches_into_the_next_file(folder, names, root, caplog):
    """Cases t19, v12, y04. gamma 0.5: 1 + 2/2 + 4/4 | 2 + 4/2 | 4 || 16 + 32/2 + 64/4 | 32 + 64/2 | 64."""
    with caplog.at_level(logging.INFO):
        td = load_transitions(names, root=root)
    assert flat(td, "observation") == [1, 2, 3, 11, 12, 13]
    assert flat(td, "next", "observation") == [2, 3, 4, 12, 13, 13]  # the final state repeats its own
    assert flat(td, "episode") == [0, 0, 0, 1, 1, 1]
    assert flat(td, "next", "terminated") == [F, F, F, F, F, T]
    assert flat(td, "next", "truncated") == [F, F, T, F, F, F]
    assert flat(td, "next", "done") == [F, F, T, F, F, T]
    spanning = multi_step(td, 3, 0.5)
    assert flat(spanning, "next", "reward") == [3, 4, 4, 48, 64, 64]
    assert flat(spanning, "steps_to_next_obs") == [3, 2, 1, 3, 2, 1]
    for count in ("a.hdf5: 4 rows", "b.hdf5: 3 rows", "dropped 1 row (first: 3 of "):
        assert count in caplog.text
    assert td.is_memmap() == (root is not None)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("ends", [False, True])
def test_result_is_that_of_from_rollouts(folder, ends, after):
    """Joining the read files gives the same rows: three files, one of them with several episodes."""
    columns = fields(21, [1.0] * 9, ends=ends, after=after)
    columns["terminals"][3] = True
    names = [write("c.npz", columns), write("a.npz", fields(3, [5, 6, 7], ends=ends, after=after)), "b.hdf5"]
    found = load_transitions(names)
    expected = from_rollouts([load_npz("c.npz"), load_npz("a.npz"), load_hdf5("b.hdf5")])
    assert found.batch_size == expected.batch_size
    assert (found == expected).all()
    last = flat(found, "episode")[-1]
    assert last == 3


def test_files_with_other_fields_fit_together(folder):
    """The first file has time-outs and no next observations, the second one only next observations."""
    columns = fields(11, [16, 32, 64, 128], after=True)
    columns["observations"][2:] += 50
    columns["next_observations"][2:] += 50
    del columns["timeouts"]
    write("b.hdf5", columns)
    td = load_transitions(["a.hdf5", "b.hdf5"])
    assert flat(td, "next", "observation") == [2, 3, 4, 12, 13, 64, 65]
    assert flat(td, "episode") == [0, 0, 0, 1, 1, 2, 2]
    assert flat(td, "next", "truncated") == [F, F, T, F, T, F, T]


def test_a_field_may_be_zero_in_one_file_but_not_in_all(folder):
    """Sparse rewards: a failed attempt has none."""
    write("a.hdf5", fields(1, [0, 0, 0, 0]))
    assert flat(load_transitions(["a.hdf5", "b.hdf5"]), "next", "reward") == [0, 0, 0, 16, 32, 64]
    write("b.hdf5", fields(11, [0, 0, 0]))
    with pytest.raises(DatasetError, match=r"^2 sources: rewards is zero in all 7 rows; check that it was written"):
        load_transitions(["a.hdf5", "b.hdf5"])


def test_an_episode_of_one_cut_off_row_is_dropped(folder):
    write("a.hdf5", fields(1, [1]))
    td = load_transitions(["a.hdf5", "b.hdf5"])
    assert flat(td, "observation") == [11, 12, 13]


def test_several_tables_with_equal_episode_names(folder):
    """Case t18: episode names of different files are different episodes; so is an episode that goes on."""
    names = [write_table("a.parquet", 0, ["x", "x", "y", "y"]), write_table("b.parquet", 10, ["y", "y", "x", "x"])]
    td = load_transitions(names, **TABLE)
    assert flat(td, "observation") == [0, 2, 10, 12]
    assert flat(td, "next", "observation") == [1, 3, 11, 13]
    assert flat(td, "episode") == [0, 1, 2, 3]
    assert flat(td, "next", "truncated") == [T] * 4
    for read in (load_table, load_hdf5, load_npz):
        with pytest.raises(DatasetError, match=r"expected one file; to read several, use load_transitions\(\[A, B\]\)"):
            read(names, **(TABLE if read is load_table else {}))


def test_folders_of_lerobot(folder):
    """huggingface/lerobot's layout: data/chunk-000/episode_000000.parquet, one episode in each file."""
    for number in range(3):
        path = folder / "data" / f"chunk-{number // 2:03}" / f"episode_{number:06}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_table(path, 10 * number, [str(number)] * 3)
    td = load_transitions("data/**/*.parquet", **TABLE)
    assert flat(td, "observation") == [0, 1, 10, 11, 20, 21]
    assert flat(td, "episode") == [0, 0, 1, 1, 2, 2]
    assert flat(load_transitions("data/chunk-000/", **TABLE), "observation") == [0, 1, 10, 11]


def test_folder_of_episodes_beside_other_files(folder):
    """thu-ml/RoboticsDiffusionTransformer#81: episode_0.hdf5, ... and a JSON file; observations in a group."""
    (folder / "task").mkdir()
    for number in range(3):
        columns = fields(10 * number + 1, [1, 2, 3], ends=number == 1)
        columns["observations/qpos"] = columns.pop("observations")
        del columns["timeouts"]
        write(folder / "task" / f"episode_{number}.hdf5", columns)
    (folder / "task" / "instruction.json").write_text("{}")
    (folder / "task" / ".part.hdf5").write_text("")
    td = load_transitions("task", names={"observations": "observations/qpos"}, max_episode_steps=1000)
    assert flat(td, "observation") == [1, 2, 11, 12, 13, 21, 22]
    assert flat(td, "next", "done") == [F, T, F, F, T, F, T]
    assert flat(td, "next", "terminated") == [F, F, F, F, T, F, F]


def create(name: str, first: float, high: float = 1.0, env: str | None = None) -> str:
    steps = np.arange(4, dtype=np.float32)[:, None]
    buffer = EpisodeBuffer(
        observations=first + steps,
        actions=np.full((3, 1), 0.5, np.float32),
        rewards=[1.0, 2.0, 3.0],
        terminations=[F, F, F],
        truncations=[F, F, T],
    )
    box, unknown = gymnasium.spaces.Box, dict.fromkeys(("algorithm_name", "author", "author_email"), "none")
    spaces = {"action_space": box(-high, high, (1,)), "observation_space": box(-99, 99, (1,))}
    minari.create_dataset_from_buffers(
        name, buffer=[buffer], env=env, **spaces, **unknown, code_permalink="none", requirements=[]
    )
    return f"minari:{name}"


@pytest.mark.filterwarnings("ignore::UserWarning:minari")
def test_several_minari_ids(folder, monkeypatch):
    """Farama-Foundation/Minari#56, pull requests 60 and 163: only equal spaces may be combined."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(folder))
    names = [create("one-v0", 1), create("two-v0", 11)]
    td = load_transitions(names)
    assert flat(td, "observation") == [1, 2, 3, 11, 12, 13]
    assert flat(td, "next", "observation") == [2, 3, 4, 12, 13, 14]
    assert flat(td, "episode") == [0, 0, 0, 1, 1, 1]
    assert flat(td, "next", "truncated") == [F, F, T, F, F, T]
    assert (td == from_rollouts([load_minari("one-v0"), load_minari("two-v0")])).all()
    assert find_source(names).action_spec.high.item() == 1
    names.append(create("three-v0", 11, high=2.0))
    with pytest.raises(DatasetError) as error:
        load_transitions(names)
    assert str(error.value) == (
        "the action bounds are [[-2.0], [2.0]] in minari:three-v0, but [[-1.0], [1.0]] in minari:one-v0; join only "
        "datasets of the same task."
    )


def test_environment_and_scores_that_differ_are_unknown(folder, caplog):
    write("a.hdf5", fields(1, [1, 2]), env_id="Hopper-v4", ref_min_score=1.0, ref_max_score=2.0)
    write("b.hdf5", fields(1, [1, 2]), env_id="Hopper-v4")
    source = find_source(["a.hdf5", "b.hdf5"])
    assert (str(source.env), source.reference_scores) == ("Hopper-v4", (1.0, 2.0))
    source.read()
    assert "unknown" not in caplog.text
    write("b.hdf5", fields(1, [1, 2]), env_id="Hopper-v5")
    source = find_source(["a.hdf5", "b.hdf5"])
    assert (source.env, source.reference_scores) == (None, (1.0, 2.0))
    source.read()
    assert caplog.messages == [
        "a.hdf5 names Hopper-v4, but b.hdf5 names Hopper-v5, so torchrl-bcq train uses neither, unless evaluation.env "
        "is set."
    ]


@pytest.mark.parametrize("root", [None, "copies"])
def test_whole_numbers_are_refused_only_if_all_files_hold_nothing_else(folder, root):
    """In a CSV file, whole numbers may be discrete actions; one file with 0.5 shows that they are amounts."""
    for name, actions in (("one.csv", "19"), ("two.csv", "30"), ("half.csv", ["1", "0.5"])):
        rows = [f"{row},{action},{row},0,t" for row, action in enumerate(actions, 1)]
        Path(name).write_text("\n".join(["x,a,r,end,trip", *rows]))
    with pytest.raises(
        DatasetError, match=r"actions has only whole numbers in all 4 rows, in column a, and only 4 of the numbers 0"
    ):
        load_transitions(["one.csv", "two.csv"], root=root, **TABLE)
    whole = load_transitions(["one.csv", "two.csv"], root=root, action_type="continuous", **TABLE)
    # each file has two rows; the second one is cut off, and its next observation is unknown
    assert flat(whole, "action") == [1, 3]
    for names in (["two.csv", "half.csv"], ["half.csv", "two.csv"]):
        assert sorted(flat(load_transitions(names, root=root, **TABLE), "action")) == [1, 3]
        assert not find_source(names, **TABLE).has_discrete_actions()


def test_copy_is_that_of_all_files(folder):
    """One copy for all files, which is used again until one of the files, or their order, changes."""
    names = ["a.hdf5", "b.hdf5"]
    expected = load_transitions(names)

    def copies() -> int:
        return sum(path.is_dir() for path in Path("copies").iterdir())

    for _ in range(2):
        assert (load_transitions(names, root="copies") == expected).all()
        assert copies() == 1
    (copy,) = [path for path in Path("copies").iterdir() if path.is_dir()]
    assert (load_memmap(copy) == expected).all()
    assert (load_transitions(str(copy)) == expected).all()
    assert flat(load_transitions(names[::-1], root="copies"), "observation") == [11, 12, 13, 1, 2, 3]
    assert copies() == 2
    write("b.hdf5", fields(11, [16, 32, 65], ends=True))
    assert flat(load_transitions(names, root="copies"), "next", "reward")[-1] == 65
    assert copies() == 3


def test_file_that_changes_during_the_conversion(folder, monkeypatch):
    source = find_source(["a.hdf5", "b.hdf5"])
    read, passes = source.sources[1].chunks, []

    def change():
        passes.append(1)
        if len(passes) == 2:
            write("a.hdf5", fields(2, [1, 2, 4, 8]))
        yield from read()

    object.__setattr__(source.sources[1], "chunks", change)
    with pytest.raises(DatasetError, match=r"^2 sources: it changed during the conversion"):
        source.read(root="copies")
    assert not [path for path in Path("copies").iterdir() if path.is_dir()]


def test_in_torchrls_registry(folder):
    buffer = load_dataset("bcq:hdf5:*.hdf5", batch_size=6, sampler="without_replacement")
    assert sorted(buffer.sample()["observation"].flatten().tolist()) == [1, 2, 3, 11, 12, 13]


def test_bad_rows_of_all_files_are_reported_with_their_file(folder):
    write("a.hdf5", fields(1, [1, np.nan, 4, 8]))
    write("b.hdf5", fields(11, [16, 32, np.inf], ends=True))
    with pytest.raises(DatasetError) as error:
        load_transitions(["a.hdf5", "b.hdf5"])
    assert str(error.value) == (
        "2 sources: 2 defects:\n"
        "- a.hdf5: rewards has 1 row (first: 1) that are not finite in float32; drop or repair them.\n"
        "- b.hdf5: rewards has 1 row (first: 2) that are not finite in float32; drop or repair them."
    )
    assert len(load_transitions(["a.hdf5", "b.hdf5"], strict=False)) == 6
    columns = fields(11, [16, 32, 1], ends=True)
    write("b.hdf5", columns | {"terminals": [0, 0, 3]})
    with pytest.raises(DatasetError, match=r"^2 sources: b.hdf5: terminated has 1 row \(first: 2\) that are neither"):
        load_transitions(["a.hdf5", "b.hdf5"], strict=False)


def test_a_row_without_a_discrete_action_is_reported_once(folder):
    for name, actions in (("a.hdf5", [0, -1, 1, 0]), ("b.hdf5", [0, 1, 0, 1])):
        write(name, fields(1, [1, 2, 3, 4]) | {"actions": np.array(actions)})
    with pytest.raises(DatasetError) as caught:
        load_transitions(["a.hdf5", "b.hdf5"])
    assert str(caught.value).startswith(
        "2 sources: a.hdf5: actions has 1 row (first: 1) that are not whole numbers from 0, such as -1.0; correct the "
    )
    assert str(caught.value).count("such as") == 2  # the defect, and "such as doses in whole units"


def other_widths(name: str) -> list[str]:
    columns = fields(1, [1, 2, 3], width=2)
    if name == "actions":
        columns |= {"observations": columns["observations"][:, :1], "actions": columns["observations"]}
    return ["a.hdf5", write("wide.hdf5", columns)]


MALFORMED = {
    "empty list": (lambda: [], "the list of datasets is empty; name at least one."),
    "number": (lambda: 3, "the dataset is 3, expected a name or a list of names."),
    "mapping": (lambda: {"a.hdf5": 1}, "the dataset is {'a.hdf5': 1}, expected a name or a list of names."),
    "nested": (lambda: [["a.hdf5"]], "the dataset is [['a.hdf5']], expected a name or a list of names."),
    "missing": (lambda: ["a.hdf5", "none.hdf5"], "there is no file none.hdf5 in /"),
    "no match": (lambda: "none/*.hdf5", "no file matches none/*.hdf5."),
    "no match in a list": (lambda: ["a.hdf5", "csv:x*"], "no file matches x*."),
    "twice": (lambda: ["a.hdf5", "./a.hdf5"], "a.hdf5 and ./a.hdf5 are the same data; name it only once."),
    "pattern and name": (lambda: ["*.hdf5", "b.hdf5"], "b.hdf5 and b.hdf5 are the same data; name it only once."),
    "observations": (
        lambda: other_widths("observations"),
        "2 sources: wide.hdf5: observations has 2 features, but 1 in a.hdf5; join only datasets of the same task.",
    ),
    "actions": (
        lambda: other_widths("actions"),
        "2 sources: wide.hdf5: actions has 2 features, but 1 in a.hdf5; join only datasets of the same task.",
    ),
    "damaged": (
        lambda: ["a.hdf5", str(Path("bad.hdf5").write_text("x") and "bad.hdf5")],
        "2 sources: bad.hdf5: it is not an HDF5 file; choose another file.",
    ),
    "format": (
        lambda: ["a.hdf5", write_table("c.parquet", 0, ["x"])],
        "c.parquet is a parquet source, which also needs",
    ),
    "unknown": (
        lambda: ["a.hdf5", "mine:3"],
        "mine:3 cannot be joined with other datasets: only files and the sources",
    ),
    "copy": (
        lambda: ["a.hdf5", str(load_hdf5("b.hdf5").memmap("copy") is None or "copy")],
        "copy cannot be joined with other datasets: only files and the sources ['hdf5', 'npz', 'csv', 'parquet', "
        "'minari', 'd4rl'] can be. Instead of a memory-mapped copy, name the files from which the copy was made.",
    ),
    "folder of two formats": (
        lambda: write("c.npz", fields(1, [1.0, 2])) and ".",
        ". holds files with the endings ['.hdf5', '.npz']; choose one of them, such as '*.hdf5'.",
    ),
    "folder without data": (lambda: Path("empty").mkdir() or "empty", "empty is not a memory-mapped copy; it holds []"),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_lists_patterns_and_folders(folder, kind):
    make, message = MALFORMED[kind]
    names = make()
    for root in (None, "copies"):
        with pytest.raises((DatasetError, FileNotFoundError), match="^" + re.escape(message)):
            load_transitions(names, root=root)
    assert not [path for path in folder.glob("copies/*") if path.is_dir()]


def test_settings_of_a_mixed_list_must_fit_every_source(folder):
    names = ["a.hdf5", write_table("c.parquet", 0, ["x", "x"])]
    with pytest.raises(DatasetError, match=r"^a.hdf5 is a hdf5 source, which does not take the arguments \['action', "):
        load_transitions(names, **TABLE)


def test_memory_is_that_of_a_chunk(folder, monkeypatch):
    """A copy of many files is made of parts that are never larger than a chunk and a row."""
    for number in range(20):
        write(f"part{number:02}.hdf5", fields(100 * number + 1, [1.0] * 50))
    source = find_source("part*.hdf5")
    sizes = []
    parts = type(source)._parts
    monkeypatch.setattr(
        type(source), "_parts", lambda *args, **rest: (sizes.append(len(part)) or part for part in parts(*args, **rest))
    )
    td = source.read(root="copies")
    assert len(td) == 20 * 49
    assert max(sizes) == 49
    assert flat(td, "episode") == [number for number in range(20) for _ in range(49)]
    assert torch.equal(td["next", "done"].nonzero()[:, 0], torch.arange(48, 980, 49))


def test_the_pattern_for_a_folder_of_two_formats_can_be_used(folder):
    Path("run[1]").mkdir()
    for name in ("c.npz", "d.npz", "e.hdf5"):
        write(f"run[1]/{name}", fields(1, [1.0, 2], ends=True))
    Path("run[1]/old.csv").mkdir()  # a folder is no file of a third format
    with pytest.raises(DatasetError) as error:
        load_transitions("run[1]")
    pattern = re.search(r"such as '(.*)'", str(error.value))[1]
    assert pattern == "run[[]1]/*.hdf5"
    assert len(load_transitions(pattern)) == 2
    assert len(load_transitions(pattern.replace("hdf5", "npz"))) == 4


def test_kinds_of_actions_that_differ_are_told_with_the_names(folder):
    write("c.hdf5", {**fields(1, [1.0, 2], ends=True), "actions": np.array([[0], [1]])})
    with pytest.raises(RunError, match=r"the actions are discrete in c\.hdf5, but continuous in a\.hdf5; join only"):
        find_source(["a.hdf5", "c.hdf5"]).has_discrete_actions()
    assert not find_source(["a.hdf5", "b.hdf5"]).has_discrete_actions()


def test_patterns_and_brackets_in_names_with_a_colon(folder):
    Path("12:30").mkdir()
    for name in ("12:30/a.npz", "12:30/b.npz", "12:30/c[1].npz"):
        write(name, fields(1, [1.0, 2], ends=True))
    assert len(load_transitions("12:30/?.npz")) == len(load_transitions("npz:12:30/?.npz")) == 4
    assert len(load_transitions("npz:12:30/c[1].npz")) == 2


def test_any_ending_after_a_prefix_and_endings_in_capitals(folder):
    """A prefix says what a pattern's files are; in a folder, A.HDF5 is an HDF5 file."""
    for name in ("a", "b"):
        (folder / f"{name}.hdf5").rename(folder / f"{name}.dat")
    assert flat(load_transitions("hdf5:*.dat"), "observation") == [1, 2, 3, 11, 12, 13]
    (folder / "capitals").mkdir()
    (folder / "a.dat").rename(folder / "capitals/A.HDF5")
    assert flat(load_transitions("capitals"), "observation") == [1, 2, 3]
