"""The layout compared with a table by hand, and the whole message of each refusal."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from torchrl.data import Binary, Bounded

from torchrl_bcq import from_arrays
from torchrl_bcq.data.checks import Checks
from torchrl_bcq.data.frame_store import FrameStore
from torchrl_bcq.data.transitions import lay_out

# Two episodes, the second cut off, and an unfinished third: observations are 10 * episode + time.
OBSERVATIONS = np.array([[10.0], [11], [12], [20], [21], [30], [31]])
ACTIONS = np.array([[0.1], [0.2], [0.3], [0.4], [0.5], [0.6], [0.7]])
REWARDS = np.array([1.0, 2, 3, 4, 5, 6, 7])
TERMINATED = np.array([0, 0, 1, 0, 0, 0, 0], dtype=bool)
TRUNCATED = np.array([0, 0, 0, 0, 1, 0, 0], dtype=bool)


def arrays(**changes):
    fields = {"observations": OBSERVATIONS, "actions": ACTIONS, "rewards": REWARDS, "terminated": TERMINATED}
    return {**fields, "truncated": TRUNCATED, **changes}


def column(td, *key):
    return td[key if len(key) > 1 else key[0]].flatten().tolist()


def test_rows_never_join_two_episodes(caplog):
    """Without next observations the truncated row (4) and the unfinished last one (6) are dropped."""
    with caplog.at_level(logging.INFO):
        td = from_arrays(**arrays())
    assert td.batch_size == (5,)
    assert column(td, "observation") == [10, 11, 12, 20, 30]
    assert column(td, "next", "observation") == [11, 12, 12, 21, 31]  # the final state repeats its own
    assert column(td, "next", "reward") == [1, 2, 3, 4, 6]
    assert column(td, "next", "terminated") == [False, False, True, False, False]
    assert column(td, "next", "truncated") == [False, False, False, True, True]  # rows before the dropped ones
    assert column(td, "next", "done") == [False, False, True, True, True]
    assert column(td, "episode") == [0, 0, 0, 1, 2]
    assert "dropped 2 rows (first: 4) without a next observation or action mask" in caplog.text


def test_given_next_observations_keep_every_row_and_both_flags():
    following = OBSERVATIONS + 1
    td = from_arrays(**arrays(next_observations=following))
    assert td.batch_size == (7,)
    assert column(td, "next", "observation") == [11, 12, 13, 21, 22, 31, 32]
    assert column(td, "next", "terminated") == TERMINATED.tolist()
    last = np.arange(7) == 6
    assert column(td, "next", "truncated") == (TRUNCATED | last).tolist()
    assert column(td, "next", "done") == (TERMINATED | TRUNCATED | last).tolist()
    assert column(td, "episode") == [0, 0, 0, 1, 1, 2, 2]


def test_row_that_is_both_terminated_and_truncated_is_kept():
    td = from_arrays(**arrays(truncated=TERMINATED))
    assert column(td, "next", "truncated") == [False, False, True, False, False, True]
    assert column(td, "episode") == [0, 0, 0, 1, 1, 1]


def test_a_single_feature_needs_no_second_dimension():
    flat = arrays(observations=OBSERVATIONS[:, 0], actions=ACTIONS[:, 0], next_observations=OBSERVATIONS[:, 0] + 1)
    expected = from_arrays(**arrays(next_observations=OBSERVATIONS + 1))
    assert (from_arrays(**flat) == expected).all()


def test_layout_and_dtypes_are_torchrls():
    columns = {
        "rewards": REWARDS[:, None],
        "terminated": torch.tensor(TERMINATED)[:, None],
        "truncated": TRUNCATED * 1.0,
    }
    td = from_arrays(**arrays(**columns))
    dtypes = {key: (tuple(value.shape[1:]), value.dtype) for key, value in td.items(True, True)}
    flag = ((1,), torch.bool)
    assert dtypes == {
        "observation": ((1,), torch.float32),
        "action": ((1,), torch.float32),
        "episode": ((), torch.int64),
        ("next", "observation"): ((1,), torch.float32),
        ("next", "reward"): ((1,), torch.float32),
        ("next", "done"): flag,
        ("next", "terminated"): flag,
        ("next", "truncated"): flag,
    }


def test_bounds_are_compared_in_the_datas_precision():
    """-0.4 in float32 is slightly below -0.4 in float64, and accepted."""
    spec = Bounded(-0.4, 0.8, (1,), dtype=torch.float64)
    assert len(from_arrays(**arrays(actions=put(ACTIONS, 0, -0.4), action_spec=spec))) == 5


def put(array, row, value):
    array = np.array(array, dtype=float)
    array[row] = value
    return array


SPEC = Bounded(-1, 1, (1,))
BAD = [
    (
        {"rewards": put(REWARDS, [2, 5], np.nan)},
        "rewards has 2 rows (first: 2) that are not finite in float32; drop or repair them.",
    ),
    (
        {"actions": put(ACTIONS, 6, np.inf)},
        "actions has 1 row (first: 6) that are not finite in float32; drop or repair them.",
    ),
    (
        {"observations": put(OBSERVATIONS, 1, 1e39)},
        "observations has 1 row (first: 1) that are not finite in float32; drop or repair them.",
    ),
    (
        {"next_observations": put(OBSERVATIONS, 3, -np.inf)},
        "next_observations has 1 row (first: 3) that are not finite in float32; drop or repair them.",
    ),
    (
        {"observations": OBSERVATIONS * 0},
        "observations is zero in all 7 rows; check that it was written and read correctly.",
    ),
    ({"actions": ACTIONS * 0}, "actions is zero in all 7 rows; check that it was written and read correctly."),
    ({"rewards": REWARDS * 0}, "rewards is zero in all 7 rows; check that it was written and read correctly."),
    ({"actions": ACTIONS[:, :, None]}, "actions has shape (7, 1, 1), expected [N, features]."),
    ({"rewards": np.ones((7, 2))}, "rewards has shape (7, 2), expected [N] or [N, 1]."),
    ({"terminated": np.ones((7, 2))}, "terminated has shape (7, 2), expected [N] or [N, 1]."),
    (
        {"rewards": np.array(["1"] * 7)},
        "rewards has dtype <U1, expected real numbers. Convert rewards to floating-point numbers, in Python with "
        "np.asarray(rewards, dtype=float).",
    ),
    ({"observations": OBSERVATIONS + 1j}, "observations has dtype complex128, expected real numbers."),
    (
        {"terminated": np.array([None] * 7)},
        "terminated has dtype object, expected booleans. Convert "
        "terminated to floating-point numbers, in Python with np.asarray(terminated, dtype=float).",
    ),
    (
        {"terminated": put(TERMINATED, [3, 4], 2)},
        "terminated has 2 rows (first: 3) that are neither 0 nor 1, such as 2.0; use only 0 (false) and 1 (true).",
    ),
    (
        {"truncated": put(TRUNCATED, 5, np.nan)},
        "truncated has 1 row (first: 5) that are neither 0 nor 1, such as nan; use only 0 (false) and 1 (true).",
    ),
    ({"observations": np.ones((0, 1))}, "observations is empty (shape (0, 1)); it needs at least one value."),
    ({"actions": np.ones((7, 0))}, "actions is empty (shape (7, 0)); it needs at least one value."),
    (
        {"rewards": REWARDS[:6]},
        "fields differ in length: {'observations': 7, 'actions': 7, 'rewards': 6, 'terminated': 7, 'truncated': 7}; "
        "each field needs one row per step. Put the last observation of an episode into next_observations.",
    ),
    (
        {"next_observations": np.ones((7, 2))},
        "next_observations has shape (7, 2), but observations has shape (7, 1); both need the same shape.",
    ),
    (
        {"actions": put(ACTIONS, [1, 3], 1.5), "action_spec": SPEC},
        "actions has 2 rows (first: 1) outside the action bounds: the actions span [0.10000000149011612] to [1.5], "
        "the bounds are [-1.0] to [1.0]; clip or rescale the actions.",
    ),
    (
        {"action_spec": Binary(1)},
        "action_spec must be a continuous Bounded spec, got Binary of torch.int8.",
    ),
    (
        {"action_spec": Bounded(-1, 1, (2,))},
        "actions have shape (7, 1), but the action bounds have shape (2,); choose the bounds "
        "of this dataset, or read other actions.",
    ),
    (
        {"truncated": None},
        "truncated and next_observations are both missing, so it is unknown where episodes were cut off; pass one of "
        "them, or truncated=np.zeros(N) if no episode was cut off.",
    ),
    ({"truncated": np.ones(7)}, None),
]


@pytest.mark.parametrize(
    ("changes", "message"), BAD, ids=[f"{i}-{'-'.join(changes)}" for i, (changes, _) in enumerate(BAD)]
)
def test_refusals_name_field_count_and_first_row(changes, message):
    if message is None:
        changes = {**changes, "terminated": TERMINATED & False}
        message = (
            "all 7 rows are truncated and lack a next observation or next action mask; correct truncated, or give "
            "next_observations and, if there are action_masks, next_action_masks."
        )
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the whole message is compared below)
        from_arrays(**arrays(**changes))
    assert str(error.value) == message


def test_several_defects_give_one_message_with_a_list():
    changes = {
        "observations": put(OBSERVATIONS, [2, 4, 6], np.nan),
        "actions": put(ACTIONS, [1, 3], 1.5),
        "rewards": REWARDS * 0,
        "terminated": put(TERMINATED, 5, 3),
        "action_spec": SPEC,
    }
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the whole message is compared below)
        from_arrays(**arrays(**changes))
    assert str(error.value) == (
        "4 defects:\n"
        "- observations has 3 rows (first: 2) that are not finite in float32; drop or repair them.\n"
        "- terminated has 1 row (first: 5) that are neither 0 nor 1, such as 3.0; use only 0 (false) and 1 (true).\n"
        "- actions has 2 rows (first: 1) outside the action bounds: the actions span [0.10000000149011612] to [1.5], "
        "the bounds are [-1.0] to [1.0]; clip or rescale the actions.\n"
        "- rewards is zero in all 7 rows; check that it was written and read correctly."
    )


def test_without_truncated_an_episode_is_cut_where_observations_do_not_continue():
    """Row 2 is terminated and not cut off, although 13 is not 20; row 4 leads to 22, but the next row is 30."""
    td = from_arrays(**arrays(truncated=None, next_observations=OBSERVATIONS + 1))
    assert column(td, "next", "observation") == [11, 12, 13, 21, 22, 31, 32]
    assert column(td, "next", "terminated") == [False, False, True, False, False, False, False]
    assert column(td, "next", "truncated") == [False, False, False, False, True, False, True]
    assert column(td, "next", "done") == [False, False, True, False, True, False, True]
    assert column(td, "episode") == [0, 0, 0, 1, 1, 2, 2]


ABSENT = [["truncated"], ["next_observations"], []]


@pytest.mark.parametrize("absent", ABSENT, ids=["-".join(names) or "none" for names in ABSENT])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_rows_laid_out_in_chunks_are_the_same(size, absent, caplog):
    fields = {**arrays(next_observations=OBSERVATIONS + 1), **dict.fromkeys(absent)}
    with caplog.at_level(logging.INFO):
        expected = from_arrays(**fields)
    told = caplog.messages.copy()
    caplog.clear()
    checks = Checks()
    chunks = [
        checks({name: values[start : start + size] for name, values in fields.items() if values is not None})
        for start in range(0, 7, size)
    ]
    with caplog.at_level(logging.INFO):
        parts = list(lay_out([("", chunks)], FrameStore()))
    found = torch.cat(parts)
    assert len(found) == len(expected)
    assert (found == expected).all()
    assert {key: value.dtype for key, value in found.items(True, True)} == {
        key: value.dtype for key, value in expected.items(True, True)
    }
    assert caplog.messages == told  # of dropped rows, counted over all chunks


def test_defects_are_counted_over_chunks():
    checks = Checks()
    rewards = put(REWARDS, [3, 5, 6], np.nan)
    for start in (0, 2, 4, 6):
        rows = slice(start, start + 2)
        checks({name: values[rows] for name, values in arrays(rewards=rewards).items()})
    with pytest.raises(ValueError) as error:  # noqa: PT011
        checks.finish()
    assert str(error.value) == "rewards has 3 rows (first: 3) that are not finite in float32; drop or repair them."


def test_chunks_that_do_not_fit_together_are_refused():
    checks = Checks()
    checks(arrays())
    with pytest.raises(
        ValueError, match=r"^actions has 2 features from row 7 on, but 1 before; every row needs the same number.$"
    ):
        checks(arrays(actions=np.ones((7, 2))))
    checks = Checks()
    checks(arrays(next_observations=OBSERVATIONS))
    with pytest.raises(
        ValueError, match=r"^next_observations is missing from row 7 on, but given before; every row needs the same f"
    ):
        checks(arrays())
    checks = Checks()
    checks(arrays(truncated=None, next_observations=OBSERVATIONS))
    with pytest.raises(
        ValueError, match=r"^truncated is given from row 7 on, but missing before; every row needs the same fields.$"
    ):
        checks(arrays(next_observations=OBSERVATIONS))


def test_no_chunk_at_all_is_refused():
    with pytest.raises(ValueError, match=r"^the data has no rows; at least one row is needed.$"):
        list(lay_out([], FrameStore()))


def test_warns_of_large_rewards_in_dropped_rows(caplog):
    """Only the last, cut-off rows of the episodes have a large reward, and they are dropped."""
    rewards = np.array([0.0, 0, -1, 0, 1, 0, 1])
    with caplog.at_level(logging.WARNING):
        from_arrays(**arrays(rewards=rewards * [1, 1, 0.01, 1, 1, 1, 1]))
    assert caplog.messages == [
        "dropped 2 rows (first: 4) without a next observation or action mask (truncated rows, or an unfinished last "
        "row). Their mean reward magnitude is 1, and that of all other rows is 0.002. If the dropped rows led to a "
        "final state, set terminated there, or give next_observations (and next_action_masks)."
    ]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        from_arrays(**arrays())
    assert caplog.messages == []


def test_warns_of_steps_that_never_continue(caplog):
    from_arrays(**arrays(truncated=None, next_observations=OBSERVATIONS + 0.5))
    assert caplog.messages == [
        "5 of 7 rows end an episode, because their next observation is not exactly the observation of the next row. If "
        "these rows belong to one episode, sort them by time, and correct or remove the next observations."
    ]
    caplog.clear()
    from_arrays(**arrays(truncated=None, next_observations=OBSERVATIONS + 1))
    assert caplog.messages == []


def test_warns_of_joined_episodes_if_truncated_is_never_set(caplog):
    """Another episode follows row 2, but no flag is set there."""
    following = np.array([[11.0], [12], [13], [21], [30], [31], [32]])
    flags = {"terminated": np.arange(7) == 6, "truncated": np.zeros(7), "next_observations": following}
    assert len(from_arrays(**arrays(**flags))["episode"].unique()) == 1
    assert caplog.messages == [
        "truncated is never set, but the next observation differs from the observation of the next row in 1 row "
        "(first: 2). If episodes were cut off there, mark these rows as truncated."
    ]
    caplog.clear()
    late = arrays(**{**flags, "truncated": np.arange(7) == 4})
    checks = Checks()
    chunks = [checks({name: values[rows] for name, values in late.items()}) for rows in (slice(4), slice(4, 7))]
    assert len(torch.cat(list(lay_out([("", chunks)], FrameStore())))) == 7
    from_arrays(**late)
    from_arrays(**arrays(**{**flags, "next_observations": np.roll(OBSERVATIONS, -1)}))
    assert caplog.messages == []


class Frame:
    """Stands for a pandas frame or series, which NumPy turns into an array of objects or of the wanted dtype."""

    def __init__(self, values):
        self.values = np.array(values, dtype=object)

    def __array__(self, dtype=None, copy=None):
        return self.values if dtype is None else self.values.astype(dtype)


def test_frames_with_columns_of_several_dtypes_are_refused_with_a_remedy_that_works():
    """Such as nullable columns, or a boolean column among numbers."""
    numbers, flags = Frame(OBSERVATIONS.tolist()), Frame(TERMINATED.tolist())
    for name, values, expected in (("observations", numbers, "real numbers"), ("terminated", flags, "booleans")):
        with pytest.raises(ValueError) as error:  # noqa: PT011 (the whole message is compared below)
            from_arrays(**arrays(**{name: values}))
        assert str(error.value) == (
            f"{name} has dtype object, expected {expected}. Convert {name} to floating-point numbers, in Python with "
            f"np.asarray({name}, dtype=float)."
        )
        converted = {name: np.asarray(values, dtype=float)}
        assert (from_arrays(**arrays(**converted)) == from_arrays(**arrays())).all()
    with pytest.raises(
        ValueError, match=r"observations has dtype bool, expected real numbers. Convert observations to"
    ):
        from_arrays(**arrays(observations=OBSERVATIONS > 0))


def test_tensors_of_bfloat16():
    rounded = torch.tensor(OBSERVATIONS, dtype=torch.bfloat16)
    td = from_arrays(**arrays(observations=rounded))
    assert (td == from_arrays(**arrays(observations=rounded.float()))).all()


def test_warns_of_rows_of_environments_that_alternate(caplog):
    """Rows of two environments; only the last row of each is truncated."""
    first, second = np.arange(10.0)[:, None], 100 + np.arange(10.0)[:, None]
    rows = {
        "observations": np.stack([first, second], 1).reshape(-1, 1),
        "next_observations": np.stack([first, second], 1).reshape(-1, 1) + 1,
        "actions": np.linspace(-1, 1, 20)[:, None],
        "rewards": np.arange(20.0),
        "terminated": np.zeros(20),
        "truncated": np.arange(20) >= 18,
    }
    from_arrays(**rows)
    (warning,) = caplog.messages
    assert warning.startswith(
        "inside of episodes, the next observation differs from the observation of the next row in 18"
    )
    caplog.clear()
    order = np.arange(20).reshape(10, 2).T.flatten()  # sorted by environment
    from_arrays(**{name: values[order] for name, values in rows.items()})
    assert not caplog.messages
