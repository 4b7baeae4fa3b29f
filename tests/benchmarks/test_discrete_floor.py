"""The floor of discrete BCQ against the package: losses, gradients, targets, operations; and a small run."""

from __future__ import annotations

import json

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Categorical, Unbounded
from torchrl.objectives import SoftUpdate

from torchrl_bcq import DiscreteBCQLoss, make_discrete_bcq_modules

BATCH = 4


@pytest.fixture(params=["vectors", "frames"])
def kind(request):
    return request.param


@pytest.fixture
def floor(load, kind):
    data = load("transitions").make_discrete_transitions(kind)[:20]
    data["next", "terminated"] = torch.rand(len(data), 1) < 0.3
    return load("discrete_floor").DiscreteFloor(data, BATCH, "cpu", kind)


def test_loss_and_gradients_of_the_floor_are_those_of_the_package(load, floor, kind):
    frames = kind == "frames"
    spec = Unbounded(load("transitions").FRAME, dtype=torch.uint8) if frames else Unbounded((17,))
    (network,) = make_discrete_bcq_modules(spec, Categorical(6))
    floor.logits[-1][0].data.mul_(200)  # so that the threshold excludes actions
    layers = [layer for layer in network.modules() if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear))]
    pairs = list(zip(layers, [*floor.trunk, *floor.value, *floor.logits], strict=True))

    def copy_weights() -> None:
        for layer, (weight, bias) in pairs:
            layer.weight.data.copy_(weight)
            layer.bias.data.copy_(bias)

    copy_weights()
    loss = DiscreteBCQLoss(network)
    SoftUpdate(loss, tau=0.005)
    for source in floor.sources:
        source.add_(0.02 * torch.randn_like(source))
    copy_weights()  # the targets stay

    state, action, reward, following, terminated = (field[:BATCH] for field in floor.fields)
    outcome = {"observation": following, "reward": reward, "terminated": terminated, "done": terminated}
    batch = TensorDict({"observation": state, "action": action, "next": outcome}, [BATCH])
    theirs, (own, metadata) = floor.loss(state, action, reward, following, terminated), loss.qvalue_loss(batch)
    assert metadata["allowed_share"].mean() < 1
    torch.testing.assert_close(theirs, own, rtol=1e-5, atol=1e-5)
    theirs.backward()
    own.backward()
    for layer, (weight, bias) in pairs:
        torch.testing.assert_close(layer.weight.grad, weight.grad, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(layer.bias.grad, bias.grad, rtol=1e-3, atol=1e-4)


def test_an_update_of_the_floor_learns_and_moves_its_target(floor, kind):
    before = [source.clone() for source in floor.sources]
    floor.settings = type(floor.settings)(floor.settings.hidden, 1e-3, 1e-8, floor.settings.tau, copy_every=2)
    floor.update(1)
    tau = 0.0 if kind == "frames" else 0.005
    for old, source, target in zip(before, floor.sources, floor.targets, strict=True):
        assert (source != old).any()
        torch.testing.assert_close(target, (1 - tau) * old + tau * source)
    if kind == "frames":
        floor.update(1)
        assert all(torch.equal(source, target) for source, target in zip(floor.sources, floor.targets, strict=True))


def test_flops_are_those_counted_by_hand(load, floor, kind):
    # outputs of a layer times the inputs of each
    trunk = [20 * 20 * 32 * 256, 9 * 9 * 64 * 512, 7 * 7 * 64 * 576] if kind == "frames" else []
    head = [3136 * 512, 512 * 6] if trunk else [17 * 256, 256 * 256, 256 * 6]
    evaluated = 3 * sum(trunk) + 5 * sum(head)  # next state: trunks of both networks, three heads
    backward = 2 * (sum(trunk) + 2 * sum(head)) - (trunk[0] if trunk else 2 * head[0])  # no gradient of the state
    assert load("rounds").count_flops(lambda: floor.update(1)) == BATCH * 2 * (evaluated + backward)


def test_command_measures_discrete_actions_alone(load, tmp_path):
    small = ["--batch-sizes", "--states", "--vectors", "8", "--frames", "2", "--rounds", "2", "--seconds", "0.01"]
    load("bench_peers").main([*small, "--threads", "1", "--only", "eager", "floor", "--out", f"{tmp_path}"])
    results = json.loads((tmp_path / "benchmark.json").read_text())
    assert results["training"] == results["acting"] == []
    assert [[one["size"] for one in results[kind]] for kind in ("vectors", "frames")] == [[8], [2]]
    for kind, shape in (("vectors", [8, 256, 256]), ("frames", [2, 3136, 512])):
        assert results[kind][0]["matmul"]["shape"] == shape
        assert list(results[kind][0]["summary"]) == ["eager", "floor"]
