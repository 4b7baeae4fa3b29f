"""A replay buffer of stacked frames: reading it, or saving rows of it, neither changes nor copies the stored frames."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchrl.data import Categorical, Unbounded
from torchrl.objectives import SoftUpdate

from torchrl_bcq import (
    DiscreteBCQLoss,
    OfflineTrainer,
    from_arrays,
    load_hdf5,
    make_discrete_bcq_modules,
    make_replay_buffer,
    stack_observations,
)
from torchrl_bcq.data.frame_stack import FrameStack
from torchrl_bcq.runs.build import _make_normalization
from torchrl_bcq.trainers.checkpoints import dataset_digest

from ..array_files import write_arrays

ROWS, SIZE = 60, 36


def columns() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "observations": rng.integers(0, 256, (ROWS, SIZE, SIZE), dtype=np.uint8),
        "actions": rng.integers(0, 3, ROWS),
        "rewards": rng.normal(size=ROWS),
        "terminals": np.arange(ROWS) % 10 == 9,
        "timeouts": np.zeros(ROWS, bool),
    }


def stacked(tmp_path, root):
    if root:
        return load_hdf5(write_arrays(tmp_path / "frames.hdf5", columns()), root=tmp_path / "copies")
    return stack_observations(from_arrays(*columns().values()), 2)


@pytest.mark.parametrize("root", [False, True])
def test_reading_all_rows_changes_nothing(tmp_path, root):
    buffer = make_replay_buffer(stacked(tmp_path, root), batch_size=8, seed=0)
    before = dataset_digest(buffer.storage[:])
    rows = buffer[:]
    assert type(rows["observation"]) is torch.Tensor
    assert torch.equal(rows["observation"], buffer.storage[:]["observation"].gathered())
    spec = Unbounded(rows["observation"].shape[1:], dtype=torch.uint8)
    assert _make_normalization(True, buffer, spec).observations.keys() == {"observation"}
    assert isinstance(buffer.storage[:]["observation"], FrameStack)
    assert dataset_digest(buffer.storage[:]) == before


def test_the_rows_of_an_infinite_loss_are_saved_without_the_other_frames(tmp_path):
    data = stacked(tmp_path, False)
    data["next", "reward"][:] = 1e38
    (network,) = make_discrete_bcq_modules(
        Unbounded((2, SIZE, SIZE), dtype=torch.uint8), Categorical(3), frame_hidden=[8]
    )
    loss = DiscreteBCQLoss(network, loss_function="l2")
    buffer, updater = make_replay_buffer(data, batch_size=4, seed=0), SoftUpdate(loss, tau=0.1)
    trainer = OfflineTrainer(
        loss,
        buffer,
        target_net_updater=updater,
        total_steps=2,
        log_interval=1,
        progress_bar=False,
        save_trainer_file=str(tmp_path / "trainer"),
    )
    with pytest.raises(FloatingPointError):
        trainer.train()
    (file,) = tmp_path.glob("not-finite*.pt")
    rows = torch.load(file, weights_only=True)
    assert torch.equal(rows["observation"], data["observation"].gathered()[rows["index"]])
    assert file.stat().st_size < 4 * 2 * 2 * SIZE * SIZE + 8_000
