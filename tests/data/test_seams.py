"""Two datasets that ``torch.cat`` joined: the seam is noticed, and the named remedy works."""

from __future__ import annotations

from functools import partial

import h5py
import numpy as np
import pytest
import torch
from tensordict import TensorDict

from torchrl_bcq import (
    DatasetError,
    episode_weights,
    from_arrays,
    from_rollouts,
    load_hdf5,
    load_transitions,
    multi_step,
    return_weights,
    split_episodes,
)
from torchrl_bcq.data.episodes import episode_numbers, episode_returns
from torchrl_bcq.reports.description import describe

LOOK_BEYOND_A_ROW = {
    "multi_step": partial(multi_step, num_steps=3, gamma=0.99),
    "episode_weights": episode_weights,
    "return_weights": return_weights,
    "split_episodes": split_episodes,
    "episode_returns": episode_returns,
}


def write(path, first: float, episodes: int, *, terminated: bool, after: bool):
    """Episodes of 20 steps; all of them terminated or cut off."""
    rows = np.arange(20 * episodes)
    ends = rows % 20 == 19
    with h5py.File(path, "w") as file:
        file["observations"] = first + rows[:, None] + 100.0 * (rows // 20)[:, None]
        file["actions"] = np.full((len(rows), 1), 0.5)
        file["rewards"] = rows + 1.0
        file["terminals"] = ends & terminated
        file["timeouts"] = ends & (not terminated) & (rows < rows[-1])
        if after:
            file["next_observations"] = file["observations"][()] + 1
    return path


@pytest.fixture(params=[(1, F, A) for F in (True, False) for A in (True, False)] + [(2, False, False), (2, True, True)])
def files(request, tmp_path):
    """Two files of one or two episodes; the last episode of a file is cut off without a flag, or terminated."""
    episodes, terminated, after = request.param
    shape = {"terminated": terminated, "after": after}
    return [write(tmp_path / f"{i}.hdf5", 1000 * i + 1, episodes, **shape) for i in range(2)]


def by_episode(td: TensorDict) -> TensorDict:
    return td[td["episode"].argsort(stable=True)]


@pytest.mark.parametrize("order", [torch.clone, by_episode], ids=["as joined", "sorted by episode"])
@pytest.mark.parametrize("name", LOOK_BEYOND_A_ROW)
def test_seam_is_refused_and_the_remedy_works(files, name, order):
    """Cases t19, v12, y04; sorting the rows by episode hides no seam."""
    call = LOOK_BEYOND_A_ROW[name]
    parts = [load_hdf5(file) for file in files]
    joined = order(torch.cat(parts))
    with pytest.raises(
        DatasetError, match=r"To join datasets, use load_transitions\(\[A, B\]\) for files or from_roll"
    ):
        call(joined)
    right = load_transitions(files)
    episodes = 2 * (1 + int(parts[0]["episode"].max()))
    assert len(episode_returns(right)) == episodes
    call(right)
    for rows in (from_rollouts(parts), from_rollouts(joined)):
        assert len(episode_returns(rows)) == episodes
        call(rows)


def test_message_names_the_rows(tmp_path):
    one = load_hdf5(write(tmp_path / "a.hdf5", 1, 1, terminated=False, after=False))
    with pytest.raises(DatasetError) as error:
        multi_step(torch.cat([one, one]), 3, 0.99)
    assert str(error.value) == (
        "row 18 ends episode 0 (done is true), but row 19 has the same episode number. To join datasets, use "
        "load_transitions([A, B]) for files or from_rollouts([a, b]), and not torch.cat. If these are rows of one "
        "dataset, correct the numbers, or delete the entry episode, so that done ends episodes."
    )
    rows = torch.cat([one, one]).exclude("episode")  # the last remedy
    assert episode_returns(rows).tolist() == [190, 190]  # 1 + 2 + ... + 19; the last row was dropped
    two = load_hdf5(write(tmp_path / "b.hdf5", 1, 2, terminated=True, after=True))
    with pytest.raises(
        DatasetError, match=r"^episode 0 appears again at row 40, after rows of another episode. To join"
    ):
        multi_step(torch.cat([two, two]), 3, 0.99)


def test_describe_reports_the_seam(files):
    parts = [load_hdf5(file) for file in files]
    remedy = "if torch.cat joined datasets, use load_transitions([A, B]) or from_rollouts([a, b]) instead"
    for order in (torch.clone, by_episode):
        assert any(remedy in str(finding) for finding in describe(order(torch.cat(parts))).findings)
    assert not any(remedy in str(finding) for finding in describe(load_transitions(files)).findings)


def test_right_data_raises_no_alarm(files):
    """n-step rows before the end of an episode have its flags; rows may be left out; episodes in any order."""
    data = load_transitions(files)
    numbers = data["episode"]
    lengths = numbers.bincount()
    for steps in (1, 3, 50):
        spanning = multi_step(data, steps, 0.9)
        assert torch.equal(episode_weights(spanning), 1 / lengths.double()[numbers])
        assert torch.equal(episode_numbers(spanning), numbers)
    kept = data[torch.arange(len(data)) % 3 != 1]
    assert episode_numbers(kept).unique().tolist() == numbers.unique().tolist()
    assert torch.equal(episode_numbers(kept), kept["episode"])
    backwards = torch.cat([data[numbers == number] for number in numbers.unique().flip(0)])
    assert torch.equal(episode_numbers(backwards), numbers.max() - backwards["episode"])
    with pytest.raises(DatasetError, match=r"has the same episode number|appears again"):
        episode_weights(torch.cat([multi_step(load_hdf5(file), 3, 0.9) for file in files]))


def test_every_reader_marks_the_last_row_of_each_episode():
    """Episodes of 3, 2 and 2 rows, with and without next observations; the last row of the data has no flag."""
    rows = np.arange(7)
    fields = {"observations": rows[:, None] + 1.0, "actions": rows[:, None] + 1.0, "rewards": rows + 1.0}
    fields |= {"terminated": rows == 2, "truncated": rows == 4}
    for after in (None, rows[:, None] + 2.0):
        td = from_arrays(**fields, next_observations=after)
        last = torch.cat([td["episode"][1:] != td["episode"][:-1], torch.tensor([True])])
        assert torch.equal(td["next", "done"][:, 0], last)
        assert torch.equal(td["next", "truncated"][:, 0], last & ~td["next", "terminated"][:, 0])
