"""ExportedPolicy: inputs that it refuses, with the message of each; shapes, dtypes, ranges."""

from __future__ import annotations

import re
import warnings

import numpy as np
import onnx
import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.data import Binary, Bounded, Categorical, Composite, Unbounded

from torchrl_bcq import (
    DeterministicActor,
    DiscreteBCQPolicy,
    ExportedPolicy,
    export_policy,
    make_discrete_bcq_modules,
)

MASKED = Composite(observation=Unbounded((3,)), action_mask=Binary(4, dtype=torch.bool))
FRAMES = Unbounded((3, 36, 36), dtype=torch.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files of a policy on vectors, on vectors with a mask, on frames, and with a history."""
    folder = tmp_path_factory.mktemp("policies")
    actor = DeterministicActor(nn.Linear(3, 1), Bounded(-1, 1, (1,)))
    rows = TensorDict({"observation": torch.tensor([[-1.0, 0.0, 5.0], [1.0, 2.0, 5.0]])}, [2])
    export_policy(actor, folder / "vector.onnx", rows)
    for name, spec in (("mask", MASKED), ("frames", FRAMES)):
        policy = DiscreteBCQPolicy(*make_discrete_bcq_modules(spec, Categorical(4), hidden=(8,)))
        export_policy(policy, folder / f"{name}.onnx")
    actor.stack = 3
    export_policy(actor, folder / "history.onnx", rows)
    return folder


@pytest.fixture
def vector(folder):
    return ExportedPolicy(folder / "vector.onnx")


@pytest.mark.parametrize(
    ("observation", "message"),
    [
        ([0.0, 1.0], "'observation' has shape (2,), expected [3] for one observation, or [B, 3] for several."),
        (np.zeros((2, 2, 3)), "'observation' has shape (2, 2, 3), expected [3] for one"),
        (np.zeros((0, 3)), "'observation' has shape (0, 3): it holds no observation."),
        (1.0, "'observation' has shape (), expected [3]"),
        (
            [0.0, np.nan, 5.0],
            "'observation' has values that are not finite in float32, such as nan at [1]; repair",
        ),
        ([[0, 1, 5], [0, 1, 1e300]], "'observation' has values that are not finite in float32, such as inf at [1, 2]"),
        (["left", "right", "up"], "'observation' has dtype <U5, expected real numbers (float32)."),
        ([0, 1j, 5], "'observation' has dtype complex128, expected real numbers (float32)."),
        ([[0, 1, 5], [0, 1]], "'observation' is not an array of numbers ("),
        ((np.zeros(3), {}), "; if it is the result of env.reset() or env.step(), pass the first value only."),
        (None, "'observation' has dtype object, expected real numbers (float32)."),
        ({"obs": [0, 1, 5]}, "the observation lacks 'observation'; it has ['obs']. Add the missing entry."),
    ],
)
def test_observations_that_are_refused(vector, observation, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        vector.act(observation)


@pytest.mark.parametrize(
    ("observation", "message"),
    [
        ([0.0, 1.0, 2.0], "the policy reads 'observation', 'action_mask'; pass a mapping"),
        ({"observation": np.zeros(3)}, "the observation lacks 'action_mask'; it has ['observation']."),
        (
            {"observation": np.zeros((2, 3)), "action_mask": np.ones((3, 4), bool)},
            "the entries hold different numbers of states: {'observation': (2,), 'action_mask': (3,)}; make",
        ),
        (
            {"observation": np.zeros(3), "action_mask": [0.5, 1, 1, 1]},
            "'action_mask' has dtype float64, expected booleans: True for each available action.",
        ),
        (
            {"observation": np.zeros(3), "action_mask": [2, 1, 1, 1]},
            "'action_mask' has dtype int64, expected booleans: True for each available action.",
        ),
        ({"observation": np.zeros(3), "action_mask": [True] * 3}, "'action_mask' has shape (3,), expected [4] for"),
        (
            {"observation": np.zeros((2, 3)), "action_mask": [[True] * 4, [False] * 4]},
            "'action_mask' allows no action in the states [1]; repair the mask.",
        ),
        (
            {"observation": np.zeros(3), "action_mask": [False] * 4},
            "'action_mask' allows no action in the states [0]; repair the mask.",
        ),
    ],
)
def test_masks_that_are_refused(folder, observation, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ExportedPolicy(folder / "mask.onnx").act(observation)


def test_frames_that_are_refused(folder):
    policy = ExportedPolicy(folder / "frames.onnx")
    frame = np.zeros((3, 36, 36))
    with pytest.raises(ValueError, match=re.escape("'observation' has dtype float64, expected whole numbers (uint8).")):
        policy.act(frame)
    with pytest.raises(ValueError, match="'observation' has values outside the range of uint8"):
        policy.act(np.full((3, 36, 36), 256))
    assert policy.act(frame.astype(int)) == policy.act(frame.astype(np.uint8))


def test_files_that_are_refused(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.onnx does not exist, or is not a file"):
        ExportedPolicy(tmp_path / "absent.onnx")
    with pytest.raises(FileNotFoundError, match="is not a file"):
        ExportedPolicy(tmp_path)
    with pytest.raises(ValueError, match="threads is 0, expected at least 1"):
        ExportedPolicy(folder / "vector.onnx", threads=0)
    text = tmp_path / "text.onnx"
    text.write_text("no graph")
    with pytest.raises(ValueError, match="text.onnx is not an ONNX file that onnxruntime can run"):
        ExportedPolicy(text)
    half = tmp_path / "half.onnx"
    half.write_bytes((whole := (folder / "vector.onnx").read_bytes())[: len(whole) // 2])
    with pytest.raises(ValueError, match="half.onnx is not an ONNX file that onnxruntime can run"):
        ExportedPolicy(half)

    model = onnx.load(folder / "vector.onnx")
    (entry,) = model.metadata_props
    contract, changed = entry.value, tmp_path / "changed.onnx"
    entry.value = contract.replace('"format": 1', '"format": 2')
    onnx.save(model, changed)
    with pytest.raises(ValueError, match="changed.onnx has format 2, but this class reads 1; use a newer version"):
        ExportedPolicy(changed)
    entry.value = contract.replace('"name": "observation"', '"name": "obs"')
    onnx.save(model, changed)
    with pytest.raises(ValueError, match=re.escape("has the inputs ['observation'], but describes ['obs']; export it")):
        ExportedPolicy(changed)
    del model.metadata_props[:]
    onnx.save(model, changed)
    with pytest.raises(ValueError, match="changed.onnx is an ONNX file, but it was not written by torchrl-bcq export"):
        ExportedPolicy(changed)


def test_latents_and_resets_that_are_refused(vector, folder):
    with pytest.raises(ValueError, match="the file has no input for latents; export the policy with latents=True"):
        vector.act([0.0, 1.0, 5.0], latents=[0.0])
    policy = ExportedPolicy(folder / "history.onnx")
    policy.act([[5.0], [5.0]])
    for mask in ([True], [1, 0], True):
        with pytest.raises(ValueError, match=re.escape("expected booleans (2,), one for each environment.")):
            policy.reset(mask)


@pytest.mark.parametrize("convert", [np.float16, np.float64, np.int8, np.uint64, ">f4", list, tuple])
def test_numbers_of_other_kinds(vector, convert):
    given = np.array([[0, 1, 5], [-1, 2, 5]])
    given = given[:1] if convert is np.uint64 else given
    other = convert(given.tolist()) if isinstance(convert, type) and issubclass(convert, (list, tuple)) else None
    other = given.astype(convert) if other is None else other
    np.testing.assert_array_equal(vector.act(other), vector.act(given.astype(np.float32)))


def test_arrays_that_are_not_contiguous(vector):
    given = np.array([[0, 1, 5], [-1, 2, 5]], np.float32)
    np.testing.assert_array_equal(vector.act(np.asfortranarray(given)), vector.act(given))
    np.testing.assert_array_equal(vector.act(given[::-1]), vector.act(given)[::-1])


def test_a_number_outside_the_training_range_warns_once(vector):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vector.act([[-1.0, -0.09, 5.0], [1.0, 2.09, 5.0]])  # 5 % beyond the ends of the range
    message = (
        "'observation'[1] is 2.5, but in the training data it was between 0 and 2; the action may be wrong. There are "
        "no more warnings about this number."
    )
    with pytest.warns(UserWarning, match=re.escape(message)) as caught:
        expected = vector.act([[0.0, 1.0, 5.0], [0.0, 2.5, 5.0]])
    assert [warning.filename for warning in caught] == [__file__]
    assert expected.shape == (2, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vector.act([0.0, 9.0, 5.0])
    with pytest.warns(UserWarning, match=re.escape("'observation'[0] is 9, but")):
        vector.act([9.0, 9.0, 5.0])
    for odd in ([np.inf, 9.0, 9.0], [np.inf, 9.0, 5.0], [9.0, 1e300, 5.0]):
        with pytest.raises(ValueError, match="not finite"):
            vector.act(odd)
    with pytest.raises(ValueError, match="'observation' is a masked array; fill in its values"):
        vector.act(np.ma.array([0.0, 1.0, 5.0], mask=[1, 0, 0]))
