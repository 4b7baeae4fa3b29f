from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Bounded, Composite, Unbounded

from torchrl_bcq.modules import Normalization, make_bcq_modules, make_cloning_modules

from ..conftest import ACTION_SPEC, OBSERVATION_SPEC


def sizes(net) -> list[int]:
    return [layer.in_features for layer in net if hasattr(layer, "in_features")] + [net[-1].out_features]


def test_author_sizes_are_the_default():
    vae, actor, critics = make_bcq_modules(Unbounded((11,)), Bounded(-1, 1, (3,)))
    assert sizes(vae.encoder) == [14, 750, 750, 12]  # two heads of 2 * action size
    assert sizes(vae.decoder) == [17, 750, 750, 3]
    assert sizes(actor.network) == [14, 400, 300, 3]
    assert [sizes(critic.module) for critic in critics.critics] == [[14, 400, 300, 1]] * 2
    assert (vae.latent_clip, vae.log_std_range, actor.phi) == (0.5, (-4.0, 15.0), 0.05)


def test_cloning_network_has_the_sizes_of_the_actor():
    (actor,) = make_cloning_modules(Unbounded((11,)), Bounded(-1, 1, (3,)))
    assert sizes(actor.network) == [11, 400, 300, 3]
    spec = Composite(camera=Composite(features=Unbounded((4,))), joints=Unbounded((3,)))
    (actor,) = make_cloning_modules(spec, ACTION_SPEC, hidden=(8,), action_key=("arm", "torque"))
    assert sizes(actor.network) == [7, 8, 2]
    assert {*actor.in_keys, *actor.out_keys} == {("camera", "features"), "joints", ("arm", "torque")}


def test_cloning_network_standardises_its_observations():
    statistics = torch.tensor([10.0, 20.0, 30.0]), torch.tensor([1.0, 2.0, 4.0])
    actors = []
    for normalization in (None, Normalization({"observation": statistics})):
        torch.manual_seed(1)
        actors += make_cloning_modules(OBSERVATION_SPEC, ACTION_SPEC, hidden=(8,), normalization=normalization)
    plain, scaled = actors
    torch.testing.assert_close(
        scaled(torch.tensor([[11.0, 16.0, 30.0]])), plain(torch.tensor([[1.0, -2.0, 0.0]])), rtol=0, atol=0
    )
    with pytest.raises(TypeError, match="normalization is a bool, expected the result of Normalization.fit"):
        make_cloning_modules(OBSERVATION_SPEC, ACTION_SPEC, normalization=True)


def test_several_observations_are_concatenated():
    spec = Composite(camera=Composite(features=Unbounded((4,))), joints=Unbounded((3,)))
    vae, actor, critics = make_bcq_modules(spec, ACTION_SPEC, hidden=(8,), vae_hidden=(8,))
    assert set(vae.observation_keys) == {("camera", "features"), "joints"}
    states = TensorDict({"camera": {"features": torch.randn(5, 4)}, "joints": torch.randn(5, 3)}, [5])
    value = critics(actor(vae.decode(states)))["state_action_value"]
    assert value.shape == (5, 2)
    states["joints"] = states["joints"] + 1
    assert (critics(states)["state_action_value"] != value).all()


def test_own_key_names_reach_everything():
    names = {"action_key": ("arm", "torque"), "value_key": "worth"}
    vae, actor, critics = make_bcq_modules(Composite(state=OBSERVATION_SPEC), ACTION_SPEC, **names)
    out = critics(actor(vae.decode(TensorDict({"state": torch.randn(5, 3)}, [5]))))
    assert set(out.keys(True, True)) == {"state", ("arm", "torque"), "worth"}
    out["arm", "torque"] = out["arm", "torque"] + 1
    assert (critics(out.clone())["worth"] != out["worth"]).all()


def test_settings_reach_the_networks():
    settings = {"kl_weight": 0.7, "latent_clip": 2.0, "latent_dim": 3, "phi": 0.2, "num_critics": 5}
    vae, actor, critics = make_bcq_modules(OBSERVATION_SPEC, ACTION_SPEC, **settings)
    assert (vae.kl_weight, vae.latent_clip, vae.latent_dim, actor.phi) == (0.7, 2.0, 3, 0.2)
    assert len(critics.critics) == 5


def test_noise_of_the_mixture_has_no_limit_by_default():
    free, limited = ({"behavior": "mixture", "noise_clip": clip} for clip in (None, 0.5))
    for settings, limit in ((free, math.inf), (limited, 0.5)):
        mixture, _, _ = make_bcq_modules(OBSERVATION_SPEC, ACTION_SPEC, **settings)
        assert mixture.noise_clip == limit


def test_dtype_and_device_reach_everything():
    double = Unbounded((3,), dtype=torch.float64)
    for build in (make_bcq_modules, make_cloning_modules):
        for module in build(double, ACTION_SPEC, hidden=(4,), dtype=torch.float64):
            assert {tensor.dtype for tensor in module.state_dict().values()} == {torch.float64}
        for module in build(OBSERVATION_SPEC, ACTION_SPEC, hidden=(4,), device="meta"):
            assert {tensor.device.type for tensor in module.state_dict().values()} == {"meta"}


def test_observations_that_are_not_vectors_are_refused():
    with pytest.raises(ValueError, match=r"frame 'pixels' has dtype torch.float32, expected torch.uint8"):
        make_bcq_modules(Composite(pixels=Unbounded((3, 8, 8))), ACTION_SPEC)
    with pytest.raises(ValueError, match="observation 'step_count' has shape .* and dtype torch.int64"):
        make_bcq_modules(Composite(step_count=Unbounded((1,), dtype=torch.int64)), ACTION_SPEC)
    with pytest.raises(ValueError, match="has dtype torch.float64, but the networks have dtype torch.float32: wrap"):
        make_bcq_modules(Unbounded((3,), dtype=torch.float64), ACTION_SPEC)


def test_float64_bounds_are_rounded_inwards():
    """The float32 number below 0.1 is 0.09999999404; the nearest one, 0.10000000149, is outside."""
    bounds = (torch.tensor([bound], dtype=torch.float64) for bound in (-0.1, 0.1))
    spec = Bounded(*bounds, (1,), dtype=torch.float64)
    (actor,) = make_cloning_modules(Unbounded((3,)), spec, hidden=(4,))
    vae, perturbation, _ = make_bcq_modules(Unbounded((3,)), spec, hidden=(4,), vae_hidden=(4,))
    for module in (actor, vae, perturbation):
        assert (module.low.tolist(), module.high.tolist()) == ([-0.09999999403953552], [0.09999999403953552])
    actor.network[-1].bias.data.fill_(100)
    assert actor.act([0.0, 0.0, 0.0]).astype("float64") == 0.09999999403953552
