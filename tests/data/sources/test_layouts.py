"""Files of Tianshou and d3rlpy, padded episodes, and other layouts in which rows are not simply one after another."""

from __future__ import annotations

import subprocess
import sys

import h5py
import numpy as np
import pytest
import torch

from torchrl_bcq import from_arrays, load_hdf5, load_npz
from torchrl_bcq.data.sources import layouts

from ...array_files import same, write_arrays


def refusal(path, load=load_hdf5, **settings) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011 (whole messages are compared)
        load(path, **settings)
    return str(error.value)


def rows(td, *key):
    return td[key if len(key) > 1 else key[0]].flatten().tolist()


@pytest.fixture(params=[1, 3, 1000])
def small_chunks(request, monkeypatch):
    """Read so many rows at a time."""
    monkeypatch.setattr(layouts, "CHUNK_BYTES", 8 * request.param)


# Tianshou 2.0: ReplayBuffer.save_hdf5


def slots(written, size=40):
    """Fields of a buffer: slot i holds step ``written[i]``; the others hold zeros. Steps end at 4, 9, 14, ..."""
    step = np.zeros(size)
    step[: len(written)] = written
    used = np.arange(size) < len(written)
    return {
        "obs": np.stack([step, used], 1).astype("f4"),
        "act": np.where(used, step / 100 + 0.5, 0).astype("f4")[:, None],
        "rew": np.where(used, step + 1, 0),
        "terminated": used & (step % 10 == 9),
        "truncated": used & (step % 10 == 4),
        "done": used & (step % 5 == 4),
        "obs_next": np.stack([np.where(used, step + 1, 0), used], 1).astype("f4"),
    }


def write_buffer(path, fields, without=(), entries=None, **attributes):
    with h5py.File(path, "w") as file:
        for name, values in fields.items():
            if name not in without:
                file[f"_meta/{name}"] = values
        size = len(fields["act"])
        file["_meta"].attrs["__data_type__"] = "Batch"
        file.create_group("_meta/info")
        file["_indices"] = np.arange(size)
        file["last_index"] = np.array([attributes.get("_insertion_idx", 1) - 1])
        file.create_group("options").attrs["stack_num"] = 1
        for name, values in (entries or {}).items():
            file.pop(name, None)
            file[name] = values
        file.attrs.update({"maxsize": size, "stack_num": 1} | attributes)
    return path


def arrays(steps, **changes):
    """Arguments of from_arrays for whole steps in this order; the last one is cut off if it has no flag."""
    steps = np.array(steps)
    terminated, truncated = steps % 10 == 9, steps % 10 == 4
    truncated[-1] |= not terminated[-1]
    ones = np.ones(len(steps))
    return {
        "observations": np.stack([steps, ones], 1),
        "actions": (steps / 100 + 0.5).astype("f4")[:, None],
        "rewards": steps + 1.0,
        "terminated": terminated,
        "truncated": truncated,
        "next_observations": np.stack([steps + 1, ones], 1),
        **changes,
    }


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("index", ["_insertion_idx", "_index"])
def test_free_slots_of_a_buffer_are_not_read(tmp_path, index):
    path = write_buffer(tmp_path / "b.hdf5", slots(range(25)), _size=25, **{index: 25})
    td = load_hdf5(path)
    same(td, from_arrays(**arrays(range(25))))
    assert rows(td, "next", "reward") == list(range(1, 26))
    assert rows(td, "episode") == [e for e in range(5) for _ in range(5)]


@pytest.mark.usefixtures("small_chunks")
def test_a_buffer_that_has_wrapped_around_starts_with_the_oldest_row(tmp_path):
    """55 steps in 40 slots: slot 0 holds step 40, and slot 15 the oldest step, 15."""
    path = write_buffer(tmp_path / "b.hdf5", slots([*range(40, 55), *range(15, 40)]), _size=40, _insertion_idx=15)
    td = load_hdf5(path)
    same(td, from_arrays(**arrays(range(15, 55))))
    assert td["observation"][:, 0].tolist() == list(range(15, 55))


@pytest.mark.usefixtures("small_chunks")
def test_a_buffer_without_next_observations(tmp_path):
    """Truncated rows, and the newest row 57, have no next observation."""
    fields = slots([*range(40, 58), *range(18, 40)])
    path = write_buffer(tmp_path / "b.hdf5", fields, without=["obs_next"], _size=40, _insertion_idx=18)
    td = load_hdf5(path)
    kept = [step for step in range(18, 58) if step % 10 != 4 and step != 57]
    assert td["observation"][:, 0].tolist() == kept
    after = [step if step % 10 == 9 else step + 1 for step in kept]
    assert td["next", "observation"][:, 0].tolist() == after


@pytest.mark.usefixtures("small_chunks")
def test_a_buffer_of_several_environments(tmp_path):
    """Ring 0 has wrapped around, ring 1 has free slots, ring 2 is empty, and ring 3 ends with a terminated step."""
    fields = slots([10, 11, 12, 13, 4, 5, 6, 7, 8, 9, *range(30, 37), 0, 0, 0, *[0] * 10, *range(0, 10)])
    entries = {"_offset": [0, 10, 20, 30], "_lengths": [10, 7, 0, 10], "last_index": [3, 16, 20, 39]}
    path = write_buffer(tmp_path / "b.hdf5", fields, entries=entries, _size=0, _insertion_idx=0, buffer_num=4)
    order = [*range(4, 14), *range(30, 37), *range(10)]
    ends = np.isin(np.arange(27), [0, 9, 14, 16, 21])  # steps 4, 13 (newest of its ring), 34, 36 (newest), 4
    same(load_hdf5(path), from_arrays(**arrays(order, truncated=ends)))


def test_an_empty_buffer_and_one_that_does_not_fit_together(tmp_path):
    path = write_buffer(tmp_path / "b.hdf5", slots([]), _size=0, _insertion_idx=0)
    assert refusal(path) == "b.hdf5: the data has no rows; at least one row is needed."
    path = write_buffer(tmp_path / "b.hdf5", slots(range(25)), _size=25, _insertion_idx=7)
    assert refusal(path) == (
        "b.hdf5: the buffer has 25 steps in its slots 0 to 39 of 40, with the newest step in slot 6, but maxsize 40. "
        "These numbers do not fit together; save the buffer again."
    )


def test_a_buffer_that_stacks_when_it_samples_holds_single_observations(tmp_path, caplog):
    path = write_buffer(tmp_path / "b.hdf5", slots(range(25)), _size=25, _insertion_idx=25, stack_num=4)
    same(load_hdf5(path), from_arrays(**arrays(range(25))))
    assert caplog.messages == [
        "Tianshou joins 4 observations when it samples this buffer; to do the same, call "
        "stack_observations(transitions, 4)."
    ]


def test_an_old_buffer_with_done_alone(tmp_path):
    path = write_buffer(tmp_path / "b.hdf5", slots(range(25)), without=["terminated", "truncated"], _size=25, _index=25)
    assert refusal(path) == (
        "b.hdf5: it lacks ['terminated']; it holds ['act', 'done', 'info', 'obs', 'obs_next', 'rew']. done does not "
        "say whether an episode was terminated or truncated. Name the entries with names={'terminated': ...}."
    )


@pytest.mark.parametrize("prefix", ["", "_meta/"])
def test_names_in_a_buffer(tmp_path, prefix):
    fields = slots(range(25))
    fields["obs/robot"], fields["obs/goal"] = fields["obs"], fields.pop("obs") * 7
    path = write_buffer(tmp_path / "b.hdf5", fields, without=["obs_next"], _size=25, _insertion_idx=25)
    assert refusal(path) == (
        "b.hdf5: observations is the group 'obs'; choose from it, as in "
        "names={'observations': ['obs/goal', 'obs/robot']}."
    )
    td = load_hdf5(path, names={"observations": f"{prefix}obs/goal"})
    assert td["observation"][:4, 0].tolist() == [0, 7, 14, 21]
    assert len(td) == 22  # of 25 rows, those of steps 4, 14 and 24 are cut off


# d3rlpy 1.x: MDPDataset.dump, and 2.x: ReplayBuffer.dump

EPISODES = (4, 5, 3)  # terminated, cut off, cut off
OBSERVATIONS = np.array([[e, t] for e, n in enumerate(EPISODES, 1) for t in range(n)], dtype="f4")
ACTIONS, REWARDS = np.linspace(-1, 1, 12, dtype="f4")[:, None], np.arange(1, 13, dtype="f4")
TERMINATED, ENDS = np.arange(12) == 3, np.isin(np.arange(12), [3, 8, 11])
CUT = {"observations": OBSERVATIONS, "actions": ACTIONS, "rewards": REWARDS}
CUT |= {"terminated": TERMINATED, "truncated": ENDS & ~TERMINATED}
FLAT = {"observations": OBSERVATIONS, "actions": ACTIONS, "rewards": REWARDS, "terminals": TERMINATED * 1.0}


FORMS = pytest.mark.parametrize(("name", "load"), [("d.hdf5", load_hdf5), ("d.npz", load_npz)])


@FORMS
@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("shape", [(12,), (12, 1)])
def test_ends_of_d3rlpy_1(tmp_path, name, load, shape):
    """Of ten kept rows, the terminated one counts as terminated and not as cut off."""
    more = {"episode_terminals": (ENDS * 1.0).reshape(shape), "discrete_action": False, "version": "1.0"}
    path = write_arrays(tmp_path / name, {**FLAT, **more, "terminals": FLAT["terminals"].reshape(shape)})
    td = load(path)
    same(td, from_arrays(**CUT))
    assert rows(td, "episode") == [0] * 4 + [1] * 4 + [2] * 2
    assert rows(td, "next", "truncated") == [row in (7, 9) for row in range(10)]  # the row before a dropped row
    same(load(path, names={"episode_terminals": "episode_terminals"}), td)


@FORMS
def test_flags_of_starts_and_ends_must_be_flags(tmp_path, name, load):
    for field, first in (("episode_terminals", 8), ("episode_starts", 7)):
        path = write_arrays(tmp_path / name, {**FLAT, field: np.where(np.arange(12) == 8, 2, ENDS)})
        assert refusal(path, load) == (
            f"{name}: truncated has 1 row (first: {first}) that are neither 0 nor 1, such as 2.0; use only 0 (false) "
            "and 1 (true)."
        ).replace("2.0", "2")
        path = write_arrays(tmp_path / name, {**FLAT, field: ENDS[:-1]})
        assert refusal(path, load).startswith(f"{name}: fields differ in length: ")


@FORMS
@pytest.mark.usefixtures("small_chunks")
def test_starts_of_episodes(tmp_path, name, load):
    starts = np.r_[True, ENDS[:-1]]
    same(load(write_arrays(tmp_path / name, {**FLAT, "episode_starts": starts})), from_arrays(**CUT))


def test_starts_do_not_say_whether_an_episode_was_terminated(tmp_path):
    """Expert data of Stable-Baselines 2 has neither terminals nor time-outs."""
    fields = {"obs": OBSERVATIONS, "actions": ACTIONS, "rewards": REWARDS, "episode_starts": ENDS}
    path = write_arrays(tmp_path / "d.npz", {**fields, "episode_returns": np.ones(3)})
    assert refusal(path, load_npz) == (
        "d.npz: it lacks ['terminated']; it holds ['actions', 'episode_returns', 'episode_starts', 'obs', 'rewards']. "
        "episode_starts does not say whether an episode was terminated or truncated. Name the entries with "
        "names={'terminated': ...}."
    )


def test_one_way_to_show_ends_is_read(tmp_path):
    """If entries disagree, one must be named."""
    wrong = np.arange(12) % 2 == 0
    both = {**FLAT, "timeouts": CUT["truncated"]}
    for name, agreeing, other in (
        ("episode_terminals", ENDS, wrong),
        ("episode_starts", np.r_[True, ENDS[:-1]], wrong),
        ("lengths", np.array(EPISODES), np.ones(12, int)),
    ):
        same(load_npz(write_arrays(tmp_path / "d.npz", {**both, name: agreeing})), from_arrays(**CUT))
        path = write_arrays(tmp_path / "d.npz", {**both, name: other})
        row = int(name == "episode_starts")
        assert f"d.npz: timeouts and {name} disagree on whether row {row} ends an episode; " in refusal(path, load_npz)
        same(load_npz(path, names={"truncated": "timeouts"}), from_arrays(**CUT))
    path = write_arrays(tmp_path / "d.npz", {**FLAT, "timeouts": wrong, "lengths": np.array(EPISODES)})
    same(load_npz(path, names={"lengths": "lengths"}), from_arrays(**CUT))
    assert "names has ['lengths', 'truncated'], which all show" in refusal(
        path, load_npz, names={"lengths": "lengths", "truncated": "timeouts"}
    )
    path = write_arrays(tmp_path / "d.npz", {**FLAT, "timeouts": wrong, "starts": np.r_[True, ENDS[:-1]]})
    same(load_npz(path, names={"episode_starts": "starts"}), from_arrays(**CUT))
    assert refusal(path, load_npz, names={"episode_starts": "starts", "truncated": "timeouts"}) == (
        "d.npz: names has ['truncated', 'episode_starts'], which all show where episodes end; name only one of them."
    )


def dump(count="num_episodes", **changes):
    """Entries of d3rlpy's ReplayBuffer.dump; ``terminated`` is one flag for each episode."""
    entries = {"columns": np.array([b"observations", b"actions", b"rewards", b"terminated"]), count: 3}
    for number, stop in enumerate(np.cumsum(EPISODES)):
        part = slice(stop - EPISODES[number], stop)
        entries |= {f"observations_{number}": OBSERVATIONS[part], f"actions_{number}": ACTIONS[part]}
        entries |= {f"rewards_{number}": REWARDS[part, None], f"terminated_{number}": number == 0}
    entries = {**entries, "version": "2.1", **changes}
    return {name: values for name, values in entries.items() if values is not None}


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("count", ["num_episodes", "total_size"])
def test_dump_of_d3rlpy_2(tmp_path, count):
    same(load_hdf5(write_arrays(tmp_path / "d.h5", dump(count))), from_arrays(**CUT))


def test_incomplete_dumps_of_d3rlpy_2(tmp_path):
    remedy = "Only observations, actions and rewards of one array each can be read; save the dataset again."
    columns = "3 episodes with ['observations', 'actions', 'rewards', 'terminated']"
    for entry in ("rewards_1", "terminated_2"):
        assert refusal(write_arrays(tmp_path / "d.h5", dump(**{entry: None}))) == (
            f"d.h5: it holds {columns}, but the entries ['{entry}'] are missing or left over. {remedy}"
        )
    path = write_arrays(tmp_path / "d.h5", dump(observations_0=None, observations_0_0=OBSERVATIONS[:4]))
    assert refusal(path) == (
        f"d.h5: it holds {columns}, but the entries ['observations_0', 'observations_0_0'] are missing or left over. "
        f"{remedy}"
    )
    path = write_arrays(tmp_path / "d.h5", dump(num_episodes=2))
    assert refusal(path).startswith("d.h5: it holds 2 episodes with")


def test_discrete_actions_of_d3rlpy_2(tmp_path):
    steps = {f"actions_{n}": np.arange(size)[:, None] for n, size in enumerate(EPISODES)}
    found = load_hdf5(write_arrays(tmp_path / "d.h5", dump(**steps)))["action"]
    numbered = {f"actions_{n}": np.arange(size)[:, None] + 0.5 for n, size in enumerate(EPISODES)}
    kept = load_hdf5(write_arrays(tmp_path / "d.h5", dump(**numbered)))["action"]
    assert found.dtype == torch.int64
    assert found.tolist() == (kept[:, 0] - 0.5).tolist()


# padded arrays [E, T, D], and flat arrays, with the number of steps of each episode


def padded(more=0):
    """Arrays of 4 episodes, of which the second has no steps, with NaN in unused places."""
    fields = {name: np.full((4, 6, *values.shape[1:]), np.nan) for name, values in FLAT.items()}
    fields["observations"] = np.full((4, 6 + more, 2), np.nan)
    for slot, stop, length in zip((0, 2, 3), np.cumsum(EPISODES), EPISODES, strict=True):
        for name, values in FLAT.items():
            fields[name][slot, :length] = values[stop - length : stop]
        if more:
            fields["observations"][slot, length] = OBSERVATIONS[stop - 1] + [0, 1]
    return {**fields, "lengths": np.array([4, 0, 5, 3])}


@FORMS
@pytest.mark.usefixtures("small_chunks")
def test_padded_episodes(tmp_path, name, load):
    td = load(write_arrays(tmp_path / name, padded()))
    same(td, from_arrays(**CUT))
    td = load(write_arrays(tmp_path / name, padded(more=1)))
    same(td, from_arrays(**CUT, next_observations=OBSERVATIONS + np.array([0, 1], "f4")))


def test_padded_episodes_that_do_not_fit(tmp_path):
    def refuse(**changes):
        fields = {name: values for name, values in {**padded(), **changes}.items() if values is not None}
        return refusal(write_arrays(tmp_path / "d.npz", fields), load_npz)

    assert refuse(lengths=None) == (
        "d.npz: actions has shape (4, 6, 1). If this is [episode, step, feature], add an entry lengths with the number "
        "of steps of each episode; if it is [step, environment, feature], swap the first two dimensions before that."
    )
    for odd in ([4, 0, 7, 3], [4, 0, -1, 3]):
        assert refuse(lengths=np.array(odd)) == (
            "d.npz: lengths has 1 row (first: 2) outside 0 to 6, the number of stored steps; correct lengths."
        )
    assert refuse(lengths=np.array([4.0, 0, 5, 3])) == (
        "d.npz: lengths has shape (4,) and dtype float64, expected one integer for each episode."
    )
    assert refuse(lengths=np.array([4, 5, 3])).startswith("d.npz: lengths has 3 episodes, but the fields have the")
    assert refuse(rewards=np.ones(24)).startswith("d.npz: lengths has 4 episodes, but the fields have the shapes")
    assert refuse(lengths=np.zeros(4, int)) == "d.npz: the data has no rows; at least one row is needed."


@FORMS
def test_flat_arrays_with_lengths(tmp_path, name, load):
    """The layout of DPPO's train.npz: states, actions, rewards, terminals, traj_lengths."""
    fields = {"states" if field == "observations" else field: values for field, values in FLAT.items()}
    path = write_arrays(tmp_path / name, {**fields, "traj_lengths": np.array([*EPISODES])})
    same(load(path), from_arrays(**CUT))
    path = write_arrays(tmp_path / name, {**fields, "traj_lengths": np.array([4, 5, 4])})
    assert refusal(path, load) == (
        f"{name}: lengths adds up to 13 steps, but there are 12 rows; correct lengths, or add timeouts."
    )


# groups of episodes


def write_groups(path, more=(1, 1, 1), **changes):
    with h5py.File(path, "w") as file:
        for number, (stop, length) in enumerate(zip(np.cumsum(EPISODES), EPISODES, strict=True)):
            fields = {name: values[stop - length : stop] for name, values in FLAT.items()}
            if more[number]:
                fields["observations"] = np.concatenate([fields["observations"], [[number + 1, length]]])
            for name, values in fields.items():
                file[f"episode_{number}/{name}"] = changes.get(f"{name}_{number}", values)
    return path


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("short", [0, 1, 2])
def test_an_episode_with_as_many_observations_as_steps_loses_its_last_step(tmp_path, short, caplog):
    """The first episode is terminated, so its last step needs no next observation."""
    caplog.set_level("INFO")
    td = load_hdf5(write_groups(tmp_path / "d.hdf5", more=[number != short for number in range(3)]))
    dropped = {0: [], 1: [8], 2: [11]}[short]
    kept = [row for row in range(12) if row not in dropped]
    assert td["observation"].tolist() == OBSERVATIONS[kept].tolist()
    after = OBSERVATIONS + np.array([0, 1])
    after[3] -= (0, short == 0)
    assert td["next", "observation"].tolist() == after[kept].tolist()
    assert rows(td, "next", "truncated") == [row in (8 - (short == 1), 11 - (short == 2)) for row in kept]
    told = [f"dropped 1 row (first: {row}) without a next observation or action mask" for row in dropped]
    assert [message[: len(told[0])] for message in caplog.messages] == told


def test_episodes_beside_metadata_and_in_several_groups(tmp_path, caplog):
    caplog.set_level("INFO")
    expected = load_hdf5(write_groups(tmp_path / "d.hdf5"))
    with h5py.File(tmp_path / "d.hdf5", "a") as file:
        file["meta"], file["config/layers2/width"] = 1.0, 2.0
        file.create_group("episode_3")
    same(load_hdf5(tmp_path / "d.hdf5"), expected)
    assert "/: the entries ['config', 'episode_3', 'meta'] are not read; they are no episodes" in caplog.text
    with h5py.File(tmp_path / "two.hdf5", "w") as file, h5py.File(tmp_path / "d.hdf5") as source:
        for name, parts in (("test", [2]), ("train", [0, 1])):
            for number in parts:
                source.copy(f"episode_{number}", file, f"{name}/episode_{number}")
    both = load_hdf5(tmp_path / "two.hdf5")
    assert rows(both, "next", "reward") == [*REWARDS[9:], *REWARDS[:9]]
    assert "the file has episodes in the groups ['/test', '/train']; all are read" in caplog.text


def test_an_episode_whose_fields_differ_in_length_is_named(tmp_path):
    """In the whole file, the lengths agree."""
    changes = {"rewards_1": REWARDS[4:8], "rewards_2": REWARDS[8:12]}
    assert refusal(write_groups(tmp_path / "d.hdf5", **changes)) == (
        "d.hdf5: episode 1 (counted from 0) has fields of different lengths: {'observations': 5, 'actions': 5, "
        "'rewards': 4, 'terminated': 5, 'next_observations': 5}; each field needs one row per step, and observations "
        "and frames may have one more."
    )


def test_a_file_that_is_open_elsewhere(tmp_path):
    path = write_arrays(tmp_path / "d.hdf5", {**FLAT, "timeouts": CUT["truncated"]})
    code = f"import h5py, sys; file = h5py.File({str(path)!r}, 'a'); print(flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as other:
        other.stdout.readline()
        message = refusal(path)
        other.stdin.close()
    assert message.startswith("d.hdf5: another process has the file open for writing and has locked it (")
    assert message.endswith(
        "Close the file there. If no process writes to the file, for example on a network drive without locks, set the "
        "environment variable HDF5_USE_FILE_LOCKING=FALSE."
    )
    same(load_hdf5(path), from_arrays(**CUT))


@pytest.mark.parametrize("name", ["observations", "episode_0"])
def test_entries_in_another_file_are_refused(tmp_path, name):
    """The other file could change, and an earlier memory-mapped copy would still be read."""
    path = write_arrays(tmp_path / "d.hdf5", {key: values for key, values in FLAT.items() if key != name})
    with h5py.File(path, "a") as file:
        file[name] = h5py.ExternalLink("other.hdf5", "/")
    expected = f"d.hdf5: {name} is stored in the file other.hdf5, which may change; copy the data into this file."
    assert refusal(path, load_hdf5) == expected
