"""Statistics against numbers computed by hand, and the same whatever the chunks; the text; the picture."""

from __future__ import annotations

from unittest import mock

import matplotlib.figure
import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Bounded

from torchrl_bcq import describe, from_arrays
from torchrl_bcq.reports.description import fields as fields_module, scan as scan_module
from torchrl_bcq.reports.description.picture import draw


def small():
    """Two episodes of three and two rows: one terminates, one is cut off."""
    return from_arrays(
        observations=np.array([[1.0, 10], [2, 20], [3, 30], [4, 40], [5, 60]], dtype=np.float32),
        actions=np.array([[-2.0], [0.5], [1], [2], [1]], dtype=np.float32),
        rewards=np.array([1.0, 2, 3, 4, -8]),
        terminated=np.array([0, 0, 1, 0, 0], dtype=bool),
        truncated=np.array([0, 0, 0, 0, 1], dtype=bool),
        next_observations=np.array([[2.0, 20], [3, 30], [9, 9], [5, 60], [6, 60]], dtype=np.float32),
    )


def random_data(rows=5000):
    """Episodes of 1 to 40 rows, some NaN, some repeated rows and some that don't continue."""
    rng = np.random.default_rng(0)
    done = rng.random(rows) < 0.1
    done[-1] = True
    observation = rng.normal(size=(rows, 4)).astype(np.float32)
    observation[100:110] = observation[200:210]
    observation[:, 3] = observation[:, 1]
    terminated = done & (rng.random(rows) < 0.5)
    td = from_arrays(
        observation,
        rng.uniform(-1, 1, (rows, 2)).clip(-0.5, 0.5).astype(np.float32),
        rng.normal(size=rows),
        terminated,
        done & ~terminated,
        np.roll(observation, -1, 0),
    )
    td["observation"][[17, 2500], 0] = float("nan")
    td["next", "reward"][[40, 4100]] = 1e6
    td[300:320] = td[3000:3020]
    return td


def test_statistics_by_hand():
    survey = describe(small()).survey
    assert survey.lengths.tolist() == [3, 2]
    assert survey.returns.tolist() == [6, -4]
    assert survey.last.tolist() == [2, 4]
    assert (survey.terminated.tolist(), survey.truncated.tolist()) == ([True, False], [False, True])
    (observations,) = survey.observations
    assert (observations.low.tolist(), observations.high.tolist()) == ([1, 10], [5, 60])
    assert observations.mean.tolist() == pytest.approx([3, 32])
    assert observations.std.tolist() == pytest.approx([2**0.5, 296**0.5])  # of -2 .. 2; of -22, -12, -2, 8, 28
    assert survey.rewards.mean.item() == pytest.approx(0.4)
    assert survey.actions.mean.item() == pytest.approx(0.5)


def test_text():
    assert str(describe(small(), action_spec=Bounded(-2, 2, (1,)))).split("\n") == [
        "5 transitions in 2 episodes, 0.0 MB",
        "episode length  min 2  median 2.5  max 3 steps",
        "return          min -4  mean 1  std 5  max 6",
        "reward          min -8  mean 0.4  std 4.317  max 4",
        "ends            1 terminated  1 truncated  0 without a flag",
        "",
        "column                  min       mean        std        max   spec            at bounds",
        "observations 0            1          3      1.414          5",
        "observations 1           10         32       17.2         60",
        "actions 0                -2        0.5      1.342          2   -2 to 2             40.0%",
        "",
        "1 thing to look at",
        "  1  transitions has only 5 rows (first: 0), fewer than 1000; record more data, because networks",
        "     overfit few rows.",
    ]


def test_values_that_are_not_finite_are_left_out():
    td = small()
    td["observation"][1] = torch.tensor([float("nan"), float("inf")])
    td["next", "reward"][3] = float("nan")
    survey = describe(td).survey
    assert survey.observations[0].mean.tolist() == pytest.approx([13 / 4, 35])
    assert survey.observations[0].std.tolist() == pytest.approx([(8.75 / 4) ** 0.5, 325**0.5])
    assert survey.returns.tolist() == [6, -8]


@pytest.mark.parametrize("memmap", [False, True])
def test_chunks_change_nothing(monkeypatch, tmp_path, memmap):
    td = random_data()
    whole = describe(td)
    monkeypatch.setattr(fields_module, "CHUNK_BYTES", 1000)
    parts = describe(td.memmap(tmp_path / "data") if memmap else td)
    assert parts.findings == whole.findings
    assert len(whole.findings) == 7
    for one, other in zip(
        [*whole.survey.observations, whole.survey.actions, whole.survey.rewards],
        [*parts.survey.observations, parts.survey.actions, parts.survey.rewards],
        strict=True,
    ):
        for name in ("low", "high", "count"):
            assert torch.equal(getattr(one, name), getattr(other, name))
        assert one.checksums == other.checksums
        torch.testing.assert_close(one.mean, other.mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(one.std, other.std, rtol=1e-12, atol=0)
        assert torch.equal(one.sample.nan_to_num(), other.sample.nan_to_num())
    assert torch.equal(whole.survey.lengths, parts.survey.lengths)
    torch.testing.assert_close(whole.survey.returns, parts.survey.returns, rtol=0, atol=1e-9)
    assert torch.equal(whole.survey.last, parts.survey.last)


def test_the_last_chunk_may_be_one_row(monkeypatch):
    td = random_data()[:4901]
    whole = describe(td)
    monkeypatch.setattr(fields_module, "CHUNK_BYTES", whole.survey.nbytes // 4901 * 50)
    chunks = list(fields_module.Reader(td).chunks())
    assert chunks[-2:] == [slice(4850, 4900), slice(4900, 4901)]
    assert describe(td).findings == whole.findings


def test_one_row():
    survey = describe(small()[:1]).survey
    assert (survey.lengths.tolist(), survey.returns.tolist()) == ([1], [1])
    assert survey.observations[0].mean.tolist() == [1, 10]


def test_statistics_against_numpy():
    td = random_data()
    survey = describe(td).survey
    observation = td["observation"].double().numpy()
    np.testing.assert_allclose(survey.observations[0].mean, np.nanmean(observation, 0), atol=1e-14)
    np.testing.assert_allclose(survey.observations[0].std, np.nanstd(observation, 0), rtol=1e-12)
    rewards, episode = td["next", "reward"].double().squeeze(1).numpy(), td["episode"].numpy()
    starts = np.flatnonzero(np.r_[True, episode[1:] != episode[:-1]])
    np.testing.assert_allclose(survey.returns, np.add.reduceat(rewards, starts), atol=1e-9)


def test_sample_is_spread(monkeypatch):
    monkeypatch.setattr(scan_module, "SAMPLE_ROWS", 100)
    td = random_data()
    td["action"][:, 0] = torch.arange(5000)
    sample = describe(td).survey.actions.sample
    assert sample.shape == (100, 2)
    assert len(sample[:, 0].unique()) == 100
    assert torch.equal(sample[:, 0].sort().values, sample[:, 0])
    assert sample[:, 0].mean() == pytest.approx(2500, abs=500)  # 3.5 standard errors


def test_rollouts_of_several_environments():
    """``[2, 3]``: rows of the two do not follow one another, though no flag says so."""
    td = small()[:3]
    td["next", "terminated"].zero_()
    td["next", "done"].zero_()
    td = torch.stack([td, td.clone()])
    del td["episode"]
    survey = describe(td).survey
    assert survey.lengths.tolist() == [3, 3]
    assert survey.returns.tolist() == [6, 6]


def test_episodes_come_from_flags_where_they_have_no_number():
    td = small()
    del td["episode"], td["next", "done"], td["next", "truncated"]
    survey = describe(td).survey
    assert survey.lengths.tolist() == [3, 2]
    assert survey.truncated.tolist() == [False, False]
    assert "1 terminated  0 truncated  1 without a flag" in str(describe(td))


def test_the_row_before_a_dropped_row_is_truncated():
    """The third of 6 steps is cut off, and the last step is unfinished: neither has a next observation."""
    ones = np.arange(1, 7)[:, None] * 1.0
    td = from_arrays(ones, ones, ones, np.zeros(6), [0, 0, 1, 0, 0, 0])
    assert str(describe(td)).splitlines()[4] == "ends            0 terminated  2 truncated  0 without a flag"


def test_own_keys_nested_observations_and_images():
    td = small()
    td["robot", "speed"] = td.pop("observation")
    td["next", "robot", "speed"] = td["next"].pop("observation")
    td["pixels"] = torch.arange(5 * 12, dtype=torch.uint8).reshape(5, 3, 2, 2)
    td["next", "pixels"] = td["pixels"] + 1
    text = str(describe(td))
    assert "robot.speed 1           10         32       17.2         60" in text
    assert "pixels          [3, 2, 2] uint8  min 0  max 59" in text


def test_observations_of_whole_numbers_and_of_one_number():
    td = small()
    for part in (td, td["next"]):
        part["observation"] = part["observation"].long()
        part["speed"] = part["observation"][:, 1].half()
    survey = describe(td).survey
    assert {field.name: field.mean.tolist() for field in survey.observations} == {
        "observations": [3, 32],
        "speed": [32],
    }


def test_entries_that_are_no_observations():
    td = small()
    td["td_error"] = torch.rand(5, 1)
    td["next", "other"] = torch.rand(5, 1)
    td["is_init"] = torch.ones(5, 1, dtype=torch.bool)
    td["next", "is_init"] = ~td["is_init"]
    assert [field.name for field in describe(td).survey.observations] == ["observations"]


@pytest.mark.parametrize("own", [False, True])
def test_observations_without_next_ones(own):
    td = small()
    td["goal"] = torch.rand(5, 2)
    del td["next", "observation"]
    if own:
        td["next", "goal"] = td["goal"]
    assert sorted(field.name for field in describe(td).survey.observations) == ["goal", "observations"]


@pytest.mark.parametrize("data", [small, random_data])
def test_picture_is_whole_or_not_there(tmp_path, data):
    description, path = describe(data()), tmp_path / "new" / "folder" / "data.png"
    description.plot(path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n")
    assert path.stat().st_size > 20_000
    before = path.read_bytes()

    def half(self, aside, **_):
        aside.write_bytes(b"half")
        raise OSError("disk full")

    with mock.patch.object(matplotlib.figure.Figure, "savefig", half), pytest.raises(OSError, match="disk full"):
        description.plot(path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["data.png"]


def test_picture_of_many_columns_and_of_none(tmp_path):
    zeros = torch.zeros(50, 1, dtype=torch.bool)
    following = {"observation": torch.randn(50, 300), "reward": torch.randn(50, 1), "terminated": zeros}
    td = TensorDict({"observation": torch.randn(50, 300), "action": torch.randn(50, 22), "next": following}, [50])
    text = str(describe(td))
    assert "... 280 more columns" in text
    assert "... 2 more columns" in text
    describe(td).plot(tmp_path / "wide.png")
    td = small()
    td["observation"][:] = float("nan")
    describe(td).plot(tmp_path / "none.png")
    assert len(list(tmp_path.iterdir())) == 2


def test_the_picture_names_the_columns(tmp_path):
    rng = np.random.default_rng(0)
    states, actions, ends = rng.normal(size=(90, 2)), rng.uniform(size=(90, 1)), np.arange(90) % 30 == 29
    transitions = from_arrays(states, actions, np.ones(90), np.zeros(90), ends, next_observations=states)
    describe(transitions, column_names={"observations": ["$\\x$", "$"]}).plot(tmp_path / "a.png")  # no formula
    describe(transitions, column_names={"observations": ["质量", "x"]}).plot(tmp_path / "b.png")  # no such characters
    for names in (None, {"observations": ["place", "mass"], "actions": ["force"]}):
        survey = describe(transitions, column_names=names).survey
        *_, action, observation = draw(survey, []).axes
        shown = [label.get_text() for label in observation.get_xticklabels()]
        assert (action.get_xlabel(), shown[:2] == ["place", "mass"]) == (
            f"column {'force' if names else 0}",
            bool(names),
        )


def test_findings_name_the_columns():
    """The example of a finding was made before the names were known."""
    rng = np.random.default_rng(0)
    states, actions = rng.normal(size=(90, 2)), rng.uniform(-1, 1, size=(90, 2))
    states[7, 1], actions[5, 1] = 1e4, 3.0
    transitions = from_arrays(states, actions, rng.normal(size=90), np.zeros(90), np.arange(90) % 30 == 29)
    names, spec = {"observations": ["place", "mass"], "actions": ["force", "dose"]}, Bounded(-1, 1, (2,))
    found = {one.kind: one.message for one in describe(transitions, action_spec=spec, column_names=names).findings}
    assert "3 in column dose, where the bounds are -1 to 1" in found["outside"]
    assert "10000 in column mass, where the others span" in found["far"]


def test_not_finite_pixels_do_not_count_as_zero():
    pixels = torch.rand(60, 3, 4, 4) + 1
    pixels[3, 0, 0, 0] = torch.nan
    rows = TensorDict({"pixels": pixels, "action": torch.randn(60, 1)}, [60])
    ends = torch.arange(60)[:, None] % 20 == 19
    rows["next"] = TensorDict({"pixels": pixels, "reward": torch.randn(60, 1), "terminated": ends}, [60])
    images = describe(rows).survey.images.values()
    assert images
    assert all(image.low >= 1 for image in images)


def test_almost_equal_returns_are_drawn(tmp_path):
    """Sums in another order differ in the last bit, which 40 bins cannot split."""
    rewards = torch.tensor([0.1, 0.2, 0.3, 0.3, 0.2, 0.1] * 10, dtype=torch.float64)[:, None]
    rows = TensorDict({"observation": torch.randn(60, 2), "action": torch.randn(60, 1)}, [60])
    ends = torch.arange(60)[:, None] % 3 == 2
    rows["next"] = TensorDict({"observation": torch.randn(60, 2), "reward": rewards, "terminated": ends}, [60])
    describe(rows).plot(tmp_path / "a.png")
