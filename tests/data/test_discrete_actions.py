"""Discrete actions, masks of available actions, and probabilities of the recorded policy, in arrays and files."""

from __future__ import annotations

import h5py
import minari
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from minari.data_collector import EpisodeBuffer
from torchrl.data import Bounded, Categorical, MultiCategorical, OneHot

from torchrl_bcq import DatasetError, from_arrays, load_hdf5, load_minari, load_npz, load_transitions

from ..array_files import write_arrays

CHOICES = np.array([2, 0, 1, 1, 2, 0, 1, 2])
ENDS = np.array([0, 0, 0, 1, 0, 0, 0, 0])
CUTS = np.array([0, 0, 0, 0, 0, 0, 0, 1])
STEPS = {
    "observations": np.arange(16.0).reshape(8, 2) + 1,
    "rewards": np.ones(8),
    "terminated": ENDS,
    "truncated": CUTS,
    "next_observations": np.arange(16.0).reshape(8, 2) + 3,
}
MASKS = np.ones((8, 3), bool)
MASKS[[1, 4], [1, 0]] = False


def steps(**changes):
    return {**STEPS, "actions": CHOICES, **changes}


def refusal(**changes):
    with pytest.raises(DatasetError) as error:
        from_arrays(**steps(**changes))
    return str(error.value)


FORMS = {
    "[N]": CHOICES,
    "[N, 1]": CHOICES[:, None],
    "bytes": CHOICES.astype(np.uint8),
    "one-hot": np.eye(3, dtype=int)[CHOICES],
    "booleans": np.eye(3, dtype=bool)[CHOICES],
    "tensor": torch.from_numpy(CHOICES),
    "big-endian": CHOICES.astype(">i4"),
}


@pytest.mark.parametrize("form", FORMS)
def test_indices_and_one_hot_vectors_become_indices(form):
    for spec in (None, Categorical(3)):
        action = from_arrays(**steps(actions=FORMS[form]), action_spec=spec)["action"]
        assert (action.tolist(), action.dtype) == (CHOICES.tolist(), torch.int64)
    action = from_arrays(**steps(actions=FORMS[form]), action_spec=OneHot(3))["action"]
    assert action.tolist() == np.eye(3)[CHOICES].tolist()
    assert OneHot(3).is_in(action[0])
    action = from_arrays(**steps(actions=FORMS[form]), action_spec=Categorical(3, shape=(1,)))["action"]
    assert action.tolist() == CHOICES[:, None].tolist()


@pytest.mark.parametrize("form", ["[N]", "[N, 1]", "one-hot"])
def test_floats_are_discrete_if_the_user_says_so(form):
    numbers = FORMS[form].astype(np.float32)
    for how in ({"action_type": "discrete"}, {"action_spec": Categorical(3)}):
        assert from_arrays(**steps(actions=numbers), **how)["action"].tolist() == CHOICES.tolist()
    if numbers.ndim == 2:
        assert from_arrays(**steps(actions=numbers))["action"].tolist() == numbers.tolist()


def test_integers_are_continuous_if_the_user_says_so():
    for how in ({"action_type": "continuous"}, {"action_spec": Bounded(0, 9, (1,))}):
        td = from_arrays(**steps(actions=CHOICES[:, None]), **how)
        assert (td["action"].flatten().tolist(), td["action"].dtype) == (CHOICES.tolist(), torch.float32)


REFUSED = [
    (
        {"actions": CHOICES - 1},
        "actions has 2 rows (first: 1) that are not whole numbers from 0, such as -1.0; correct the actions. If the "
        "actions are continuous, such as doses in whole units, pass action_type='continuous'.",
    ),
    (
        {"action_spec": Categorical(2)},
        "actions has 3 rows (first: 0) that are not whole numbers from 0 to 1, such as 2.0; correct the actions. If "
        "the actions are continuous, such as doses in whole units, pass action_type='continuous'.",
    ),
    (
        {"actions": CHOICES + 0.5, "action_type": "discrete"},
        "actions has 8 rows (first: 0) that are not whole numbers from 0, such as 2.5; correct the actions. If the "
        "actions are continuous, such as doses in whole units, pass action_type='continuous'.",
    ),
    (
        {"actions": np.eye(3, dtype=int)[CHOICES], "action_spec": Categorical(4)},
        "actions has 3 columns, but there are 4 discrete actions; store each action as an index, or as a one-hot "
        "vector with one column for each action.",
    ),
    (
        {"action_type": "continuous", "action_spec": Categorical(3)},
        "action_type is 'continuous', but the action spec is discrete; change one of them.",
    ),
    (
        {"actions": np.where(CHOICES == 1, np.nan, CHOICES), "action_type": "discrete"},
        "actions has 3 rows (first: 2) that are not finite in float32; drop or repair them.",
    ),
    (
        {"action_masks": MASKS[:, :2]},
        "actions has 3 rows (first: 0) that are not whole numbers from 0 to 1, such as 2.0; correct the actions. If "
        "the actions are continuous, such as doses in whole units, pass action_type='continuous'.",
    ),
    (
        {"action_masks": MASKS[:, :2], "action_spec": Categorical(3)},
        "action_masks has 2 columns, but there are 3 discrete actions; store one column for each action.",
    ),
    (
        {"action_masks": MASKS & (np.arange(3) != 2)},
        "actions has 3 rows (first: 0) with an action that action_masks does not allow; correct the actions or the "
        "masks.",
    ),
    (
        {"action_masks": MASKS, "next_action_masks": MASKS & (np.arange(8) != 6)[:, None]},
        "next_action_masks allows no action in 1 row (first: 6) that do not end in a final state; correct them.",
    ),
    (
        {"action_masks": MASKS * 2},
        "action_masks has 8 rows (first: 0) that are neither 0 nor 1, such as 2; use only 0 (false) and 1 (true).",
    ),
    (
        {"actions": np.ones((8, 1)) / 2, "action_masks": MASKS},
        "action_masks is given, but the actions are continuous; if they are discrete, pass action_type='discrete'; "
        "otherwise remove action_masks from the data.",
    ),
    (
        {"action_probabilities": np.array([0.5, 0, 1, 1.5, 1, 1, 1, 1])},
        "action_probabilities has 2 rows (first: 1) that are not above 0 or, for discrete actions, are above 1; give "
        "the probability with which the recorded policy chose the action of the row.",
    ),
    (
        {"truncated": None, "action_masks": MASKS},
        "truncated and next_action_masks are both missing; give one of them.",
    ),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_refusals(changes, message):
    assert refusal(**changes) == message


def test_the_mask_of_the_next_row_is_used_and_the_last_row_of_a_cut_episode_is_dropped():
    td = from_arrays(**steps(action_masks=MASKS))
    assert td["action_mask"].tolist() == MASKS[:7].tolist()
    after = [*MASKS[1:4], MASKS[3], *MASKS[5:8]]  # row 3 is terminated, so its own mask is copied
    assert td["next", "action_mask"].tolist() == np.array(after).tolist()
    assert td["next", "done"].flatten().tolist() == [False, False, False, True, False, False, True]
    assert td["next", "truncated"].flatten().tolist() == [False] * 6 + [True]
    given = from_arrays(**steps(action_masks=MASKS, next_action_masks=~MASKS | [True, False, False]))
    assert len(given) == 8
    assert given["next", "action_mask"].tolist() == (~MASKS | [True, False, False]).tolist()


@pytest.mark.parametrize("kind", ["hdf5", "npz"])
@pytest.mark.parametrize("root", [None, "copies"])
def test_files_hold_masks_and_probabilities(tmp_path, kind, root):
    probabilities = np.linspace(0.2, 0.9, 8)
    entries = {**STEPS, "actions": CHOICES, "action_mask": MASKS, "infos/action_probability": probabilities}
    path, root = write_arrays(tmp_path / f"d.{kind}", entries), root and tmp_path / root
    td = {"hdf5": load_hdf5, "npz": load_npz}[kind](path, root=root)
    expected = from_arrays(**steps(action_masks=MASKS, action_probabilities=probabilities))
    assert (td == expected).all()
    assert {*td.keys(True, True)} == {*expected.keys(True, True)}
    assert td["action_probability"].tolist() == pytest.approx(probabilities[:7].tolist())


def test_the_attribute_of_a_file_says_how_many_actions_there_are(tmp_path):
    path = write_arrays(tmp_path / "d.hdf5", {**STEPS, "actions": CHOICES.astype(float)})
    with h5py.File(path, "a") as file:
        file.attrs["n_actions"] = 3
    assert load_hdf5(path)["action"].tolist() == CHOICES.tolist()
    with h5py.File(path, "a") as file:
        file.attrs["n_actions"] = 2
    with pytest.raises(DatasetError, match=r"3 rows \(first: 0\) that are not whole numbers from 0 to 1, such as 2.0"):
        load_hdf5(path)


def test_the_attribute_may_be_the_number_of_action_dimensions(tmp_path):
    path = write_arrays(tmp_path / "d.hdf5", {**STEPS, "actions": np.full((8, 3), 0.5)}, n_actions=3)
    assert load_hdf5(path, action_type="continuous")["action"].shape == (8, 3)


def test_a_copy_of_actions_that_are_stored_as_floats_with_masks(tmp_path):
    entries = {**STEPS, "actions": CHOICES.astype(float), "action_mask": MASKS}
    path = write_arrays(tmp_path / "d.hdf5", entries, n_actions=3)
    copy = load_hdf5(path, root=tmp_path / "copies")
    assert copy["action"].tolist() == load_hdf5(path)["action"].tolist() == CHOICES[:7].tolist()
    assert copy["action_mask"].tolist() == MASKS[:7].tolist()


def test_padded_indices(tmp_path):
    """Episodes of 4 and 3 steps in arrays [E, T] hold the observation and the mask after the last step."""
    fields = {"observations": (np.arange(20.0).reshape(2, 5, 2) + 1), "actions": CHOICES.reshape(2, 4)}
    fields |= {"rewards": np.ones((2, 4)), "terminals": ENDS.reshape(2, 4), "timeouts": np.zeros((2, 4))}
    masks = np.ones((2, 5, 3), bool)
    masks[1, 3, 0] = False
    td = load_hdf5(write_arrays(tmp_path / "d.h5", {**fields, "lengths": [4, 3], "action_masks": masks}))
    assert td["action"].tolist() == CHOICES[:7].tolist()
    assert td["next", "action_mask"][:, 0].tolist() == [True] * 6 + [False]
    assert td["next", "observation"][6].tolist() == [17, 18]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning:minari")
def test_minari(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    observations = np.arange(10, dtype=np.float32).reshape(5, 2) + 1
    episode = EpisodeBuffer(0, observations=observations, actions=CHOICES[:4], rewards=np.ones(4),
                            terminations=ENDS[:4].astype(bool), truncations=np.zeros(4, bool))  # fmt: skip
    spaces = {"action_space": Discrete(4), "observation_space": Box(-9, 99, (2,), np.float32)}
    minari.create_dataset_from_buffers("test/discrete-v0", [episode], **spaces)
    assert load_minari("test/discrete-v0")["action"].tolist() == CHOICES[:4].tolist()
    with pytest.raises(DatasetError, match=r"not whole numbers from 0 to 1, such as 2.0"):
        load_minari("test/discrete-v0", action_spec=Categorical(2))


def test_joined_files_have_the_same_kind_of_actions(tmp_path):
    one = write_arrays(tmp_path / "one.npz", steps())
    two = write_arrays(tmp_path / "two.npz", steps(actions=CHOICES[:, None] / 2))
    assert load_transitions([one, write_arrays(tmp_path / "copy.npz", steps())])["action"].tolist() == [*CHOICES] * 2
    with pytest.raises(DatasetError, match=r"two.npz: its actions are continuous, but discrete in the sources before"):
        load_transitions([one, two])


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"action_masks": MASKS},
            r"it holds \['action_masks'\], but .*a.npz holds \[\]",
        ),
        ({"action_probabilities": np.full(8, 0.5)}, r"it holds \['action_probabilities'\], but .*a.npz holds \[\]"),
    ],
)
def test_joined_files_have_the_same_fields(tmp_path, changes, message, first):
    files = [{}, changes][:: -1 if first else 1]
    names = {"truncated": "timeouts", "terminated": "terminals"}
    paths = []
    for name, more in zip("ab", files, strict=True):
        fields = {names.get(key, key): value for key, value in steps(**more).items()}
        paths.append(str(write_arrays(tmp_path / f"{name}.npz", fields)))
    with pytest.raises(DatasetError, match="holds .*all sources need the same fields" if first else message):
        load_transitions(paths)


def test_masks_of_joined_files_have_the_same_width(tmp_path):
    paths = []
    for name, width in (("a", 3), ("b", 4)):
        fields = steps(action_masks=np.ones((8, width), bool))
        fields |= {"timeouts": fields.pop("truncated"), "terminals": fields.pop("terminated")}
        paths.append(str(write_arrays(tmp_path / f"{name}.npz", fields)))
    with pytest.raises(DatasetError, match="action_masks"):
        load_transitions(paths)


def test_masks_of_next_states_alone_are_refused():
    assert (
        refusal(next_action_masks=MASKS) == "next_action_masks is given without action_masks; also give action_masks."
    )


def test_a_spec_of_several_choices_is_refused(tmp_path):
    path = write_arrays(tmp_path / "a.npz", steps())
    with pytest.raises(ValueError, match="MultiCategorical"):
        load_npz(path, action_spec=MultiCategorical((3, 2)))
