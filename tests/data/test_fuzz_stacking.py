"""Malformed transitions and observations, of which ``stack_observations`` and ``History`` make states."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from torchrl_bcq import History, multi_step, stack_observations

AFTER = ("next", "observation")
MISSING = float("nan")


def both(td, change):
    return td.set("observation", change(td["observation"])).set(AFTER, change(td[AFTER]))


def ends(td, change):
    return td.exclude("episode").set(("next", "done"), change(td["next", "done"]))


NOT_TRANSITIONS = {
    "a list": lambda td: [td],
    "a dictionary": lambda td: td.to_dict(),
    "a number": lambda td: 3,
    "nothing": lambda td: None,
    "a tensor": lambda td: td["observation"],
    "no rows": lambda td: td[:0],
    "one row": lambda td: td[0],
    "two dimensions": lambda td: td.unsqueeze(0),
    "no next": lambda td: td.exclude("next"),
    "next is a tensor": lambda td: td.exclude("next").set("next", td["observation"]),
    "text in next": lambda td: td.set(("next", "note"), "x"),
    "several steps": lambda td: td.set("steps_to_next_obs", torch.full((len(td), 1), 2)),
    "no done, no episode": lambda td: td.exclude("episode", ("next", "done")),
    "wide done": lambda td: ends(td, lambda done: done.repeat(1, 2)),
    "flat done": lambda td: ends(td, lambda done: done[:, 0]),
    "done is missing": lambda td: ends(td, lambda done: done * MISSING),
    "done is two": lambda td: ends(td, lambda done: done.long() + 1),
    "done is a half": lambda td: ends(td, lambda done: done * 0.5),
    "done is negative": lambda td: ends(td, lambda done: -1.0 * done.long()),
    "episodes are missing": lambda td: td.set("episode", td["episode"] * MISSING),
    "one episode is missing": lambda td: td.set("episode", td["episode"].where(td["episode"] > 0, MISSING)),
    "complex episodes": lambda td: td.set("episode", td["episode"] + 0j),
    "episodes are a text": lambda td: td.set("episode", "a"),
    "episodes are a list": lambda td: td.set_non_tensor("episode", [1] * len(td)),
    "episodes are nested": lambda td: td.set("episode", TensorDict({"a": td["episode"]}, [len(td)])),
    "wide episodes": lambda td: td.set("episode", td["episode"][:, None].repeat(1, 2)),
}
NOT_VECTORS = {
    "no observation": lambda td: td.exclude("observation"),
    "no next observation": lambda td: td.exclude(AFTER),
    "flat": lambda td: td.set("observation", td["observation"][:, 0]),
    "both flat": lambda td: both(td, lambda value: value[:, 0]),
    "images": lambda td: both(td, lambda value: value[:, :, None].repeat(1, 2, 2)),
    "a dictionary": lambda td: td.set("observation", TensorDict({"a": td["observation"]}, [len(td)])),
    "dictionaries": lambda td: both(td, lambda value: TensorDict({"a": value}, [len(value)])),
    "text": lambda td: td.set("observation", "x"),
    "other width": lambda td: td.set(AFTER, td[AFTER].repeat(1, 2)),
}


@pytest.mark.parametrize("defect", [*NOT_TRANSITIONS, *(f"{name} as vectors" for name in NOT_VECTORS)])
def test_transitions_that_cannot_be_stacked(ledger, make_steps, defect):
    change = NOT_TRANSITIONS.get(defect) or NOT_VECTORS[defect.removesuffix(" as vectors")]
    for seed in (3, 5, 8):
        odd = change(make_steps(seed).transitions())
        ledger.refuse("stacking", partial(stack_observations, odd, 2))
        if defect in NOT_TRANSITIONS:
            ledger.refuse("stacking", partial(multi_step, odd, 2, 0.9))


@pytest.mark.parametrize("number", [0, -1, 1.5, "2", None, 2.0, [2], MISSING, 10**9, 41, b"2", {}, 1j])
def test_numbers_of_observations(ledger, make_steps, number):
    transitions = make_steps(3).transitions()
    ledger.refuse("stacking", lambda: stack_observations(transitions, number))
    if not isinstance(number, int) or number < 1:
        ledger.refuse("histories", lambda: History(number))


@pytest.mark.parametrize("folder", ["", ".", "~nobody-of-this-name/x", "/dev/null/x"])
def test_folders_of_states(ledger, make_steps, folder):
    transitions = make_steps(3).transitions()
    ledger.refuse("stacking", lambda: stack_observations(transitions, 2, folder=folder))


class Broken:
    def __array__(self, *args, **kwargs):
        raise RuntimeError("no")


NO_OBSERVATIONS = [
    *("abc", ["a"], [["a", "b"]], [[1], [1, 2]], 1.0, None, {}, {"a": 1}, [None], [1, None], [b"x"], iter([1]), {1, 2}),
    *([10**400], [{}], [[]] * 2 + [[1]], Broken(), [Broken()], object, len, "", b"", [[1], 2], [2**63], [1, "2"]),
    *(np.array(["2020"], "M8"), np.zeros(2, "V4"), np.zeros(2, [("a", "f4")]), np.longdouble([1]), np.float64(1)),
    *(np.ma.masked_array([1.0, 2], [True, False]), np.array(None), np.array([1], "m8[s]"), np.array(3)),
    *(torch.tensor(1.0), torch.ones(2).to_sparse()),
]


@pytest.mark.parametrize("odd", NO_OBSERVATIONS, ids=lambda value: type(value).__name__)
def test_observations_that_are_no_vectors(ledger, odd):
    """The refused observation is not added to the history."""
    ledger.refuse("histories", lambda: History(2)(odd))
    history = History(2)
    history([1.0, 2.0])
    ledger.refuse("histories", lambda: history(odd))
    assert history([3.0, 4.0]).tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("shape", [(1,), (3,), (1, 2), (2, 1), (0,), (2, 0), (2, 2, 2)])
def test_observations_of_other_shapes(ledger, shape):
    history = History(2)
    history([1.0, 2.0])
    with pytest.raises(ValueError, match=r"the observation has shape .*, but the one before has \(2,\); call reset"):
        history(np.ones(shape))
    ledger.counts["histories"] += 1


MASKS = [
    "ab",
    [1, 0],
    [1.0, 0.0],
    [[True], [False, True]],
    [None, True],
    {},
    [True, None],
    ["True", "False"],
    b"",
    1,
    0.0,
]
MASKS += [
    [True],
    [True] * 3,
    [[True], [False]],
    [[True, False]],
    np.array([True, None]),
    Broken(),
    [],
    True,
    torch.ones(2),
]
MASKS += [np.ma.masked_array([True, False], [True, False]), {True, False}, "True", np.zeros((2, 0), bool)]


@pytest.mark.parametrize("mask", MASKS, ids=lambda value: type(value).__name__)
def test_masks_that_do_not_fit(ledger, mask):
    history = History(2)
    history([[1.0], [2.0]])
    ledger.refuse("histories", lambda: history.reset(mask))
    assert history([[3.0], [4.0]]).tolist() == [[1, 3], [2, 4]]


def test_arrays_of_any_byte_order_and_stride():
    history = History(2)
    first = history(np.array([1.0, 2.0]).astype(">f8"))
    assert first.tolist() == [1, 2, 1, 2]
    assert history(np.arange(6.0)[::-1][::3]).tolist() == [1, 2, 5, 2]


def test_how_many_were_malformed(ledger, check_count):
    check_count(ledger.counts, ["stacking", "histories"], at_least=250)
