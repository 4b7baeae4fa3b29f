"""Candidates are evaluated in parts, in order, on a CPU."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict

from torchrl_bcq.objectives.candidates import evaluate_in_parts


def candidates(*batch: int) -> tuple[TensorDict, torch.Tensor]:
    """Numbered ones, with latents that are ten times the number."""
    numbers = torch.arange(torch.Size(batch).numel()).reshape(batch)
    return TensorDict({"number": numbers}, batch), 10 * numbers.unsqueeze(-1)


@pytest.mark.parametrize(
    ("batch", "size", "parts"),
    [
        ((6, 2), 12, [(6, 2)]),
        ((6, 2), 6, [(3, 2), (3, 2)]),
        ((5, 2), 4, [(2, 2), (2, 2), (1, 2)]),
        ((6, 2), 1, [(1, 2)] * 6),  # a part holds all candidates of a row
        ((3, 4, 2), 12, [(3, 2, 2), (3, 2, 2)]),  # along the last batch dimension
        ((2,), 1, [(2,)]),  # one state
    ],
)
def test_parts_and_their_order(batch, size, parts):
    seen = []

    def evaluate(part: TensorDict, latent: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(part.batch_size))
        assert (latent.squeeze(-1) == 10 * part["number"]).all()
        return part["number"].sum(-1, keepdim=True)

    found = evaluate_in_parts(evaluate, *candidates(*batch), size)
    assert seen == parts
    assert torch.equal(found, candidates(*batch)[0]["number"].sum(-1, keepdim=True))


def test_other_devices_evaluate_all_at_once():
    seen = []
    rows, latent = candidates(6, 2)
    out = torch.zeros(6, 1)
    assert evaluate_in_parts(lambda part, _: seen.append(part) or out, rows, latent.to("meta"), 1) is out
    assert seen == [rows]


def test_no_candidates():
    states, latent = TensorDict({}, [0, 4]), torch.zeros(0, 4, 2)
    assert evaluate_in_parts(lambda states, latent: latent.sum((-1, -2))[:, None], states, latent, 8).shape == (0, 1)
