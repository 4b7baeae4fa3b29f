"""Twenty defects of a dataset, each written to a file, and the message that a user gets.

Readers refuse the first ten. The others may be intended, and ``describe`` reports them.
"""

from __future__ import annotations

import numpy as np
import pytest
from torchrl.data import Bounded

from torchrl_bcq import DatasetError, describe, load_hdf5

from ..array_files import write_arrays

ROWS = 1300  # 13 episodes: the first has 80 steps, the last 120, the others 100
LAST = np.r_[np.arange(80, 1300, 100), ROWS] - 1
SPEC = Bounded(-1, 1, (2,))


def healthy() -> dict[str, np.ndarray]:
    """Random steps; even episodes are cut off, odd ones terminate."""
    rng = np.random.default_rng(0)
    observations = rng.normal(size=(ROWS + 1, 3))
    terminals, timeouts = np.zeros((2, ROWS), dtype=bool)
    timeouts[LAST[::2]] = terminals[LAST[1::2]] = True
    following = observations[1:].copy()
    following[LAST] += 1  # the episode's last observation is not the next one's first
    return {
        "observations": observations[:-1],
        "actions": rng.uniform(-0.9, 0.9, (ROWS, 2)),
        "rewards": rng.normal(size=ROWS),
        "terminals": terminals,
        "timeouts": timeouts,
        "next_observations": following,
    }


def put(name, rows, value):
    """Overwrite some rows of a field."""

    def change(fields):
        fields[name] = fields[name].astype(np.result_type(fields[name], type(value)))
        fields[name][rows] = value

    return change


def both_observations(rows, value):
    """Overwrite some observations, also as next observations of the rows before."""

    def change(fields):
        fields["observations"][rows] = value
        fields["next_observations"][np.asarray(rows) - 1] = value

    return change


def do(name, make):
    """Replace a field by a function of it."""
    return lambda fields: fields.update({name: make(fields[name])})


def without(*names):
    return lambda fields: [fields.pop(name) for name in names]


def everything_cut(fields):
    without("next_observations")(fields)
    put("terminals", slice(None), False)(fields)
    put("timeouts", slice(None), True)(fields)


def time_limit_as_terminal(fields):
    put("terminals", LAST, True)(fields)
    put("timeouts", LAST, False)(fields)
    for name in fields:
        fields[name] = fields[name][80:1280]  # 12 episodes of 100 steps


def shuffled(fields):
    for name in ("observations", "next_observations"):
        fields[name][[200, 300]] = fields[name][[300, 200]]


def same_column(fields):
    for name in ("observations", "next_observations"):
        fields[name][:, 2] = fields[name][:, 0]


def constant_column(fields):
    for name in ("observations", "next_observations"):
        fields[name][:, 1] = 7


def repeated(fields):
    """A second copy of the first whole episode."""
    for name in fields:
        fields[name] = np.concatenate([fields[name], fields[name][:80]])


REFUSED = {
    "rewards that are not numbers": (
        put("rewards", [4, 9], np.nan),
        "rewards has 2 rows (first: 4) that are not finite in float32; drop or repair them.",
    ),
    "actions that overflow": (
        put("actions", [17], 1e39),
        "actions has 1 row (first: 17) that are not finite in float32; drop or repair them.",
    ),
    "observations that were never written": (
        do("observations", np.zeros_like),
        "observations is zero in all 1300 rows; check that it was written and read correctly.",
    ),
    "actions in other units": (
        do("actions", lambda actions: np.where(np.arange(2 * ROWS).reshape(ROWS, 2) == 11, 1.5, 0.5)),
        "actions has 1 row (first: 5) outside the action bounds: the actions span [0.5, 0.5] to [0.5, 1.5], the "
        "bounds are [-1.0, -1.0] to [1.0, 1.0]; clip or rescale the actions.",
    ),
    "flags that are none": (
        put("terminals", [30, 31, 32], 2),
        "terminated has 3 rows (first: 30) that are neither 0 nor 1, such as 2; use only 0 (false) and 1 (true).",
    ),
    "one row too many": (
        do("rewards", lambda rewards: np.append(rewards, 0)),
        "fields differ in length: {'observations': 1300, 'actions': 1300, 'rewards': 1301, 'terminated': 1300, "
        "'truncated': 1300, 'next_observations': 1300}; each field needs one row per step. Put the last observation "
        "of an episode into next_observations.",
    ),
    "a field under no common name": (
        lambda fields: fields.update(torques=fields.pop("actions")),
        "it lacks ['actions']; it holds ['next_observations', 'observations', 'rewards', 'terminals', 'timeouts', "
        "'torques']. Name the entries with names={'actions': ...}.",
    ),
    "ends that nobody recorded": (
        without("timeouts", "next_observations"),
        "it has neither timeouts nor next_observations, so it is unknown where episodes were cut off. Pass "
        "max_episode_steps=, add timeouts, or use from_arrays if no episode was cut off.",
    ),
    "steps that have no successor": (
        everything_cut,
        "all 1300 rows are truncated and lack a next observation or next action mask; correct truncated, or give "
        "next_observations and, if there are action_masks, next_action_masks.",
    ),
    "integers out of bounds": (
        do("actions", lambda actions: np.full(actions.shape, 2)),
        "actions has 1300 rows (first: 0) outside the action bounds: the actions span [2.0, 2.0] to [2.0, 2.0], the "
        "bounds are [-1.0, -1.0] to [1.0, 1.0]; clip or rescale the actions.",
    ),
}
REPORTED = {
    "actions at the bounds": (
        put("actions", np.arange(20, 1000), 1.0),
        "actions has 980 rows (first: 20) at a bound of the action spec in columns 0, 1",
    ),
    "rewards of a million": (put("rewards", [11, 12], 1e6), "rewards has 2 rows (first: 11) of magnitude above 100000"),
    "every row terminal": (put("terminals", slice(None), True), "terminated is set in all 1300 rows (first: 0)"),
    "a time limit recorded as an end": (
        time_limit_as_terminal,
        "terminated is set in 12 rows (first: 99) that end episodes after 100 steps, the greatest length, so",
    ),
    "observations that do not continue": (
        shuffled,
        "next_observations differs from the observation of the next row of the same episode in 4 rows (first: 199)",
    ),
    "zeros for the successor at a time-out": (
        put("next_observations", LAST[2:5:2], 0),
        "next_observations has only zeros in 2 rows (first: 279) where terminated is not set",
    ),
    "observations of zeros": (
        both_observations([50, 60], 0),
        "observations has only zeros in 2 rows (first: 50)",
    ),
    "a column twice": (
        same_column,
        "observations has equal values in columns 0 and 2, in all 1300 rows (first: 0)",
    ),
    "a column that never changes": (
        constant_column,
        "observations is constant in column 1, in all 1300 rows (first: 0)",
    ),
    "rows twice": (repeated, "transitions has 80 rows (first: 1300) that repeat"),
}


@pytest.fixture
def written(tmp_path):
    def write(change):
        fields = healthy()
        change(fields)
        return write_arrays(tmp_path / "d.hdf5", fields)

    return write


def test_twenty_are_listed():
    assert (len(REFUSED), len(REPORTED)) == (10, 10)


def test_healthy_data_is_neither_refused_nor_reported(written):
    assert describe(load_hdf5(written(lambda fields: None), action_spec=SPEC), action_spec=SPEC).findings == []


@pytest.mark.parametrize("defect", REFUSED)
def test_refused(written, defect):
    change, message = REFUSED[defect]
    with pytest.raises(DatasetError) as error:
        load_hdf5(written(change), action_spec=SPEC)
    assert str(error.value) == f"d.hdf5: {message}"


@pytest.mark.parametrize("defect", REPORTED)
def test_reported(written, defect):
    change, message = REPORTED[defect]
    transitions = load_hdf5(written(change), action_spec=SPEC)
    findings = [str(finding) for finding in describe(transitions, action_spec=SPEC).findings]
    assert [finding for finding in findings if finding.startswith(message)], findings
