from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict

from torchrl_bcq import make_replay_buffer


def transitions(rows: int = 50) -> TensorDict:
    return TensorDict({"row": torch.arange(rows)}, batch_size=[rows])


def test_seed_alone_decides_the_order_of_rows():
    one, two, other = (make_replay_buffer(transitions(), batch_size=8, seed=seed) for seed in (1, 1, 2))
    torch.manual_seed(5)
    first = [one.sample()["row"].tolist() for _ in range(5)]
    torch.manual_seed(6)
    assert [two.sample()["row"].tolist() for _ in range(5)] == first
    assert [other.sample()["row"].tolist() for _ in range(5)] != first


def test_samples_uniformly_with_replacement():
    buffer = make_replay_buffer(transitions(10), batch_size=10_000, seed=0)
    counts = torch.bincount(buffer.sample()["row"], minlength=10)
    assert (counts - 1000).abs().max() < 150  # five standard deviations


def test_data_is_kept_as_given():
    source = transitions()
    buffer = make_replay_buffer(source)
    assert len(buffer) == 50
    assert buffer[:]["row"].tolist() == source["row"].tolist()
    assert buffer.sample().batch_size == (100,)


@pytest.mark.parametrize(
    "bad", [TensorDict({}, batch_size=[]), TensorDict({}, batch_size=[0]), TensorDict({}, batch_size=[2, 3])]
)
def test_odd_batch_sizes_are_refused(bad):
    with pytest.raises(ValueError, match="transitions have batch size"):
        make_replay_buffer(bad)


def test_empty_batches_are_refused():
    with pytest.raises(ValueError, match="batch_size is 0"):
        make_replay_buffer(transitions(), batch_size=0)
