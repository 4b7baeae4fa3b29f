"""The state of a replay buffer in a checkpoint, from which each sampler draws the same rows again."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from tensordict import NonTensorData, TensorDict
from torchrl.checkpoint import Checkpoint, CheckpointError, GlobalRNGState
from torchrl.data import ListStorage, PrioritizedSampler, SliceSampler, TensorDictReplayBuffer

from torchrl_bcq import make_replay_buffer
from torchrl_bcq.data.frame_stack import FrameStack
from torchrl_bcq.trainers.checkpoints import SamplerState, dataset_digest, make_checkpoint

from ..conftest import skip_without_extension

ROWS = 50
SETTINGS = {
    "uniform": {},
    "without_replacement": {"sampler": "without_replacement"},
    "weighted": {"weights": torch.arange(ROWS) % 5},
    "masked": {"weights": torch.arange(ROWS) % 3 == 0},
    "prioritized": {"sampler": "prioritized"},
    "slices": {"sampler": "slices"},
    "list": {},
}


def make(kind: str, seed: int | None) -> TensorDictReplayBuffer:
    transitions = TensorDict({"row": torch.arange(ROWS), "episode": torch.arange(ROWS) // 10}, [ROWS])
    settings = dict(SETTINGS[kind])
    if kind == "slices":
        settings["sampler"] = SliceSampler(num_slices=2, traj_key="episode", cache_values=True)
    if settings.get("sampler") == "prioritized":
        skip_without_extension()
    if kind == "list":
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        buffer = TensorDictReplayBuffer(storage=ListStorage(ROWS), batch_size=8, generator=generator)
        buffer.extend(transitions)
        return buffer
    return make_replay_buffer(transitions, batch_size=8, seed=seed, **settings)


def draw(buffer: TensorDictReplayBuffer, batches: int) -> list[list[int]]:
    """Rows of some batches; each batch changes the priorities, if there are any, as training does."""
    drawn = []
    for _ in range(batches):
        batch = buffer.sample()
        drawn.append(batch["row"].tolist())
        if isinstance(buffer.sampler, PrioritizedSampler):
            batch["td_error"] = (batch["row"] % 9).float() + len(drawn)
            buffer.update_tensordict_priority(batch)
    return drawn


def checkpoint(buffer: TensorDictReplayBuffer) -> Checkpoint:
    return make_checkpoint(sampler=SamplerState(buffer), random_state=GlobalRNGState())


@pytest.mark.parametrize("before", [0, 3, 7, 10])  # 7 batches of 8 are the first round of 50, 10 are within the second
@pytest.mark.parametrize("seed", [0, None])
@pytest.mark.parametrize("kind", SETTINGS)
def test_draws_the_same_rows_after_a_load(tmp_path, kind, seed, before):
    first = make(kind, seed)
    draw(first, before)
    checkpoint(first).save(tmp_path / "checkpoint")
    undisturbed = draw(first, 12)

    torch.manual_seed(1234)  # a new process has another random state
    second = make(kind, None if seed is None else 99)
    draw(second, 2)
    checkpoint(second).load(tmp_path / "checkpoint")
    assert draw(second, 12) == undisturbed
    assert len({tuple(rows) for rows in undisturbed}) == 12

    suffixes = {file.suffix for file in (tmp_path / "checkpoint").rglob("*") if file.is_file()}
    assert suffixes == {".json", ".pt"}  # read with weights_only=True


def test_several_loads(tmp_path):
    buffer = make("without_replacement", 0)
    undisturbed = draw(make("without_replacement", 0), 15)
    for part in range(3):
        assert draw(buffer, 5) == undisturbed[5 * part : 5 * part + 5]
        checkpoint(buffer).save(tmp_path / str(part))
        buffer = make("without_replacement", part)
        checkpoint(buffer).load(tmp_path / str(part))


def test_a_round_is_loaded_to_the_device_of_the_data(tmp_path):
    """A generator of another device than the round's could not draw the next one."""
    buffer = make("without_replacement", 0)
    draw(buffer, 1)
    checkpoint(buffer).save(tmp_path / "checkpoint")
    buffer.storage.device = torch.device("meta")  # stands in for an accelerator
    checkpoint(buffer).load(tmp_path / "checkpoint")
    assert buffer.sampler._sample_list.device.type == "meta"


@pytest.mark.parametrize(("saved", "loaded"), [("uniform", "weighted"), ("without_replacement", "uniform")])
def test_another_kind_of_sampler_is_refused(tmp_path, saved, loaded):
    checkpoint(make(saved, 0)).save(tmp_path / "checkpoint")
    classes = [type(make(kind, 0).sampler).__name__ for kind in (saved, loaded)]
    with pytest.raises(CheckpointError, match=f"used a {classes[0]}, but this one uses a {classes[1]}; use the same"):
        checkpoint(make(loaded, 0)).load(tmp_path / "checkpoint")


def test_other_weights_are_refused(tmp_path):
    checkpoint(make("weighted", 0)).save(tmp_path / "checkpoint")
    other = make_replay_buffer(make("uniform", 0)[:], batch_size=8, seed=0, weights=torch.arange(ROWS) % 4)
    with pytest.raises(CheckpointError, match="the saved sampler had other weights"):
        checkpoint(other).load(tmp_path / "checkpoint")


def state_file(path: Path, component: str = "sampler") -> Path:
    return path / Checkpoint.manifest(path)["components"][component]["path"] / "state.pt"


def test_the_weights_are_not_in_the_checkpoint(tmp_path):
    checkpoint(make("weighted", 0)).save(tmp_path / "checkpoint")
    state = torch.load(state_file(tmp_path / "checkpoint"), weights_only=True)
    assert state["sampler"].keys() == {"rows", "total", "moment"}


def test_a_pickle_in_place_of_a_state_is_not_loaded(tmp_path):
    checkpoint(make("uniform", 0)).save(tmp_path / "checkpoint")
    file = state_file(tmp_path / "checkpoint")
    torch.save({**torch.load(file, weights_only=True), "x": Bomb(tmp_path / "opened")}, file)
    with pytest.raises(CheckpointError, match="Weights only load failed"):
        checkpoint(make("uniform", 0)).load(tmp_path / "checkpoint")
    assert not (tmp_path / "opened").exists()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # tensordict warns, and unpickles
def test_a_pickle_in_memory_mapped_files_is_not_loaded(tmp_path):
    """TorchRL's own adapter reads them if there is no state.pt."""
    checkpoint(make("uniform", 0)).save(tmp_path / "checkpoint")
    file = state_file(tmp_path / "checkpoint")
    state = TensorDict({"rows": torch.zeros(1), "x": NonTensorData(Bomb(tmp_path / "opened"))})
    state.memmap(file.parent / "state")
    (file.parent / "state.json").write_text("{}")
    file.unlink()
    with pytest.raises(CheckpointError, match="there is no .*state.pt"):
        checkpoint(make("uniform", 0)).load(tmp_path / "checkpoint")
    assert not (tmp_path / "opened").exists()


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_another_number_of_transitions_is_refused(tmp_path):
    checkpoint(make("uniform", 0)).save(tmp_path / "checkpoint")
    other = make_replay_buffer(TensorDict({"row": torch.arange(49)}, [49]), batch_size=8, seed=0)
    with pytest.raises(CheckpointError, match="had 50 transitions, but this one has 49; resume with the same dataset"):
        checkpoint(other).load(tmp_path / "checkpoint")


def test_a_dataset_with_one_other_value_is_refused(tmp_path):
    checkpoint(make("uniform", 0)).save(tmp_path / "checkpoint")
    rows = make("uniform", 0)[:].clone()
    rows["row"][17] += 1
    message = "the dataset has changed since the checkpoint: it has the same number of transitions, but other values"
    with pytest.raises(CheckpointError, match=message):
        checkpoint(make_replay_buffer(rows, batch_size=8, seed=0)).load(tmp_path / "checkpoint")
    rows["row"][17] -= 1
    checkpoint(make_replay_buffer(rows, batch_size=8, seed=0)).load(tmp_path / "checkpoint")


DATA = {"a": torch.arange(6.0), ("next", "b"): torch.arange(12).reshape(6, 2)}
OTHERS = {
    "value": {**DATA, "a": torch.arange(6.0) + torch.eye(6)[5] * 1e-6},
    "order": {**DATA, "a": torch.arange(6.0).flip(0)},
    "name": {"c": DATA["a"], ("next", "b"): DATA["next", "b"]},
    "nesting": {"a": DATA["a"], ("other", "b"): DATA["next", "b"]},
    "dtype": {**DATA, ("next", "b"): DATA["next", "b"].view(torch.float64)},  # the same bytes
    "shape": {**DATA, ("next", "b"): DATA["next", "b"].reshape(6, 1, 2)},
    "more": {**DATA, "c": torch.zeros(6, 0)},
}


@pytest.mark.parametrize("changed", OTHERS)
def test_digest_changes_with(changed):
    assert dataset_digest(TensorDict(OTHERS[changed], [6])) != dataset_digest(TensorDict(DATA, [6]))


@pytest.mark.parametrize("hashed_at_a_time", [1, 20, 1 << 24])
def test_digest_depends_on_the_data_alone(tmp_path, monkeypatch, hashed_at_a_time):
    """It does not depend on files, the order of entries, strides, or the size of the parts that are read."""
    digest = dataset_digest(TensorDict(DATA, [6]))
    monkeypatch.setattr("torchrl_bcq.trainers.checkpoints._DIGEST_BYTES", hashed_at_a_time)
    assert dataset_digest(TensorDict(DATA, [6]).memmap(tmp_path)) == digest
    assert dataset_digest(TensorDict(dict(reversed(DATA.items())), [6])) == digest
    strided = DATA["next", "b"].T.contiguous().T
    assert dataset_digest(TensorDict({**DATA, ("next", "b"): strided}, [6])) == digest


def test_digest_of_stored_frames(monkeypatch):
    """Each frame is hashed once, and neither the order in which frames are stored nor unused frames matter."""
    frames = torch.arange(5 * 4, dtype=torch.uint8).reshape(5, 1, 2, 2)
    now, later = torch.tensor([[0, 0], [0, 1], [3, 3]]), torch.tensor([[0, 1], [1, 2], [3, 4]])
    hashed = []

    def digest(stored: torch.Tensor, *, moved: int = 0, shift: int = 0) -> str:
        entries = {"o": FrameStack(stored, (now + moved) % 5), ("next", "o"): FrameStack(stored, (later + moved) % 5)}
        return dataset_digest(TensorDict({**entries, "x": torch.arange(3) + shift}, [3]))

    sha256 = hashlib.sha256
    monkeypatch.setattr(hashlib, "sha256", lambda *frame: hashed.extend(frame) or sha256(*frame))
    monkeypatch.setattr(FrameStack, "gathered", lambda self: pytest.fail("frames are copied"))
    expected = digest(frames)
    assert len(hashed) == 5
    assert digest(frames.roll(2, 0), moved=2) == expected
    assert digest(torch.cat([frames, frames[:1] + 9])) == expected
    assert digest(frames, shift=1) != expected
    assert digest(frames.roll(2, 0)) != expected
    for number in range(5):
        assert digest(frames + torch.eye(5, dtype=torch.uint8)[number].view(5, 1, 1, 1)) != expected


def test_digest_by_hand():
    flags = torch.tensor([True, False])
    assert dataset_digest(TensorDict({"f": flags}, [2])) == hashlib.sha256(b"f torch.bool (2,)\x01\x00").hexdigest()


def test_a_generator_of_another_kind_of_device_is_seeded(tmp_path, caplog):
    """The state of a CUDA generator has another size."""
    buffers = [make("uniform", seed) for seed in (0, 1)]
    for buffer in buffers:
        state = SamplerState(make("uniform", 0)).state_dict()
        state["generator"] = torch.arange(16, dtype=torch.uint8)
        SamplerState(buffer).load_state_dict(state)
        assert "the checkpoint is from another kind of device, so training draws other rows" in caplog.text
    first, second = (draw(buffer, 3) for buffer in buffers)
    assert first == second != draw(make("uniform", 0), 3)
