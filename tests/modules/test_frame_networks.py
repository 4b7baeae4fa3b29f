"""The networks of BCQ and cloning read frames, alone or beside vectors; so do losses, trainer, metrics and policies."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.objectives import DDPGLoss, SoftUpdate

from torchrl_bcq import (
    BCQLoss,
    BCQPolicy,
    BCQTrainer,
    CloningLoss,
    History,
    Normalization,
    from_arrays,
    make_bcq_modules,
    make_cloning_modules,
    make_replay_buffer,
    stack_observations,
)
from torchrl_bcq.evaluation import DatasetMetrics

FRAMES, ACTION = Unbounded((2, 36, 40), dtype=torch.uint8), Bounded(-2, 2, (2,))
BOTH = Composite(observation=Unbounded((6,)), pixels=FRAMES)
SMALL = {"hidden": (8,), "vae_hidden": (8,)}


def states(number: int, spec=BOTH, *more: int) -> TensorDict:
    spec = spec if isinstance(spec, Composite) else Composite(observation=spec)
    entries = {
        key: torch.randint(256, (number, *more, *leaf.shape), dtype=torch.uint8)
        if leaf.dtype == torch.uint8
        else torch.randn(number, *more, *leaf.shape)
        for key, leaf in spec.items()
    }
    return TensorDict(entries, [number, *more])


def rows() -> TensorDict:
    """30 rows with vectors ``[3]`` and frames ``[36, 40]``."""
    rng = np.random.default_rng(0)
    return from_arrays(
        rng.normal(size=(30, 3)), rng.uniform(-2, 2, (30, 2)), rng.normal(size=30), np.arange(30) % 15 == 14,
        np.zeros(30), frames=rng.integers(0, 256, (30, 36, 40), dtype=np.uint8),
    )  # fmt: skip


def test_each_network_has_convolutions_of_its_own():
    vae, actor, critics = make_bcq_modules(FRAMES, ACTION)
    networks = [vae.encoder, vae.decoder, actor.network, *(critic.module for critic in critics.critics)]
    trunks = [[layer for layer in one.modules() if isinstance(layer, nn.Conv2d)] for one in networks]
    for network, others in zip(networks, ([2], [4], [2], [2], [2]), strict=True):
        # 64 features at 1 x 1 places, beside the action or the latent
        assert next(layer for layer in network.modules() if isinstance(layer, nn.Linear)).in_features == 64 + others[0]
    weights = [layer.weight.data_ptr() for layers in trunks for layer in layers]
    assert len(weights) == len(set(weights)) == 15
    assert [tuple(layer.weight.shape) for layer in trunks[0]] == [(32, 2, 8, 8), (64, 32, 4, 4), (64, 64, 3, 3)]


def test_vectors_are_scaled_and_frames_are_divided_by_255():
    mean, scale = torch.arange(6.0, dtype=torch.float64), torch.full((6,), 2.0, dtype=torch.float64)
    normalization = Normalization({"observation": (mean, scale)}, reward_scale=3.0)
    _, _, critics = make_bcq_modules(BOTH, ACTION, normalization=normalization)
    seen = states(4).set("action", torch.rand(4, 2))
    network = critics.critics[0].module
    x = seen["pixels"].float() / 255
    for layer in (layer for layer in network.trunk.modules() if isinstance(layer, nn.Conv2d)):
        x = layer(x).relu()
    x = torch.cat([(seen["observation"] - mean.float()) / 2, x.flatten(1), seen["action"] / 2], 1)
    for layer in list(network.mlp)[1:-1]:
        x = layer(x)
    torch.testing.assert_close(critics(seen)["state_action_value"][:, :1], 3 * x)


def test_the_channels_of_frames_are_scaled():
    data = stack_observations(rows(), 2)
    fitted = Normalization.fit(data, observation_keys=["observation", "pixels"])
    pixels = data["pixels"].numpy().astype(float)
    mean, scale = fitted.observations["pixels"]
    np.testing.assert_allclose(mean, pixels.mean((0, 2, 3)))
    np.testing.assert_allclose(scale, pixels.std((0, 2, 3)))
    (network,) = make_cloning_modules(BOTH, ACTION, hidden=(8,), normalization=fitted)
    (plain,) = make_cloning_modules(BOTH, ACTION, hidden=(8,), normalization=Normalization.identity(BOTH))
    (trunk,), (plain_trunk,) = ([m for m in one.modules() if hasattr(m, "num_vectors")] for one in (network, plain))
    plain_trunk.convolutions.load_state_dict(trunk.convolutions.state_dict())
    by_hand = (data["pixels"][:4].float() - mean.float().view(2, 1, 1)) / scale.float().view(2, 1, 1)
    features = trunk.convolutions[0](by_hand)
    torch.testing.assert_close(trunk(data["observation"][:4], data["pixels"][:4])[:, 6:], features)
    plain.load_state_dict(network.state_dict())  # the scaling is a part of the weights
    torch.testing.assert_close(plain_trunk(data["observation"][:4], data["pixels"][:4])[:, 6:], features)


def test_the_scaling_of_frames_is_that_of_rows_spread_evenly(monkeypatch):
    """The rows 0, 3, 6 and 9 of ten, in parts of three; bytes that do not vary are divided by 255."""
    monkeypatch.setattr("torchrl_bcq.modules.normalization.FRAME_ROWS", 4)
    monkeypatch.setattr("torchrl_bcq.modules.normalization.FRAME_CHUNK", 3)
    frames = torch.full((10, 2, 36, 36), 7, dtype=torch.uint8)
    frames[:, 0] = 100
    frames[[0, 3, 6, 9], 0] = torch.tensor([1, 2, 3, 6], dtype=torch.uint8).view(4, 1, 1)
    data = TensorDict({"observation": frames}, [10])
    mean, scale = Normalization.fit(data, scale_rewards=False).observations["observation"]
    assert mean.tolist() == [3, 7]
    np.testing.assert_allclose(scale, [3.5**0.5, 255])  # ((-2)^2 + (-1)^2 + 0 + 3^2) / 4
    with pytest.raises(ValueError, match="'observation' has 3 features, but the normalization was fitted on 2"):
        make_cloning_modules(
            Unbounded((3, 36, 36), dtype=torch.uint8),
            ACTION,
            normalization=Normalization({"observation": (mean, scale)}),
        )


def test_frames_of_candidates_are_processed_once():
    """The ten candidates of a state have the same frames, expanded; the result is that of ten copies."""
    _, _, critics = make_bcq_modules(FRAMES, ACTION, **SMALL)
    expanded = states(3, FRAMES).unsqueeze(-1).expand(3, 10).copy().set("action", torch.rand(3, 10, 2))
    seen = []
    first = next(layer for layer in critics.critics[0].modules() if isinstance(layer, nn.Conv2d))
    first.register_forward_hook(lambda layer, inputs, output: seen.append(len(output)))
    values = [critics.first(source.copy())["state_action_value"] for source in (expanded, expanded.clone())]
    torch.testing.assert_close(*values)
    assert seen == [3, 30]


@pytest.mark.parametrize("spec", [FRAMES, BOTH], ids=["frames", "both"])
def test_losses_learn_from_frames(spec):
    torch.manual_seed(0)
    following = {**states(5, spec), "reward": torch.ones(5, 1)}
    flags = {name: torch.zeros(5, 1, dtype=torch.bool) for name in ("done", "terminated")}
    batch = states(5, spec).update({"action": torch.rand(5, 2), "next": {**following, **flags}})
    losses = [
        BCQLoss(*make_bcq_modules(spec, ACTION, **SMALL)),
        CloningLoss(*make_cloning_modules(spec, ACTION, hidden=(8,))),
    ]
    SoftUpdate(losses[0], tau=0.1)
    for loss in losses:
        found = loss(batch)
        total = sum(value for key, value in found.items() if key.startswith("loss_"))
        total.backward()
        convolutions = [
            p.grad for name, p in loss.named_parameters() if p.ndim == 4 and p.requires_grad and "target" not in name
        ]
        assert len(convolutions) == (15 if isinstance(loss, BCQLoss) else 3)
        assert all(grad is not None and grad.isfinite().all() and grad.any() for grad in convolutions)


def test_train_measure_and_act_on_stacked_frames_beside_vectors():
    torch.manual_seed(0)
    data = stack_observations(rows(), 2)
    fitted = Normalization.fit(data, observation_keys=["observation", "pixels"])
    networks = make_bcq_modules(BOTH, ACTION, normalization=fitted, **SMALL)
    loss, policy = BCQLoss(*networks), BCQPolicy(*networks, num_action_samples=5)
    buffer = make_replay_buffer(data, batch_size=6, seed=0)
    trainer = BCQTrainer(loss, buffer, target_net_updater=SoftUpdate(loss, tau=0.1), total_steps=4, log_interval=2)
    metrics = DatasetMetrics(loss, policy, data, interval=2)
    metrics.register(trainer)
    trainer.train()
    assert all(np.isfinite(value) for value in metrics.measure().values())
    vectors, frames = History(2), History(2, dim=-3)
    for row in (0, 1):
        state = {
            "observation": vectors(rows()["observation"][row].numpy()),
            "pixels": frames(rows()["pixels"][row].numpy()),
        }
    assert state["pixels"].dtype == np.uint8
    action = policy.act(state)
    assert np.array_equal(state["pixels"], data["pixels"][1].numpy())
    np.testing.assert_allclose(action, policy.act(data[1:2])[0], rtol=1e-5)
    with pytest.raises(ValueError, match=r"'pixels' has shape \(1, 36, 40\), expected \[2, 36, 40\]"):
        policy.act({**state, "pixels": rows()["pixels"][0].numpy()})


def test_act_on_frames_alone():
    (actor,) = make_cloning_modules(FRAMES, ACTION, hidden=(8,))
    frames = states(3, FRAMES)["observation"].numpy()
    actions = actor.act(frames)
    assert actions.shape == (3, 2)
    np.testing.assert_allclose(actor.act(frames[0]), actions[0], rtol=1e-5)
    assert not np.allclose(actions[0], actions[1])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (Unbounded((3, 84, 84)), r"frame 'observation' has dtype torch.float32, expected torch.uint8"),
        (Unbounded((84, 84, 3), dtype=torch.uint8), r"a frame has shape \(84, 84, 3\), expected \[C, H, W\]"),
        (Unbounded((84, 84), dtype=torch.uint8), r"has shape \(84, 84\) and .* expected a float vector"),
        (Unbounded((8,), dtype=torch.uint8), r"has shape \(8,\) and dtype torch.uint8, expected a float vector"),
    ],
)  # fmt: skip
def test_other_observations_are_refused(spec, message):
    for make in (make_bcq_modules, make_cloning_modules):
        with pytest.raises(ValueError, match=message):
            make(spec, ACTION)


def test_history_of_frames():
    """Frames ``[B, C, H, W]`` of two environments; the second one starts a new episode."""
    frames = torch.arange(4 * 2 * 3 * 2 * 2, dtype=torch.uint8).reshape(4, 2, 3, 2, 2)
    history = History(3, dim=-3)
    assert torch.equal(history(frames[0]), frames[0].repeat(1, 3, 1, 1))
    assert torch.equal(history(frames[1]), torch.cat([frames[0], frames[0], frames[1]], 1))
    history.reset([False, True])
    state = history(frames[2])
    assert torch.equal(state[0], torch.cat([*frames[:3, 0]]))
    assert torch.equal(state[1], frames[2, 1].repeat(3, 1, 1))
    with pytest.raises(ValueError, match=r"has shape \(3, 2, 2\), but the one before has \(2, 3, 2, 2\); call reset"):
        history(frames[0, 0])
    with pytest.raises(ValueError, match=r"expected an array of numbers, \[C, H, W\] or \[B, C, H, W\]"):
        History(3, dim=-3)(np.zeros((2, 2), np.uint8))
    with pytest.raises(ValueError, match="dim is 1, expected -1 for vectors, or -3 for frames"):
        History(3, dim=1)


def test_actions_are_scaled_beside_frames_alone():
    """Actions of 100 and 200 times the size give the same losses and values, because the networks scale them."""
    data = from_arrays(
        np.random.default_rng(0).integers(0, 256, (8, 36, 40), dtype=np.uint8), np.linspace(-1, 1, 8)[:, None],
        np.arange(8.0), np.arange(8) == 7, np.zeros(8),
    )  # fmt: skip
    spec = Unbounded((1, 36, 40), dtype=torch.uint8)
    found = []
    for high in (100.0, 200.0):
        torch.manual_seed(0)
        vae, _, critics = make_bcq_modules(
            spec, Bounded(-high, high, (1,)), normalization=Normalization.fit(data, scale_rewards=False), **SMALL
        )
        batch = data.clone().set("action", high * data["action"])
        found.append((vae.training_loss(batch, torch.zeros(8, 2))[0], critics(batch)["state_action_value"]))
    torch.testing.assert_close(found[0], found[1])


def test_networks_of_frames_run_with_the_target_weights_of_torchrls_losses():
    """TorchRL's losses replace parameters by buffers in the targets."""
    (actor,) = make_cloning_modules(BOTH, ACTION, hidden=(8,))
    _, _, critics = make_bcq_modules(BOTH, ACTION, **SMALL, num_critics=1)
    loss = DDPGLoss(actor, critics, delay_actor=True, delay_value=True)
    loss.make_value_estimator(gamma=0.9)
    SoftUpdate(loss, tau=0.1)
    td, following = states(4), states(4)
    flags = {name: torch.zeros(4, 1, dtype=torch.bool) for name in ("done", "terminated")}
    td["next"] = following.update({"reward": torch.ones(4, 1), **flags})
    td["action"] = torch.zeros(4, 2)
    out = loss(td)
    assert out["loss_actor"].isfinite()
    assert out["loss_value"].isfinite()
