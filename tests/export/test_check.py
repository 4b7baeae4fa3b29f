"""The comparison of a file with its policy: by hand, and with graphs that are wrong on purpose."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.data import Binary, Bounded, Categorical, Composite, Unbounded

from torchrl_bcq import BCQPolicy, DiscreteBCQPolicy, export_policy, make_bcq_modules, make_discrete_bcq_modules
from torchrl_bcq.errors import RunError
from torchrl_bcq.export import check
from torchrl_bcq.export.graph import Port

VECTOR, BOX = Unbounded((3,)), Bounded(torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 4.0]), (2,))
MASKED = Composite(observation=VECTOR, action_mask=Binary(4, dtype=torch.bool))
SIZES = {"hidden": (8,), "vae_hidden": (8,)}
ACTION = Port("action", "action", (1,), torch.float32, "action", {"low": [0.0], "high": [4.0]})


def test_difference_of_rows():
    got, wanted = torch.tensor([[1.0, 2.0], [300.0, 0.0]]), torch.tensor([[1.5, 2.0], [303.0, 0.0]])
    assert check.difference(got, wanted, torch.tensor(2.0)).tolist() == [0.25, 1.5]
    ends = torch.tensor([math.inf, math.nan]), torch.tensor([math.inf, 0.0])
    assert check.difference(*ends, torch.tensor(1.0)).tolist() == [0, math.inf]


def test_difference_is_relative_to_the_range_or_the_size():
    expected = TensorDict({"action": torch.tensor([[1.0], [3.0]]), "value": torch.tensor([[1e-3], [500.0]])}, [2])
    got = torch.tensor([[1.2], [3.0]])
    assert check._output_difference(got, expected, ACTION).tolist() == pytest.approx([0.05, 0])
    unknown = replace(ACTION, facts={})
    assert check._output_difference(got, expected, unknown).tolist() == pytest.approx([0.2, 0])
    small = TensorDict({"action": torch.tensor([[1e-5], [2e-5]])}, [2])
    found = check._output_difference(torch.tensor([[2e-5], [2e-5]]), small, unknown)
    assert found.tolist() == pytest.approx([0.5, 0])
    value = replace(ACTION, name="value", kind="output", key="value", facts={})
    found = check._output_difference(torch.tensor([[2e-3], [505.0]]), expected, value)
    assert found.tolist() == pytest.approx([1e-3, 0.01])
    assert check._output_difference(got[:, 0], expected, ACTION).tolist() == [math.inf] * 2


def test_another_candidate_of_equal_value_does_not_differ():
    candidates = torch.tensor([[[0.4], [2.0], [3.6]]]).expand(4, 3, 1)
    values = {"candidates": candidates, "action_value": torch.tensor([[2.0, 4.0, 4.0]]).expand(4, 3)}
    expected = TensorDict({"action": torch.full((4, 1), 2.0), **values}, [4])
    # the same; another one of equal value; the worst one, which is nearer by its action; none of them
    got = torch.tensor([[2.0], [3.6], [0.4], [2.4]])
    assert check._output_difference(got, expected, ACTION).tolist() == pytest.approx([0, 0, 0.4, 0.1])


def test_nan_differs_and_does_not_hide_other_rows():
    values = torch.tensor([[1.0, 2.0], [math.nan, 2.0], [1.0, 2.0]])
    candidates = torch.tensor([[[0.4], [2.0]], [[0.4], [2.0]], [[0.4], [math.nan]]])
    expected = TensorDict(action=candidates[:, 1], candidates=candidates, action_value=values, batch_size=[3])
    got = torch.tensor([[2.0], [math.nan], [math.nan]])
    assert check._output_difference(got, expected, ACTION).tolist() == [0, math.inf, math.inf]


def test_values_are_equal_only_up_to_rounding():
    value = torch.tensor([[3000.0, 2999.7, 2998.0], [3000.0, 2999.999, 0.0], [1.0, -math.inf, 0.0]])
    # a range of 2, of which 1 % of the best value, 30, is larger; a range of 3,000; actions that are not allowed
    expected = [[0, 0.01, 2 / 30], [0, 1e-3 / 3000, 1], [0, math.inf, 1]]
    for row, wanted in zip(check.shortfall(value).tolist(), expected, strict=True):
        assert row == pytest.approx(wanted, rel=0.05)


def test_an_action_that_is_not_allowed_differs():
    allowed = torch.tensor([[True, True, False]]).expand(3, 3)
    values = {"candidates": allowed, "action_value": torch.tensor([[4.0, 4.0, 9.0]]).expand(3, 3)}
    got = torch.tensor([0, 1, 2])
    port = replace(ACTION, shape=(), dtype=torch.int64, facts={})
    expected = TensorDict({"action": torch.zeros(3, dtype=torch.int64), **values}, [3])
    assert check._output_difference(got, expected, port).tolist()[:2] == [0, 0]
    assert check._output_difference(got, expected, port)[2] >= 1
    one_hot = nn.functional.one_hot(got, 3)
    expected["action"] = one_hot[:1].expand(3, 3)
    assert check._output_difference(one_hot, expected, port).tolist() == [0, 0, 1]
    assert check._output_difference(torch.tensor([[1, 1, 0]] * 3), expected, port).tolist() == [1, 1, 1]


class Worst(BCQPolicy):
    """Takes the worst candidate in an exported graph, and the best one otherwise."""

    def forward(self, tensordict):
        if not torch.compiler.is_exporting():
            return super().forward(tensordict)
        critic = self.critics.first
        self.critics.first = lambda td: (out := critic(td)).set("state_action_value", -out["state_action_value"])
        try:
            return super().forward(tensordict)
        finally:
            del self.critics.first


class Unmasked(DiscreteBCQPolicy):
    """Ignores the mask in an exported graph."""

    def _choose(self, scores, mask):
        return super()._choose(scores, None if torch.compiler.is_exporting() else mask)


def test_wrong_graphs_are_found(tmp_path):
    networks = make_bcq_modules(VECTOR, BOX, **SIZES)
    for parameter in networks[2].critics[0].module[-1].parameters():
        if parameter.ndim == 1:
            parameter.data += 3000.0  # small differences of large values
    for policy in (
        Worst(*networks, num_action_samples=5),
        Unmasked(*make_discrete_bcq_modules(MASKED, Categorical(4))),
    ):
        with pytest.raises(RunError, match="differ by"):
            export_policy(policy, tmp_path / "policy.onnx")
    assert not [*tmp_path.iterdir()]
