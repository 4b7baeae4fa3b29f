from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from torchrl_bcq.modules import DeterministicActor, PerturbationActor

from ..conftest import ACTION_SPEC

# the deterministic actor


class Difference(nn.Module):
    """Logits ``left - right``, scaled."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, left, right):
        return self.scale * (left - right)


def make_actor(scale: float = 1.0) -> DeterministicActor:
    keys = {"observation_keys": ["left", ("arm", "right")], "action_key": ("arm", "torque")}
    return DeterministicActor(Difference(scale), ACTION_SPEC, **keys)


def states(left: list[float]) -> TensorDict:
    return TensorDict({"left": torch.tensor([left]), "arm": {"right": torch.tensor([[1.0, 1.0]])}}, [1])


def test_action_by_hand():
    """Logits 0.5 and -0.5: tanh(0.5) = 0.4621172 in [-1, 1], and 2 - 2 * 0.4621172 in [0, 4]."""
    actor = make_actor()
    assert (actor.in_keys, actor.out_keys) == (["left", ("arm", "right")], [("arm", "torque")])
    out = actor(states([1.5, 0.5]))
    torch.testing.assert_close(out["arm", "torque"], torch.tensor([[0.4621172, 1.0757656]]))


def test_gradient_by_hand():
    """The logits are the scale times (0.5, -0.5); d action / d scale = (0.5, 2 * -0.5) * (1 - tanh(0.5)^2)."""
    actor = make_actor()
    actor(states([1.5, 0.5]))["arm", "torque"].sum().backward()
    torch.testing.assert_close(actor.network.scale.grad, torch.tensor(-0.5 * (1 - 0.4621172**2)))


def test_action_stays_inside_the_bounds_and_reaches_them():
    assert make_actor(1e6)(states([2.0, 0.0]))["arm", "torque"].tolist() == [[1.0, 0.0]]


def test_autocast_leaves_the_dtype_of_the_action():
    actor = DeterministicActor(nn.Linear(3, 2), ACTION_SPEC)
    with torch.autocast("cpu", torch.bfloat16):
        assert actor(observation=torch.zeros(5, 3)).dtype == torch.float32


def test_network_of_the_wrong_size_is_refused():
    actor = DeterministicActor(nn.Linear(3, 5), ACTION_SPEC)
    with pytest.raises(ValueError, match="network returns 5 features, but the action has 2 dimensions"):
        actor(observation=torch.zeros(5, 3))


# the perturbation actor


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
    with pytest.raises(ValueError, match=f"phi is {phi}, expected 0 or more"):
        PerturbationActor(Push(), ACTION_SPEC, phi=phi)
