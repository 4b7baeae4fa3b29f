"""The networks of discrete BCQ and of discrete cloning: sizes, shared layers, scaling, and what is refused."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.data import Binary, Bounded, Categorical, Composite, OneHot, Unbounded
from torchrl.modules import MLP

from torchrl_bcq import MultiHeadNetwork, Normalization, make_discrete_bcq_modules, make_discrete_cloning_modules

FRAMES = Unbounded((4, 84, 84), dtype=torch.uint8)
MAKERS = [make_discrete_bcq_modules, make_discrete_cloning_modules]


def sizes(network: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(p.shape) for name, p in network.named_parameters() if name.endswith("weight")]


def test_the_authors_networks_for_vectors():
    """Two separate MLPs of 256-256."""
    (network,) = make_discrete_bcq_modules(Unbounded((8,)), Categorical(4))
    assert sizes(network) == [(256, 8), (256, 256), (4, 256)] * 2
    value, logits = network(torch.randn(5, 8))
    assert value.shape == logits.shape == (5, 4)
    logits.sum().backward()
    assert all(p.grad is None for p in network.heads[0].parameters())
    assert logits.min() < 0  # no ReLU
    assert not torch.allclose(logits.sum(-1), torch.ones(5))  # no softmax


def test_the_authors_network_for_frames():
    """Convolutions that both outputs share, and 512 units for each output."""
    (network,) = make_discrete_bcq_modules(FRAMES, Categorical(6))
    trunk = [(32, 4, 8, 8), (64, 32, 4, 4), (64, 64, 3, 3)]
    assert sizes(network) == [*trunk, *[(512, 3136), (6, 512)] * 2]
    frames = torch.randint(256, (2, 4, 84, 84), dtype=torch.uint8)
    value, logits = network(frames)
    assert value.shape == logits.shape == (2, 6)
    x = frames.float() / 255
    for convolution in (layer for layer in network.trunk.modules() if isinstance(layer, nn.Conv2d)):
        x = convolution(x).relu()
    torch.testing.assert_close(value, network.heads[0](x.flatten(1)))
    torch.testing.assert_close(logits, network.heads[1](x.flatten(1)))
    for batch in ((), (1, 2)):
        states = TensorDict({"observation": frames.reshape(1, 2, 4, 84, 84)[(0, 0) if batch == () else ()]}, batch)
        torch.testing.assert_close(network(states)["action_value"], value[0] if batch == () else value.unsqueeze(0))


def test_the_networks_of_cloning_have_the_same_size():
    for spec in (Unbounded((8,)), FRAMES):
        (bcq,), (cloning,) = (make(spec, Categorical(6)) for make in MAKERS)
        assert cloning.out_keys == ["imitation_logits"]
        assert sizes(cloning.heads[0]) == sizes(bcq.heads[1])


def test_frames_beside_vectors():
    spec = Composite(camera=Unbounded((1, 36, 52), dtype=torch.uint8), robot=Composite(joints=Unbounded((3,))))
    (network,) = make_discrete_bcq_modules(spec, Categorical(2), frame_hidden=(16,))
    assert network.in_keys == [("robot", "joints"), "camera"]
    assert network.heads[0][0].in_features == 3 + 64 * 1 * 3  # 36 -> 8 -> 3 -> 1, 52 -> 12 -> 5 -> 3
    states = TensorDict(
        {"camera": torch.randint(256, (5, 1, 36, 52), dtype=torch.uint8), "robot": {"joints": torch.randn(5, 3)}}, [5]
    )
    before = network(states.clone())["action_value"]
    for key in network.in_keys:
        changed = states.clone()
        changed[key] = changed[key].flip(0)
        assert (network(changed)["action_value"] != before).any(-1)[[0, 4]].all()


@pytest.mark.parametrize("make", MAKERS)
def test_keys_device_and_dtype(make):
    spec = Composite(obs=Unbounded((3,), dtype=torch.float64), free=Binary(2, dtype=torch.bool))
    keys = {"action_key": ("do", "it"), "action_mask_key": "free", "logits_key": "l"}
    (network,) = make(spec, OneHot(2), hidden=(8,), device="cpu", dtype=torch.float64, **keys)
    assert network.in_keys == ["obs"]
    assert network.out_keys[-1] == "l"
    assert network.action_key == ("do", "it")
    assert network.action_mask_key == "free"
    assert {p.dtype for p in network.parameters()} == {torch.float64}
    assert set(network.observation_specs) == {"obs", "free"}


def test_normalization_standardises_vectors_and_scales_values():
    location, scale = torch.tensor([1.0, -2.0, 0.0]).double(), torch.tensor([2.0, 0.5, 1.0]).double()
    normalization = Normalization({"observation": (location, scale)}, reward_scale=10.0)
    (network,) = make_discrete_bcq_modules(Unbounded((3,)), Categorical(2), hidden=(8,), normalization=normalization)
    (plain,) = make_discrete_bcq_modules(Unbounded((3,)), Categorical(2), hidden=(8,))
    weights = list(network.parameters())
    for ours, theirs in zip(plain.parameters(), weights, strict=True):
        ours.data.copy_(theirs.data)
    x = torch.randn(5, 3)
    value, logits = network(x)
    expected_value, expected_logits = plain(((x - location) / scale).float())
    torch.testing.assert_close(value, 10 * expected_value)
    torch.testing.assert_close(logits, expected_logits)
    (frames,) = make_discrete_bcq_modules(FRAMES, Categorical(2), normalization=Normalization({}, reward_scale=10.0))
    assert frames.heads[0][-1].scale.item() == 10
    assert len(frames.heads[1]) == len(frames.heads[0]) - 1


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(
    ("observation", "action", "message"),
    [
        (
            Unbounded((3,)),
            Bounded(-1, 1, (2,)),
            "action_space is a Bounded.*, expected one discrete action for each step",
        ),
        (Unbounded((3,)), "categorical", "action_spec is 'categorical', expected the spec of one action"),
        (Unbounded((3,)), Categorical(4, shape=(2,)), "for a vectorised environment, pass env.action_spec_unbatched"),
        (Unbounded((2, 3)), Categorical(4), r"'observation' has shape \(2, 3\) .* expected a float vector \[D\]"),
        (Unbounded((3,), dtype=torch.float64), Categorical(4), "has dtype torch.float64, but the networks have dtype"),
        (Unbounded((1, 84, 84)), Categorical(4), "frame 'observation' has dtype torch.float32, expected torch.uint8"),
        (
            Unbounded((84, 84, 3), dtype=torch.uint8),
            Categorical(4),
            r"a frame has shape \(84, 84, 3\), expected \[C, H, W\] with H and W >= 36; move the channels",
        ),
        (
            Composite(x=Unbounded((3,)), action_mask=Binary(3, dtype=torch.bool)),
            Categorical(4),
            r"'action_mask' has shape \(3,\) and dtype torch.bool, expected booleans \(4,\)",
        ),
        (
            Composite(action_mask=Binary(4, dtype=torch.bool)),
            Categorical(4),
            r"observation_spec has the entries \['action_mask'\], expected an observation",
        ),
    ],
)
def test_specs_that_do_not_fit_are_refused(make, observation, action, message):
    with pytest.raises(ValueError, match=message):
        make(observation, action)


def test_selected_outputs_keep_their_values():
    network = MultiHeadNetwork({"q": nn.Linear(3, 2), "logits": nn.Linear(3, 2)}, "categorical")
    td = TensorDict({"observation": torch.ones(5, 3)}, [5])
    whole = network(td.copy())
    for selection in (["logits"], ["logits", "q"]):
        chosen = network.select_out_keys(*selection)(td.copy())
        first = network.first(td.copy())
        network.reset_out_keys()
        assert set(chosen.keys()) == {"observation", *selection}
        assert set(first.keys()) == {"observation", selection[0]}
        assert torch.equal(first[selection[0]], whole[selection[0]])
        for key in selection:
            assert torch.equal(chosen[key], whole[key])


def test_networks_of_ones_own():
    trunk = nn.Linear(3, 8)
    network = MultiHeadNetwork({"q": nn.Linear(8, 2), ("its", "logits"): MLP(8, 2)}, "one-hot", trunk=trunk)
    out = network(TensorDict({"observation": torch.ones(5, 3)}, [5]))
    torch.testing.assert_close(out["q"], network.heads[0](trunk(torch.ones(5, 3))))
    assert out["its", "logits"].shape == (5, 2)
    first = network.first(TensorDict({"observation": torch.ones(5, 3)}, [5]))
    assert torch.equal(first["q"], out["q"])
    assert set(first.keys()) == {"observation", "q"}
    with pytest.raises(ValueError, match="heads is empty, expected a network for each output"):
        MultiHeadNetwork({}, "categorical")
