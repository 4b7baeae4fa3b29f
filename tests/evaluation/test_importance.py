"""Importance sampling over two short episodes, computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from torchrl_bcq import DatasetError, ImportanceSampling, multi_step

RATIO = torch.tensor([2.0, 0.5, 0.0])
GAMMA = 0.5
ONES = torch.ones(3)


def episodes() -> TensorDict:
    """An episode with the rewards 1 and 2, and one with the reward 3."""
    ended = torch.tensor([[False], [True], [True]])
    following = {"reward": torch.tensor([[1.0], [2.0], [3.0]]), "done": ended, "terminated": ended}
    return TensorDict({"next": following}, [3])


def test_estimates():
    """The weights of the first episode are 2 and 1, that of the second one is 0."""
    sampling = ImportanceSampling(episodes(), RATIO, GAMMA, (ONES, ONES, ONES))
    found = sampling.estimate()
    assert found["importance_sampling"] == pytest.approx((2 * 1 + 0.5 * 1 * 2 + 0) / 2)
    assert found["weighted_importance_sampling"] == pytest.approx((2 * 1 + 0.5 * 2 * 2 + 0) / 2)
    first = 1 + 2 * (1 + 0.5 * 1 - 1) + 0.5 * 1 * (2 + 0 - 1)  # the value after the end is 0
    assert found["doubly_robust"] == pytest.approx((first + 1) / 2)
    weighted = 1 + 2 * (1 + 0.5 * 1 - 1) + 0.5 * 2 * (2 + 0 - 1)
    assert found["weighted_doubly_robust"] == pytest.approx((weighted + 1) / 2)
    assert sampling.effective_sample_size == pytest.approx(1)


def test_a_ratio_of_one_gives_the_recorded_returns():
    sampling = ImportanceSampling(episodes(), ONES, GAMMA)
    assert sampling.estimate() == pytest.approx({"importance_sampling": 2.5, "weighted_importance_sampling": 2.5})
    assert sampling.effective_sample_size == pytest.approx(2)


def test_chosen_episodes():
    sampling = ImportanceSampling(episodes(), RATIO, GAMMA)
    assert sampling.estimate(np.array([0, 0]))["importance_sampling"] == pytest.approx(3)
    assert sampling.estimate(np.array([0, 0]))["weighted_importance_sampling"] == pytest.approx(1 + 0.5 * 2)
    assert sampling.estimate(np.array([1]))["weighted_importance_sampling"] == 0


def test_the_value_after_a_cut_off_counts():
    data = episodes()
    data["next", "terminated"] = torch.zeros(3, 1, dtype=torch.bool)
    found = ImportanceSampling(data, ONES, GAMMA, (0 * ONES, 0 * ONES, 4 * ONES)).estimate()
    first = (1 + 0.5 * 4) + 0.5 * (2 + 0.5 * 4)
    assert found["doubly_robust"] == pytest.approx((first + (3 + 0.5 * 4)) / 2)


def test_episodes_must_be_known():
    with pytest.raises(DatasetError, match="done"):
        ImportanceSampling(episodes().exclude(("next", "done")), RATIO, GAMMA)


@pytest.mark.parametrize("probability", [0.05, 0.95])
def test_long_episodes(probability):
    """Each episode has the return 1200, so a weighted mean of the returns is 1200, too."""
    rows = 4 * 1200
    ended = torch.arange(1, rows + 1).view(-1, 1) % 1200 == 0
    following = {"reward": torch.ones(rows, 1), "done": ended, "terminated": ended}
    ratio = torch.full((rows,), probability / 0.5)
    ratio[::7] = 0.2  # not the same in all episodes
    sampling = ImportanceSampling(TensorDict({"next": following}, [rows]), ratio, 1.0)
    assert sampling.estimate()["weighted_importance_sampling"] == pytest.approx(1200)
    assert 1 <= sampling.effective_sample_size <= 4
    assert not np.isnan(sampling.estimate()["importance_sampling"])


@pytest.mark.parametrize(
    ("ratio", "values", "name"), [(RATIO[:, None], None, "ratio"), (RATIO, (ONES, ONES[:, None], ONES), "values")]
)
def test_wrong_shapes_are_refused(ratio, values, name):
    with pytest.raises(ValueError, match=rf"{name} has shape \(3, 1\), expected one number for each row: \(3,\)"):
        ImportanceSampling(episodes(), ratio, GAMMA, values)


def test_several_steps_in_a_row_are_refused():
    with pytest.raises(DatasetError, match="a row spans several steps"):
        ImportanceSampling(multi_step(episodes(), 2, GAMMA), RATIO, GAMMA)
