"""What a checkpoint keeps of a replay buffer: enough to go on drawing the same rows, whatever draws them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tensordict import NonTensorData, TensorDict
from torchrl.checkpoint import Checkpoint, CheckpointError, GlobalRNGState
from torchrl.data import PrioritizedSampler, SliceSampler, TensorDictReplayBuffer

from torchrl_bcq import make_replay_buffer
from torchrl_bcq.trainers.bcq import _SamplerState

ROWS = 50
SETTINGS = {
    "uniform": {},
    "without_replacement": {"sampler": "without_replacement"},
    "weighted": {"weights": torch.arange(ROWS) % 5},
    "masked": {"weights": torch.arange(ROWS) % 3 == 0},
    "prioritized": {"sampler": "prioritized"},
    "slices": {"sampler": "slices"},
}


def make(kind: str, seed: int | None) -> TensorDictReplayBuffer:
    transitions = TensorDict({"row": torch.arange(ROWS), "episode": torch.arange(ROWS) // 10}, [ROWS])
    settings = dict(SETTINGS[kind])
    if kind == "slices":
        settings["sampler"] = SliceSampler(num_slices=2, traj_key="episode", cache_values=True)
    try:
        return make_replay_buffer(transitions, batch_size=8, seed=seed, **settings)
    except ImportError as error:
        pytest.skip(str(error))


def draw(buffer: TensorDictReplayBuffer, batches: int) -> list[list[int]]:
    """Rows of some batches; where there are priorities each batch changes them, as training does."""
    drawn = []
    for _ in range(batches):
        batch = buffer.sample()
        drawn.append(batch["row"].tolist())
        if isinstance(buffer.sampler, PrioritizedSampler):
            batch["td_error"] = (batch["row"] % 9).float() + len(drawn)
            buffer.update_tensordict_priority(batch)
    return drawn


def checkpoint(buffer: TensorDictReplayBuffer) -> Checkpoint:
    return Checkpoint(sampler=_SamplerState(buffer), random_state=GlobalRNGState())


@pytest.mark.parametrize("before", [0, 3, 7, 10])  # 7 batches of 8 are the first round of 50, 10 are within the second
@pytest.mark.parametrize("seed", [0, None])
@pytest.mark.parametrize("kind", SETTINGS)
def test_goes_on_with_the_same_rows(tmp_path, kind, seed, before):
    first = make(kind, seed)
    draw(first, before)
    checkpoint(first).save(tmp_path / "checkpoint")
    undisturbed = draw(first, 12)

    torch.manual_seed(1234)  # the break
    second = make(kind, None if seed is None else 99)
    draw(second, 2)
    checkpoint(second).load(tmp_path / "checkpoint")
    assert draw(second, 12) == undisturbed
    assert len({tuple(rows) for rows in undisturbed}) == 12

    suffixes = {file.suffix for file in (tmp_path / "checkpoint").rglob("*") if file.is_file()}
    assert suffixes <= {".json", ".memmap"}  # nothing to unpickle


def test_a_second_break_changes_nothing_either(tmp_path):
    buffer = make("without_replacement", 0)
    undisturbed = draw(make("without_replacement", 0), 15)
    for part in range(3):
        assert draw(buffer, 5) == undisturbed[5 * part : 5 * part + 5]
        checkpoint(buffer).save(tmp_path / str(part))
        buffer = make("without_replacement", part)
        checkpoint(buffer).load(tmp_path / str(part))


def test_a_round_goes_on_where_the_data_is(tmp_path):
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
    with pytest.raises(CheckpointError, match=f"drew with a {classes[0]}, this one with a {classes[1]}; make it alike"):
        checkpoint(make(loaded, 0)).load(tmp_path / "checkpoint")


def test_other_weights_are_refused(tmp_path):
    checkpoint(make("weighted", 0)).save(tmp_path / "checkpoint")
    other = make_replay_buffer(make("uniform", 0)[:], batch_size=8, seed=0, weights=torch.arange(ROWS) % 4)
    with pytest.raises(CheckpointError, match="the saved sampler had other weights"):
        checkpoint(other).load(tmp_path / "checkpoint")


def test_the_weights_are_not_in_the_checkpoint(tmp_path):
    checkpoint(make("weighted", 0)).save(tmp_path / "checkpoint")
    (file,) = Path(tmp_path).rglob("weights.json")
    assert json.loads(file.read_text()).keys() == {"rows", "total", "moment"}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # tensordict warns before it unpickles, which is not enough
def test_a_pickle_in_a_checkpoint_is_never_opened(tmp_path):
    checkpoint(make("uniform", 0)).save(tmp_path / "checkpoint")
    (folder,) = (path.parent for path in (tmp_path / "checkpoint").rglob("generator/meta.json"))
    state = TensorDict({"generator": torch.Generator().get_state(), "x": NonTensorData(Bomb(tmp_path / "opened"))})
    state.memmap(folder)
    with pytest.raises(CheckpointError, match="pickle"):
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
    with pytest.raises(CheckpointError, match="had 50 transitions, this one has 49; go on with the same dataset"):
        checkpoint(other).load(tmp_path / "checkpoint")
