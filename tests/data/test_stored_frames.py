"""Frames that are stored once: readers, stacks, replay buffers and copies, compared with ready stacks."""

from __future__ import annotations

import copy
import logging
import pickle
import tracemalloc
from pathlib import Path

import gymnasium
import h5py
import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.envs import CatFrames, GymWrapper, TransformedEnv, UnsqueezeTransform

from torchrl_bcq import (
    DatasetError,
    describe,
    from_arrays,
    load_hdf5,
    load_memmap,
    load_npz,
    load_transitions,
    make_replay_buffer,
    multi_step,
    split_episodes,
    stack_observations,
)
from torchrl_bcq.data.frame_layout import layout_of
from torchrl_bcq.data.frame_stack import FrameStack
from torchrl_bcq.data.frames import stack_in_folder
from torchrl_bcq.data.sources import conversion, layouts
from torchrl_bcq.reports.description import fields as fields_module
from torchrl_bcq.trainers.checkpoints import dataset_digest

from ..conftest import skip_without_extension

ROWS = 24  # episodes of 10, 9 and 5 rows
TERMINATED, TRUNCATED = np.arange(ROWS) == 9, (np.arange(ROWS) == 18) | (np.arange(ROWS) == 23)


def pictures(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def steps(shape: tuple[int, ...] = (6, 5), following: bool = True) -> dict[str, np.ndarray]:
    """Fields of 24 rows; the next frame of the last row of an episode is not the frame of another row."""
    frames, last = pictures(ROWS, *shape), TERMINATED | TRUNCATED
    after = np.concatenate([frames[1:], frames[-1:]])
    after[last] = pictures(int(last.sum()), *shape, seed=1)
    fields = {
        "observations": frames,
        "actions": np.linspace(-1, 1, ROWS)[:, None],
        "rewards": np.arange(ROWS) + 1.0,
        "terminated": TERMINATED,
        "truncated": TRUNCATED,
    }
    return fields | ({"next_observations": after} if following else {})


def as_vectors(fields: dict[str, np.ndarray]) -> TensorDict:
    """The transitions of the same fields, read as vectors of numbers."""
    flat = {name: values.reshape(ROWS, -1).astype(float) for name, values in fields.items() if values.ndim > 2}
    return from_arrays(**{**fields, **flat})


def flat(frames: torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(np.asarray(frames)).flatten(1).float()


def same_states(frames: TensorDict, vectors: TensorDict) -> bool:
    """Whether frames are the vectors of the same rows."""
    return all(torch.equal(flat(frames[key]), vectors[key]) for key in ("observation", ("next", "observation")))


@pytest.mark.parametrize("following", [True, False])
@pytest.mark.parametrize("number", [1, 2, 4])
def test_equal_to_vectors_of_the_same_numbers(following, number):
    """Vectors are laid out and stacked by other code, which is compared with CatFrames in test_frames.py."""
    fields = steps(following=following)
    frames, vectors = from_arrays(**fields), as_vectors(fields)
    assert isinstance(frames["observation"], FrameStack)
    assert frames["observation"].shape == (ROWS if following else ROWS - 2, 1, 6, 5)
    assert len(frames["observation"].frames) == (ROWS + 3 if following else ROWS)
    assert frames["next", "observation"].frames is frames["observation"].frames
    assert same_states(stack_observations(frames, number), stack_observations(vectors, number))
    for key in ("episode", "action", ("next", "truncated"), ("next", "done")):
        assert torch.equal(frames[key], vectors[key])


def test_frames_are_held_once():
    source = from_arrays(**steps((3, 6, 5)))
    stacked = multi_step(stack_observations(source[torch.arange(ROWS) % 7 != 3], 4), 3, gamma=0.9)
    for rows in (source, stacked, stacked[2:9], stacked.clone(), stacked.split(4)[1], torch.cat([stacked, stacked])):
        for key in ("observation", ("next", "observation")):
            assert rows[key].frames is source["observation"].frames
    assert stacked["observation"].shape[1:] == (12, 6, 5)
    assert copy.deepcopy(stacked)["observation"].frames is source["observation"].frames
    loaded = pickle.loads(pickle.dumps(stacked))
    assert loaded["observation"].frames is loaded["next", "observation"].frames
    moved = stacked.to("meta")
    assert moved["observation"].frames is moved["next", "observation"].frames
    assert moved["observation"].frames.device.type == "meta"
    few = stacked[:2].to("meta")["observation"]  # 8 of 27 frames: only these frames are moved
    assert not isinstance(few, FrameStack)
    assert few.shape == (2, 12, 6, 5)


class Blinks(gymnasium.Env):
    """Random frames ``[H, W]``; episodes end at random, or after 6 steps."""

    observation_space = gymnasium.spaces.Box(0, 255, (6, 5), np.uint8)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def _frame(self):
        return self.np_random.integers(0, 256, (6, 5), dtype=np.uint8)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self._frame(), {}

    def step(self, action):
        return self._frame(), 1.0, bool(self.np_random.uniform() < 0.2), False, {}


@pytest.mark.parametrize("number", [1, 2, 4, 9])
def test_equal_to_cat_frames(number):
    """The rows of an environment that joins its frames are those of the single frames that it recorded."""
    torch.manual_seed(number)
    env = TransformedEnv(GymWrapper(gymnasium.wrappers.TimeLimit(Blinks(), 6)))
    env.append_transform(UnsqueezeTransform(-3, in_keys=["observation"]))
    env.append_transform(CatFrames(number, dim=-3, in_keys=["observation"], out_keys=["stacked"]))
    env.set_seed(number)
    rollout = env.rollout(150, break_when_any_done=False)
    env.close()
    after = rollout["next"]
    fields = {"observations": rollout["observation"], "next_observations": after["observation"]}
    flags = {"terminated": after["terminated"], "truncated": after["truncated"]}
    rows = from_arrays(actions=rollout["action"], rewards=after["reward"], **fields, **flags)
    assert after["terminated"].sum() > 5
    assert (after["truncated"] & ~after["terminated"]).sum() > 3
    stacked = stack_observations(rows, number)
    assert torch.equal(stacked["observation"], rollout["stacked"])
    assert torch.equal(stacked["next", "observation"], after["stacked"])


@pytest.mark.parametrize("sampler", ["uniform", "without_replacement", "prioritized", "weights"])
def test_batches_equal_those_of_ready_stacks(sampler):
    """The same seed draws the same rows from frames stored once and from ready stacks, as ordinary tensors."""
    stacked = multi_step(stack_observations(from_arrays(**steps()), 4), 2, gamma=0.9)
    ready = stacked.apply(lambda entry: entry.gathered() if isinstance(entry, FrameStack) else entry)
    if sampler == "prioritized":
        skip_without_extension()
    weights = {"weights": torch.arange(float(ROWS))} if sampler == "weights" else {"sampler": sampler}
    batches = []
    for source in (stacked, ready):
        torch.manual_seed(3)
        np.random.seed(3)
        buffer = make_replay_buffer(source, batch_size=5, seed=3, **weights)
        drawn = [buffer.sample() for _ in range(4)]
        state = buffer.state_dict()["_sampler"]
        assert not any(isinstance(leaf, FrameStack) for leaf in state.values())
        batches.append(torch.stack([batch.select("observation", "next", "action", "index") for batch in drawn]))
    for key, value in batches[0].items(True, True):
        assert type(value) is torch.Tensor
        assert torch.equal(value, batches[1][key]), key


def test_held_out_episodes_hold_their_own_frames():
    rows = stack_observations(from_arrays(**steps()), 3)
    train, held_out = split_episodes(rows, 0.3)
    ready = rows["observation"].gathered()
    assert torch.equal(rows[held_out]["observation"], ready[held_out])
    assert torch.equal(rows[train]["next", "observation"][-1], rows["next", "observation"].gathered()[train][-1])


def test_frames_in_another_order_of_memory_have_the_same_digest():
    """A checkpoint holds the digest of the dataset; a hash needs frames that are contiguous."""
    frames = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
    columns = [np.zeros((6, 1)) + 0.5, np.ones(6), np.zeros(6), np.arange(6) == 5]
    views = (frames.transpose(0, 3, 1, 2), np.ascontiguousarray(frames.transpose(0, 3, 1, 2)))
    first, second = (dataset_digest(from_arrays(view, *columns)) for view in views)
    assert first == second


def test_rows_cannot_be_changed():
    frames = from_arrays(**steps())["observation"]
    for change in (lambda: frames.zero_(), lambda: frames.__setitem__(0, 1), lambda: frames.add_(1)):
        with pytest.raises(TypeError, match=r"frames of a dataset cannot be changed.*\.gathered\(\)"):
            change()


def test_other_operations_gather():
    frames = from_arrays(**steps())["observation"]
    ready = frames.gathered()
    assert type(ready) is torch.Tensor
    for operation in (
        lambda x: x[3],
        lambda x: x[:, 0],
        lambda x: x[torch.tensor([[1, 2], [0, 5]])],
        lambda x: x[None],
        lambda x: x.float(),
        lambda x: x.flatten(1),
        lambda x: x[2:8].max(),
        lambda x: torch.cat([x, ready]),
        lambda x: torch.cat([x, x], 1),
        lambda x: torch.cat([x[:3], x[5:]]),
        lambda x: torch.zeros_like(ready).copy_(x),
        lambda x: torch.where(x > 100, x, 0),
        lambda x: torch.from_numpy(x.numpy()),
        lambda x: torch.tensor(x.tolist()),
    ):
        assert torch.equal(operation(frames), operation(ready))


# Readers


def episodes(fields: dict[str, np.ndarray]) -> list[slice]:
    stops = np.flatnonzero(fields["terminated"] | fields["truncated"]) + 1
    return [slice(start, stop) for start, stop in zip([0, *stops[:-1]], stops, strict=True)]


def write_flat(path: Path, fields: dict[str, np.ndarray]) -> None:
    with h5py.File(path, "w") as file:
        for name, values in fields.items():
            file[name] = values


def write_groups(path: Path, fields: dict[str, np.ndarray]) -> None:
    """One group for each episode, with the frame after the last step, as in Minari's files."""
    with h5py.File(path, "w") as file:
        for number, rows in enumerate(episodes(fields)):
            group = file.create_group(f"episode_{number}")
            for name in ("actions", "rewards", "terminated", "truncated"):
                group[name] = fields[name][rows]
            now, after = fields["observations"][rows], fields["next_observations"][rows]
            group["observations"] = np.concatenate([now, after[-1:]])


def write_padded(path: Path, fields: dict[str, np.ndarray]) -> None:
    with h5py.File(path, "w") as file:
        parts = episodes(fields)
        file["lengths"] = [part.stop - part.start for part in parts]
        for name, values in fields.items():
            padded = np.zeros((3, 10, *values.shape[1:]), values.dtype)
            for number, part in enumerate(parts):
                padded[number, : part.stop - part.start] = values[part]
            file[name] = padded


def write_tianshou(path: Path, fields: dict[str, np.ndarray]) -> None:
    with h5py.File(path, "w") as file:
        names = {"observations": "obs", "actions": "act", "rewards": "rew", "next_observations": "obs_next"}
        for name, values in fields.items():
            file[f"_meta/{names.get(name, name)}"] = values
        file.attrs.update(maxsize=ROWS, _size=ROWS, _insertion_idx=0)


def write_d3rlpy(path: Path, fields: dict[str, np.ndarray]) -> None:
    """A dump holds no frame after the last step."""
    with h5py.File(path, "w") as file:
        file["columns"] = [b"observations", b"actions", b"rewards", b"terminated"]
        for number, rows in enumerate(episodes(fields)):
            for name in ("observations", "actions", "rewards"):
                file[f"{name}_{number}"] = fields[name][rows]
            file[f"terminated_{number}"] = fields["terminated"][rows][-1]


@pytest.mark.parametrize("write", [write_flat, write_groups, write_padded, write_tianshou, write_d3rlpy])
@pytest.mark.parametrize("chunk", [60, 10**6])
def test_layouts_of_hdf5(tmp_path, monkeypatch, write, chunk):
    """In memory and as a memory-mapped copy, with chunks of two frames and with one chunk."""
    monkeypatch.setattr(layouts, "CHUNK_BYTES", chunk)
    fields = steps()
    write(tmp_path / "d.hdf5", fields)
    expected = as_vectors(steps(following=write is not write_d3rlpy))
    for rows in (load_hdf5(tmp_path / "d.hdf5"), load_hdf5(tmp_path / "d.hdf5", root=tmp_path / "copies")):
        assert same_states(stack_observations(rows, 3), stack_observations(expected, 3))
        assert len(rows["observation"].frames) == ROWS + (0 if write is write_d3rlpy else 3)
        for key in ("action", "episode", ("next", "done")):
            assert torch.equal(rows[key], expected[key])


def test_npz_and_several_files(tmp_path):
    fields = steps()
    np.savez(tmp_path / "a.npz", **fields)
    write_flat(tmp_path / "b.hdf5", {name: values[:19] for name, values in fields.items()})
    one = load_npz(tmp_path / "a.npz")
    assert same_states(one, as_vectors(fields))
    both = load_transitions([tmp_path / "a.npz", tmp_path / "b.hdf5"], root=tmp_path / "copies")
    assert torch.equal(both["observation"], torch.cat([one["observation"].gathered(), one["observation"][:19]]))
    assert len(both["observation"].frames) == ROWS + 3 + 19 + 2
    assert stack_observations(both, 2)["observation"][ROWS].equal(one["observation"].gathered()[[0, 0], 0])
    write_flat(tmp_path / "c.hdf5", steps((7, 5)))
    with pytest.raises(DatasetError) as error:
        load_transitions([tmp_path / "a.npz", tmp_path / "c.hdf5"])
    assert "c.hdf5: observations has (1, 7, 5) as the shape of its frames, but (1, 6, 5) in" in str(error.value)


def with_frames(fields: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same frames, beside vectors ``[N, 2]`` that count the rows."""
    count = np.arange(ROWS, dtype=np.float32)[:, None] + [1, 101]
    beside = {name.replace("observations", "frames"): fields[name] for name in fields if "observations" in name}
    vectors = {name: count + ("next" in name) for name in fields if "observations" in name}
    return {**fields, **vectors, **beside}


@pytest.mark.parametrize("following", [True, False])
def test_frames_beside_vectors(tmp_path, following):
    fields = with_frames(steps(following=following))
    write_flat(tmp_path / "d.hdf5", fields)
    names = {name: name for name in ("frames", "next_frames") if name in fields}
    expected = as_vectors(steps(following=following))
    read = load_hdf5(tmp_path / "d.hdf5", names=names, root=tmp_path / "copies")
    for rows in (from_arrays(**fields), read):
        assert rows["observation"].dtype == torch.float32
        assert torch.equal(flat(rows["pixels"]), expected["observation"])
        assert torch.equal(flat(rows["next", "pixels"]), expected["next", "observation"])
        stacked = stack_observations(rows, 3)
        assert stacked["observation"][2].tolist() == [1, 101, 2, 102, 3, 103]
        assert torch.equal(flat(stacked["pixels"]), stack_observations(expected, 3)["observation"])


def test_frames_of_groups_beside_vectors(tmp_path):
    """robomimic: obs and next_obs are groups; the next frames have the name of the frames."""
    fields = with_frames(steps())
    with h5py.File(tmp_path / "d.hdf5", "w") as file:
        for number, rows in enumerate(episodes(fields)):
            group = file.create_group(f"data/demo_{number}")
            for name in ("actions", "rewards"):
                group[name] = fields[name][rows]
            group["dones"] = fields["terminated"][rows]
            for name, after in (("obs", ""), ("next_obs", "next_")):
                group[f"{name}/state"] = fields[f"{after}observations"][rows]
                group[f"{name}/image"] = fields[f"{after}frames"][rows]
    names = {"observations": "obs/state", "frames": "obs/image", "terminated": "dones"}
    rows = load_hdf5(tmp_path / "d.hdf5", names=names)
    assert torch.equal(flat(rows["next", "pixels"]), as_vectors(steps())["next", "observation"])
    only = load_hdf5(tmp_path / "d.hdf5", names={"observations": "obs/image", "terminated": "dones"})
    assert same_states(only, as_vectors(steps()))


@pytest.mark.parametrize("lacking", ["next_frames", "next_observations"])
def test_without_one_of_the_next_fields(caplog, lacking):
    """The other one is not used, so that both next states are of the same row."""
    caplog.set_level(logging.INFO)
    fields = with_frames(steps())
    rows = from_arrays(**{name: values for name, values in fields.items() if name != lacking})
    assert same_states(rows.select("next").set("observation", rows["pixels"]).set(("next", "observation"),
                       rows["next", "pixels"]), as_vectors(steps(following=False)))  # fmt: skip
    assert any(
        "is not used, because the other next field is missing: each next state is the state of the next row" in message
        for message in caplog.messages
    )
    del fields["truncated"], fields[lacking]
    if lacking == "next_observations":
        return  # from_arrays refuses this before
    with pytest.raises(DatasetError, match=f"but {lacking} and truncated are missing; give one of these two"):
        from_arrays(**fields)


# Copies


def test_copy_holds_frames_once_and_is_read_again(tmp_path):
    write_flat(tmp_path / "d.hdf5", steps((3, 40, 40)))
    rows = load_hdf5(tmp_path / "d.hdf5", root=tmp_path / "copies")
    folder = Path(rows["action"].filename).parent
    assert (folder / "0.frames").stat().st_size == (ROWS + 3) * 3 * 40 * 40
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < (ROWS + 3) * 3 * 40 * 40 + 5_000
    assert rows.is_memmap()
    assert rows.is_locked
    again = load_memmap(folder)
    assert torch.equal(again["next", "observation"], rows["next", "observation"])
    batch = make_replay_buffer(again, batch_size=7).sample()
    assert torch.equal(batch["observation"], rows["observation"].gathered()[batch["index"]])
    stacked = stack_in_folder(rows, 4)
    assert stacked["observation"].shape == (ROWS, 12, 40, 40)
    assert (folder.with_name(f"{folder.name}-stack4") / "0.frames").samefile(folder / "0.frames")
    assert torch.equal(stacked["observation"], stack_observations(rows, 4)["observation"])
    spanning = multi_step(stacked, 3, 0.9, folder=tmp_path / "three")
    assert torch.equal(spanning["next", "observation"], multi_step(stacked, 3, 0.9)["next", "observation"])
    assert (tmp_path / "three" / "0.frames").samefile(folder / "0.frames")


def test_frames_in_memory_are_written_to_a_folder(tmp_path):
    rows = from_arrays(**with_frames(steps()))
    written = stack_observations(rows, 2, folder=tmp_path / "stacked")
    assert torch.equal(written["pixels"], stack_observations(rows, 2)["pixels"])
    assert written["pixels"].frames is written["next", "pixels"].frames
    assert (tmp_path / "stacked" / "0.frames").stat().st_size == (ROWS + 3) * 30


def test_links_are_replaced_by_copies_where_there_are_none(tmp_path, monkeypatch):
    write_flat(tmp_path / "d.hdf5", steps())
    rows = load_hdf5(tmp_path / "d.hdf5", root=tmp_path / "copies")
    monkeypatch.setattr("os.link", lambda *_: (_ for _ in ()).throw(OSError("no links")))
    stacked = stack_in_folder(rows, 2)
    assert torch.equal(stacked["observation"], stack_observations(rows, 2)["observation"])


def test_no_half_written_copy_is_left(tmp_path, monkeypatch):
    write_flat(tmp_path / "d.hdf5", steps())
    monkeypatch.setattr(conversion, "write_frames", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        load_hdf5(tmp_path / "d.hdf5", root=tmp_path / "copies")
    assert [path for path in (tmp_path / "copies").iterdir() if path.suffix != ".lock"] == []


def test_damaged_copies_are_refused(tmp_path):
    write_flat(tmp_path / "d.hdf5", steps())
    rows = load_hdf5(tmp_path / "d.hdf5", root=tmp_path / "copies")
    folder = Path(rows["action"].filename).parent
    (folder / "0.frames").write_bytes(b"short")
    with pytest.raises(
        DatasetError, match=r"0.frames has 5 bytes, expected 810 for the frames \[27, 1, 6, 5\]; delete"
    ):
        load_memmap(folder)
    (folder / "frames.json").write_text("[{]")
    with pytest.raises(DatasetError, match="cannot be read"):
        load_memmap(folder)


# Shapes and refusals


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((84, 84), "HW"), ((1, 84, 84), "CHW"), ((4, 84, 84), "CHW"), ((84, 84, 1), "HWC"), ((84, 84, 4), "HWC"),
        ((96, 96, 3), "HWC"), ((3, 96, 96), "CHW"), ((64, 64, 12), "HWC"), ((12, 64, 64), "CHW"), ((4, 4, 4), "CHW"),
        ((5, 5, 3), "HWC"), ((16, 12, 11), "CHW"),
    ],
)  # fmt: skip
def test_layout_of_frames(shape, layout):
    assert layout_of(shape) == layout


def test_channels_are_moved_to_the_front(caplog):
    caplog.set_level(logging.INFO)
    fields = steps((9, 8, 3))
    rows = from_arrays(**fields)
    assert torch.equal(rows["observation"], torch.from_numpy(fields["observations"]).permute(0, 3, 1, 2))
    assert caplog.messages[0] == (
        "observations has shape [N, 9, 8, 3]; the last dimension is taken for the channels, and the frames become "
        "[N, 3, 9, 8]."
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda f: {**f, "observations": f["observations"] / 255},
            r"observations has shape \(24, 6, 5\) and dtype float64\. If this is \[step, environment, features\], .*"
            r"If these are frames, store bytes from 0 to 255: frames with values from 0 to 1 become",
        ),
        (lambda f: {**f, "observations": f["observations"].astype(int)}, "dtype int64, expected vectors"),
        (lambda f: {**f, "observations": f["observations"][:, None, None]}, r"shape \(24, 1, 1, 6, 5\) and dtype"),
        (lambda f: {**f, "frames": f["observations"].reshape(24, -1)}, r"frames has shape \(24, 30\) and dtype uint8"),
        (lambda f: {**f, "next_observations": f["next_observations"][:, :5]}, r"next_observations has shape \(24, 1"),
        (lambda f: {**f, "observations": f["observations"][1:]}, "fields differ in length: {'observations': 23, 'act"),
        (
            lambda f: {**with_frames(f), "next_frames": f["observations"][:, :5]},
            r"next_frames has shape \(24, 1, 5, 5\), but frames has shape \(24, 1, 6, 5\); both need the same shape",
        ),
        (lambda f: {**f, "next_frames": f["observations"]}, "next_frames is given without frames; also give frames"),
        (lambda f: {**f, "observations": np.zeros((24, 6, 5), np.uint8)}, "observations is zero in all 24 rows"),
        (lambda f: {**f, "observations": np.zeros((24, 6, 0), np.uint8)}, r"observations has shape \(24, 6, 0\)"),
    ],
)  # fmt: skip
def test_refusals(change, message):
    with pytest.raises(DatasetError, match=message):
        from_arrays(**change(steps()))


def test_stacks_are_told(caplog):
    """Frames that are stacked already; and ready stacks of rollouts, which are ordinary tensors."""
    once = stack_observations(from_arrays(**steps()), 4)
    fields = {"observations": once["observation"], "next_observations": once["next", "observation"]}
    twice = from_arrays(**{**steps(), **fields})
    caplog.clear()
    stack_observations(twice, 4)
    assert caplog.messages == [
        "the observations seem to be stacked already: each holds the last channels of the row before, moved by 1 "
        "places. If so, do not stack them again."
    ]
    with pytest.raises(DatasetError, match=r"append CatFrames\(N, dim=-3\) to the environment"):
        stack_observations(once.apply(lambda x: x.gathered() if isinstance(x, FrameStack) else x), 2)


def test_missing_rows_are_told(caplog):
    rows = from_arrays(**steps())
    stack_observations(rows[torch.arange(ROWS) != 4], 2)
    assert caplog.messages[0].startswith("in 1 of 23 rows (first: 3), the next observation is not the observation of")


def test_description_reads_a_sample_of_the_frames(tmp_path, monkeypatch):
    fields = with_frames(steps())
    fields["frames"][3] = 7
    rows = stack_observations(from_arrays(**fields), 2)
    found = describe(rows)
    assert "pixels          [2, 6, 5] uint8  min 0  max 255  (24 sampled frames, 1 of one colour)" in str(found)
    found.plot(tmp_path / "picture.png")
    alone = from_arrays(**steps())
    monkeypatch.setattr(fields_module, "SAMPLE_FRAMES", 5)
    assert "observations    [1, 6, 5] uint8" in str(describe(alone))
    assert "(5 sampled frames, 0 of one colour)" in str(describe(alone))
    assert [finding.kind for finding in describe(alone).findings] == ["few rows"]
    assert describe(alone).survey.nbytes < ROWS * 30 + ROWS * 60
    twice = torch.cat([alone, alone])
    twice["episode"] = torch.cat([alone["episode"], alone["episode"] + 3])
    assert "repeated" in [finding.kind for finding in describe(twice).findings]


def test_copies_are_written_in_small_parts(tmp_path, monkeypatch):
    """14 MB of frames, in chunks of 0.5 MB; writing, stacking and drawing batches hold a few chunks in memory."""
    rows, ends = 2_000, np.arange(2_000) % 100 == 99
    with h5py.File(tmp_path / "d.hdf5", "w") as file:
        file["observations"] = pictures(rows, 84, 84)
        file["actions"], file["rewards"] = np.linspace(-1, 1, rows)[:, None], np.ones(rows)
        file["terminals"], file["timeouts"] = np.zeros(rows), ends
    monkeypatch.setattr(layouts, "CHUNK_BYTES", 2**19)
    load_hdf5(tmp_path / "d.hdf5")  # imports
    tracemalloc.start()
    stacked = stack_in_folder(load_hdf5(tmp_path / "d.hdf5", root=tmp_path / "copies"), 4)
    make_replay_buffer(stacked, batch_size=8).sample()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert stacked["observation"].numel() == 55_883_520  # 1,980 rows: the 20 rows that were cut off are dropped
    assert peak < 5_000_000
