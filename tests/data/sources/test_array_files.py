"""HDF5 and NPZ files in the layouts of D4RL, Gymnasium, Tianshou, Minari and robomimic."""

from __future__ import annotations

import re
import zipfile
from dataclasses import replace

import h5py
import numpy as np
import pytest
from torchrl.data import Bounded

from torchrl_bcq import from_arrays, load_hdf5, load_npz
from torchrl_bcq.data.sources import array_files, layouts

from ...array_files import same

# three episodes: of 4 steps (terminated), 5 (cut off), 3 (unfinished); observations are [episode, step]
LENGTHS = (4, 5, 3)
OBSERVATIONS = np.array([[e, t] for e, n in enumerate(LENGTHS, 1) for t in range(n)], dtype=np.float32)
STEPS = {
    "observations": OBSERVATIONS,
    "actions": np.linspace(-1, 1, 12, dtype=np.float32)[:, None],
    "rewards": np.arange(1, 13, dtype=np.float32),
    "terminated": np.arange(12) == 3,
    "truncated": np.arange(12) == 8,
    "next_observations": OBSERVATIONS + np.array([0, 1], dtype=np.float32),
}
D4RL = {"terminated": "terminals", "truncated": "timeouts"}
MINARI = {"terminated": "terminations", "truncated": "truncations"}
SINGULAR = {"observations": "observation", "actions": "action", "rewards": "reward", "next_observations": "next_obs"}
TIANSHOU = {"observations": "obs", "actions": "act", "rewards": "rew", "next_observations": "obs_next"}


def write_hdf5(path, fields, **options):
    with h5py.File(path, "w") as file:
        for name, value in fields.items():
            file.create_dataset(name, data=value, **options)
    return path


def write_npz(path, fields):
    np.savez(path, **fields)
    return path


def write_compressed(path, fields):
    np.savez_compressed(path, **fields)
    return path


FORMATS = {"hdf5": (write_hdf5, load_hdf5), "npz": (write_npz, load_npz), "compressed": (write_compressed, load_npz)}


@pytest.fixture(params=FORMATS)
def form(request, tmp_path):
    """``(write, load)``: write fields to a file, load transitions from it."""
    write, load = FORMATS[request.param]
    return lambda fields: write(tmp_path / f"d.{'hdf5' if load is load_hdf5 else 'npz'}", fields), load


def steps(names=None, without=(), **changes):
    fields = {name: value for name, value in {**STEPS, **changes}.items() if name not in without}
    return {(names or {}).get(name, name): value for name, value in fields.items()}


def rows(td, *key):
    return td[key if len(key) > 1 else key[0]].squeeze(-1).tolist()


@pytest.mark.parametrize("names", [D4RL, MINARI, SINGULAR | MINARI, TIANSHOU, D4RL | TIANSHOU])
def test_common_names(form, names):
    write, load = form
    td = load(write(steps(names) | {"infos": np.ones(3)}))  # other entries may have any length
    same(td, from_arrays(**STEPS))
    assert rows(td, "next", "reward") == list(range(1, 13))
    assert rows(td, "episode") == [0] * 4 + [1] * 5 + [2] * 3
    assert rows(td, "next", "truncated") == [row in (8, 11) for row in range(12)]


def test_time_out_keeps_its_true_next_observation_where_there_is_one(form):
    write, load = form
    td = load(write(steps(D4RL)))
    assert rows(td, "next", "truncated").index(True) == 8
    assert td["next", "observation"][8].tolist() == [2, 5]  # not [3, 0] of the next episode, nor zeros


def test_time_out_without_next_observation_is_dropped(form):
    """The unfinished last row is dropped, too; the terminated row repeats its own observation."""
    write, load = form
    td = load(write(steps(D4RL, without=["next_observations"])))
    kept = [0, 1, 2, 3, 4, 5, 6, 7, 9, 10]
    after = [1, 2, 3, 3, 5, 6, 7, 8, 10, 11]
    assert td["observation"].tolist() == OBSERVATIONS[kept].tolist()
    assert td["next", "observation"].tolist() == OBSERVATIONS[after].tolist()
    assert rows(td, "next", "terminated") == [row == 3 for row in kept]
    assert rows(td, "next", "truncated") == [row in (7, 10) for row in kept]  # each is before a dropped row
    assert rows(td, "episode") == [0] * 4 + [1] * 4 + [2] * 2


def test_names_may_be_given(form):
    write, load = form
    own = {"observations": "o", "actions": "a", "rewards": "r", "terminated": "failed", "next_observations": "after"}
    same(load(write(steps(own)), names=own), from_arrays(**STEPS))


def test_names_may_be_paths(tmp_path):
    paths = {"observations": "log/robot/o", "actions": "log/robot/a", "truncated": "log/over"}
    path = write_hdf5(tmp_path / "d.hdf5", steps(paths))
    same(load_hdf5(path, names=paths), from_arrays(**STEPS))


def test_names_choose_among_several(form):
    write, load = form
    fields = steps(D4RL) | {"states": STEPS["observations"] * 7, "truncated": STEPS["truncated"]}
    path = write(fields)
    assert refusal(load, path) == (
        f"{path.name}: ['observations', 'states'] could all be observations; choose one with "
        "names={'observations': 'observations'}."
    )
    choice = "choose one with names={{'truncated': 'timeouts'}}"
    expected = f"{{}}: ['timeouts', 'truncated'] could all be truncated; {choice}."
    assert refusal(load, path, names={"observations": "states"}) == expected.format(path.name)
    td = load(path, names={"observations": "states", "truncated": "timeouts"})
    assert td["observation"].tolist() == (STEPS["observations"] * 7).tolist()


def refusal(load, path, **settings) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011 (whole messages are compared)
        load(path, **settings)
    return str(error.value)


def test_missing_fields_are_named(form):
    write, load = form
    path = write(steps(without=["rewards", "terminated"]))
    assert refusal(load, path) == (
        f"{path.name}: it lacks ['rewards', 'terminated']; it holds ['actions', 'next_observations', 'observations', "
        "'truncated']. Name the entries with names={'rewards': ...}."
    )
    path = write(steps({"terminated": "dones"}))
    assert refusal(load, path) == (
        f"{path.name}: it lacks ['terminated']; it holds ['actions', 'dones', 'next_observations', 'observations', "
        "'rewards', 'truncated']. dones does not say whether an episode was terminated or truncated. "
        "Name the entries with names={'terminated': ...}."
    )
    same(load(path, names={"terminated": "dones"}), from_arrays(**STEPS))


def test_wrong_names_are_refused(form):
    write, load = form
    path = write(steps())
    assert refusal(load, path, names={"reward": "rewards", "action": "actions"}) == (
        f"{path.name}: names has the unknown fields ['action', 'reward']; the known fields are ['observations', "
        "'actions', 'rewards', 'terminated', 'truncated', 'next_observations', 'groups', 'action_masks', "
        "'next_action_masks', 'action_probabilities', 'frames', 'next_frames', 'episode_terminals', "
        "'episode_starts', 'lengths']."
    )
    assert refusal(load, path, names={"observations": "obs/robot"}) == (
        f"{path.name}: names refers to the entries ['obs/robot'], but the file holds only ['actions', "
        "'next_observations', 'observations', 'rewards', 'terminated', 'truncated']."
    )


def test_group_in_place_of_a_field_is_refused(tmp_path):
    path = write_hdf5(tmp_path / "d.hdf5", steps({"observations": "obs/robot"}))
    with h5py.File(path, "a") as file:
        file["obs/object"] = np.ones((12, 2))
    assert refusal(load_hdf5, path) == (
        "d.hdf5: observations is the group 'obs'; choose from it, as in "
        "names={'observations': ['obs/object', 'obs/robot']}."
    )


def test_file_that_would_join_episodes_is_refused(form):
    write, load = form
    path = write(steps(without=["truncated", "next_observations"]))
    assert refusal(load, path) == (
        f"{path.name}: it has neither timeouts nor next_observations, so it is unknown where episodes were cut off. "
        "Pass max_episode_steps=, add timeouts, or use from_arrays if no episode was cut off."
    )
    assert refusal(load, path, max_episode_steps=0) == "max_episode_steps is 0, expected a whole number of at least 1."


def test_without_time_outs_an_episode_is_cut_where_it_does_not_continue(form):
    write, load = form
    td = load(write(steps(D4RL, without=["truncated"])))
    assert rows(td, "next", "truncated") == [row in (8, 11) for row in range(12)]


def cut_off(terminated: np.ndarray, limit: int) -> list[bool]:
    """Rows at which a time limit ends episodes, counted step by step."""
    cut, step = [], 0
    for ended in terminated.tolist():
        step += 1
        cut.append(step == limit and not ended)
        if ended or step == limit:
            step = 0
    return cut


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 7, 40])
@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1000])
def test_time_limit(tmp_path, monkeypatch, limit, chunk):
    """Chunks of any size may divide an episode."""
    rng = np.random.default_rng(limit)
    ends = rng.random(60) < 0.12
    fields = {
        "observations": np.arange(60, dtype=np.float32)[:, None],
        "actions": rng.uniform(-1, 1, (60, 1)).astype(np.float32),
        "rewards": rng.normal(size=60),
        "terminated": ends,
        "next_observations": np.arange(1, 61, dtype=np.float32)[:, None],
    }
    path = write_hdf5(tmp_path / "d.hdf5", fields)
    monkeypatch.setattr(layouts, "CHUNK_BYTES", 8 * chunk)
    td = load_hdf5(path, max_episode_steps=limit)
    cut = cut_off(ends, limit)
    assert rows(td, "next", "truncated") == [*cut[:-1], not ends[-1]]
    assert rows(td, "next", "terminated") == ends.tolist()
    del fields["next_observations"]
    td = load_npz(write_npz(tmp_path / "d.npz", fields), max_episode_steps=limit) if limit > 1 else None
    kept = [row for row in range(60) if ends[row] or not (cut[row] or row == 59)]
    assert td is None or rows(td, "observation") == kept


def test_time_limit_of_one_step_leaves_nothing_without_next_observations(tmp_path):
    path = write_hdf5(tmp_path / "d.hdf5", steps(without=["truncated", "next_observations"], terminated=np.zeros(12)))
    assert refusal(load_hdf5, path, max_episode_steps=1) == (
        "d.hdf5: all 12 rows are truncated and lack a next observation or next action mask; correct truncated, or give "
        "next_observations and, if there are action_masks, next_action_masks."
    )


def test_ends_inside_the_time_limit_are_warned_of(form, caplog):
    """The first episode, of rows 0 to 3, ends in a final state, the second after row 8, the third after row 11."""
    write, load = form
    path = write(steps(without=["truncated"], terminated=np.arange(12) == 3))
    load(path, max_episode_steps=5)
    assert not caplog.messages
    load(path, max_episode_steps=7)
    (message,) = caplog.messages
    assert "the next observation differs from the observation of the next row in 1 row (first: 8). If ep" in message
    assert "leave max_episode_steps out: then the next observations show the ends of episodes." in message


@pytest.mark.parametrize(
    ("name", "values"), [("episode_terminals", [0, 1, 0, 0]), ("episode_starts", [1, 0, 1, 0]), ("lengths", [2, 2])]
)
def test_a_group_of_several_episodes_is_refused(tmp_path, name, values):
    fields = steps(D4RL, without=["truncated"])
    path = write_hdf5(tmp_path / "d.hdf5", {f"run_0/{field}": value[:4] for field, value in fields.items()})
    load_hdf5(path)
    with h5py.File(path, "a") as file:
        file[f"run_0/{name}"] = np.array(values)
    assert refusal(load_hdf5, path) == (
        f"d.hdf5: episode 0 (counted from 0) holds several episodes, as its entry {name} shows; store each episode "
        "in a group of its own, or all steps outside of groups."
    )


def test_a_single_flag_of_a_group_is_refused(tmp_path):
    fields = {f"episode_0/{field}": value[:4] for field, value in steps(D4RL).items()}
    path = write_hdf5(tmp_path / "d.hdf5", {**fields, "episode_0/terminals": True})
    message = "d.hdf5: episode 0 (counted from 0): terminated is one value, expected one for each step."
    assert refusal(load_hdf5, path) == message


def test_time_outs_in_the_file_override_a_time_limit(form):
    write, load = form
    same(load(write(steps(D4RL)), max_episode_steps=2), from_arrays(**STEPS))


def changed(change):
    return {name: change(value) if name != "terminated" else value for name, value in STEPS.items()}


LAYOUTS = {
    "as is": STEPS,
    "float64": changed(lambda v: v.astype(np.float64)),
    "big-endian": {name: value.astype(">f8" if value.dtype.kind == "f" else ">i4") for name, value in STEPS.items()},
    "columns first": changed(np.asfortranarray),
    "[N, 1]": {name: value.reshape(len(value), -1) for name, value in STEPS.items()},
    "0 and 1": {**STEPS, "terminated": STEPS["terminated"].astype(np.uint8), "truncated": STEPS["truncated"] * 1.0},
}
ABSENT = [(), ("truncated",), ("next_observations",)]


@pytest.mark.parametrize("absent", ABSENT, ids=["-".join(names) or "all fields" for names in ABSENT])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_every_layout_in_chunks(form, monkeypatch, layout, chunk, absent):
    write, load = form
    given = {name: value for name, value in STEPS.items() if name not in absent}
    path = write(steps(without=absent, **LAYOUTS[layout]))
    monkeypatch.setattr(layouts, "CHUNK_BYTES", chunk * 8)
    same(load(path), from_arrays(**{"truncated": None, **given}))


@pytest.mark.parametrize("options", [{"compression": "gzip", "chunks": True, "shuffle": True}, {"chunks": True}])
def test_compressed_and_chunked_hdf5(tmp_path, monkeypatch, options):
    path = write_hdf5(tmp_path / "d.hdf5", steps(D4RL), **options)
    monkeypatch.setattr(layouts, "CHUNK_BYTES", 40)
    same(load_hdf5(path), from_arrays(**STEPS))


def test_chunks_hold_a_few_rows(tmp_path, monkeypatch):
    """The widest field decides: observations of 2 float32 are 8 bytes per row."""
    monkeypatch.setattr(layouts, "CHUNK_BYTES", 8 * 5)
    for source in (
        array_files.hdf5(write_hdf5(tmp_path / "d.hdf5", STEPS)),
        array_files.npz(write_npz(tmp_path / "d.npz", STEPS)),
    ):
        assert [len(chunk["actions"]) for chunk in source.chunks()] == [5, 5, 2]


def episodes(layout: str):
    """The fields of each episode; Minari's have one observation more than steps."""
    ends = np.cumsum(LENGTHS)
    for start, end in zip(ends - LENGTHS, ends, strict=True):
        fields = {name: value[start:end] for name, value in STEPS.items()}
        after = fields.pop("next_observations")
        if layout == "minari":
            fields["observations"] = np.concatenate([fields["observations"], after[-1:]])
        else:
            fields["next_observations"] = after
        yield {{**MINARI, **SINGULAR, "observations": "observations"}.get(name, name): v for name, v in fields.items()}


def write_episodes(path, layout: str, name: str, **names: str):
    """Write the groups in another order than that of their names and numbers."""
    with h5py.File(path, "w") as file:
        for number, fields in reversed(list(zip((2, 9, 10), episodes(layout), strict=True))):
            for field, value in fields.items():
                file[f"{name.format(number)}/{names.get(field, field)}"] = value
        file.attrs["total"] = 3
    return path


@pytest.mark.parametrize(
    ("layout", "name"), [("minari", "episode_{}"), ("minari", "data/{}"), ("steps", "data/demo_{}")]
)
def test_groups_of_episodes(tmp_path, layout, name):
    """Ends are kept; the third episode has no flag at its end and is cut off."""
    td = load_hdf5(write_episodes(tmp_path / "d.hdf5", layout, name))
    expected = from_arrays(**{**STEPS, "truncated": STEPS["truncated"] | (np.arange(12) == 11)})
    same(td, expected)
    assert td["next", "observation"][[3, 8, 11]].tolist() == [[1, 4], [2, 5], [3, 3]]


def test_groups_with_names(tmp_path):
    """robomimic's: an episode in data/demo_0, observations in groups, and lists of episodes in another group."""
    paths = {"observations": "obs/robot", "next_obs": "next_obs/robot", "terminations": "dones", "truncations": "cut"}
    path = write_episodes(tmp_path / "d.hdf5", "steps", "data/demo_{}", **paths)
    with h5py.File(path, "a") as file:
        file["mask/train"] = np.array([b"demo_2", b"demo_9"])
        for demo in file["data"].values():
            demo["states"] = np.ones((len(demo["reward"]), 3))
    own = {"observations": "obs/robot", "next_observations": "next_obs/robot", "terminated": "dones"}
    td = load_hdf5(path, names=own)
    cut = (np.arange(12) == 8) | (np.arange(12) == 11)  # "cut" has no common name: both ends lack a flag
    same(td, from_arrays(**{**STEPS, "truncated": cut}))


def test_fields_beside_numbered_groups_are_no_episodes(tmp_path):
    """Such as the weights of D4RL's behaviour policy."""
    path = write_hdf5(
        tmp_path / "d.hdf5", {**steps(D4RL), "policy/fc0/weight": np.ones(3), "policy/fc1/weight": np.ones(3)}
    )
    same(load_hdf5(path), from_arrays(**STEPS))


@pytest.mark.parametrize("field", ["rewards", "next_observations"])
def test_lengths_that_differ_are_refused(form, field):
    write, load = form
    path = write(steps(**{field: STEPS[field][:-1]}))
    lengths = {name: 11 if name == field else 12 for name in STEPS}
    assert refusal(load, path) == (
        f"{path.name}: fields differ in length: {lengths}; each field needs one row per step. Put the last observation "
        "of an episode into next_observations."
    )


def test_empty_and_scalar_fields_are_refused(form):
    write, load = form
    path = write({name: value[:0] for name, value in STEPS.items()})
    assert refusal(load, path) == f"{path.name}: observations is empty (shape (0, 2)); it needs at least one value."
    path = write(dict.fromkeys(STEPS, 1.0))
    assert refusal(load, path) == f"{path.name}: observations has shape (), expected [N, features]."


def test_bad_rows_are_counted_over_chunks(form, monkeypatch):
    write, load = form
    rewards = STEPS["rewards"].copy()
    rewards[[4, 6, 11]] = np.nan
    path = write(steps(D4RL, rewards=rewards))
    monkeypatch.setattr(layouts, "CHUNK_BYTES", 16)
    assert refusal(load, path, action_spec=Bounded(-0.5, 0.5, (1,))) == (
        f"{path.name}: 2 defects:\n"
        "- rewards has 3 rows (first: 4) that are not finite in float32; drop or repair them.\n"
        "- actions has 6 rows (first: 0) outside the action bounds: the actions span [-1.0] to [1.0], the "
        "bounds are [-0.5] to [0.5]; clip or rescale the actions."
    )


def test_absent_files(tmp_path):
    for load, name in ((load_hdf5, "none.hdf5"), (load_npz, "none.npz")):
        with pytest.raises(FileNotFoundError, match=f"^there is no file {re.escape(str(tmp_path / name))}.$"):
            load(tmp_path / name)


def test_other_and_damaged_files(form, tmp_path):
    write, load = form
    whole = write(steps(D4RL))
    path = tmp_path / f"text{whole.suffix}"
    path.write_text("neither of them")
    kind = "an HDF5" if load is load_hdf5 else "an NPZ"
    assert refusal(load, path) == f"{path.name}: it is not {kind} file; choose another file."
    path.write_bytes(whole.read_bytes()[:-30])
    if load is load_hdf5:
        assert re.fullmatch(
            r"text.hdf5: the source cannot be read \(.*truncated file.*\) and may be damaged: .* or create the source "
            r"again.",
            refusal(load, path),
        )
    else:
        assert refusal(load, path) == "text.npz: it is not an NPZ file; choose another file."


@pytest.mark.parametrize("write", [write_npz, write_compressed])
def test_npz_with_a_changed_byte_is_refused(tmp_path, write):
    path = write(tmp_path / "d.npz", steps(D4RL, rewards=np.arange(1, 13) * 1.1))
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo("rewards.npy")
    content[member.header_offset + 30 + len(member.filename) + 20 + member.compress_size - 10] ^= 16
    path.write_bytes(content)
    unpacked = r"the source cannot be read \(.*\) and may be damaged: copy or create the source again"
    damaged = "the array 'rewards.npy' in the file is damaged; copy the file again"
    assert re.fullmatch(rf"d.npz: ({unpacked}|{damaged}).", refusal(load_npz, path))


def test_no_changed_byte_of_an_npz_directory_hides_a_field(tmp_path):
    """The directory has no checksum, and without next_observations the result would be another."""
    path = write_npz(tmp_path / "d.npz", steps(D4RL))
    whole, content = load_npz(path), path.read_bytes()
    for at in range(content.index(b"PK\1\2"), len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x55]) + content[at + 1 :])
        try:
            loaded = load_npz(path)
        except ValueError:
            continue
        assert loaded.shape == whole.shape
        assert (loaded == whole).all()


def test_npz_member_shorter_than_it_says(tmp_path):
    path = write_npz(tmp_path / "d.npz", steps())
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content[:-8] if name == "rewards.npy" else content)
    assert re.fullmatch(
        r"d.npz: the source cannot be read \(.*\) and may be damaged: copy or create the source again.",
        refusal(load_npz, path),
    )


def test_pickles_in_npz_are_never_loaded(tmp_path):
    path = write_npz(tmp_path / "d.npz", steps(rewards=np.array([1.0] * 11 + [None], dtype=object)))
    assert re.match(r"d.npz: the source cannot be read \(Object arrays cannot be loaded", refusal(load_npz, path))


def test_memory_mapped_copy_is_the_same(form, tmp_path, monkeypatch):
    write, load = form
    path = write(steps(D4RL, without=["next_observations"]))
    monkeypatch.setattr(layouts, "CHUNK_BYTES", 24)
    td = load(path, root=tmp_path / "copies")
    assert td.is_memmap()
    same(td, from_arrays(**{**STEPS, "next_observations": None}))


def source_with(path, **attributes):
    with h5py.File(write_hdf5(path, steps(D4RL)), "a") as file:
        file.attrs.update(attributes)
    return array_files.hdf5(path)


SCORES = {"ref_min_score": -20.5, "ref_max_score": 3234.25}


def test_hdf5_knows_its_environment_and_scores(tmp_path):
    source = source_with(tmp_path / "d.hdf5", env_id="Hopper-v5", **SCORES)
    assert (str(source.env), source.reference_scores) == ("Hopper-v5", (-20.5, 3234.25))
    source = source_with(tmp_path / "d.hdf5", env_id=np.bytes_("mine/Hop.per-v5"), ref_min_score=np.array([3]))
    assert (str(source.env), source.reference_scores) == ("mine/Hop.per-v5", None)  # one score is missing
    source = source_with(tmp_path / "d.hdf5")
    assert (source.env, source.reference_scores) == (None, None)


@pytest.mark.parametrize("env_id", ["os: Hopper-v5", "Hopper-v5; import os", "", b"\xff", 5, np.array([b"a", b"b"])])
def test_unsafe_and_invalid_ids_are_left_out(tmp_path, env_id):
    source = source_with(tmp_path / "d.hdf5", env_id=env_id, **SCORES)
    assert (source.env, source.reference_scores) == (None, (-20.5, 3234.25))


@pytest.mark.parametrize(
    "scores",
    [(1.0, 1.0), (2.0, 1.0), (np.nan, 1.0), (0.0, np.nan), (-np.inf, 1.0), (0.0, np.inf), ("low", 1.0), ([0, 1], 2)],
)
def test_unusable_scores_are_left_out(tmp_path, scores):
    source = source_with(tmp_path / "d.hdf5", env_id="Hopper-v5", ref_min_score=scores[0], ref_max_score=scores[1])
    assert (str(source.env), source.reference_scores) == ("Hopper-v5", None)


def test_a_file_that_is_not_hdf5_is_refused_when_it_is_read(tmp_path):
    (tmp_path / "d.hdf5").write_text("no HDF5")
    source = array_files.hdf5(tmp_path / "d.hdf5")
    assert (source.env, source.reference_scores) == (None, None)
    with pytest.raises(ValueError, match=r"^d.hdf5: it is not an HDF5 file; choose another file.$"):
        source.read()


def test_environment_and_scores_make_no_other_copy(tmp_path):
    source = source_with(tmp_path / "d.hdf5", env_id="Hopper-v5", **SCORES)
    other = replace(source, env=None, reference_scores=(0.0, 1.0))
    assert source.read(root=tmp_path / "copies")["action"].filename == (
        other.read(root=tmp_path / "copies")["action"].filename
    )


def test_a_time_limit_without_effect_is_reported(tmp_path, caplog):
    path = write_hdf5(tmp_path / "d.hdf5", steps(D4RL))
    same(load_hdf5(path, max_episode_steps=2), load_hdf5(path))
    assert caplog.messages == ["max_episode_steps has no effect, because the file says where episodes were cut off."]
