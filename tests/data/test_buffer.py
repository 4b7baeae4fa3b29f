from __future__ import annotations

import gc

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import PrioritizedSampler, RandomSampler, SamplerWithoutReplacement

from torchrl_bcq import make_replay_buffer
from torchrl_bcq.data import buffer as module, episodes

from ..conftest import skip_without_extension


def transitions(rows: int = 50) -> TensorDict:
    return TensorDict({"row": torch.arange(rows)}, batch_size=[rows])


def full(rows: int = 50) -> TensorDict:
    flags = {name: torch.zeros(rows, 1, dtype=torch.bool) for name in ("done", "terminated", "truncated")}
    outcome = {"observation": torch.randn(rows, 3), "reward": torch.randn(rows, 1), **flags}
    columns = {"observation": torch.randn(rows, 3), "action": torch.randn(rows, 2), "next": outcome}
    return TensorDict(columns, batch_size=[rows], device="cpu")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"sampler": "without_replacement"},
        {"weights": torch.arange(50) % 2},
        {"weights": torch.arange(50)},
        {"sampler": "prioritized"},
    ],
)
def test_seed_alone_decides_the_order_of_rows(settings):
    if settings.get("sampler") == "prioritized":
        skip_without_extension()
    one, two, other = (make_replay_buffer(transitions(), batch_size=8, seed=seed, **settings) for seed in (1, 1, 2))
    torch.manual_seed(5)
    first = [one.sample()["row"].tolist() for _ in range(5)]
    torch.manual_seed(6)
    assert [two.sample()["row"].tolist() for _ in range(5)] == first
    assert [other.sample()["row"].tolist() for _ in range(5)] != first


def test_samples_uniformly_with_replacement():
    buffer = make_replay_buffer(transitions(10), batch_size=10_000, seed=0)
    counts = torch.bincount(buffer.sample()["row"], minlength=10)
    assert (counts - 1000).abs().max() < 150  # five standard deviations


def test_without_replacement_each_round_has_each_row_once_in_a_new_order():
    buffer = make_replay_buffer(transitions(50), batch_size=20, seed=0, sampler="without_replacement")
    rounds = [[buffer.sample()["row"] for _ in range(3)] for _ in range(2)]
    assert [[len(batch) for batch in batches] for batches in rounds] == [[20, 20, 10]] * 2
    first, second = (torch.cat(batches).tolist() for batches in rounds)
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    assert first != sorted(first)


def test_weights_decide_the_frequencies():
    weights = torch.tensor([0.0, 1.0, 0.0, 2.0, 5.0, 0.0])
    buffer = make_replay_buffer(transitions(6), batch_size=80_000, seed=0, weights=weights)
    counts = torch.bincount(buffer.sample()["row"], minlength=6).tolist()
    assert [counts[row] for row in (0, 2, 5)] == [0, 0, 0]
    for row, share in ((1, 1 / 8), (3, 2 / 8), (4, 5 / 8)):
        deviation = (80_000 * share * (1 - share)) ** 0.5
        assert abs(counts[row] - 80_000 * share) < 5 * deviation


def test_prioritized_starts_uniform_and_follows_the_priorities():
    """At alpha 0.6 a td_error of 32 against 1 in the other nine rows is drawn 32^0.6 = 8 times as often as each."""
    skip_without_extension()
    buffer = make_replay_buffer(transitions(10), batch_size=17_000, seed=0, sampler="prioritized")
    counts = torch.bincount(buffer.sample()["row"], minlength=10)
    assert (counts - 1700).abs().max() < 5 * (17_000 * 0.1 * 0.9) ** 0.5
    errors = torch.ones(10)
    errors[3] = 32.0
    buffer.update_tensordict_priority(TensorDict({"index": torch.arange(10), "td_error": errors}, [10]))
    batch = buffer.sample()
    counts = torch.bincount(batch["row"], minlength=10)
    assert abs(counts[3] - 8000) < 5 * (17_000 * 8 / 17 * 9 / 17) ** 0.5
    weights = batch["priority_weight"]  # (p / min p)^-beta: 8^-0.4 for row 3, 1 for the others
    expected = torch.where(batch["row"] == 3, 8**-0.4, 1.0)
    torch.testing.assert_close(weights, expected)


def test_prioritized_where_the_extension_does_not_fit(monkeypatch):
    def fail(*args, **settings):
        raise RuntimeError("SumSegmentTreeFp32 is not available. See warning above.")

    monkeypatch.setattr(module.PrioritizedSampler, "__init__", fail)
    with pytest.raises(ImportError, match=r"does not fit torch .*built for torch 2.14: .* or use sampler='uniform'"):
        make_replay_buffer(transitions(), sampler="prioritized")


def test_prioritized_on_a_gpu_needs_a_build_with_cuda():
    """The build of PyPI has no CUDA code. TorchRL raises its error before it uses a GPU, so no GPU is needed here."""
    skip_without_extension()
    with pytest.raises(ImportError, match=r"TorchRL built with CUDA, .*; use sampler='uniform', or device='cpu'"):
        make_replay_buffer(transitions(), sampler="prioritized", device="cuda")


def test_any_sampler_of_torchrl_is_used_as_it_is():
    sampler = SamplerWithoutReplacement(shuffle=False)
    buffer = make_replay_buffer(transitions(), batch_size=10, sampler=sampler)
    assert buffer.sampler is sampler
    assert buffer.sample()["row"].tolist() == list(range(10))


def test_own_prioritized_sampler_knows_the_rows_that_are_there():
    skip_without_extension()
    sampler = PrioritizedSampler(10, alpha=1.0, beta=1.0)
    rows = make_replay_buffer(transitions(10), batch_size=1000, sampler=sampler, seed=0).sample()["row"]
    assert set(rows.tolist()) == set(range(10))


def test_data_is_kept_as_given():
    source = transitions()
    buffer = make_replay_buffer(source)
    assert len(buffer) == 50
    assert buffer[:]["row"].tolist() == source["row"].tolist()
    assert buffer.sample().batch_size == (100,)


def test_transitions_are_neither_copied_nor_changed(tmp_path):
    source = full()
    keys = set(source.keys(True, True))
    buffer = make_replay_buffer(source)
    buffer.sample()
    assert buffer[:]["observation"].data_ptr() == source["observation"].data_ptr()
    assert set(source.keys(True, True)) == keys
    source["late"] = torch.zeros(50)  # the buffer does not change with the TensorDict
    assert "late" not in buffer.sample().keys()

    mapped = source.memmap(tmp_path)
    buffer = make_replay_buffer(mapped, batch_size=500, seed=0)
    assert buffer.storage._storage.is_memmap()
    del mapped
    gc.collect()
    batch = buffer.sample()
    torch.testing.assert_close(batch["next", "reward"], source["next", "reward"][batch["index"]])
    assert not batch.is_memmap()
    assert not batch.is_locked


def test_rows_cannot_be_added_or_dropped():
    buffer = make_replay_buffer(full())
    for write in (lambda: buffer.extend(full(3)), lambda: buffer.add(full(1)[0]), buffer.empty):
        with pytest.raises(RuntimeError, match="the dataset is fixed; put new rows into a buffer of your own"):
            write()
    assert len(buffer) == 50


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("key", ["observation", ("nested", "pose"), ("next", "reward")])
def test_values_that_are_not_finite_are_refused(tmp_path, monkeypatch, key, mapped):
    monkeypatch.setattr(episodes, "CHUNK_VALUES", 7)
    source = full()
    source["nested", "pose"] = torch.zeros(50, 2)
    source[key][12] = torch.inf
    source[key][31, 0] = torch.nan
    shown = repr(key).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=rf"{shown} has 2 rows \(first: 12\) that are not finite; drop or repair them"):
        make_replay_buffer(source.memmap(tmp_path) if mapped else source)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("reward", torch.zeros(50), r"'reward'\) has shape \(50,\), expected \(50, 1\). Use reward\[:, None\]."),
        ("terminated", torch.zeros(50).bool(), r"'terminated'\) has shape \(50,\), expected \(50, 1\)"),
        ("done", torch.zeros(50, 2).bool(), r"'done'\) has shape \(50, 2\), expected \(50, 1\)"),
        ("truncated", torch.zeros(50, 1), r"'truncated'\) has dtype torch.float32, expected torch.bool; use .bool\(\)"),
    ],
)
def test_outcomes_of_another_shape_or_dtype_are_refused(name, value, message):
    source = full()
    source["next", name] = value
    with pytest.raises(ValueError, match=message):
        make_replay_buffer(source)


def test_images_text_and_own_names_pass():
    source = TensorDict({"pixels": torch.zeros(4, 3, 8, 8, dtype=torch.uint8), "next": {"gain": torch.ones(4)}}, [4])
    source["robot"] = "arm"
    batch = make_replay_buffer(source, batch_size=2).sample()
    assert batch["pixels"].shape == (2, 3, 8, 8)
    assert batch["next", "gain"].tolist() == [1, 1]
    assert batch["robot"] == "arm"


@pytest.mark.parametrize(
    "bad", [TensorDict({}, batch_size=[]), TensorDict({}, batch_size=[0]), TensorDict({}, batch_size=[2, 3])]
)
def test_odd_batch_sizes_are_refused(bad):
    with pytest.raises(ValueError, match="transitions have batch size"):
        make_replay_buffer(bad)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"sampler": "random"}, r"sampler is 'random', expected one of \['uniform', 'without_replacement', 'prior"),
        ({"sampler": "prioritized", "weights": torch.ones(50)}, "weights and sampler='prioritized' both choose"),
        ({"sampler": RandomSampler(), "weights": torch.ones(50)}, "weights and sampler=RandomSampler.* both choose"),
        ({"weights": torch.ones(49)}, "there are 49 weights for 50 transitions"),
    ],
)
def test_invalid_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make_replay_buffer(transitions(), **settings)
