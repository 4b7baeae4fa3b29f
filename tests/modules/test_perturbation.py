from __future__ import annotations

import pytest
import torch
from torch import nn

from torchrl_bcq import PerturbationActor

from ..conftest import ACTION_SPEC


class Push(nn.Module):
    """Pushes each row towards the sign of its first observation, at full strength."""

    def forward(self, observation, action):
        return 1e6 * observation[..., :1].sign().expand_as(action)


def test_row_i_depends_on_row_i_alone(make_batch):
    """Slip 1: every row gets its own perturbation, not row 0's."""
    actor = PerturbationActor(Push(), ACTION_SPEC, phi=0.1)
    batch = make_batch(4)
    batch["observation"][:, 0] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    batch["action"] = torch.tensor([[0.0, 2.0]]).repeat(4, 1)
    # half-ranges 1 and 2, phi 0.1: moves of 0.1 and 0.2, by the row's own sign
    expected = torch.tensor([[0.1, 2.2], [-0.1, 1.8], [0.1, 2.2], [-0.1, 1.8]])
    torch.testing.assert_close(actor(batch)["action"], expected)


def test_stays_inside_the_spec_per_dimension(make_batch):
    actor = PerturbationActor(Push(), ACTION_SPEC, phi=0.5)
    batch = make_batch(2)
    batch["observation"][:, 0] = torch.tensor([1.0, -1.0])
    batch["action"] = torch.tensor([[0.9, 3.9], [-0.9, 0.1]])
    assert actor(batch)["action"].tolist() == [[1.0, 4.0], [-1.0, 0.0]]


@pytest.mark.parametrize("phi", [-0.1, float("nan")])
def test_phi_that_is_no_distance_is_refused(phi):
    with pytest.raises(ValueError, match=f"phi is {phi}; it is a distance"):
        PerturbationActor(Push(), ACTION_SPEC, phi=phi)
