"""Weights and masks that decide which rows are drawn."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import TensorStorage

from torchrl_bcq import (
    DatasetError,
    WeightedSampler,
    episode_weights,
    make_replay_buffer,
    return_weights,
    split_episodes,
)

LENGTHS = (1, 4, 2, 3)
RETURNS = (5.0, 1.0, 3.0, 1.0)


def episodes(numbers=(3, 4, 8, 9), done: bool = False) -> TensorDict:
    """Four episodes of 1, 4, 2 and 3 rows with returns 5, 1, 3 and 1, marked by their number or by ``done``."""
    rewards = [5.0, 4.0, -2.0, -2.0, 1.0, 1.5, 1.5, 0.0, 0.0, 1.0]
    source = TensorDict({"row": torch.arange(10), "next": {"reward": torch.tensor(rewards)[:, None]}}, [10])
    if done:
        source["next", "done"] = (torch.arange(10)[:, None] == torch.tensor([0, 4, 6])).any(1, keepdim=True)
    else:
        source["episode"] = torch.tensor(numbers).repeat_interleave(torch.tensor(LENGTHS))
    return source


def spread(values) -> list[float]:
    return [value for value, length in zip(values, LENGTHS, strict=True) for _ in range(length)]


def counts(source: TensorDict, weights, draws: int) -> torch.Tensor:
    return torch.bincount(
        make_replay_buffer(source, batch_size=draws, seed=0, weights=weights).sample()["row"], minlength=len(source)
    ).double()


@pytest.mark.parametrize("source", [episodes(), episodes(numbers=(2, 0, 1, 7)), episodes(done=True)])
def test_each_episode_is_as_likely_as_another(source):
    weights = episode_weights(source)
    assert weights.tolist() == spread([1, 1 / 4, 1 / 2, 1 / 3])
    drawn = torch.stack([part.sum() for part in counts(source, weights, 10_000).split(LENGTHS)])
    assert (drawn - 2500).abs().max() < 5 * (10_000 * 0.25 * 0.75) ** 0.5  # five standard deviations


@pytest.mark.parametrize("source", [episodes(), episodes(done=True)])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_episodes_are_weighted_by_their_return(source, temperature):
    """Returns 5, 1, 3, 1 are 1, 0, 1/2, 0 when scaled to their range."""
    weights = return_weights(source, temperature=temperature)
    ratios = torch.tensor(spread([0, -1, -0.5, -1]), dtype=torch.float64) / temperature
    torch.testing.assert_close(weights.log(), ratios)
    torch.testing.assert_close(return_weights(source), return_weights(source, temperature=0.1), rtol=0, atol=0)


def test_returns_and_lengths_multiply():
    source = episodes()
    weights = return_weights(source, temperature=1 / torch.tensor(4.0).log().item()) * episode_weights(source)
    shares = torch.stack([part.sum() for part in weights.split(LENGTHS)])  # 4^0, 4^-1, 4^-1/2, 4^-1
    torch.testing.assert_close(shares / shares.sum(), torch.tensor([4.0, 1, 2, 1], dtype=torch.float64) / 8)


def test_equal_returns_are_weighted_alike():
    source = episodes()
    source["next", "reward"] = torch.tensor([[6.0, 3, 1, 1, 1, 2, 4, 6, 0, 0]]).T
    assert return_weights(source).tolist() == [1.0] * 10


def test_split_keeps_episodes_together():
    source = TensorDict({"episode": torch.arange(40).repeat_interleave(5)}, [200])
    train, held_out = split_episodes(source, fraction=0.25, seed=3)
    assert torch.equal(train, ~held_out)
    assert held_out.view(40, 5).sum(1).unique().tolist() == [0, 5]
    assert held_out.sum() == 50
    assert torch.equal(split_episodes(source, fraction=0.25, seed=3)[1], held_out)
    assert not torch.equal(split_episodes(source, fraction=0.25, seed=4)[1], held_out)
    assert split_episodes(source)[1].sum() == 20


@pytest.mark.parametrize(("fraction", "held"), [(0.01, 1), (0.99, 3)])
def test_split_leaves_an_episode_on_each_side(fraction, held):
    _, held_out = split_episodes(episodes(), fraction=fraction)
    assert len(episodes()["episode"][held_out].unique()) == held


def test_training_part_of_a_memory_map_is_drawn_without_a_copy(tmp_path):
    source = episodes().memmap(tmp_path)
    train, held_out = split_episodes(source, fraction=0.5, seed=1)
    buffer = make_replay_buffer(source, batch_size=1000, seed=0, weights=train)
    assert buffer.storage._storage.is_memmap()
    assert set(buffer.sample()["row"].tolist()) == set(source["row"][train].tolist())
    assert set(source[held_out]["row"].tolist()) == set(range(10)) - set(source["row"][train].tolist())
    both = counts(source, return_weights(source, temperature=10) * train, 1000) > 0
    assert torch.equal(both, train)


def test_refusals():
    with pytest.raises(ValueError, match="the transitions are one episode; a split by episode needs at least two"):
        split_episodes(TensorDict({"episode": torch.zeros(5, dtype=torch.int64)}, [5]))
    for fraction in (0.0, 1.0):
        with pytest.raises(ValueError, match=f"fraction is {fraction}, expected a number between 0 and 1"):
            split_episodes(episodes(), fraction=fraction)
    with pytest.raises(ValueError, match=r"lack \('next', 'done'\); they hold \['row'\].*set transitions\['episode'\]"):
        episode_weights(TensorDict({"row": torch.arange(3)}, [3]))
    with pytest.raises(ValueError, match=r"episode 4 appears again at row 8, after rows of another episode. To join"):
        episode_weights(TensorDict({"episode": torch.tensor([4, 4, 5, 5, 5, 6, 6, 6, 4, 5])}, [10]))
    with pytest.raises(ValueError, match=r"episode has shape \(3, 2\), expected \(3,\)"):
        episode_weights(TensorDict({"episode": torch.zeros(3, 2)}, [3]))
    with pytest.raises(ValueError, match="temperature is 0, expected above 0"):
        return_weights(episodes(), temperature=0)
    with pytest.raises(ValueError, match=r"lack \('next', 'reward'\); they hold \['episode'\]"):
        return_weights(episodes().select("episode"))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_returns_that_are_not_finite_are_refused(value):
    source = episodes()
    source["next", "reward"][[6, 8]] = value
    with pytest.raises(DatasetError) as error:
        return_weights(source)
    assert str(error.value) == ("('next', 'reward') has 2 rows (first: 6) that are not finite; drop or repair them.")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            [1.0, -1.0, torch.nan, 2.0],
            r"weights has 2 rows \(first: 1\) that are negative or not finite, such as -1.0; use 0 to",
        ),
        ([1.0, 1.0, 1.0, torch.inf], r"weights has 1 row \(first: 3\) that are negative or not finite, such as inf"),
        ([0, 0, 0, 0], "weights are zero in all 4 rows, so no row can be drawn"),
        ([[1.0], [1.0]], r"weights have shape \(2, 1\) and dtype torch.float32; expected real numbers of shape \[N\]"),
        ([], r"weights have shape \(0,\)"),
    ],
)
def test_invalid_weights_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        WeightedSampler(torch.tensor(weights))


@pytest.mark.parametrize("share", [0.5, 0.2])
@pytest.mark.parametrize("scale", [1e308, 5.0, 1e-300])  # the sum of the first overflows
def test_weights_of_any_scale(share, scale):
    weights = scale * torch.tensor([share, 0, 1 - share, 0], dtype=torch.float64)
    drawn = counts(TensorDict({"row": torch.arange(4)}, [4]), 1.5 * weights, 1000)
    assert drawn[1] == drawn[3] == 0
    assert abs(drawn[0] - 1000 * share) < 5 * (1000 * share * (1 - share)) ** 0.5  # five standard deviations


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.float32])
def test_weights_of_any_dtype(dtype):
    drawn = counts(TensorDict({"row": torch.arange(3)}, [3]), torch.tensor([0, 1, 1], dtype=dtype), 1000)
    assert drawn[0] == 0
    assert abs(drawn[1] - 500) < 5 * 250**0.5  # five standard deviations


@pytest.mark.parametrize(("point", "row"), [(0.0, 100), (1 - 2**-53, 899)])
def test_extreme_draws_pick_rows_with_weight(monkeypatch, point, row):
    """``torch.rand`` gives 0 at the lowest and the number just below 1 at the highest."""
    weights = torch.rand(1000) + 0.1
    weights[:100] = weights[900:] = 0
    sampler, storage = WeightedSampler(weights), TensorStorage(TensorDict({"row": torch.arange(1000)}, [1000]))
    monkeypatch.setattr(torch, "rand", lambda shape, dtype, **settings: torch.full(shape, point, dtype=dtype))
    assert sampler.sample(storage, 2)[0].tolist() == [row, row]


def test_more_rows_than_multinomial_takes():
    rows = 2**24 + 10
    weights = torch.zeros(rows)
    weights[-3:] = torch.arange(1, 4)
    storage = TensorStorage(torch.zeros(1, dtype=torch.bool).expand(rows))
    assert WeightedSampler(weights).sample(storage, 100)[0].unique().tolist() == [rows - 3, rows - 2, rows - 1]


def test_weights_must_fit_the_storage_and_the_saved_state(tmp_path):
    sampler = WeightedSampler(torch.tensor([1.0, 2, 1, 1, 1]))
    with pytest.raises(ValueError, match="there are 5 weights for the 10 rows of the storage"):
        sampler.sample(TensorStorage(episodes()), 2)
    sampler.dumps(tmp_path)
    WeightedSampler(torch.tensor([2, 4, 2, 2, 2])).loads(tmp_path)  # the same shares
    for other in ([1, 2, 1, 1, 1, 0], [1, 1, 2, 1, 1], [1, 2, 1, 1, 0], [1, 1, 1, 1, 1]):
        with pytest.raises(ValueError, match="the saved sampler had other weights"):
            WeightedSampler(torch.tensor(other)).loads(tmp_path)
